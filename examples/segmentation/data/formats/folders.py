"""`images/` and `masks/` with files of the same names, once or for each of `train/`, `val/`, `test/`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats.files import IMAGES, by_stem, files_in, masks_by_stem, pair_up, subfolder, subfolders
from segmentation.data.item import Item, Pixels, check_sizes, read_image, read_pair, read_values, to_classes
from segmentation.data.split import SIDES
from segmentation.tasks import Task

DESCRIPTION = (
    "images/ and masks/ (or masks/0/, masks/1/, ... one folder a class) with the same names, or with _mask, "
    "_segmentation, _label or _gt added to those of the masks; also under train/, val/, test/"
)
SUFFIXES = ("_mask", "_segmentation", "_label", "_gt")


def fits(folder: Path) -> bool:
    return any(files_in(subfolder(place, "images"), IMAGES) for place in _places(folder).values())


def items(task: Task, folder: Path) -> list[Item]:
    """One item an image; every image is a subject of its own, for nothing is known of patients.

    Under `train/`, `val/`, `test/` the name of the side is put before the id, since sides are often numbered alike.
    """
    found = []
    for side, place in _places(folder).items():
        images, masks = by_stem(files_in(subfolder(place, "images"), IMAGES)), subfolder(place, "masks")
        parts = _class_folders(task, masks)
        read = read_pair if len(parts) == 1 else read_classes
        by_class = [masks_by_stem(files_in(part, IMAGES), images, *SUFFIXES) for part in parts]
        for part, paths in zip(parts, by_class, strict=True):
            pair_up(images, paths, part)
        for name, image in images.items():
            files = (image, *(paths[name] for paths in by_class))
            key = f"{side}_{name}" if side else name
            found.append(Item(key, key, partial(read, task, *files), split=side, files=files))
    return found


def read_classes(task: Task, image_path: Path, *mask_paths: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c) and class numbers (h w) of one mask a class; where masks overlap, the later class counts."""
    image = read_image(image_path, task.in_channels)
    classes = np.zeros(image.shape[:2], np.uint8)
    for number, (name, path) in enumerate(zip(task.class_names, mask_paths, strict=True), start=1):
        values = read_values(path)
        check_sizes(image, image_path, values, path)
        classes[to_classes(values, {255: name}, path) > 0] = number
    return image, classes


def _places(folder: Path) -> dict[str, Path]:
    """Folders that hold images/ and masks/, by the side they stand for: the folder itself, or its sides."""
    places = {"": folder} | {side: subfolder(folder, side) for side in SIDES}
    whole = {
        side: place
        for side, place in places.items()
        if place is not None and subfolder(place, "images") and subfolder(place, "masks")
    }
    return {"": folder} if "" in whole else whole


def _class_folders(task: Task, masks: Path) -> list[Path]:
    """`masks/` itself, or the folders `0`, `1`, ... in it, one for each class."""
    parts = {path.name: path for path in subfolders(masks) if path.name.isdecimal()}
    if not parts:
        return [masks]
    wanted = [str(k) for k in range(len(task.labels))]
    if sorted(parts) != wanted:
        raise ValueError(
            f"{masks} has the folders {', '.join(sorted(parts))}: task {task.name!r} needs "
            f"{', '.join(wanted)}, for {', '.join(task.class_names)}"
        )
    return [parts[name] for name in wanted]
