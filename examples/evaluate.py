"""Score a trained network on the images that its training never touched, or on other ones.

    python examples/evaluate.py --run runs/isic
    python examples/evaluate.py --run runs/isic --data-dir OTHER --flips

Writes scores.json and images.csv (one row an image) into --out and prints a table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from segmentation.checkpoints import find_run, load_run, read_settings
from segmentation.data import split as splits
from segmentation.data.demo import demo_items
from segmentation.data.formats import find_items
from segmentation.data.item import Item, Pixels
from segmentation.evaluation import Evaluation, evaluate, whole_file, write_csv
from segmentation.surface import TOLERANCE

TITLES = {"iou": "IoU", "dice": "Dice", "f1": "F1", "hd95": "HD95", "surface_dice": "surface Dice"}

console = Console()
remarks = Console(stderr=True)  # what must not get into the output of --json


def build_parser() -> ArgumentParser:
    """All flags."""
    parser = ArgumentParser(prog="evaluate.py", description="Score a trained network image by image.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of train.py, or one of its .ckpt files")
    add("--data-dir", type=Path | None, help="folder of images and masks (default: that of the run)")
    add("--split", type=Path | None, help="split.json to follow (default: that of the run, on the run's own data)")
    add(
        "--side",
        type=Literal["test", "val", "train", "all"] | None,
        help="which images (default: test; all of another --data-dir without --split)",
    )
    add("--window", action="store_true", help="windows of the image at its own resolution, not the squashed image")
    add("--flips", action="store_true", help="average over the flips of the task's augmentation")
    add("--out", type=Path | None, help="folder for the results (default: RUN/evaluation-SIDE)")
    add("--json", action="store_true", help="print scores.json instead of a table")
    return parser


def follow(items: Sequence[Item], split: Path) -> list[Item]:
    """The items that a split lists, on its sides; reading one that changed since is refused."""
    table = splits.read_split(split)
    return [
        replace(item, read=partial(read_unchanged, item, table[item.id]["sha256"]))
        for item in splits.follow_split(items, table)
    ]


def read_unchanged(item: Item, digest: str) -> tuple[Pixels, NDArray[np.uint8]]:
    """Image and mask of an item, refused where they are not those that a split was made with."""
    pair = item.read()
    if splits.file_hash(item) != digest:
        raise ValueError(f"image or mask of {item.id!r} changed since the split was written")
    return pair


def refuse_seen(items: Sequence[Item], own_split: Path) -> None:
    """Refuse items that the run was trained on or chosen by; where only their ids are those of such items, say so."""
    table = {name: row for name, row in splits.read_split(own_split).items() if row["split"] != "test"}
    seen = {row["sha256"] for row in table.values()}
    readable = [item for item in items if all(path.is_file() for path in item.files)]
    if known := [item.id for item in readable if splits.file_hash(item) in seen]:
        raise ValueError(
            f"{len(known)} of {len(items)} images, such as {known[0]!r}, are among those that the run was trained or "
            f"validated on: add --split {own_split} to score those that it has not seen"
        )
    if alike := [item.id for item in items if item.id in table]:
        remarks.print(
            f"[yellow]{len(alike)} of {len(items)} images, such as {escape(repr(alike[0]))}, are called as images that "
            "the run was trained or validated on: if they show the same subjects, these scores are too good",
            soft_wrap=True,
        )


def results_table(scores: dict[str, Any]) -> Table:
    """metric | mean per image (sd) | pooled over pixels."""
    heading = f"{scores['model']}, {scores['images']} images of {scores['data']}, side {scores['side']}"
    table = Table("", title=heading)
    for column in ("mean per image (sd)", "pooled over pixels"):
        table.add_column(column, justify="right")
    unit = scores["unit"]
    for name, summary in scores["per_image"].items():
        label = TITLES[name] + {"hd95": f" ({unit})", "surface_dice": f" ({TOLERANCE:g} {unit})"}.get(name, "")
        digits = 2 if name == "hd95" else 3
        table.add_row(label, _mean_sd(summary, digits), _number(scores["pooled"].get(name), 3))
    for name, part in scores.get("classes", {}).items():
        for score in ("iou", "dice"):
            values = (_number(part[way][score], 3) for way in ("per_image", "pooled"))
            table.add_row(f"{name} {TITLES[score]}", *values)
    if "mean_of_classes" in scores:
        table.add_row("mean Dice of the classes", _number(scores["mean_of_classes"]["dice"], 3), "")
    if "circumference" in scores and scores["circumference"]["images"]:
        errors = scores["circumference"]
        signed = {"mean": errors["mean_error_mm"], "sd": errors["sd_error_mm"]}
        table.add_row("head circumference, absolute error (mm)", _number(errors["mean_absolute_error_mm"], 2), "")
        table.add_row("head circumference, error (mm)", _mean_sd(signed, 2), "")
        table.caption = f"circumference of {errors['images']} heads; {errors['no_ellipse']} without an ellipse"
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean_sd(summary: dict[str, float | None], digits: int) -> str:
    sd = _number(summary["sd"], digits)
    return _number(summary["mean"], digits) + (f" ({sd})" if sd else "")


def write_results(out: Path, evaluation: Evaluation, scores: dict[str, Any]) -> None:
    """scores.json and images.csv."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "images.csv", evaluation.rows)
    with whole_file(out / "scores.json") as draft:
        draft.write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def show(scores: dict[str, Any], out: Path) -> None:
    """The table, and by name every image that could not be read."""
    console.print(results_table(scores))
    for image in scores["unreadable_images"]:
        console.print(f"[yellow]left out: {escape(image['id'])}: {escape(image['reason'])}", soft_wrap=True)
    console.print(f"scores and one row an image are in {escape(str(out))}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score a run, write the results and return what scores.json holds."""
    settings = build_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    folder, checkpoint = find_run(settings.run)
    trained = load_run(settings.run)
    trained.network.to("cuda" if torch.cuda.is_available() else "cpu")

    own_data, own_split = read_settings(folder)["data_dir"], folder / "split.json"
    own_data = None if own_data is None else Path(own_data)
    data_dir, split, side = settings.data_dir or own_data, settings.split, settings.side
    items = demo_items(trained.task, trained.image_size) if data_dir is None else find_items(trained.task, data_dir)
    if split is None and (data_dir is None or (own_data is not None and data_dir.resolve() == own_data.resolve())):
        split = own_split
    if split is None:
        refuse_seen(items, own_split)
        side = side or "all"
    else:
        items = follow(items, split)
        side = side or "test"
    items = [item for item in items if side in ("all", item.split)]
    if not items:
        raise ValueError(f"side {side!r} holds no image: choose another --side, or give a --split that has one")

    progress = partial(track, description="evaluating", console=remarks, disable=not remarks.is_terminal)
    evaluation = evaluate(trained, items, window=settings.window, flips=settings.flips, progress=progress)
    options = [name for name in ("window", "flips") if settings[name]]
    scores = {
        **{"task": trained.task.name, "model": trained.name, "image_size": trained.image_size},
        **{"run": folder.resolve().name, "checkpoint": checkpoint.name},
        **{"data": "demo" if data_dir is None else data_dir.resolve().name, "side": side, "options": options},
        "split_sha256": None if split is None else splits.split_hash(splits.read_split(split)),
        **evaluation.scores(),
        "unreadable_images": evaluation.unreadable,
    }
    out = settings.out
    if out is None:
        other = [scores["data"]] if settings.data_dir else []
        epoch = [checkpoint.stem] if checkpoint.stem != "best" else []
        out = folder / "-".join(["evaluation", *other, side, *epoch, *options])
    write_results(out, evaluation, scores)
    if settings.json:
        console.print_json(data=scores)
    else:
        show(scores, out)
    return scores


if __name__ == "__main__":
    main()
