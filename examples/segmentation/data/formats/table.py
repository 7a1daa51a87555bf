"""Any: images/, masks/<id>.png and items.csv with the columns id, file, group (and split, pixel_size_mm, hc_mm)."""

from __future__ import annotations

from pathlib import Path

from segmentation.data.formats.files import composed, positive, read_table
from segmentation.data.item import Item, read_files
from segmentation.tasks import Task

TITLES = ("id", "file", "group")
LENGTHS = ("pixel_size_mm", "resized_pixel_size_mm", "hc_mm")


def fits(folder: Path) -> bool:
    return (folder / "items.csv").is_file()


def items(task: Task, folder: Path) -> list[Item]:
    """The items that `items.csv` lists; every file it names must be there.

    `split` (train, val, test), `pixel_size_mm` and `hc_mm` are read where they stand. `resized_pixel_size_mm` goes
    before `pixel_size_mm`: it belongs to the file in `images/`, the other to the file it was made from.
    """
    rows = read_table(folder / "items.csv", TITLES)
    if not rows:
        raise ValueError(f"{folder / 'items.csv'} lists no images")
    return [_item(task, folder, *row) for row in rows]


def _item(task: Task, folder: Path, place: str, row: dict[str, str]) -> Item:
    if empty := [title for title in TITLES if not row[title]]:
        raise ValueError(f"{place}: {empty[0]} is empty; every image needs an id, a file and a group")
    files = [_existing(folder / "images" / row["file"], place), _existing(folder / "masks" / f"{row['id']}.png", place)]
    lengths = {title: positive(place, row, title) for title in LENGTHS if row.get(title)}
    pixel = lengths.get("resized_pixel_size_mm", lengths.get("pixel_size_mm"))
    facts = {"split": row.get("split", ""), "circumference": lengths.get("hc_mm")}
    return Item.of_files(
        read_files, task, row["id"], *files, group=row["group"], pixel_size=pixel and (pixel, pixel), **facts
    )


def _existing(path: Path, place: str) -> Path:
    """The file, which may be stored with its accents in another way than `path` has them."""
    if path.is_file():
        return path
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    if not (found := [file for file in beside if composed(file.name) == composed(path.name)]):
        raise FileNotFoundError(f"{place}: {path} does not exist; add the file or remove the line")
    return found[0]
