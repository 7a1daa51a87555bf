"""SPIDER: images/ and masks/ with volumes of the spine (.mha, .nii, .nii.gz) of the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats import voxels
from segmentation.data.formats.files import VOLUMES, by_stem, files_in, leading_number, pair_up, subfolder
from segmentation.data.item import Item, bone_classes, slice_items
from segmentation.data.pixels import Pixels, sitk
from segmentation.tasks import Task

# Its labels count from the bottom: 1 is the lowest lumbar vertebra.
VERTEBRAE = range(1, 26)
ALSO_CUT = [*VERTEBRAE, *range(101, 126)]  # with those partly outside the volume
CLASSES = {
    "lumbar_spine": {"L1": [5], "L2": [4], "L3": [3], "L4": [2], "L5": [1]},
    "spine_vertebrae": {"vertebra": ALSO_CUT},
    "spine_structures": {"vertebra": ALSO_CUT, "canal": [100], "disc": range(201, 226)},
}
LEGEND = "which SPIDER does not use: 1 to 25 and 101 to 125 are vertebrae, 100 the canal, 201 to 225 discs"


def fits(folder: Path) -> bool:
    return all(files_in(subfolder(folder, part), VOLUMES) for part in ("images", "masks"))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per sagittal slice, called `<name>_<slice in the file>`; only slices that hold a label of the task.

    The group is the patient, the number that file names begin with. Nothing is resampled: pixels are as large as the
    scanner made them, and `pixel_size` says how large.
    """
    images, masks = (files_in(subfolder(folder, part), VOLUMES) for part in ("images", "masks"))
    found = []
    for name, *pair in pair_up(by_stem(images), masks):
        classes = bone_classes(task, CLASSES, pair[1], LEGEND)
        values, pixel_size, cut = voxels.read_mask(find_cut, *pair)
        facts = {"group": leading_number(name), "pixel_size": pixel_size, "cut": cut}
        found += slice_items(task, name, pair, read_sagittal, values, classes, **facts)
    return found


def read_sagittal(*files: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w 1) and mask values (s h w), the head up and the front of the body at the left."""
    return voxels.read_stack(find_cut, *files)


def find_cut(mask: sitk.Image, image_path: Path, mask_path: Path) -> voxels.Cut:
    """Sagittal; with a silent header, up is where the numbers of the vertebrae say: they count from the bottom."""
    sagittal = voxels.lay(mask, [(voxels.SAGITTAL, voxels.STORED)], mask_path)
    values = sitk.GetArrayFromImage(sagittal)  # s h w
    numbers = [number for number in np.unique(values).tolist() if number in VERTEBRAE]
    rows = [np.nonzero(values == number)[1].mean() for number in numbers[:1] + numbers[-1:]]
    is_turned = bool(rows and rows[0] < rows[1])  # the lowest vertebra stands above the highest
    if voxels.is_silent(mask):
        return voxels.SAGITTAL, voxels.TURNED if is_turned else voxels.STORED
    if is_turned:
        raise ValueError(
            f"{mask_path} counts its vertebrae from the top, if the header of {image_path} is right: "
            "SPIDER counts from the bottom"
        )
    return voxels.SAGITTAL, ""
