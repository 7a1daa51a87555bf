"""Finding files: what every layout needs to know of folders, names and tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
VOLUMES = (".mha", ".nii", ".nii.gz")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and what macOS adds to archives."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def subfolder(folder: Path, name: str) -> Path | None:
    """The folder `name` in a folder, upper or lower case; of a doubled one (`name/name/`) the inner."""
    for path in subfolders(folder):
        if path.name.lower() == name.lower():
            return subfolder(path, name) or path
    return None


def files_in(folder: Path | None, endings: Sequence[str]) -> list[Path]:
    """The files in a folder that end in one of `endings`, upper or lower case, sorted, without hidden ones."""
    if folder is None:
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(tuple(endings)) and not path.name.startswith(".") and path.is_file()
    )


def stem(path: Path) -> str:
    """The name of a file without its ending, `.nii.gz` being one."""
    return re.sub(r"(\.nii)?\.[^.]+$", "", path.name, flags=re.IGNORECASE)


def leading_number(path: Path) -> str:
    """The number that a file's name begins with, or all of the name where it begins with none."""
    name = stem(path)
    number = re.match(r"\d+", name)
    return number[0] if number else name


def by_stem(paths: Iterable[Path], name: Callable[[Path], str] = stem) -> dict[str, Path]:
    """Files by their stem, or by what `name` makes of them. Two of one name are refused."""
    found: dict[str, Path] = {}
    for path in paths:
        key = name(path)
        if key in found:
            raise ValueError(f"{path} and {found[key].name} both belong to {key!r}: keep one of the two")
        found[key] = path
    return found


def masks_by_stem(paths: Iterable[Path], images: dict[str, Path], *suffixes: str) -> dict[str, Path]:
    """Mask files by the stem of their image: the same, or the same with one of `suffixes` added, in any case."""

    def image_stem(path: Path) -> str:
        name = stem(path)
        ending = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
        return name if name in images else name[: len(name) - len(ending)]

    return by_stem(paths, image_stem)


def pair_up(images: dict[str, Path], masks: dict[str, Path], place: Path) -> list[tuple[str, Path, Path]]:
    """(stem, image, mask) of all files; an image without mask, or a mask (in `place`) without image, is an error."""
    if alone := sorted(images.keys() - masks.keys()):
        raise FileNotFoundError(
            f"{images[alone[0]]} has no mask in {place} ({len(alone)} such): add the masks or remove the images"
        )
    if alone := sorted(masks.keys() - images.keys()):
        raise FileNotFoundError(
            f"{masks[alone[0]]} has no image ({len(alone)} such): add the images or remove the masks"
        )
    return [(name, images[name], masks[name]) for name in sorted(images)]


def read_rows(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a csv file, blanks around names and values removed."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            lines = [[cell.strip() for cell in line] for line in csv.reader(stream, strict=True)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read as a table ({error}): save it as CSV in UTF-8") from error
    lines = [line for line in lines if any(line)]
    columns = lines[0] if lines else []
    return columns, [dict(zip(columns, line, strict=False)) for line in lines[1:]]


def positive(text: str, column: str, place: str) -> float:
    """A length in mm from a table; `place` tells where it stands."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{place}: {column} is {text!r}, which is no positive number of millimetres")
    return value
