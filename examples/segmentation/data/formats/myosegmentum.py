"""MyoSegmenTUM: a folder of NN.mat with the image I and the vertebrae GT, both h w s."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from segmentation.data.formats.files import by_stem, files_in
from segmentation.data.formats.voxels import SAGITTAL, STORED
from segmentation.data.item import Item, bone_classes, slice_items
from segmentation.data.pixels import Pixels, named, to_pixels, to_values
from segmentation.tasks import Task

# Its labels count from the top: 1 is L1.
CLASSES = {
    "lumbar_spine": {"L1": [1], "L2": [2], "L3": [3], "L4": [4], "L5": [5]},
    "spine_vertebrae": {"vertebra": range(1, 6)},
}
LEGEND = "but in GT 1 to 5 are L1 to L5, and 0 is background"


def fits(folder: Path) -> bool:
    return bool(files_in(folder, (".mat",)))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per sagittal slice, called `<name>_<slice in the file>`; only slices that hold a label of the task.

    Every file is a subject. The files do not say how large their pixels are.
    """
    found = []
    for name, path in by_stem(files_in(folder, (".mat",))).items():
        classes = bone_classes(task, CLASSES, path, LEGEND)
        facts = {"group": name, "cut": (SAGITTAL, STORED)}
        found += slice_items(task, name, [path], read_matlab, read_matlab(path)[1], classes, **facts)
    return found


def read_matlab(path: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w 1) and mask values (s h w). Some files have one more slice in GT than in I; it is left out."""
    with named(path, "read as a MATLAB file", Exception):  # SciPy raises whatever its parser meets in a damaged file
        content = loadmat(path, variable_names=["I", "GT"])
    if missing := {"I", "GT"} - content.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it needs the image I and the mask GT")
    image, mask = content["I"], content["GT"]
    same = image.ndim == mask.ndim == 3 and mask.shape[:2] == image.shape[:2]
    if not same or mask.shape[2] - image.shape[2] not in (0, 1):
        raise ValueError(f"{path} holds GT of the shape {mask.shape} for I of {image.shape}: both must be of one shape")
    image, values = (np.moveaxis(voxels, 2, 0) for voxels in (image, mask[..., : image.shape[2]]))  # s h w
    return to_pixels(image, path)[..., None], to_values(values, path)
