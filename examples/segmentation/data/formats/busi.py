"""BUSI: benign/, malignant/, normal/ with 'benign (1).png', 'benign (1)_mask.png', 'benign (1)_mask_1.png'."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from segmentation.data.formats.files import IMAGES, by_stem, check_pairs, files_in, stem, subfolder
from segmentation.data.item import Item, read_files
from segmentation.tasks import Task

MASK = re.compile(r"(.+)_mask(_\d+)?", re.IGNORECASE)


def fits(folder: Path) -> bool:
    return bool(_masks(_files(folder)))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image, all its masks in one; images without finding come with their empty mask.

    Every image is a subject of its own, for nothing is known of patients.
    """
    if len(task.labels) > 1:
        raise ValueError(f"{folder} holds masks of lesions, one class: task {task.name!r} has {len(task.labels)}")
    files = _files(folder)
    masks = _masks(files)
    images = by_stem(path for path in files if not MASK.fullmatch(stem(path)))
    check_pairs(images, {name: paths[0] for name, paths in masks.items()})
    found = []
    for name, image in images.items():
        read = partial(read_files, labels=[{255: task.class_names[0]}] * len(masks[name]))
        found.append(Item.of_files(read, task, name, image, *masks[name]))
    return found


def _files(folder: Path) -> list[Path]:
    return [path for name in ("benign", "malignant", "normal") for path in files_in(subfolder(folder, name), IMAGES)]


def _masks(files: list[Path]) -> dict[str, list[Path]]:
    """The masks of each image, by its name."""
    masks: dict[str, list[Path]] = {}
    for path in files:
        if match := MASK.fullmatch(stem(path)):
            masks.setdefault(match[1], []).append(path)
    return masks
