"""BUSI: benign/, malignant/, normal/ with 'benign (1).png', 'benign (1)_mask.png', 'benign (1)_mask_1.png'."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from segmentation.data.formats.files import IMAGES, by_stem, check_alone, files_in, stem, subfolder
from segmentation.data.item import Item, read_layers
from segmentation.tasks import Task

MASK = re.compile(r"(.+)_mask(_\d+)?", re.IGNORECASE)


def fits(folder: Path) -> bool:
    return any(MASK.fullmatch(stem(path)) for path in _files(folder))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image, all its masks in one; images without finding come with their empty mask.

    Every image is a subject of its own, for nothing is known of patients.
    """
    if len(task.labels) > 1:
        raise ValueError(f"{folder} holds masks of lesions, one class: task {task.name!r} has {len(task.labels)}")
    images = by_stem(path for path in _files(folder) if not MASK.fullmatch(stem(path)))
    masks: dict[str, list[Path]] = {}
    for path in _files(folder):
        if match := MASK.fullmatch(stem(path)):
            masks.setdefault(match[1], []).append(path)
    firsts = {name: paths[0] for name, paths in masks.items()}
    check_alone(firsts, images, "has no image", "add the image or remove the mask")
    check_alone(images, masks, "has no mask", "add 'NAME_mask.png', or remove the image")
    return [
        Item.of_files(partial(read_layers, [1] * len(masks[name])), task, name, image, *masks[name])
        for name, image in images.items()
    ]


def _files(folder: Path) -> list[Path]:
    return [path for name in ("benign", "malignant", "normal") for path in files_in(subfolder(folder, name), IMAGES)]
