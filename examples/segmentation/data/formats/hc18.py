"""HC18: training_set/ with outlines *_Annotation.png, and training_set_pixel_size_and_HC.csv."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.ellipse import fit_ellipse
from segmentation.data.formats import files
from segmentation.data.item import Item, Pixels, read_raw
from segmentation.tasks import Task

TABLE = "training_set_pixel_size_and_HC.csv"
TITLES = ("filename", "pixel size", "head circumference")
TOLERANCE = 4  # pixels: HC18's outlines are two pixels wide, none lies more than 1.5 beside its ellipse


def fits(folder: Path) -> bool:
    return any(_is_outline(path) for path in files.files_in(_training_set(folder), files.IMAGES))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image of the training set. The test set has no annotation and is not read.

    The group is the number that file names begin with: `010_HC` and `010_2HC` show the same head.
    """
    place = _training_set(folder)
    if len(task.labels) > 1:
        raise ValueError(f"{place} holds outlines of heads, one class: task {task.name!r} has {len(task.labels)}")
    paths = files.files_in(place, files.IMAGES)
    images = files.by_stem(path for path in paths if not _is_outline(path))
    pairs = files.pair_up(images, filter(_is_outline, paths), place, "_annotation")
    table = next((table for part in (place, *place.parents[:2]) if (table := part / TABLE).is_file()), None)
    if table is None:
        raise FileNotFoundError(
            f"{place.parent / TABLE} does not exist: it gives the pixel sizes, download it with HC18"
        )
    lengths = _read_table(table)
    if missing := sorted(images.keys() - lengths.keys()):
        raise ValueError(f"{table} has no row for {images[missing[0]]} ({len(missing)} such): use the table of HC18")
    return [
        Item.of_files(read_outlined, task, name, *pair, group=files.leading_number(name), **lengths[name])
        for name, *pair in pairs
    ]


def read_outlined(task: Task, image_path: Path, outline_path: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c), and the ellipse through an outline, filled (h w).

    The fit is right where the head leaves the frame and its outline is open, which no flood fill is.
    """
    image, outline = read_raw(task.in_channels, image_path, outline_path)
    points = np.argwhere(outline > outline.max() / 2)  # n 2
    try:
        ellipse = fit_ellipse(points)
    except ValueError as error:
        raise ValueError(f"{outline_path} holds no outline of a head ({error}): replace or remove it") from error
    beside = float((np.abs(ellipse.radii(*points.T) - 1) * ellipse.b).max())  # at most the distance to the ellipse
    if beside > TOLERANCE or ellipse.a > np.hypot(*outline.shape):
        raise ValueError(
            f"{outline_path} is not the outline of one ellipse: points lie {beside:.0f} pixels beside it, "
            f"and its longer half axis has {ellipse.a:.0f}; "
            "use the annotation as HC18 gives it, not filled and with nothing else drawn in"
        )
    return image, ellipse.fill(outline.shape).astype(np.uint8)


def _is_outline(path: Path) -> bool:
    return files.stem(path).lower().endswith("_annotation")


def _training_set(folder: Path) -> Path:
    """Where the images are: `training_set/`, the inner of a doubled one, or the folder itself."""
    return files.subfolder(folder, "training_set") or folder


def _read_table(table: Path) -> dict[str, dict[str, object]]:
    """`pixel_size` and `circumference` in mm of each image, by its stem."""
    columns, rows = files.read_rows(table)
    names = files.find_columns(table, columns, TITLES)
    lengths = {}
    for line, row in enumerate(rows, start=2):
        pixel, length = (files.positive(row.get(name, ""), name, f"{table} line {line}") for name in names[1:])
        lengths[files.stem(Path(row.get(names[0], "")))] = {"pixel_size": (pixel, pixel), "circumference": length}
    return lengths
