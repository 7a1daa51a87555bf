"""IoU, Dice and F1 of a whole validation set, per image and pooled over pixels, from MONAI's confusion counts.

* `per_image`: the score of each image, then the mean over the images.  `pooled`: one score of all pixels together.
* Foreground is any label against the rest. An image with an empty truth and an empty prediction scores 1.
* A class that is neither in the truth nor in the prediction of an image is left out of that class's mean; a class
  that no image holds scores None.
* Dice = 2 TP / (2 TP + FP + FN) is the F1 score of the pixels; both names are given because tables use both.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics.confusion_matrix import compute_confusion_matrix_metric, get_confusion_matrix
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

SCORES = {"iou": "threat score", "dice": "f1 score", "f1": "f1 score"}


def predicted_classes(logits: Tensor) -> Tensor:
    """Class numbers (b 1 h w) of logits (b c h w): one channel is a sigmoid, several are a softmax."""
    return (logits > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1, keepdim=True)


def confusion_counts(prediction: Tensor, truth: Tensor, num_labels: int) -> Tensor:
    """TP, FP, TN, FN (b 1+num_labels 4) of class numbers (b 1 h w): foreground first, then every class by itself."""

    def masks(classes: Tensor) -> Tensor:
        one_hot = F.one_hot(classes[:, 0].long(), 1 + num_labels).movedim(-1, 1)  # b 1+num_labels h w
        return torch.cat([classes > 0, one_hot[:, 1:]], dim=1)

    return get_confusion_matrix(masks(prediction), masks(truth))


def image_scores(counts: Tensor, score: str) -> Tensor:
    """Foreground score of each image from counts (b c 4); empty truth with empty prediction is 1."""
    return compute_confusion_matrix_metric(SCORES[score], counts[:, 0]).nan_to_num(nan=1.0)


class SegmentationMetrics(Metric):
    """Collects confusion counts over an epoch (and over processes); `compute` gives the nested dict of scores.

    {"per_image": {"iou", "dice", "f1"}, "pooled": {...}}, and for several classes "classes": {name: the same two}.
    """

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
        # With several processes the sampler repeats images to make the shares equal: each image counts once.
        by_image = dict(zip(dim_zero_cat(self.indices).tolist(), dim_zero_cat(self.counts), strict=True))
        counts = torch.stack([by_image[index] for index in sorted(by_image)]).cpu().double()  # n c 4
        scores: dict[str, Any] = {
            "per_image": {score: image_scores(counts, score).mean().item() for score in SCORES},
            "pooled": {score: image_scores(counts.sum(0, keepdim=True), score).item() for score in SCORES},
        }
        if len(self.class_names) > 1:
            scores["classes"] = {
                name: {
                    "per_image": _class_scores(counts[:, k]),
                    "pooled": _class_scores(counts[:, k].sum(0, keepdim=True)),
                }
                for k, name in enumerate(self.class_names, start=1)
            }
        return scores


def _class_scores(counts: Tensor) -> dict[str, float | None]:
    """Mean scores of counts (n 4) over the images where the class occurs."""
    scores = {}
    for score, name in SCORES.items():
        values = compute_confusion_matrix_metric(name, counts)
        scores[score] = None if values.isnan().all() else values.nanmean().item()
    return scores
