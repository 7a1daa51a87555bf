"""Every score of a predicted mask: of one image as a row, and what the rows of many images come to.

* `per_image`: the score of each image, then mean and sample standard deviation over the images.
  `pooled`: one score of all pixels together.
* Foreground is any label against the rest. An image with an empty truth and an empty prediction scores 1; if only one
  of them is empty it scores 0, and its HD95 is the image's diagonal.
* A class that is neither in the truth nor in the prediction of an image is left out of that class's mean.
* Dice = 2 TP / (2 TP + FP + FN) is the F1 score of the pixels; both names are given because tables use both.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from segmentation.data.ellipse import head_circumference
from segmentation.data.item import Item
from segmentation.tasks import Task

Row = dict[str, Any]

OVERLAP = ("iou", "dice", "f1")
RATES = ("sensitivity", "specificity")
COUNTS = ("tp", "fp", "fn", "tn")
SURFACE = ("hd95", "surface_dice")
# Distance that surface Dice forgives, in mm, or in pixels where their size is unknown: each of the two outlines is
# known to one pixel, so two pixels apart is no disagreement yet. One number for all, with pixels of about 1 mm in mind.
TOLERANCE = 2.0
DIGITS = {"hd95": 1}  # in tables; of all others three


def predicted_classes(logits: Tensor) -> Tensor:
    """Class numbers (b 1 h w) of logits (b c h w): one channel is a sigmoid, several are a softmax."""
    return (logits > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1, keepdim=True)


def confusion_counts(prediction: Tensor, truth: Tensor, num_labels: int) -> Tensor:
    """TP, FP, FN, TN (b 1+num_labels 4) of class numbers (b 1 h w): foreground first, then every class by itself.

    They are whole numbers, exact for images of any size.
    """

    numbers = range(1, 1 + num_labels)
    p, t = (torch.cat([x > 0, *(x == k for k in numbers)], dim=1) for x in (prediction, truth))  # b 1+num_labels h w
    return torch.stack([pixels.sum((2, 3)) for pixels in (p & t, p & ~t, ~p & t, ~p & ~t)], dim=-1)


def overlap(tp: int, fp: int, fn: int, empty: float | None = 1.0) -> dict[str, float | None]:
    """IoU, Dice and F1 of pixel counts; `empty` where there is neither truth nor prediction."""
    if tp + fp + fn == 0:
        return dict.fromkeys(OVERLAP, empty)
    dice = 2 * tp / (2 * tp + fp + fn)
    return {"iou": tp / (tp + fp + fn), "dice": dice, "f1": dice}


def rates(tp: int, fp: int, fn: int, tn: int) -> dict[str, float | None]:
    """Sensitivity and specificity of pixel counts; None where nothing, or everything, is foreground."""
    return {"sensitivity": tp / (tp + fn) if tp + fn else None, "specificity": tn / (tn + fp) if tn + fp else None}


def surface_scores(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], pixel_size: tuple[float, float] | None
) -> dict[str, float]:
    """HD95 and surface Dice of two masks (h w), in millimetres where the size of a pixel is known.

    HD95 is the larger of two 95th percentiles: of the distances from each outline to the other. Both take an outline
    as its pixels, each of which counts once: where pixels are not square, a long side of a pixel counts no more than a
    short one.
    """
    spacing = pixel_size or (1.0, 1.0)
    if not (prediction.any() and truth.any()):
        if prediction.any() or truth.any():
            return {"hd95": math.hypot(*(np.array(truth.shape) * spacing)), "surface_dice": 0.0}
        return {"hd95": 0.0, "surface_dice": 1.0}
    masks = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))  # 1 1 h w
    options = dict(zip(("y_pred", "y"), masks, strict=True), include_background=True, spacing=spacing)
    with warnings.catch_warnings():  # MONAI 1.6 calls a function of its own in a way that it deprecates
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        hd95 = compute_hausdorff_distance(**options, percentile=95)
        surface_dice = compute_surface_dice(**options, class_thresholds=[TOLERANCE])
    return {"hd95": hd95.item(), "surface_dice": surface_dice.item()}


def common_unit(images: pd.DataFrame) -> str:
    """The unit of the distances of all images; "mixed" where some are in millimetres and some in pixels."""
    return str(images["unit"].iloc[0]) if images["unit"].nunique() == 1 else "mixed"


def overlap_row(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Row:
    """Counts (1+classes 4) and overlap of one image: of the foreground, and of the classes where there are several."""
    row: Row = {**overlap(*counts[0][:3]), **rates(*counts[0]), **dict(zip(COUNTS, counts[0], strict=True))}
    if len(class_names) > 1:
        for name, (tp, fp, fn, _) in zip(class_names, counts[1:], strict=True):
            scores = overlap(tp, fp, fn, empty=None)
            found = {"dice": scores["dice"], "iou": scores["iou"], "tp": tp, "fp": fp, "fn": fn}
            row |= {f"{key}_{name}": value for key, value in found.items()}
    return row


def score_image(task: Task, item: Item, prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Row:
    """All scores of one image from class numbers (h w) at its own size; None where something is not known."""
    pair = (torch.from_numpy(classes)[None, None] for classes in (prediction, truth))  # 1 1 h w
    counts = confusion_counts(*pair, len(task.labels))[0].tolist()
    row: Row = {"id": item.id, "group": item.group, "unit": "mm" if item.pixel_size else "px"}
    row |= overlap_row(counts, task.class_names) | surface_scores(prediction > 0, truth > 0, item.pixel_size)
    if task.name == "fetal_head":
        found = head_circumference(prediction == 1, item.pixel_size) if item.pixel_size else None
        error = None if found is None or item.circumference is None else found - item.circumference
        row |= {"hc_mm": found, "hc_true_mm": item.circumference, "hc_error_mm": error}
    return row


def summarise(rows: Sequence[Row], class_names: Sequence[str]) -> dict[str, Any]:
    """What the rows of all images come to. HD95 and surface Dice have no mean where mm and pixels are mixed."""
    frame = pd.DataFrame(rows)
    known = [name for name in OVERLAP + RATES + SURFACE if name in frame]
    scores: dict[str, Any] = {
        "per_image": {name: mean_sd(frame[name]) for name in known},
        "pooled": _pooled(frame) | rates(*frame[list(COUNTS)].sum().tolist()),
        "empty": {
            "predictions": int((frame["tp"] + frame["fp"] == 0).sum()),
            "truths": int((frame["tp"] + frame["fn"] == 0).sum()),
        },
    }
    if "group" in frame:  # not in validation, which knows images by their number only
        dice = subject_dice(frame)
        scores["per_subject"] = {"dice": mean_sd(dice), "subjects": len(dice)}
        scores["unit"] = common_unit(frame)
        if scores["unit"] == "mixed":
            scores["per_image"] |= {name: {"mean": None, "sd": None} for name in SURFACE}
    if len(class_names) > 1:
        scores["classes"] = {
            name: {
                "per_image": {score: mean_sd(frame[f"{score}_{name}"])["mean"] for score in ("iou", "dice")},
                "pooled": _pooled(frame, f"_{name}", None),
            }
            for name in class_names
        }
        means = pd.Series([part["per_image"]["dice"] for part in scores["classes"].values()])
        scores["mean_of_classes"] = {"dice": mean_sd(means)["mean"]}
    if "hc_mm" in frame:
        errors = frame["hc_error_mm"].astype(float)
        missed = (frame["unit"] == "mm") & frame["hc_true_mm"].notna() & frame["hc_mm"].isna()
        scores["circumference"] = {
            "mean_absolute_error_mm": number(errors.abs().mean()),
            "median_absolute_error_mm": number(errors.abs().median()),
            "mean_error_mm": number(errors.mean()),
            "sd_error_mm": number(errors.std()),
            "images": int(errors.count()),
            "no_ellipse": int(missed.sum()),
        }
    return scores


def subject_dice(frame: pd.DataFrame) -> pd.Series:
    """Dice of the pixels of each subject's images together, such as the slices of its volume."""
    sums = frame.groupby("group")[list(COUNTS[:3])].sum()
    return pd.Series([overlap(*row)["dice"] for row in sums.itertuples(index=False)], sums.index)


def mean_sd(values: pd.Series) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that are known."""
    values = values.astype(float)
    return {"mean": number(values.mean()), "sd": number(values.std())}


def number(value: float) -> float | None:
    """None for NaN, which JSON cannot hold."""
    return None if np.isnan(value) else float(value)


def titles(unit: str) -> dict[str, str]:
    """What tables call the scores."""
    return {
        "iou": "IoU",
        "dice": "Dice",
        "f1": "F1",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "hd95": f"HD95 ({unit})",
        "surface_dice": f"surface Dice ({TOLERANCE:g} {unit})",
    }


def plus_minus(mean: float | None, sd: float | None = None, digits: int = 3) -> str:
    """Mean ± deviation, where there are, as tables show them."""
    if mean is None:
        return "n/a"
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _pooled(frame: pd.DataFrame, suffix: str = "", empty: float | None = 1.0) -> dict[str, float | None]:
    return overlap(*(int(frame[f"{name}{suffix}"].sum()) for name in COUNTS[:3]), empty)


class ValidationScores(Metric):
    """Collects the counts of a validation set, over processes too; `compute` summarises them."""

    full_state_update = False

    def __init__(self, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.class_names = class_names
        self.add_state("indices", default=[], dist_reduce_fx="cat")
        self.add_state("counts", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, truth: Tensor, indices: Tensor) -> None:
        """Class numbers (b 1 h w) of prediction and truth; `indices` (b) tell the images of the set apart."""
        self.indices.append(indices)
        self.counts.append(confusion_counts(prediction, truth, len(self.class_names)))

    def compute(self) -> dict[str, Any]:
        """The scores of every image once: several processes repeat some to make their shares equal."""
        counts = dict(zip(dim_zero_cat(self.indices).tolist(), dim_zero_cat(self.counts).tolist(), strict=True))
        return summarise([overlap_row(counts[index], self.class_names) for index in sorted(counts)], self.class_names)
