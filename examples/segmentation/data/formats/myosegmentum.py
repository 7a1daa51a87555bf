"""MyoSegmenTUM volumes as MATLAB files: `NN.mat` with the image `I` and the vertebrae `GT`, both h w s."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from segmentation.data.formats.files import by_stem, files_in
from segmentation.data.formats.voxels import Voxels, number, presets, slice_items, to_pixels, to_values
from segmentation.data.item import Item, Pixels
from segmentation.tasks import Task

DESCRIPTION = "MyoSegmenTUM: a folder of NN.mat with I and GT"
KNOWN = range(6)

# Its labels count from the top: 1 is L1.
CLASSES: dict[str, Voxels] = {
    "lumbar_spine": {f"L{k}": (range(k, k + 1),) for k in range(1, 6)},
    "spine_vertebrae": {"vertebra": (range(1, 6),)},
}


def fits(folder: Path) -> bool:
    return bool(files_in(folder, (".mat",)))


def items(task: Task, folder: Path) -> list[Item]:
    """One item a sagittal slice, called `<name>_<slice in the file>`; only slices that hold a label of the task.

    Every file is a subject. The files do not say how large their pixels are.
    """
    classes = partial(number, ranges=presets(task, CLASSES, folder))
    found = []
    for name, path in by_stem(files_in(folder, (".mat",))).items():
        found += slice_items(task, name, name, (path,), read_matlab(path)[1], classes, read_matlab)
    return found


def read_matlab(path: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w 1) and mask values (s h w). Some files have one more slice in GT than in I; it is left out."""
    try:
        content = loadmat(path, variable_names=["I", "GT"])
    except Exception as error:  # of a damaged file SciPy raises whatever its parser meets
        raise ValueError(f"{path} cannot be read as a MATLAB file ({error}): replace or remove it") from error
    if missing := {"I", "GT"} - content.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it needs the image I and the mask GT")
    image, mask = content["I"], content["GT"]
    if (
        image.ndim != 3
        or mask.ndim != 3
        or mask.shape[:2] != image.shape[:2]
        or len(mask.T) - len(image.T) not in (0, 1)
    ):
        raise ValueError(f"{path} holds GT of the shape {mask.shape} for I of {image.shape}: both must be of one shape")
    values = np.moveaxis(to_values(mask, path), 2, 0)[: image.shape[2]]  # s h w
    if odd := [value for value in np.unique(values).tolist() if value not in KNOWN]:
        raise ValueError(f"{path} holds the value {odd[0]} in GT: 1 to 5 are L1 to L5, 0 is background")
    return to_pixels(np.moveaxis(image, 2, 0), path)[..., None], values
