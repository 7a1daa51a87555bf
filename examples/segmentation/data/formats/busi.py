"""BUSI as it is handed out: `Dataset_BUSI_with_GT/` with a folder a finding, images and masks together."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats.files import IMAGES, by_stem, files_in, stem, subfolder
from segmentation.data.item import Item, Pixels, check_sizes, read_image, read_values, to_classes
from segmentation.tasks import Task

DESCRIPTION = "BUSI: benign/, malignant/, normal/ with 'benign (1).png', 'benign (1)_mask.png', 'benign (1)_mask_1.png'"
FINDINGS = ("benign", "malignant", "normal")
MASK = re.compile(r"(.+)_mask(_\d+)?", re.IGNORECASE)


def fits(folder: Path) -> bool:
    return any(MASK.fullmatch(stem(path)) for name in FINDINGS for path in files_in(subfolder(folder, name), IMAGES))


def items(task: Task, folder: Path) -> list[Item]:
    """One item an image, all its masks in one; images without finding come with their empty mask.

    Every image is a subject of its own, for nothing is known of patients.
    """
    if len(task.labels) > 1:
        raise ValueError(f"{folder} holds masks of lesions, one class: task {task.name!r} has {len(task.labels)}")
    found = []
    for place in filter(None, (subfolder(folder, name) for name in FINDINGS)):
        files = files_in(place, IMAGES)
        images = by_stem(path for path in files if not MASK.fullmatch(stem(path)))
        masks: dict[str, list[Path]] = {name: [] for name in images}
        for path in files:
            if match := MASK.fullmatch(stem(path)):
                if match[1] not in images:
                    raise FileNotFoundError(f"{path} has no image: add the image or remove the mask")
                masks[match[1]].append(path)
        if alone := [name for name in images if not masks[name]]:
            raise FileNotFoundError(
                f"{images[alone[0]]} has no mask ({len(alone)} such): add '{alone[0]}_mask.png', or remove the image"
            )
        found += [
            Item(name, name, partial(read_united, task, image, *masks[name]), files=(image, *masks[name]))
            for name, image in images.items()
        ]
    return found


def read_united(task: Task, image_path: Path, *mask_paths: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c), and what any of its masks holds (h w)."""
    image = read_image(image_path, task.in_channels)
    united = np.zeros(image.shape[:2], np.uint8)
    for path in mask_paths:
        values = read_values(path)
        check_sizes(image, image_path, values, path)
        united |= to_classes(values, task.labels, path)
    return image, united
