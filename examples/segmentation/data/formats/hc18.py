"""HC18: training_set/ with outlines *_Annotation.png, and training_set_pixel_size_and_HC.csv."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.ellipse import fit_ellipse
from segmentation.data.formats import files
from segmentation.data.item import Item
from segmentation.data.pixels import Pixels, check_sizes, read_image, read_values
from segmentation.tasks import Task

TABLE = "training_set_pixel_size_and_HC.csv"
TITLES = ("filename", "pixel size", "head circumference")
OUTLINE = "_annotation"
TOLERANCE = 4  # pixels: HC18's outlines are two pixels wide, none lies more than 1.5 beside its ellipse


def fits(folder: Path) -> bool:
    return bool(files.apart(files.files_in(_training_set(folder), files.IMAGES), OUTLINE)[1])


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image of the training set. The test set has no annotation and is not read.

    The group is the number that file names begin with: `010_HC` and `010_2HC` show the same head.
    """
    place = _training_set(folder)
    if len(task.labels) > 1:
        raise ValueError(f"{place} holds outlines of heads, one class: task {task.name!r} has {len(task.labels)}")
    table = next((table for part in (place, *place.parents[:2]) if (table := part / TABLE).is_file()), None)
    if table is None:
        raise FileNotFoundError(f"{place.parent / TABLE} is missing: it gives the pixel sizes, download it with HC18")
    rows = {files.stem(Path(row["filename"])): (place, row) for place, row in files.read_table(table, TITLES)}
    images, outlines = files.apart(files.files_in(place, files.IMAGES), OUTLINE)
    found = []
    for name, *pair in files.pair_up(files.by_stem(images), outlines, OUTLINE):
        if name not in rows:
            raise ValueError(f"{table} has no row for {pair[0]}: use the table of HC18")
        size, length = (files.positive(*rows[name], title) for title in TITLES[1:])
        facts = {"group": files.leading_number(name), "pixel_size": (size, size), "circumference": length}
        found.append(Item.of_files(read_outlined, task, name, *pair, **facts))
    return found


def read_outlined(task: Task, image_path: Path, outline_path: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c), and the ellipse through an outline, filled (h w).

    The fit is right where the head leaves the frame and its outline is open, which no flood fill is.
    """
    image, outline = read_image(image_path, task.in_channels), read_values(outline_path)
    check_sizes(image.shape[1::-1], image_path, outline.shape[::-1], outline_path)
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


def _training_set(folder: Path) -> Path:
    """Where the images are: `training_set/`, the inner of a doubled one, or the folder itself."""
    return files.subfolder(folder, "training_set") or folder
