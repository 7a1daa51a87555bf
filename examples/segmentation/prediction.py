"""From files to masks of their own size: class numbers of an image or of a volume, and how they are written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.ellipse import head_circumference
from segmentation.data.formats.files import VOLUMES, positive, read_table, stem
from segmentation.data.formats.voxels import Cut, copy_place, lay, read_header, read_volume
from segmentation.data.pixels import Pixels, read_image, sitk, to_pixels
from segmentation.figures import overlay
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
    classes: NDArray[np.uint8] = sitk.GetArrayFromImage(labels)
    return classes


def check_outputs(files: Sequence[Path], table: Path | None, out: Path) -> None:
    """Refuse to write over an input, or two masks or overlays to one file, before anything is written."""
    for path in [*files, *([table] if table else [])]:
        places = (path.resolve(), path.parent.resolve() / path.name)  # what a link leads to, and the link
        if any(out.resolve() in place.parents for place in places):
            raise ValueError(
                f"out {str(out)!r} holds the input {str(path)!r}, which stays as it is: give another folder"
            )
    refuse_twins((name, path) for path in files for name in output_names(path))


def output_names(path: Path) -> tuple[str, ...]:
    """The files that come of an input: a volume, or mask and overlay."""
    name = stem(path)
    return (f"{name}.mha",) if path.name.lower().endswith(VOLUMES) else (f"{name}.png", f"{name}-overlay.png")


def refuse_twins(names: Iterable[tuple[str, object]]) -> None:
    """Refuse (name, source) of two sources that would be written to one file."""
    taken: dict[str, object] = {}
    for name, source in names:
        if (first := taken.setdefault(name, source)) != source:
            raise ValueError(f"{first} and {source} would both be written as {name!r}: rename one of them")


def write_prediction(found: Prediction, task: Task, out: Path, sizes: dict[str, float]) -> dict[str, Any]:
    """Write the mask and overlay of an image, or the volume; the row of predictions.csv."""
    classes, (mask, *overlays) = found.classes, (out / name for name in output_names(found.path))
    row: dict[str, Any] = {"file": found.path.name, "foreground": int((classes > 0).sum())}
    if found.image is None:
        write_volume(found, mask)
        return row
    write_mask(classes, task, mask)
    save(Image.fromarray(overlay(found.image, classes)), overlays[0])
    if sizes:
        size = sizes.get(stem(found.path))
        if size is None:
            warnings.warn(f"no pixel size is given for {found.path.name}: its hc_mm stays empty", stacklevel=2)
        row["hc_mm"] = None if size is None else head_circumference(classes, (size, size))
    return row


def write_mask(classes: NDArray[np.uint8], task: Task, path: Path) -> None:
    """Write class numbers (h w) as the task's label values."""
    save(Image.fromarray(np.array([0, *task.labels], np.uint8)[classes]), path)


def write_volume(found: Prediction, path: Path) -> None:
    """Write class numbers as a volume on the grid of the file they come from."""
    labels = sitk.GetImageFromArray(found.classes)
    copy_place(read_header(found.path), labels)
    with whole_file(path) as draft:
        sitk.WriteImage(labels, str(draft), useCompression=True)


def save(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all."""
    with whole_file(path) as draft:
        image.save(draft)


def read_pixel_sizes(table: Path) -> dict[str, float]:
    """Millimetres a pixel by the stems of file names, from a table as HC18 has them."""
    if not table.is_file():
        raise FileNotFoundError(f"pixel_size_csv {str(table)!r} does not exist")
    rows = read_table(table, ("filename", "pixel size"))
    return {stem(Path(row["filename"])): positive(place, row, "pixel size") for place, row in rows}
