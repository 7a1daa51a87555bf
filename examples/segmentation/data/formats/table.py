"""Any: images/, masks/<id>.png and items.csv with the columns id, file, group (and split, pixel_size_mm, hc_mm)."""

from __future__ import annotations

from pathlib import Path

from segmentation.data.formats.files import existing, find_columns, positive, read_rows
from segmentation.data.item import Item, read_pair
from segmentation.tasks import Task

COLUMNS = ("id", "file", "group")
LENGTHS = ("pixel_size_mm", "resized_pixel_size_mm", "hc_mm")


def fits(folder: Path) -> bool:
    return (folder / "items.csv").is_file()


def items(task: Task, folder: Path) -> list[Item]:
    """The items that `items.csv` lists; every file it names must be there.

    `split` (train, val, test), `pixel_size_mm` and `hc_mm` are read where they stand. `resized_pixel_size_mm` goes
    before `pixel_size_mm`: it belongs to the file in `images/`, the other to the file it was made from.
    """
    table = folder / "items.csv"
    columns, rows = read_rows(table)
    names = find_columns(table, columns, COLUMNS)
    if not rows:
        raise ValueError(f"{table} lists no images: the data folder {str(folder)!r} is empty")
    rows = [row | {title: row.get(name, "") for title, name in zip(COLUMNS, names, strict=True)} for row in rows]
    return [_item(task, folder, row, f"{table} line {line}") for line, row in enumerate(rows, start=2)]


def _item(task: Task, folder: Path, row: dict[str, str], place: str) -> Item:
    if empty := [column for column in COLUMNS if not row.get(column)]:
        raise ValueError(f"{place}: {empty[0]} is empty; every image needs an id, a file and a group")
    files = []
    for path in (folder / "images" / row["file"], folder / "masks" / f"{row['id']}.png"):
        if (file := existing(path)) is None:
            raise FileNotFoundError(f"{place}: {path} does not exist; add the file or remove the line")
        files.append(file)
    lengths = {column: positive(row[column], column, place) for column in LENGTHS if row.get(column)}
    pixel = lengths.get("resized_pixel_size_mm", lengths.get("pixel_size_mm"))
    facts = {"split": row.get("split", ""), "circumference": lengths.get("hc_mm")}
    return Item.of_files(
        read_pair, task, row["id"], *files, group=row["group"], pixel_size=pixel and (pixel, pixel), **facts
    )
