"""What the commands print: remarks and tables."""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from segmentation.scores import DIGITS, plus_minus, titles

# Paths and names are printed as they are, brackets and colons included.
console = Console(markup=False, emoji=False, highlight=False, quiet=rank_zero_only.rank != 0)

# Remarks of Lightning that say nothing new here: images are in memory, and repeated images are counted once.
REMARKS = (
    "does not have many workers",
    "Checkpoint directory .* is not empty",
    "Using `DistributedSampler` with the dataloaders",
    "LeafSpec",
)

# What the user can mend.
MISTAKES = (ArgumentError, ImportError, MisconfigurationException, OSError, ValueError)


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


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End with exit status 2 and one line, without a traceback, where something is wrong that the user can mend."""
    try:
        yield
    except MISTAKES as error:
        is_long = isinstance(error, ArgumentError)
        sys.stderr.write(f"error: {' '.join(str(error).split()) if is_long else error}\n")
        raise SystemExit(2) from None


@contextmanager
def told_of_interrupts(trainer: lightning.Trainer, sentence: str) -> Iterator[None]:
    """After Ctrl-C end with exit status 130 and a sentence; Lightning alone ends with 1 and without a word."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        say(f"\nInterrupted. {sentence}")
        raise SystemExit(130) from None


def scores_table(title: str, scores: Mapping[str, Any]) -> Table:
    """score | mean per image ± sd | pooled over pixels."""
    table = Table("", title=title)
    for column in ("mean per image ± sd", "pooled over pixels"):
        table.add_column(column, justify="right")
    for name, label in titles(scores.get("unit", "px")).items():
        if name in scores["per_image"]:
            pooled = plus_minus(scores["pooled"][name]) if name in scores["pooled"] else ""
            table.add_row(label, plus_minus(**scores["per_image"][name], digits=DIGITS.get(name, 3)), pooled)
    for name, part in scores.get("classes", {}).items():
        table.add_row(f"{name} Dice", *(plus_minus(part[way]["dice"]) for way in ("per_image", "pooled")))
    if "mean_of_classes" in scores:
        table.add_row("mean Dice of the classes", plus_minus(scores["mean_of_classes"]["dice"]))
    if "per_subject" in scores:
        table.add_row("Dice of a subject's images together", plus_minus(**scores["per_subject"]["dice"]))
    table.caption = f"{scores['empty']['predictions']} images in which nothing was found"
    errors = scores.get("circumference", {"images": 0})
    if errors["images"]:
        absolute = " / ".join(f"{errors[f'{kind}_absolute_error_mm']:.2f}" for kind in ("mean", "median"))
        table.add_row("head circumference, absolute error, mean / median (mm)", absolute)
        signed = plus_minus(errors["mean_error_mm"], errors["sd_error_mm"], digits=2)
        table.add_row("head circumference, error (mm)", signed)
        table.caption += f"; circumference of {errors['images']} heads; {errors['no_ellipse']} without an ellipse"
    return table
