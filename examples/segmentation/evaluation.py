"""Scores of a trained network on images of their own size: one row an image, and what the rows come to.

* `per_image`: the score of each image, then mean and sample standard deviation over the images.
  `pooled`: one score of all pixels together.
* Foreground is any label against the rest. An image with an empty truth and an empty prediction scores 1; if only one
  of them is empty it scores 0, and its HD95 is the image's diagonal.
* A class that is neither in the truth nor in the prediction of an image is left out of that class's mean.
* Dice = 2 TP / (2 TP + FP + FN) is the F1 score of the pixels; both names are given because tables use both.

The truth is never resized: the probabilities are brought to the size of the image.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.checkpoints import Trained
from segmentation.data.ellipse import head_circumference
from segmentation.data.item import Item
from segmentation.inference import probabilities, to_classes_map
from segmentation.surface import surface_scores

Row = dict[str, Any]
Progress = Callable[[Sequence[Item]], Iterable[Item]]

OVERLAP = ("iou", "dice", "f1")
SURFACE = ("hd95", "surface_dice")


@dataclass(frozen=True)
class Evaluation:
    """Rows of the images that could be read, and {"id", "reason"} of those that could not."""

    rows: list[Row]
    unreadable: list[dict[str, str]]
    class_names: tuple[str, ...]

    def scores(self) -> dict[str, Any]:
        """All scores. HD95 and surface Dice have no mean (None) where some images are in mm and others in pixels."""
        if not self.rows:
            reason = f": {self.unreadable[0]['reason']}" if self.unreadable else ""
            raise ValueError(f"none of {len(self.unreadable)} images could be read{reason}")
        per_image = {name: _summary(self._column(name)) for name in OVERLAP + SURFACE}
        units = set(self._column("unit"))
        if len(units) > 1:
            per_image |= {name: _summary([]) for name in SURFACE}
        scores: dict[str, Any] = {
            "images": len(self.rows),
            "unreadable": len(self.unreadable),
            "unit": units.pop() if len(units) == 1 else "mixed",
            "per_image": per_image,
            "pooled": self._pooled(),
        }
        if len(self.class_names) > 1:
            classes = {name: self._class_scores(name) for name in self.class_names}
            means = [part["per_image"]["dice"] for part in classes.values() if part["per_image"]["dice"] is not None]
            scores |= {"classes": classes, "mean_of_classes": {"dice": _summary(means)["mean"]}}
        if "hc_mm" in self.rows[0]:
            scores["circumference"] = self._circumference()
        return scores

    def _column(self, name: str) -> list[Any]:
        """The values of a column, without those that are not there."""
        return [row[name] for row in self.rows if row[name] is not None]

    def _pooled(self, suffix: str = "", empty: float | None = 1.0) -> dict[str, float | None]:
        return overlap(*(sum(self._column(f"{name}{suffix}")) for name in ("tp", "fp", "fn")), empty)

    def _class_scores(self, name: str) -> dict[str, dict[str, float | None]]:
        pooled = self._pooled(f"_{name}", empty=None)
        return {
            "per_image": {score: _summary(self._column(f"{score}_{name}"))["mean"] for score in ("iou", "dice")},
            "pooled": {score: pooled[score] for score in ("iou", "dice")},
        }

    def _circumference(self) -> dict[str, float | int | None]:
        errors = self._column("hc_error_mm")
        summary = _summary(errors)
        return {
            "mean_absolute_error_mm": _summary([abs(error) for error in errors])["mean"],
            "mean_error_mm": summary["mean"],
            "sd_error_mm": summary["sd"],
            "images": len(errors),
            "no_ellipse": sum(
                row["unit"] == "mm" and row["hc_true_mm"] is not None and row["hc_mm"] is None for row in self.rows
            ),
        }


def evaluate(
    trained: Trained,
    items: Sequence[Item],
    *,
    window: bool = False,
    flips: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores of `items`; `progress` wraps them while they are worked through, e.g. `rich.progress.track`."""
    rows, unreadable = [], []
    for item in (progress or iter)(items):
        try:
            image, truth = item.read()
        except (OSError, RuntimeError, ValueError) as error:
            unreadable.append({"id": item.id, "reason": str(error)})
            continue
        found = probabilities(trained.network, trained.task, image, trained.image_size, window=window, flips=flips)
        rows.append(_row(trained, item, to_classes_map(found), truth))
    return Evaluation(rows, unreadable, trained.task.class_names)


def overlap(tp: int, fp: int, fn: int, empty: float | None = 1.0) -> dict[str, float | None]:
    """IoU, Dice and F1 of pixel counts; `empty` where there is neither truth nor prediction."""
    wrong = fp + fn
    if tp + wrong == 0:
        return dict.fromkeys(OVERLAP, empty)
    dice = 2 * tp / (2 * tp + wrong)
    return {"iou": tp / (tp + wrong), "dice": dice, "f1": dice}


def count(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, int]:
    """TP, FP and FN of two masks (h w): whole numbers, exact for images of any size."""
    both = np.count_nonzero(prediction & truth)
    return {"tp": both, "fp": np.count_nonzero(prediction) - both, "fn": np.count_nonzero(truth) - both}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows with equal columns as a CSV file; what is not known stays empty."""
    with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place once it is written, so that an interrupt never leaves half a file."""
    draft = path.with_name(f".part-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _row(trained: Trained, item: Item, prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Row:
    counts = count(prediction > 0, truth > 0)
    row: Row = {
        "id": item.id,
        "group": item.group,
        **overlap(**counts),
        **surface_scores(prediction > 0, truth > 0, item.pixel_size),
        "unit": "px" if item.pixel_size is None else "mm",
        **counts,
    }
    if len(trained.task.labels) > 1:
        for number, name in enumerate(trained.task.class_names, start=1):
            counts = count(prediction == number, truth == number)
            scores = overlap(**counts, empty=None)
            row |= {f"{score}_{name}": scores[score] for score in ("dice", "iou")}
            row |= {f"{key}_{name}": value for key, value in counts.items()}
    if trained.task.name == "fetal_head":
        known = item.pixel_size is not None
        found, true = head_circumference(prediction == 1, item.pixel_size) if known else None, item.circumference
        error = None if found is None or true is None else found - true
        row |= {"hc_mm": found, "hc_true_mm": true, "hc_error_mm": error}
    return row


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation."""
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }
