"""HC18 as Zenodo hands it out: `training_set/` with ellipse outlines, and a table of pixel sizes and circumferences."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.ellipse import fit_ellipse
from segmentation.data.formats.files import (
    IMAGES,
    by_stem,
    files_in,
    leading_number,
    masks_by_stem,
    pair_up,
    positive,
    read_rows,
    stem,
    subfolder,
)
from segmentation.data.item import Item, Pixels, check_sizes, read_image, read_values
from segmentation.tasks import Task

DESCRIPTION = "HC18: training_set/ with *_Annotation.png, and training_set_pixel_size_and_HC.csv"
TABLE = "training_set_pixel_size_and_HC.csv"
TOLERANCE = 4  # pixels: HC18's outlines are two pixels wide, none lies more than 1.5 beside its ellipse


def fits(folder: Path) -> bool:
    return any(_is_outline(path) for path in files_in(_training_set(folder), IMAGES))


def items(task: Task, folder: Path) -> list[Item]:
    """One item an image of the training set. The test set has no annotation and is not read.

    The group is the number that file names begin with: `010_HC` and `010_2HC` show the same head.
    """
    place = _training_set(folder)
    if len(task.labels) > 1:
        raise ValueError(f"{place} holds outlines of heads, one class: task {task.name!r} has {len(task.labels)}")
    files = files_in(place, IMAGES)
    images = by_stem(path for path in files if not _is_outline(path))
    outlines = masks_by_stem((path for path in files if _is_outline(path)), images, "_annotation")
    table = _find_table(place)
    lengths = _read_table(table)
    if missing := sorted(images.keys() - lengths.keys()):
        raise ValueError(f"{table} has no row for {images[missing[0]]} ({len(missing)} such): use the table of HC18")
    return [
        Item(
            name,
            leading_number(image),
            partial(read_outlined, task, image, outline),
            files=(image, outline),
            pixel_size=(lengths[name][0], lengths[name][0]),
            circumference=lengths[name][1],
        )
        for name, image, outline in pair_up(images, outlines, place)
    ]


def read_outlined(task: Task, image_path: Path, outline_path: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c), and the ellipse through an outline, filled (h w).

    The fit is right where the head leaves the frame and its outline is open, which no flood fill is.
    """
    image, outline = read_image(image_path, task.in_channels), read_values(outline_path)
    check_sizes(image, image_path, outline, outline_path)
    points = np.argwhere(outline > outline.max() / 2)  # n 2
    try:
        ellipse = fit_ellipse(points)
    except ValueError as error:
        raise ValueError(f"{outline_path} holds no outline of a head ({error}): replace or remove it") from error
    radii = ellipse.radii(*points.T.astype(np.float64))
    beside = float((np.abs(radii - 1) * ellipse.b).max())  # at most the distance to the ellipse
    if beside > TOLERANCE:
        raise ValueError(
            f"{outline_path} is not the outline of one ellipse: points lie {beside:.0f} pixels beside it; "
            "use the annotation as HC18 gives it, not filled and with nothing else drawn in"
        )
    return image, ellipse.fill(outline.shape).astype(np.uint8)


def _is_outline(path: Path) -> bool:
    return stem(path).lower().endswith("_annotation")


def _training_set(folder: Path) -> Path:
    """Where the images are: `training_set/`, the inner of a doubled one, or the folder itself."""
    return subfolder(folder, "training_set") or folder


def _find_table(images: Path) -> Path:
    """The table beside the folder of the images, in it, or beside a doubled one."""
    for place in (images, *images.parents[:2]):
        if (place / TABLE).is_file():
            return place / TABLE
    raise FileNotFoundError(f"{images.parent / TABLE} does not exist: it gives the pixel sizes, download it with HC18")


def _read_table(table: Path) -> dict[str, tuple[float, float]]:
    """(pixel size, circumference) in mm of each image, by its stem."""
    columns, rows = read_rows(table)
    names = [_column(columns, title, table) for title in ("filename", "pixel size", "head circumference")]
    lengths = {}
    for line, row in enumerate(rows, start=2):
        pixel, circumference = (positive(row.get(name, ""), name, f"{table} line {line}") for name in names[1:])
        lengths[Path(row.get(names[0], "")).stem] = (pixel, circumference)
    return lengths


def _column(columns: list[str], title: str, table: Path) -> str:
    """The column whose name begins with `title`; the units that follow it are written in several ways."""
    for column in columns:
        if column.lower().startswith(title):
            return column
    raise ValueError(f"{table} lacks the column {title!r}: use the table that comes with HC18")
