"""From an image of any size to probabilities at that size: squashed as in training, or window by window."""

from itertools import combinations

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import RandFlipd
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from segmentation.data.pixels import Pixels, to_input
from segmentation.tasks import Task

WINDOWS_AT_ONCE = 4


@torch.no_grad()
def probabilities(
    network: nn.Module, task: Task, image: Pixels, size: int, *, window: bool = False, flips: bool = False
) -> Tensor:
    """Probabilities (k h w) of an image (h w c) at its own size: one sigmoid, or a softmax with the background first.

    Args:
        network: in eval mode; the work is done on its device.
        task: what it was trained for.
        image: pixels as `Item.read` gives them.
        size: side of the squares it was trained with.
        window: apply it to overlapping `size` x `size` windows of the image as it is, instead of to the whole image
            squashed to one such square. The intensities are normalised over the whole image in both cases, and of the
            file's own scale and offset nothing is left.
        flips: average the probabilities over the flips that the task's augmentation knows, and the image itself.
    """
    axes = flip_axes(task, size) if flips else ()
    flipped = [some for number in range(len(axes) + 1) for some in combinations(axes, number)]
    values = torch.from_numpy(np.moveaxis(image.astype(np.float32), 2, 0).copy()) if window else to_input(image, size)
    pair = {"image": values, "mask": torch.zeros(1, *values.shape[1:])}  # c h w or c size size
    device = next(network.parameters()).device
    x = task.transform(size, training=False)(pair)["image"][None].to(device)  # 1 c h w
    total = torch.zeros(task.num_classes, *image.shape[:2], device=device)
    for some in flipped:
        logits = _windows(network, x.flip(some), size) if window else _squashed(network, x.flip(some), image.shape[:2])
        total += (logits.sigmoid() if task.num_classes == 1 else logits.softmax(dim=1))[0].flip(some)
    return total / len(flipped)


def to_classes_map(probabilities: Tensor) -> NDArray[np.uint8]:
    """Class numbers (h w) of probabilities (k h w)."""
    classes = probabilities[0] > 0.5 if len(probabilities) == 1 else probabilities.argmax(dim=0)
    return classes.to("cpu", torch.uint8).numpy()


def flip_axes(task: Task, size: int) -> tuple[int, ...]:
    """The axes that the task's augmentation flips: -2 is up-down, -1 is left-right."""
    axes = sorted(step.flipper.spatial_axis - 2 for step in task.augmentation(size) if isinstance(step, RandFlipd))
    if not axes:
        raise ValueError(
            f"flips cannot be averaged for {task.name}: its images are never flipped in training, because front and "
            "back, head and foot are fixed; leave flips out"
        )
    return tuple(axes)


def _squashed(network: nn.Module, x: Tensor, own: tuple[int, int]) -> Tensor:
    """Logits (1 k h w) at the image's own size from one square (1 c s s).

    The logits are enlarged, not the probabilities: across a contour logits run nearly straight, so their zero is met to
    a fraction of a pixel, whereas a saturated sigmoid is a step, whose middle is always half-way between two pixels.
    """
    return F.interpolate(network(x).float(), size=own, mode="bilinear", align_corners=False, antialias=False)


def _windows(network: nn.Module, x: Tensor, size: int) -> Tensor:
    """Logits (1 k h w) of the image at its own size (1 c h w), blended from windows of half overlap.

    A smaller image is padded with zeros, which after normalisation are its own mean.
    """
    return sliding_window_inference(x, (size, size), WINDOWS_AT_ONCE, network, overlap=0.5, mode="gaussian")
