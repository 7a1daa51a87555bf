"""SPIDER: `images/1_t2.mha`, `masks/1_t2.mha`; volumes of the lumbar spine, read as sagittal slices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segmentation.data import simpleitk as sitk
from segmentation.data.formats.files import VOLUMES, by_stem, files_in, leading_number, pair_up, subfolder
from segmentation.data.formats.voxels import (
    Voxels,
    check_same_size,
    is_silent,
    number,
    orientation,
    presets,
    read_header,
    read_volume,
    sagittal,
    slice_items,
    to_pixels,
    to_values,
)
from segmentation.data.item import Item, Pixels
from segmentation.tasks import Task

DESCRIPTION = "SPIDER: images/ and masks/ with volumes (.mha, .nii, .nii.gz) of the same names"
WHOLE, CUT = range(1, 26), range(101, 126)  # vertebrae, and those partly outside the volume
KNOWN = (range(1), WHOLE, range(100, 126), range(201, 226))  # background; vertebrae; canal, cut vertebrae; discs

# Its labels count from the bottom: 1 is the lowest lumbar vertebra.
CLASSES: dict[str, Voxels] = {
    "lumbar_spine": {f"L{6 - k}": (range(k, k + 1),) for k in (5, 4, 3, 2, 1)},
    "spine_vertebrae": {"vertebra": (WHOLE, CUT)},
    "spine_structures": {"vertebra": (WHOLE, CUT), "canal": (range(100, 101),), "disc": (range(201, 226),)},
}


def fits(folder: Path) -> bool:
    return bool(files_in(subfolder(folder, "images"), VOLUMES) and files_in(subfolder(folder, "masks"), VOLUMES))


def items(task: Task, folder: Path) -> list[Item]:
    """One item a sagittal slice, called `<name>_<slice in the file>`; only slices that hold a label of the task.

    The group is the patient, the number that file names begin with. Nothing is resampled: pixels are as large as the
    scanner made them, and `pixel_size` says how large.
    """
    classes = partial(number, ranges=presets(task, CLASSES, folder))
    masks = subfolder(folder, "masks")
    images = by_stem(files_in(subfolder(folder, "images"), VOLUMES))
    found = []
    for name, *pair in pair_up(images, by_stem(files_in(masks, VOLUMES)), masks):
        mask = read_mask(*pair)
        group = leading_number(pair[0])
        found += slice_items(task, name, group, tuple(pair), mask.values, classes, read_sagittal, mask.pixel_size)
    return found


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
    if not (is_silent(mask) or is_silent(header) or orientation(mask) == orientation(header)):
        raise ValueError(
            f"{mask_path} is laid {orientation(mask)} but its image {image_path} {orientation(header)}: "
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
    if turned and not is_silent(header):
        raise ValueError(
            f"{mask_path} counts its vertebrae from the top, if the header of {image_path} is right: "
            "SPIDER counts from the bottom"
        )
    width, height, _ = laid.GetSpacing()
    return Mask(values[:, ::-1] if turned else values, (height, width), turned)


def _counts_downwards(values: NDArray[np.integer], numbers: list[int]) -> bool:
    """Whether the lowest of the `numbers` of mask values (s h w) stands above the highest."""
    if len(numbers) < 2:
        return False
    lowest, highest = (np.nonzero(values == value)[1].mean() for value in (numbers[0], numbers[-1]))
    return bool(lowest < highest)
