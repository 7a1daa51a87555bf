"""SPIDER: images/ and masks/ with volumes of the spine (.mha, .nii, .nii.gz) of the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats import voxels
from segmentation.data.formats.files import VOLUMES, by_stem, files_in, leading_number, pair_up, subfolder
from segmentation.data.item import Item, Pixels, check_values
from segmentation.tasks import Task

WHOLE, CUT = range(1, 26), range(101, 126)  # vertebrae, and those partly outside the volume
CANAL, DISCS = range(100, 101), range(201, 226)

# Its labels count from the bottom: 1 is the lowest lumbar vertebra.
CLASSES: dict[str, voxels.Voxels] = {
    "lumbar_spine": {f"L{6 - k}": (range(k, k + 1),) for k in (5, 4, 3, 2, 1)},
    "spine_vertebrae": {"vertebra": (WHOLE, CUT)},
    "spine_structures": {"vertebra": (WHOLE, CUT), "canal": (CANAL,), "disc": (DISCS,)},
}


def fits(folder: Path) -> bool:
    return all(files_in(subfolder(folder, part), VOLUMES) for part in ("images", "masks"))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per sagittal slice, called `<name>_<slice in the file>`; only slices that hold a label of the task.

    The group is the patient, the number that file names begin with. Nothing is resampled: pixels are as large as the
    scanner made them, and `pixel_size` says how large.
    """
    classes = voxels.classes_of(task, CLASSES, folder)
    images, masks = subfolder(folder, "images"), subfolder(folder, "masks")
    found = []
    for name, *pair in pair_up(by_stem(files_in(images, VOLUMES)), files_in(masks, VOLUMES), masks):
        values, pixel_size, cut = read_mask(*pair)
        facts = {"group": leading_number(name), "pixel_size": pixel_size, "cut": cut}
        found += voxels.slice_items(task, name, tuple(pair), read_sagittal, values, classes, **facts)
    return found


def read_sagittal(image_path: Path, mask_path: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w 1) and mask values (s h w), the head up and the front of the body at the left."""
    values, _, cut = read_mask(image_path, mask_path)
    return voxels.read_pixels(image_path, cut)[..., None], values


def read_mask(image_path: Path, mask_path: Path) -> tuple[NDArray[np.integer], tuple[float, float], voxels.Cut]:
    """Mask values (s h w) laid as the header of the image says, the size of a pixel in mm (row to row, column to
    column), and how the volume is cut.

    Where that header is silent, up is where the numbers of the vertebrae say it is: they count from the bottom.
    """
    mask = voxels.read_mask(mask_path, image_path)
    is_silent = voxels.is_silent(mask)
    values, pixel_size = voxels.to_arrays(voxels.lay(mask, [(voxels.SAGITTAL, voxels.STORED)], mask_path), mask_path)
    legend = ", which SPIDER does not use: 1 to 25 and 101 to 125 are vertebrae, 100 the canal, 201 to 225 discs"
    check_values(values, [0, *WHOLE, *CANAL, *CUT, *DISCS], mask_path, legend)
    numbers = [number for number in np.unique(values).tolist() if number in WHOLE]
    rows = [np.nonzero(values == number)[1].mean() for number in numbers[:1] + numbers[-1:]]
    turned = bool(rows and rows[0] < rows[1])  # the lowest vertebra stands above the highest
    if turned and not is_silent:
        raise ValueError(
            f"{mask_path} counts its vertebrae from the top, if the header of {image_path} is right: "
            "SPIDER counts from the bottom"
        )
    cut = voxels.SAGITTAL, (voxels.TURNED if turned else voxels.STORED) if is_silent else ""
    return values[:, ::-1] if turned else values, pixel_size, cut
