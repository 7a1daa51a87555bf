"""From files to classes: of an image or of a volume, which are cut as in training; and how a volume is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats.files import VOLUMES, positive, read_table, stem
from segmentation.data.formats.voxels import Cut, copy_place, lay, read_header, read_volume
from segmentation.data.pixels import Pixels, read_image, sitk, to_pixels
from segmentation.runs import whole_file
from segmentation.tasks import Task

Classify = Callable[[Pixels], NDArray[np.uint8]]


@dataclass(frozen=True)
class Prediction:
    """What was found in a file; `image` (h w c) is None for a volume, `classes` None where the file cannot be read."""

    path: Path
    classes: NDArray[np.uint8] | None = None  # h w, or the voxels of a volume in the order of its file
    image: Pixels | None = None
    reason: str = ""


def predict_file(path: Path, task: Task, classify: Classify, cuts: Sequence[Cut] = ()) -> Prediction:
    """Class numbers of an image, or of every slice of a volume, cut as the volumes of the training were."""
    try:
        if path.name.lower().endswith(VOLUMES):
            return Prediction(path, predict_volume(path, task, classify, cuts))
        image = read_image(path, task.in_channels)
        return Prediction(path, classify(image), image)
    except (ValueError, OSError) as error:
        return Prediction(path, reason=str(error))


def predict_volume(path: Path, task: Task, classify: Classify, cuts: Sequence[Cut]) -> NDArray[np.uint8]:
    """Class numbers of all voxels of a volume, in the order of its file."""
    volume = read_volume(path)
    laid = lay(volume, cuts, path)
    planes = to_pixels(sitk.GetArrayFromImage(laid), path)  # s h w
    colours = (plane[..., None].repeat(task.in_channels, axis=2) for plane in planes)
    labels = sitk.GetImageFromArray(np.stack([classify(plane) for plane in colours]))
    labels.CopyInformation(laid)
    # Axes were only exchanged and turned, so every voxel of the file has exactly one of these at its place.
    labels = sitk.Resample(labels, volume, sitk.Transform(), sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(labels)


def write_volume(found: Prediction, path: Path) -> None:
    """Write class numbers as a volume on the grid of the file they come from."""
    labels = sitk.GetImageFromArray(found.classes)
    copy_place(read_header(found.path), labels)
    with whole_file(path) as draft:
        sitk.WriteImage(labels, str(draft), useCompression=True)


def read_pixel_sizes(table: Path) -> dict[str, float]:
    """Millimetres per pixel by the stems of file names, from a table as HC18 has them."""
    if not table.is_file():
        raise FileNotFoundError(f"pixel_size_csv {str(table)!r} does not exist")
    rows = read_table(table, ("filename", "pixel size"))
    return {stem(Path(row["filename"])): positive(place, row, "pixel size") for place, row in rows}
