"""Data sets as people download them: one module a format, and `find_items`, which tells them apart."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from segmentation.data.formats import busi, folders, hc18, isic, myosegmentum, nnunet, spider, table
from segmentation.data.formats.files import subfolders
from segmentation.data.item import Item
from segmentation.tasks import Task

# A module has `fits(folder)`, `items(task, folder)` and says in its docstring what fits. The first is taken.
FORMATS = (table, isic, hc18, busi, nnunet, spider, myosegmentum, folders)
DEPTH = 5  # how far below the given folder the data set may lie


def find_items(task: Task, folder: Path) -> list[Item]:
    """The items of a data folder, sorted by id: images are found and paired with their masks, and read when used.

    `folder` may also be one that holds exactly one data set, such as what an archive was unpacked into.
    """
    name = f"data.folder {str(folder)!r}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} is not a folder: give the folder with images/, masks/, items.csv, or a data set as downloaded"
        )
    hits = _search(folder, DEPTH)
    if len(hits) > 1:
        raise ValueError(f"{name} holds {len(hits)} data sets: give one of" + "".join(f"\n  {hit}" for _, hit in hits))
    if not hits:
        known = "".join(f"\n  {' '.join((known.__doc__ or '').split())}" for known in FORMATS)
        raise ValueError(f"{name} holds nothing that is understood. Understood are:{known}")
    [(found, place)] = hits
    items = sorted(found.items(task, place), key=lambda item: item.id)
    if not items:
        raise ValueError(f"data.folder {str(place)!r} holds no image with a label of task {task.name!r}")
    return items


def _search(folder: Path, depth: int) -> list[tuple[ModuleType, Path]]:
    """All data sets in a folder; inside of one no other is looked for."""
    if found := next((known for known in FORMATS if known.fits(folder)), None):
        return [(found, folder)]
    return [hit for inner in subfolders(folder) for hit in _search(inner, depth - 1)] if depth else []
