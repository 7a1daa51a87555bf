"""How far two outlines lie apart: HD95 and surface Dice, in millimetres where the pixel size is known."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

# Distance that surface Dice forgives, in mm, or in pixels where their size is unknown: each of the two outlines is
# known to one pixel, so two pixels apart is no disagreement yet. One number for all, with pixels of about 1 mm in mind.
TOLERANCE = 2.0


def surface_scores(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], pixel_size: tuple[float, float] | None
) -> dict[str, float]:
    """`hd95` and `surface_dice` of two masks (h w).

    Two empty masks agree: 0 and 1. If only one is empty, HD95 is the image's diagonal and surface Dice is 0, so that an
    image where nothing was found counts as the failure it is.
    """
    spacing = (1.0, 1.0) if pixel_size is None else pixel_size
    if not (prediction.any() and truth.any()):
        if prediction.any() or truth.any():
            return {"hd95": math.hypot(*(np.array(truth.shape) * spacing)), "surface_dice": 0.0}
        return {"hd95": 0.0, "surface_dice": 1.0}
    pair = {"y_pred": torch.from_numpy(prediction)[None, None], "y": torch.from_numpy(truth)[None, None]}  # 1 1 h w
    options = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():  # MONAI 1.6 calls a function of its own in a way that it deprecates
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        hd95 = compute_hausdorff_distance(**pair, **options, percentile=95)
        surface_dice = compute_surface_dice(**pair, **options, class_thresholds=[TOLERANCE])
    return {"hd95": hd95.item(), "surface_dice": surface_dice.item()}
