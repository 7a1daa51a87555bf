"""The tasks: channels, labels in mask files and in volumes, and the augmentation that their anatomy allows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from monai.transforms import (
    Compose,
    EnsureTyped,
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    Transform,
)

KEYS = ("image", "mask")
CHANNELS = {"grey": 1, "rgb": 3}  # of own tasks


@dataclass(frozen=True)
class Task:
    """One segmentation task. `labels` maps the pixel value in a mask file to its name; 0 is always background."""

    name: str
    title: str
    in_channels: int
    labels: dict[int, str]
    augmentation: Callable[[int], list[Transform]]
    mask_threshold: int | None = None  # in masks with greys of one class, what is brighter is the class

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the foreground classes 1, 2, ..."""
        return tuple(self.labels.values())

    @property
    def num_classes(self) -> int:
        """Logits of a network: one (sigmoid) for a binary task, else one per class and one for background (softmax)."""
        return 1 if len(self.labels) == 1 else 1 + len(self.labels)

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """The axes that the augmentation flips: -2 is up-down, -1 is left-right."""
        steps = self.augmentation(1)
        return tuple(sorted(step.flipper.spatial_axis - 2 for step in steps if isinstance(step, RandFlipd)))

    def transform(self, size: int, training: bool) -> Compose:
        """Augmentation (in training) and normalisation, image by image, of {"image", "mask"}, squares of `size`."""
        normalise = NormalizeIntensityd(keys="image", channel_wise=True)
        plain = EnsureTyped(keys=KEYS, track_meta=False)
        return Compose([*(self.augmentation(size) if training else []), normalise, plain])


def get_task(name: str) -> Task:
    """The task called `name`, or one described by it: `grey:` or `rgb:` and the classes, as in `rgb:hair,skin`.

    Its masks hold 1, 2, ... in the order of the classes (of one class 1 or 255), or the values that are given, as in
    `rgb:hair=50,skin=100`. It is trained without flips, which not every anatomy allows.
    """
    if name in TASKS:
        return TASKS[name]
    colour, _, classes = name.partition(":")
    pairs = [part.strip().partition("=") for part in classes.split(",")]
    usual = range(1, 1 + len(pairs)) if len(pairs) > 1 else [255]
    try:
        labels = {int(value or k): label.strip() for k, (label, _, value) in zip(usual, pairs, strict=True)}
    except ValueError:
        labels = {}
    whole = len(labels) == len(set(labels.values())) == len(pairs) and all(labels.values())
    if colour not in CHANNELS or not whole or not 0 < min(labels) <= max(labels) < 256:
        raise ValueError(
            f"task {name!r} is unknown: choose one of {', '.join(TASKS)}, or describe your own as grey:CLASS,... or "
            "rgb:CLASS,... (or CLASS=VALUE, the value in masks, from 1 to 255)"
        )
    return Task(name, ", ".join(labels.values()), CHANNELS[colour], labels, _sagittal)


def _affine(size: int, degrees: float, shift: tuple[float, float], zoom: float, outside: str = "zeros") -> RandAffined:
    """Rotation, shift (rows and columns, in parts of the image) and zoom; the mask takes the nearest pixel, so no new
    labels appear."""
    return RandAffined(
        keys=KEYS,
        prob=0.7,
        rotate_range=np.deg2rad(degrees),
        translate_range=(shift[0] * size, shift[1] * size),
        scale_range=(zoom, zoom),
        mode=("bilinear", "nearest"),
        padding_mode=outside,
    )


def _skin(size: int) -> list[Transform]:
    """Skin has no up and no left: both flips, quarter turns, and the light of any dermatoscope."""
    return [
        RandFlipd(keys=KEYS, prob=0.5, spatial_axis=0),
        RandFlipd(keys=KEYS, prob=0.5, spatial_axis=1),
        RandRotate90d(keys=KEYS, prob=0.5),
        _affine(size, degrees=15, shift=(0.06, 0.06), zoom=0.12, outside="reflection"),
        RandAdjustContrastd(keys="image", prob=0.3, gamma=(0.7, 1.4)),
        RandScaleIntensityd(keys="image", prob=0.3, factors=0.15, channel_wise=True),
    ]


def _ultrasound(size: int) -> list[Transform]:
    """The probe is always at the top, so only left and right may change places."""
    return [
        RandFlipd(keys=KEYS, prob=0.5, spatial_axis=1),
        _affine(size, degrees=15, shift=(0.08, 0.08), zoom=0.15),
        RandAdjustContrastd(keys="image", prob=0.3, gamma=(0.7, 1.4)),
    ]


def _sagittal(size: int, rows: float = 0.05, outside: str = "zeros") -> list[Transform]:
    """Front and back, head and foot are fixed in a sagittal spine: no flips; contrast and noise differ by scanner."""
    return [
        _affine(size, degrees=8, shift=(rows, 0.05), zoom=0.1, outside=outside),
        RandAdjustContrastd(keys="image", prob=0.5, gamma=(0.6, 1.6)),
        RandGaussianNoised(keys="image", prob=0.3, std=0.03),
    ]


def _numbered(size: int) -> list[Transform]:
    """Vertebrae are counted from the sacrum: moved by a whole one up or down, their place does not tell the number."""
    return _sagittal(size, rows=0.15, outside="border")


TASKS = {
    task.name: task
    for task in (
        Task("isic2017", "skin lesion", 3, {255: "lesion"}, _skin),
        Task("fetal_head", "fetal head", 1, {255: "head"}, _ultrasound),
        Task("lumbar_spine", "lumbar spine", 1, {k: f"L{k}" for k in range(1, 6)}, _numbered),
        Task("breast_lesion", "breast lesion", 1, {255: "lesion"}, _ultrasound),
        Task("spine_vertebrae", "vertebrae", 1, {255: "vertebra"}, _sagittal),
        Task("spine_structures", "spine", 1, {1: "vertebra", 2: "canal", 3: "disc"}, _sagittal),
    )
}
