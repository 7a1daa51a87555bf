"""From files to masks of their own size: class numbers of an image or of a volume, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data import simpleitk
from segmentation.data.ellipse import head_circumference
from segmentation.data.formats.files import VOLUMES, positive, read_rows, stem
from segmentation.data.formats.voxels import read_volume, sagittal, to_pixels
from segmentation.data.item import Pixels, read_image
from segmentation.figures import overlay
from segmentation.runs import whole_file
from segmentation.tasks import Task

Classify = Callable[[Pixels], NDArray[np.uint8]]


@dataclass(frozen=True)
class Prediction:
    """What was found in a file; `image` (h w c) is None for a volume, `classes` None where the file cannot be read."""

    path: Path
    classes: NDArray[np.uint8] | None = None  # h w, or s h w: sagittal slices
    image: Pixels | None = None
    reason: str = ""


def predict_file(path: Path, task: Task, classify: Classify) -> Prediction:
    """Class numbers of an image, or of every sagittal slice of a volume."""
    try:
        if path.name.lower().endswith(VOLUMES):
            planes = to_pixels(simpleitk.GetArrayFromImage(sagittal(read_volume(path))), path)  # s h w
            colours = (plane[..., None].repeat(task.in_channels, axis=2) for plane in planes)
            return Prediction(path, np.stack([classify(plane) for plane in colours]))
        image = read_image(path, task.in_channels)
        return Prediction(path, classify(image), image)
    except (ValueError, OSError) as error:
        return Prediction(path, reason=str(error))


def write_prediction(found: Prediction, task: Task, out: Path, sizes: dict[str, float]) -> dict[str, Any]:
    """Write the mask and overlay of an image, or the volume; the row of predictions.csv."""
    name, classes = stem(found.path), found.classes
    row: dict[str, Any] = {"file": found.path.name, "foreground": int((classes > 0).sum())}
    if found.image is None:
        write_volume(found, out / f"{name}.mha")
        return row
    write_mask(classes, task, out / f"{name}.png")
    save(Image.fromarray(overlay(found.image, classes)), out / f"{name}-overlay.png")
    if sizes:
        size = sizes.get(found.path.name)
        row["hc_mm"] = None if size is None else head_circumference(classes, (size, size))
    return row


def write_mask(classes: NDArray[np.uint8], task: Task, path: Path) -> None:
    """Write class numbers (h w) as the task's label values."""
    save(Image.fromarray(np.array([0, *task.labels], np.uint8)[classes]), path)


def write_volume(found: Prediction, path: Path) -> None:
    """Write class numbers (s h w) as a volume on the grid of the file they come from."""
    volume = read_volume(found.path)
    labels = simpleitk.GetImageFromArray(found.classes)
    labels.CopyInformation(sagittal(volume))
    # Axes were only exchanged and turned, so every voxel of the file has exactly one of these at its place.
    labels = simpleitk.Resample(labels, volume, simpleitk.Transform(), simpleitk.sitkNearestNeighbor)
    with whole_file(path) as draft:
        simpleitk.WriteImage(labels, str(draft), useCompression=True)


def save(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all."""
    with whole_file(path) as draft:
        image.save(draft)


def read_pixel_sizes(table: Path) -> dict[str, float]:
    """Millimetres a pixel of each file name, from a table as HC18 has them."""
    if not table.is_file():
        raise FileNotFoundError(f"pixel_size_csv {str(table)!r} does not exist")
    columns, rows = read_rows(table)
    titles = {column.lower().replace(" ", ""): column for column in columns}
    if missing := [title for title in ("filename", "pixelsize(mm)") if title not in titles]:
        raise ValueError(f"{table} has no column {missing[0]!r}: it needs filename and pixel size(mm)")
    name, size = titles["filename"], titles["pixelsize(mm)"]
    return {row[name]: positive(row[size], size, f"{table} line {line}") for line, row in enumerate(rows, start=2)}
