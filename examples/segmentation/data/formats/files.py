"""Finding files: what every format needs to know of folders, names and tables."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from segmentation.data.pixels import named

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
VOLUMES = (".mha", ".nii", ".nii.gz")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # how nnU-Net numbers the files of a case


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and what macOS adds to archives."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def subfolder(folder: Path, *names: str) -> Path | None:
    """The folder of the first of `names` there is, upper or lower case; of a doubled one (`name/name/`) the inner."""
    found = {path.name.lower(): path for path in reversed(subfolders(folder))}
    path = next((found[name.lower()] for name in names if name.lower() in found), None)
    return path and (subfolder(path, path.name) or path)


def files_in(folder: Path | None, endings: Sequence[str]) -> list[Path]:
    """The files in a folder that end in one of `endings`, upper or lower case, sorted, without hidden ones."""
    files = folder.iterdir() if folder else ()
    wanted = (path for path in files if path.name.lower().endswith(tuple(endings)) and path.name[0] != ".")
    return sorted(path for path in wanted if path.is_file())


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """The images and volumes given, and those in the folders given."""
    known = IMAGES + VOLUMES
    if missing := [str(path) for path in inputs if not path.exists()]:
        raise FileNotFoundError(f"input {missing[0]!r} does not exist: give an image, a volume or a folder of them")
    files = [file for path in inputs for file in (files_in(path, known) if path.is_dir() else [path])]
    files = list(dict.fromkeys(files))  # once, also where a folder and a file in it are given
    if odd := [str(path) for path in files if not path.name.lower().endswith(known)]:
        raise ValueError(f"input {odd[0]!r} is no image: files may end in {' '.join(known)}")
    if odd := [path for path in files if path.name.encode(errors="ignore") != os.fsencode(path.name)]:
        raise ValueError(f"input {str(odd[0])!r} has a name that is no UTF-8, which no table can hold: rename it")
    if not files:
        raise ValueError(f"no image in {[str(path) for path in inputs]}: files may end in {' '.join(known)}")
    return files


def join_channels(files: Sequence[Path], number: int) -> list[tuple[Path, ...]]:
    """The files of each case: its `number` channels as nnU-Net names them, or one file that holds them all."""
    if number == 1:
        return [(path,) for path in files]
    cases: dict[Path, list[Path]] = {}
    for path in sorted(files):
        match = CHANNEL.fullmatch(stem(path))
        cases.setdefault(path.parent / match[1] if match else path, []).append(path)
    for case, found in cases.items():
        names = [path.name for path in found]
        wanted = [f"{case.name}_{channel:04d}" for channel in range(number)]
        if len(found) > 1 and [stem(path) for path in found] != wanted:
            raise ValueError(
                f"{case} has the channel(s) {', '.join(names)}: give {number} as in the training, {wanted[0]} to "
                f"{wanted[-1]}, or one image that holds them"
            )
    return [tuple(found) for found in cases.values()]


def case_stem(files: Sequence[Path]) -> str:
    """The name of a case without an ending, and without the number of a channel where there are several files."""
    name = stem(files[0])
    return CHANNEL.fullmatch(name)[1] if len(files) > 1 else name


def stem(path: Path) -> str:
    """The name of a file without its ending, `.nii.gz` being one, and its accents in one way."""
    return re.sub(r"(\.nii(?=\.gz$))?\.[^.]+$", "", composed(path.name), flags=re.IGNORECASE)


def composed(name: str) -> str:
    """A name with its accents in one way: macOS stores them as characters of their own."""
    return unicodedata.normalize("NFC", name)


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


def bare_stem(path: Path, suffix: str) -> str:
    """The stem of a file without a suffix (a pattern)."""
    return re.sub(rf"({suffix})\Z", "", stem(path), flags=re.IGNORECASE)


def apart(files: Sequence[Path], suffix: str) -> tuple[list[Path], list[Path]]:
    """Files without and with a suffix (a pattern), for images and masks that lie in one folder."""
    masks = {path for path in files if bare_stem(path, suffix) != stem(path)}
    return [path for path in files if path not in masks], sorted(masks)


def pair_up(images: dict[str, Path], masks: Iterable[Path], suffix: str = "") -> list[tuple[str, Path, Path]]:
    """(name, image, mask) of all files, sorted. A mask is called as its image, or so with the `suffix` (a pattern)."""

    targets = by_stem(masks, lambda path: name if (name := stem(path)) in images else bare_stem(path, suffix))
    check_pairs(images, targets)
    return [(name, images[name], targets[name]) for name in sorted(images)]


def check_pairs(images: dict[str, Path], masks: dict[str, Path]) -> None:
    """Refuse an image without a mask of its name, and a mask without an image."""
    for files, others, other in ((images, masks, "mask"), (masks, images, "image")):
        if alone := sorted(files.keys() - others.keys()):
            raise FileNotFoundError(f"{files[alone[0]]} has no {other} ({len(alone)} such): add it or remove the file")


def read_table(table: Path, titles: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """(place, row) of each line of a CSV file: where it stands, as in "items.csv line 2", and its cells by their title.

    Titles are those of the columns in lower case without units, "pixel size" for "Pixel size(mm) "; these must be
    there. Blanks around cells are removed, and accents are stored in one way.
    """
    with (
        named(table, "read as a table", UnicodeDecodeError, csv.Error, fix="save it as CSV in UTF-8"),
        table.open(newline="", encoding="utf-8-sig") as stream,
    ):
        reader = csv.reader(stream, strict=True)
        lines = [(reader.line_num, [composed(cell.strip()) for cell in line]) for line in reader]
    (_, columns), *lines = [(number, line) for number, line in lines if any(line)] or [(1, [])]
    found = [column.partition("(")[0].strip().lower() for column in columns]
    if missing := [title for title in titles if title not in found]:
        raise ValueError(
            f"{table} lacks the column(s) {', '.join(missing)}: it begins with {','.join(columns)[:99]!r}, and needs "
            f"{', '.join(titles)}, separated by commas"
        )
    rows = ((number, dict.fromkeys(titles, "") | dict(zip(found, line, strict=False))) for number, line in lines)
    return [(f"{table} line {number}", row) for number, row in rows]


def positive(place: str, row: dict[str, str], title: str) -> float:
    """A length in mm from a row of a table."""
    try:
        value = float(row[title])
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{place}: {title} is {row[title]!r}, which is no positive number of millimetres")
    return value
