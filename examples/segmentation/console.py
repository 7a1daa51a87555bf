"""What the commands print: remarks and tables of scores."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from segmentation.scores import TOLERANCE

TITLES = {"iou": "IoU", "dice": "Dice", "f1": "F1", "sensitivity": "sensitivity", "specificity": "specificity"}
TITLES |= {"hd95": "HD95", "surface_dice": "surface Dice"}

# Paths and names are printed as they are, brackets and colons included.
console = Console(markup=False, emoji=False, highlight=False, quiet=rank_zero_only.rank != 0)

# Remarks of Lightning that say nothing new here: images are in memory, and repeated images are counted once.
REMARKS = (
    "does not have many workers",
    "Checkpoint directory .* is not empty",
    "Using `DistributedSampler` with the dataloaders",
    "LeafSpec",
)


def quieten() -> None:
    """Leave out Lightning's remarks on its set-up; warnings about the run itself stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in REMARKS:
        warnings.filterwarnings("ignore", f".*{remark}")
    warnings.showwarning = lambda message, *_, **__: say(str(message), "yellow")  # without its place in the code


def say(text: str, style: str | None = None) -> None:
    """Print a line as it is, of whatever length."""
    console.print(text, style=style, soft_wrap=True)


def scores_table(title: str, scores: Mapping[str, Any]) -> Table:
    """score | mean per image (sd) | pooled over pixels."""
    table = Table("", title=title)
    for column in ("mean per image (sd)", "pooled over pixels"):
        table.add_column(column, justify="right")
    unit = scores.get("unit", "px")
    units = {"hd95": f" ({unit})", "surface_dice": f" ({TOLERANCE:g} {unit})"}
    for name, summary in scores["per_image"].items():
        label, digits = TITLES[name] + units.get(name, ""), 2 if name == "hd95" else 3
        table.add_row(label, _mean_sd(summary, digits), _number(scores["pooled"].get(name), 3))
    for name, part in scores.get("classes", {}).items():
        table.add_row(f"{name} Dice", *(_number(part[way]["dice"], 3) for way in ("per_image", "pooled")))
    if "mean_of_classes" in scores:
        table.add_row("mean Dice of the classes", _number(scores["mean_of_classes"]["dice"], 3), "")
    if "per_subject" in scores:
        table.add_row("Dice of a subject's images together", _mean_sd(scores["per_subject"]["dice"], 3), "")
    table.caption = f"{scores['empty']['predictions']} images in which nothing was found"
    errors = scores.get("circumference", {"images": 0})
    if errors["images"]:
        signed = {"mean": errors["mean_error_mm"], "sd": errors["sd_error_mm"]}
        absolute = " / ".join(_number(errors[f"{kind}_absolute_error_mm"], 2) for kind in ("mean", "median"))
        table.add_row("head circumference, absolute error, mean / median (mm)", absolute, "")
        table.add_row("head circumference, error (mm)", _mean_sd(signed, 2), "")
        table.caption += f"; circumference of {errors['images']} heads; {errors['no_ellipse']} without an ellipse"
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean_sd(summary: Mapping[str, float | None], digits: int) -> str:
    sd = _number(summary["sd"], digits)
    return _number(summary["mean"], digits) + (f" ({sd})" if sd else "")
