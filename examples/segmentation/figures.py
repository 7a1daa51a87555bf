"""The pictures of an experiment: curves of all variants, some cases of one, and Dice against cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from segmentation.checkpoints import Trained
from segmentation.data.item import Item, Pixels
from segmentation.experiment import Finished
from segmentation.inference import probabilities, to_classes_map
from segmentation.report import COLOURS, Shown, draw_row, title_row
from segmentation.tasks import Task

LONGEST = 512  # pixels of a picture's longer side
LINES = colormaps["tab10"].colors + colormaps["Dark2"].colors


def draw_curves(path: Path, finished: dict[str, list[Finished]]) -> None:
    """Loss and IoU per epoch: a line per variant (mean over seeds) in a band from the least to the greatest seed."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for axes, score, title in zip(grid, ("loss", "iou"), ("loss (Dice + cross-entropy)", "IoU"), strict=True):
        for axis, side, where in zip(axes, ("train", "val"), ("training", "validation"), strict=True):
            for colour, (name, group) in zip(cycle(LINES), finished.items(), strict=False):
                epochs, values = curve([run.history for run in group], f"{side}/{score}")
                axis.plot(
                    epochs, values.mean(axis=0), color=colour, label=name, marker="." if len(epochs) < 3 else None
                )
                axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            axis.set_title(f"{title}, {where}")
            axis.grid(alpha=0.3)
    for axis in grid[1]:
        axis.set_xlabel("epoch")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def curve(histories: Sequence[Sequence[dict[str, float]]], name: str) -> tuple[NDArray, NDArray]:
    """Epochs (e) that all seeds reached, and the values (seeds e) of one column."""
    length = min(len(rows) for rows in histories)
    values = np.array([[row[name] for row in rows[:length]] for rows in histories])
    return np.arange(1, length + 1), values


def draw_cases(path: Path, trained: Trained, cases: Sequence[tuple[str, Item]], *, flips: bool) -> None:
    """One row per labelled case: the image, the truth and the prediction as contours with a tint."""
    figure = Figure(figsize=(8.4, 2.6 * len(cases) + 0.5), layout="constrained")
    grid = figure.subplots(len(cases), 3, squeeze=False)
    for axes, (label, item) in zip(grid, cases, strict=True):
        draw_row(axes, show(trained, item, flips=flips))
        axes[0].set_ylabel(label, parse_math=False)
    title_row(grid[0])
    _legend(figure, trained.task)
    figure.savefig(path, dpi=110)


def show(trained: Trained, item: Item, *, flips: bool) -> Shown:
    """Image, truth and prediction of an item in its own proportions, at most `LONGEST` pixels long."""
    image, truth = item.read()
    found = probabilities(trained.network, trained.task, image, trained.image_size, flips=flips)
    prediction = to_classes_map(found)
    h, w = truth.shape
    scale = min(1.0, LONGEST / max(h, w))
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    classes = (np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in (truth, prediction))
    return picture(image, size), *classes


def picture(image: Pixels, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Three bytes a pixel (h w 3) of an image (h w c) of any depth; deeper ones from their least to greatest value."""
    values = image.astype(np.float32)
    if image.dtype != np.uint8:
        values -= values.min()
        values *= 255 / (values.max() or 1)
    shades = Image.fromarray(values.astype(np.uint8).repeat(3 // image.shape[2], axis=2))
    return np.asarray(shades.resize(size, Image.Resampling.BILINEAR))


def draw_cost(path: Path, variants: dict[str, dict[str, Any]]) -> None:
    """Dice of every variant against its parameters and against its time per epoch; bars: deviation over seeds."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axis, label, of in (
        (grid[0], "parameters (millions)", lambda cost: cost["parameters"] / 1e6),
        (grid[1], "seconds per epoch", lambda cost: cost["seconds_per_epoch"]),
    ):
        for number, (name, variant) in enumerate(variants.items()):
            dice = variant["per_image"]["dice"]
            marker, colour = "os^Dv"[number // 10 % 5], LINES[number % 10]
            place = {"fmt": marker, "color": colour, "capsize": 3, "label": name}
            axis.errorbar(of(variant["cost"]), dice["mean"], yerr=dice["sd_seeds"] or 0.0, **place)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    grid[0].set_ylabel("Dice (mean per image)")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def _legend(figure: Figure, task: Task) -> None:
    handles = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, task.class_names, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
