"""SPIDER: `images/1_t2.mha`, `masks/1_t2.mha`; volumes of the lumbar spine, read as sagittal slices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segmentation import sitk
from segmentation.items import Item, Pixels
from segmentation.sources.files import VOLUMES, by_stem, files_in, leading_number, pair_up, subfolder
from segmentation.sources.voxels import (
    as_stored,
    check_same_size,
    read_header,
    read_volume,
    slice_items,
    to_pixels,
    to_values,
)
from segmentation.tasks import SPIDER, Task, Voxels

DESCRIPTION = "SPIDER: images/ and masks/ with volumes (.mha, .nii, .nii.gz) of the same names"
WHOLE = range(1, 26)
KNOWN = (range(1), WHOLE, range(100, 126), range(201, 226))  # background; vertebrae; canal, cut vertebrae; discs


def fits(folder: Path) -> bool:
    return bool(files_in(subfolder(folder, "images"), VOLUMES) and files_in(subfolder(folder, "masks"), VOLUMES))


def items(task: Task, folder: Path) -> list[Item]:
    """One item a sagittal slice, called `<name>_<slice in the file>`; only slices that hold a label of the task.

    The group is the patient, the number that file names begin with. Nothing is resampled: pixels are as large as the
    scanner made them, and `pixel_size` says how large.
    """
    classes = partial(number, ranges=presets(task, SPIDER, folder))
    masks = subfolder(folder, "masks")
    images = by_stem(files_in(subfolder(folder, "images"), VOLUMES))
    found = []
    for name, *pair in pair_up(images, by_stem(files_in(masks, VOLUMES)), masks):
        mask = read_mask(*pair)
        group = leading_number(pair[0])
        found += slice_items(task, name, group, tuple(pair), mask.values, classes, read_sagittal, mask.pixel_size)
    return found


def presets(task: Task, known: dict[str, Voxels], folder: Path) -> Voxels:
    """The voxel values of the task's classes."""
    if task.name not in known:
        raise ValueError(f"{folder} holds volumes of the spine: task {task.name!r} is not one of {', '.join(known)}")
    return known[task.name]


def number(values: NDArray[np.integer], ranges: Voxels) -> NDArray[np.uint8]:
    """Class numbers 1, 2, ... of voxel values; what belongs to no class is background."""
    classes = np.zeros(values.shape, np.uint8)
    for k, parts in enumerate(ranges.values(), start=1):
        for part in parts:
            classes[(values >= part.start) & (values < part.stop)] = k
    return classes


class Mask(NamedTuple):
    """A mask as sagittal slices, the head up and the front of the body at the left."""

    values: NDArray[np.integer]  # s h w
    pixel_size: tuple[float, float]  # mm from row to row and from column to column
    turned: bool  # whether the rows had to be turned over


def read_sagittal(image_path: Path, mask_path: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w 1) and mask values (s h w) as in `Mask`."""
    mask = read_mask(image_path, mask_path)
    voxels = sitk.GetArrayFromImage(sagittal(read_volume(image_path)))  # s h w
    pixels = to_pixels(voxels[:, ::-1] if mask.turned else voxels, image_path)
    return pixels[..., None], mask.values


def read_mask(image_path: Path, mask_path: Path) -> Mask:
    """The mask of a volume, laid as the header of the image says.

    Where that header is silent, up is where the numbers of the vertebrae say it is: they count from the bottom.
    """
    header, mask = read_header(image_path), read_volume(mask_path)
    check_same_size(header, image_path, mask, mask_path)
    if not (_is_silent(mask) or _is_silent(header) or _orientation(mask) == _orientation(header)):
        raise ValueError(
            f"{mask_path} is laid {_orientation(mask)} but its image {image_path} {_orientation(header)}: "
            "store both with the same axes"
        )
    mask.SetDirection(header.GetDirection())
    mask.SetOrigin(header.GetOrigin())
    mask.SetSpacing(header.GetSpacing())
    laid = sagittal(mask)
    values = to_values(sitk.GetArrayFromImage(laid), mask_path)  # s h w
    numbers = np.unique(values)
    if odd := [value for value in numbers.tolist() if not any(value in part for part in KNOWN)]:
        raise ValueError(
            f"{mask_path} holds the value {odd[0]}, which SPIDER does not use: "
            "1 to 25 and 101 to 125 are vertebrae, 100 the canal, 201 to 225 discs"
        )
    turned = _counts_downwards(values, [value for value in numbers if value in WHOLE])
    if turned and not _is_silent(header):
        raise ValueError(
            f"{mask_path} counts its vertebrae from the top, if the header of {image_path} is right: "
            "SPIDER counts from the bottom"
        )
    width, height, _ = laid.GetSpacing()
    return Mask(values[:, ::-1] if turned else values, (height, width), turned)


def _is_silent(volume: sitk.Image | sitk.ImageFileReader) -> bool:
    """Whether a header has the direction and origin that programs write when they know of none."""
    return tuple(volume.GetDirection()) == (1, 0, 0, 0, 1, 0, 0, 0, 1) and not any(volume.GetOrigin())


def _orientation(volume: sitk.Image | sitk.ImageFileReader) -> str:
    """Where the three axes of a volume point, e.g. "LPS": to the left, the back and the head."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.GetDirection())


def sagittal(volume: sitk.Image) -> sitk.Image:
    """A volume with its columns to the back, its rows to the feet and its slices to the side, in the file's order."""
    if _is_silent(volume):
        return as_stored(volume)
    side = next(letter for letter in _orientation(volume) if letter in "LR")
    return sitk.DICOMOrient(volume, f"PI{side}")


def _counts_downwards(values: NDArray[np.integer], numbers: list[int]) -> bool:
    """Whether the lowest of the `numbers` of mask values (s h w) stands above the highest."""
    if len(numbers) < 2:
        return False
    lowest, highest = (np.nonzero(values == value)[1].mean() for value in (numbers[0], numbers[-1]))
    return bool(lowest < highest)
