"""The files a finished run leaves behind: metrics.json, curves.png, panel.png."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

import kan_mamba_layers
from segmentation.data.module import ImageSet, SegmentationData
from segmentation.data.split import SIDES, split_hash
from segmentation.metrics import predicted_classes
from segmentation.module import Segmentation
from segmentation.tasks import Task

COLOURS = ("#00c2a8", "#ffb000", "#fe6100", "#dc267f", "#785ef0")
PACKAGES = ("torch", "lightning", "monai", "numpy")

Shown = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8]]  # image (h w 3), truth (h w), prediction (h w)


def collect_facts(
    settings: dict[str, Any],
    command: str,
    device: torch.device,
    module: Segmentation,
    data: SegmentationData,
    rows: Sequence[dict[str, float]],
) -> dict[str, Any]:
    """What metrics.json tells of a run: what was trained on what, for how long, and the scores of the best epoch."""
    folder = settings["data_dir"]
    sides = {side: [item for item in data.items if item.split == side] for side in SIDES}
    return {
        **{name: settings[name] for name in ("task", "model", "model_args", "image_size", "seed")},
        "parameters": count_parameters(module.network),
        "data": "demo" if folder is None else Path(folder).resolve().name,
        "images": {side: len(items) for side, items in sides.items()},
        "subjects": {side: len({item.group for item in items}) for side, items in sides.items()},
        "split_sha256": split_hash(data.split),
        "epochs": len(rows),
        "steps": module.global_step,
        "best_epoch": max(rows, key=lambda row: row["val/dice"])["epoch"],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "metrics": module.scores,
        "command": command,
        "device": _device_name(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write_run(
    out: Path, task: Task, network: nn.Module, images: ImageSet, rows: Sequence[dict[str, float]], facts: dict[str, Any]
) -> None:
    """Everything: metrics.json, curves.png, panel.png, and the network itself in `model/` if it is one of ours."""
    write_metrics(out / "metrics.json", facts)
    draw_curves(out / "curves.png", rows)
    draw_panel(out / "panel.png", task, predict(network, images, number=4))
    if hasattr(network, "save_pretrained"):
        network.save_pretrained(out / "model")


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def results_table(runs: Sequence[dict[str, Any]]) -> Table:
    """task | model | IoU | Dice | F1: validation, mean per image."""
    table = Table("task", "model", title="validation, mean per image")
    for score in ("IoU", "Dice", "F1"):
        table.add_column(score, justify="right")
    for run in runs:
        scores = run["metrics"]["per_image"]
        table.add_row(run["task"], run["model"], *(f"{scores[name]:.3f}" for name in ("iou", "dice", "f1")))
    return table


def write_metrics(path: Path, facts: dict[str, Any]) -> None:
    """The facts and scores of a run with the versions that made them, as JSON."""
    versions = {"python": platform.python_version(), "kan_mamba_layers": kan_mamba_layers.__version__}
    versions |= {name: version(name) for name in PACKAGES}
    path.write_text(json.dumps({**facts, "versions": versions, "commit": _commit()}, indent=2) + "\n", encoding="utf-8")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """The commit of the checkout that holds this file, or None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def predict(network: nn.Module, images: ImageSet, number: int) -> list[Shown]:
    """Image, truth and prediction of `number` items spread evenly over a validation set."""
    network.eval()
    device = next(network.parameters()).device
    shown = []
    for index in np.linspace(0, len(images) - 1, min(number, len(images))).round().astype(int):
        with torch.no_grad():
            logits = network(images[int(index)]["image"][None].to(device))
        picture = images.images[index].float().expand(3, -1, -1).permute(1, 2, 0).numpy()  # h w 3
        shown.append((picture, images.masks[index, 0].numpy(), predicted_classes(logits)[0, 0].cpu().numpy()))
    return shown


def draw_panel(path: Path, task: Task, shown: Sequence[Shown]) -> None:
    """One row per item: the image, the truth and the prediction as contours with a tint."""
    figure, rows = _grid(len(shown))
    for axes, item in zip(rows, shown, strict=True):
        draw_row(axes, item)
    title_row(rows[0])
    handles = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, task.class_names, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)


def draw_overview(path: Path, rows: Sequence[tuple[str, Shown]]) -> None:
    """One labelled row per task, for the README."""
    figure, grid = _grid(len(rows))
    for axes, (label, item) in zip(grid, rows, strict=True):
        draw_row(axes, item)
        axes[0].set_ylabel(label)
    title_row(grid[0])
    figure.savefig(path, dpi=110)


def _grid(rows: int) -> tuple[Figure, NDArray[np.object_]]:
    figure = Figure(figsize=(6.9, 2.3 * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, 3, squeeze=False)


def title_row(axes: Sequence[Axes]) -> None:
    """Titles above the three columns."""
    for axis, title in zip(axes, ("image", "truth", "prediction"), strict=True):
        axis.set_title(title)


def draw_row(axes: Sequence[Axes], item: Shown) -> None:
    """Image, truth and prediction on three axes."""
    picture, truth, prediction = item
    for axis, classes in zip(axes, (None, truth, prediction), strict=True):
        axis.imshow(picture, interpolation="bilinear")
        axis.set(xticks=[], yticks=[])
        if classes is None:
            continue
        tint = np.ma.masked_equal(classes, 0)
        axis.imshow(tint, cmap=ListedColormap(COLOURS), vmin=1, vmax=len(COLOURS), alpha=0.25, interpolation="nearest")
        for value in np.unique(tint.compressed()):
            axis.contour(classes == value, levels=[0.5], colors=[COLOURS[value - 1]], linewidths=1.4)


def draw_curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Loss and mean IoU per epoch, training and validation."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axis, name in zip(figure.subplots(1, 2), ("loss", "iou"), strict=True):
        for side, label in (("train", "training"), ("val", "validation")):
            axis.plot(epochs, [row[f"{side}/{name}"] for row in rows], marker=".", label=label)
        axis.set(xlabel="epoch", title={"loss": "loss (Dice + cross-entropy)", "iou": "IoU (mean per image)"}[name])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
