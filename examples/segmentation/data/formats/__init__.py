"""Data sets as people download them: one module a layout, and `find_items`, which tells them apart."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from segmentation.data.formats import busi, folders, hc18, isic, myosegmentum, nnunet, spider, table
from segmentation.data.formats.files import subfolders
from segmentation.data.item import Item
from segmentation.tasks import Task

# A module has `fits(folder)`, `items(task, folder)` and a DESCRIPTION. The first that fits is taken.
LAYOUTS = (table, isic, hc18, busi, nnunet, spider, myosegmentum, folders)
DEPTH = 5  # how far below the given folder the data set may lie


def find_items(task: Task, folder: Path) -> list[Item]:
    """The items of a data folder, sorted by id: images are found and paired with their masks, and read when used.

    `folder` may also be one that holds exactly one data set, such as what an archive was unpacked into.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data-dir {str(folder)!r} is not a folder: give the folder with images/, masks/, items.csv, "
            "or a data set as it was downloaded"
        )
    layout, place = _recognise(folder)
    found = sorted(layout.items(task, place), key=lambda item: item.id)
    if not found:
        raise ValueError(f"data-dir {str(place)!r} holds no image with a label of task {task.name!r}")
    return found


def _recognise(folder: Path) -> tuple[ModuleType, Path]:
    """The layout of a folder, or of the only data set below it, and where that lies."""
    hits = _search(folder, DEPTH)
    if len(hits) > 1:
        names = "".join(f"\n  {place}" for _, place in hits)
        raise ValueError(f"data-dir {str(folder)!r} holds {len(hits)} data sets: give one of{names}")
    if not hits:
        known = "".join(f"\n  {layout.DESCRIPTION}" for layout in LAYOUTS)
        raise ValueError(f"data-dir {str(folder)!r} holds nothing that is understood. Understood are:{known}")
    return hits[0]


def _search(folder: Path, depth: int) -> list[tuple[ModuleType, Path]]:
    """All data sets in a folder; inside of one no other is looked for."""
    if layout := next((layout for layout in LAYOUTS if layout.fits(folder)), None):
        return [(layout, folder)]
    return [hit for inner in subfolders(folder) for hit in _search(inner, depth - 1)] if depth else []
