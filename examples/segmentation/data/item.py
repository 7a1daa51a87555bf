"""What a data set consists of: items, each an image and its mask, from files or from slices of volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data.pixels import Pixels, check_sizes, read_image, read_values
from segmentation.tasks import Task

Loader = Callable[..., tuple[Pixels, NDArray[np.integer]]]  # files to image (s h w c) and mask values (s h w)
Classes = Callable[[NDArray], NDArray[np.uint8]]  # mask values to class numbers
_reading = Lock()


@dataclass(frozen=True)
class Item:
    """One image with its mask, not read yet: `read()` gives pixels (h w c) and class numbers (h w)."""

    id: str
    group: str  # the subject
    read: Callable[[], tuple[Pixels, NDArray[np.uint8]]]
    split: str = ""  # "train", "val" or "test" where the data set itself says so
    files: tuple[Path, ...] = ()  # what `read` opens
    pixel_size: tuple[float, float] | None = None  # mm from row to row and from column to column
    circumference: float | None = None  # mm, the head's, as the data set gives it
    own_group: bool = False  # the data set names no subject: the image is one by itself
    cut: tuple[str, str] = ("", "")  # of a volume: `voxels.Cut`
    channel_files: int = 1  # how many of the files are channels of the image

    @classmethod
    def of_files(cls, read: Callable, task: Task, id: str, *files: Path, group: str = "", **facts: Any) -> Item:
        """The item that `read(task, *files)` reads; without a `group` it is a subject of its own."""
        return cls(id, group or id, partial(read, task, *files), files=files, own_group=not group, **facts)


def read_files(task: Task, *files: Path, labels: Sequence[dict[int, str]] = ()) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c), of one file or of one per channel, and the class numbers (h w) of its masks, the last files.

    `labels` has the class of each value of each mask; without it there is one mask with those of the task. Later masks
    lie over earlier ones.
    """
    labels = labels or [task.labels]
    images, masks = files[: -len(labels)], files[-len(labels) :]
    image = read_channels(task, images)
    classes = np.zeros(image.shape[:2], np.uint8)
    for path, names in zip(masks, labels, strict=True):
        values = read_values(path)
        check_sizes(image.shape[1::-1], images[0], values.shape[::-1], path)
        numbers = np.array([0, *(1 + task.class_names.index(name) for name in names.values())], np.uint8)
        layer = numbers[to_classes(values, names, path, task.mask_threshold)]
        classes = np.where(layer > 0, layer, classes)
    return image, classes


def read_channels(task: Task, files: Sequence[Path]) -> Pixels:
    """An image (h w c) of one file, or of one file per channel."""
    first, *others = channels = [read_image(path, task.in_channels // len(files)) for path in files]
    for channel, path in zip(others, files[1:], strict=True):
        check_sizes(first.shape[1::-1], files[0], channel.shape[1::-1], path)
    return np.concatenate(channels, axis=2)


def to_classes(
    values: NDArray[np.integer], labels: dict[int, str], path: Path, threshold: int | None = None
) -> NDArray[np.uint8]:
    """Class numbers 0, 1, 2, ... of mask values. Of one class these may be 1 or 255, or all above a threshold."""
    is_one = len(labels) == 1
    if threshold is not None and not is_one:
        raise ValueError(f"data.mask_threshold is for masks of one class, and {path} has {', '.join(labels.values())}")
    if threshold is not None:
        return (values > threshold).astype(np.uint8)
    if is_one and np.isin(values, (0, 1)).all():
        return values.astype(np.uint8)
    allowed = ", ".join(f"{value} ({name})" for value, name in labels.items())
    greys = "; for masks with greys, as JPEG leaves them, give --data.mask_threshold 127" if is_one else ""
    numbers = {value: number for number, value in enumerate([0, *labels])}
    return number_values(values, numbers, path, f"which is no label: allowed are 0 (background), {allowed}{greys}")


def number_values(values: NDArray, numbers: dict[int, int], path: Path, remark: str) -> NDArray[np.uint8]:
    """The class number of each mask value; refused where one is not among the `numbers`."""
    if odd := sorted(set(np.unique(values).tolist()) - numbers.keys()):
        raise ValueError(f"{path} holds the value {odd[0]}, {remark}")
    known = sorted(numbers)
    return np.array([numbers[value] for value in known], np.uint8)[np.searchsorted(known, values)]


def bone_classes(task: Task, known: dict[str, dict[str, Sequence[int]]], path: Path, remark: str) -> Classes:
    """What turns the values of a volume that numbers every bone into the task's classes; others are background.

    `known` has the values of each class, by task.
    """
    if task.name not in known:
        raise ValueError(f"{path} is of a volume of the spine: task {task.name!r} is not one of {', '.join(known)}")
    if task.mask_threshold is not None:
        raise ValueError(f"{path} is of a volume that numbers every bone: leave data.mask_threshold out")
    others = [value for classes in known.values() for values in classes.values() for value in values]
    classes = enumerate(known[task.name].values(), start=1)
    numbers = dict.fromkeys([0, *others], 0) | {value: number for number, values in classes for value in values}
    return partial(number_values, numbers=numbers, path=path, remark=remark)


def slice_items(
    task: Task, name: str, files: Sequence[Path], loader: Loader, values: NDArray, classes: Classes, **facts: Any
) -> list[Item]:
    """An item `<name>_<slice>` for each slice of mask values (s h w) that holds a class; `loader` reads it later."""
    return [
        Item.of_files(partial(read_slice, loader, classes, index), task, f"{name}_{index:03d}", *files, **facts)
        for index in np.flatnonzero(classes(values).any(axis=(1, 2))).tolist()
    ]


def read_slice(
    loader: Loader, classes: Classes, index: int, task: Task, *files: Path
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Slice `index` of what `loader(*files)` gives: image (h w c), and class numbers (h w) of its mask values.

    A grey volume gives as many equal channels as the task has.
    """
    with _reading:  # threads that want slices of one volume wait for it, instead of each reading it
        image, values = _load(loader, files)
    image = image[index]  # h w c
    return image.repeat(task.in_channels // image.shape[2], axis=2), classes(values[index])


@lru_cache(maxsize=4)
def _load(loader: Loader, files: tuple[Path, ...]) -> tuple[Pixels, NDArray[np.integer]]:
    return loader(*files)
