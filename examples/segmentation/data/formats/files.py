"""Finding files: what every format needs to know of folders, names and tables."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from segmentation.data.item import named

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
VOLUMES = (".mha", ".nii", ".nii.gz")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and what macOS adds to archives."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def subfolder(folder: Path, name: str) -> Path | None:
    """The folder `name` in a folder, upper or lower case; of a doubled one (`name/name/`) the inner."""
    path = next((path for path in subfolders(folder) if path.name.lower() == name.lower()), None)
    return path and (subfolder(path, name) or path)


def first_subfolder(folder: Path, names: Iterable[str]) -> Path | None:
    """The folder in a folder that has the first of `names` that there is."""
    return next(filter(None, (subfolder(folder, name) for name in names)), None)


def files_in(folder: Path | None, endings: Sequence[str]) -> list[Path]:
    """The files in a folder that end in one of `endings`, upper or lower case, sorted, without hidden ones."""
    files = folder.iterdir() if folder else ()
    wanted = (path for path in files if path.name.lower().endswith(tuple(endings)) and path.name[0] != ".")
    return sorted(path for path in wanted if path.is_file())


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """The images and volumes given, and those in the folders given; two that would have one name are refused."""
    if missing := [str(path) for path in inputs if not path.exists()]:
        raise FileNotFoundError(f"input {missing[0]!r} does not exist: give an image, a volume or a folder of them")
    files = [file for path in inputs for file in (files_in(path, IMAGES + VOLUMES) if path.is_dir() else [path])]
    if odd := [str(path) for path in files if not path.name.lower().endswith(IMAGES + VOLUMES)]:
        raise ValueError(f"input {odd[0]!r} is no image: files may end in {' '.join(IMAGES + VOLUMES)}")
    if not files:
        raise ValueError(f"no image in {[str(path) for path in inputs]}: files may end in {' '.join(IMAGES + VOLUMES)}")
    found: dict[str, Path] = {}
    for path in files:
        if (first := found.setdefault(stem(path), path)) is not path:
            raise ValueError(f"{first} and {path} would both be written as {stem(path)!r}: rename one of them")
    return files


def stem(path: Path) -> str:
    """The name of a file without its ending, `.nii.gz` being one, and its accents in one way."""
    return re.sub(r"(\.nii(?=\.gz$))?\.[^.]+$", "", composed(path.name), flags=re.IGNORECASE)


def composed(name: str) -> str:
    """A name with its accents in one way: macOS stores them as characters of their own."""
    return unicodedata.normalize("NFC", name)


def existing(path: Path) -> Path | None:
    """The file, which may be stored with its accents in another way than `path` has them; None without it."""
    if path.is_file() or not path.parent.is_dir():
        return path if path.is_file() else None
    return next((file for file in path.parent.iterdir() if composed(file.name) == composed(path.name)), None)


def leading_number(name: str) -> str:
    """The number that a name begins with, or all of the name where it begins with none."""
    return re.match(r"\d+|.*", name)[0]


def by_stem(paths: Iterable[Path], name: Callable[[Path], str] = stem) -> dict[str, Path]:
    """Files by their stem, or by what `name` makes of them. Two of one name are refused."""
    found: dict[str, Path] = {}
    for path in paths:
        if (first := found.setdefault(name(path), path)) is not path:
            raise ValueError(f"{path} and {first.name} both belong to {name(path)!r}: keep one of the two")
    return found


def pair_up(
    images: dict[str, Path], masks: Iterable[Path], folder: Path, *suffixes: str
) -> list[tuple[str, Path, Path]]:
    """(name, image, mask) of all files, sorted. A mask (in `folder`) is called as its image, or so with a suffix added.

    An image without mask, or a mask without image, is an error.
    """

    def image_stem(path: Path) -> str:
        name = stem(path)
        ending = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
        return name if name in images else name[: len(name) - len(ending)]

    targets = by_stem(masks, image_stem)
    check_alone(images, targets, f"has no mask in {folder}", "add the masks or remove the images")
    check_alone(targets, images, "has no image", "add the images or remove the masks")
    return [(name, images[name], targets[name]) for name in sorted(images)]


def check_alone(files: dict[str, Path], others: Iterable[str], trouble: str, fix: str) -> None:
    """Refuse files whose names are not among the `others`."""
    if alone := sorted(files.keys() - set(others)):
        raise FileNotFoundError(f"{files[alone[0]]} {trouble} ({len(alone)} such): {fix}")


def read_rows(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a csv file, blanks around names and values removed and accents stored in one way."""
    with (
        named(table, "read as a table", UnicodeDecodeError, csv.Error, fix="save it as CSV in UTF-8"),
        table.open(newline="", encoding="utf-8-sig") as stream,
    ):
        lines = [[composed(cell.strip()) for cell in line] for line in csv.reader(stream, strict=True)]
    columns, *lines = [line for line in lines if any(line)] or [[]]
    return columns, [dict(zip(columns, line, strict=False)) for line in lines]


def find_columns(table: Path, columns: Sequence[str], titles: Sequence[str]) -> list[str]:
    """The columns that are called so, whatever their capitals, blanks and units, as in "pixel size(mm) "."""
    names = {column.partition("(")[0].strip().lower(): column for column in columns}
    if missing := [title for title in titles if title not in names]:
        raise ValueError(
            f"{table} lacks the column(s) {', '.join(missing)}: it begins with {','.join(columns)[:99]!r}, and needs "
            f"{', '.join(titles)}, separated by commas"
        )
    return [names[title] for title in titles]


def positive(text: str, column: str, place: str) -> float:
    """A length in mm from a table; `place` tells where it stands."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{place}: {column} is {text!r}, which is no positive number of millimetres")
    return value
