"""From files to classes: of an image or of a volume, which are cut as in training; and how a volume is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats import voxels
from segmentation.data.formats.files import VOLUMES, positive, read_table, stem
from segmentation.data.formats.voxels import Cut
from segmentation.data.item import read_channels
from segmentation.data.pixels import Pixels, sitk, to_pixels
from segmentation.runs import whole_file
from segmentation.tasks import Task

Classify = Callable[[Pixels], NDArray[np.uint8]]


@dataclass(frozen=True)
class Prediction:
    """What was found in a case; `image` (h w c) is None for a volume, `classes` None where a file cannot be read."""

    files: Sequence[Path]  # of its channels, or one
    classes: NDArray[np.uint8] | None = None  # h w, or the voxels of a volume in the order of its file
    image: Pixels | None = None
    reason: str = ""


def predict_case(
    files: Sequence[Path], task: Task, classify: Classify, cuts: Sequence[Cut] = (), channel_files: int = 1
) -> Prediction:
    """Class numbers of an image, or of every slice of a volume, cut as the volumes of the training were.

    Where those of the training had `channel_files`, a volume must have as many, and an image in one file colours.
    """
    try:
        if files[0].name.lower().endswith(VOLUMES):
            if len(files) < channel_files:
                raise ValueError(f"{files[0]} is one of {channel_files} channels, as in the training: give all")
            return Prediction(files, predict_volume(files, task, classify, cuts))
        image = read_channels(task, files)
        if len(files) < channel_files and (image == image[..., :1]).all():
            raise ValueError(f"{files[0]} is grey, but images of the training had {channel_files} channels: give all")
        return Prediction(files, classify(image), image)
    except (ValueError, OSError) as error:
        return Prediction(files, reason=str(error))


def predict_volume(files: Sequence[Path], task: Task, classify: Classify, cuts: Sequence[Cut]) -> NDArray[np.uint8]:
    """Class numbers of all voxels of a volume, or of one per channel, in the order of the first file."""
    volumes = voxels.read_channels(files)
    laid = [voxels.lay(volume, cuts, path) for volume, path in zip(volumes, files, strict=True)]
    channels = [to_pixels(sitk.GetArrayFromImage(volume), path) for volume, path in zip(laid, files, strict=True)]
    found = []
    for planes in zip(*channels, strict=True):  # h w, of each channel
        found.append(classify(np.stack(planes, axis=2).repeat(task.in_channels // len(planes), axis=2)))
    labels = sitk.GetImageFromArray(np.stack(found))
    labels.CopyInformation(laid[0])
    # Axes were only exchanged and turned, so every voxel of the file has exactly one of these at its place.
    labels = sitk.Resample(labels, volumes[0], sitk.Transform(), sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(labels)


def write_volume(found: Prediction, path: Path) -> None:
    """Write class numbers as a volume on the grid of the (first) file they come from."""
    labels = sitk.GetImageFromArray(found.classes)
    voxels.copy_place(voxels.read_header(found.files[0]), labels)
    with whole_file(path) as draft:
        sitk.WriteImage(labels, str(draft), useCompression=True)


def read_pixel_sizes(table: Path) -> dict[str, float]:
    """Millimetres per pixel by the stems of file names, from a table as HC18 has them."""
    if not table.is_file():
        raise FileNotFoundError(f"pixel_size_csv {str(table)!r} does not exist")
    rows = read_table(table, ("filename", "pixel size"))
    return {stem(Path(row["filename"])): positive(place, row, "pixel size") for place, row in rows}
