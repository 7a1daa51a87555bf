"""Any: images/ and masks/ (or masks/0/, masks/1/, ... one folder per class) with the same names.

Those of the masks may end in _mask, _segmentation, _label or _gt. Both also under train/ (or training/), val/ (valid/,
validation/), test/ (testing/). The folders may also be called imgs/, and labels/, annotations/, GroundTruth/.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segmentation.data.formats.files import IMAGES, by_stem, files_in, pair_up, subfolder, subfolders
from segmentation.data.item import Item, read_files
from segmentation.tasks import Task

PICTURES = ("images", "imgs", "image", "img")
MASKS = ("masks", "labels", "annotations", "GroundTruth", "ground_truth", "mask", "label", "gt")
SIDES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SUFFIX = "_mask|_segmentation|_label|_gt"


def fits(folder: Path) -> bool:
    return any(files_in(images, IMAGES) for _, images, _ in _places(folder))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image; every image is a subject of its own, for nothing is known of patients.

    Under `train/`, `val/`, `test/` the name of the side is put before the id, since sides are often numbered alike.
    In `masks/0/`, `masks/1/`, ... the later class counts where two overlap.
    """
    found, places = [], _places(folder)
    _check_places(folder, places)
    for side, images, masks in places:
        parts = _class_folders(task, masks)
        read = partial(read_files, labels=[{255: name} for name in task.class_names] if len(parts) > 1 else ())
        pictures = by_stem(files_in(images, IMAGES))
        pairs = [pair_up(pictures, files_in(part, IMAGES), SUFFIX) for part in parts]
        for (name, image, mask), *others in zip(*pairs, strict=True):
            files = (image, mask, *(path for *_, path in others))
            found.append(Item.of_files(read, task, f"{side}_{name}" if side else name, *files, split=side))
    return found


def _places(folder: Path) -> list[tuple[str, Path, Path]]:
    """(side, images, masks): those of no side, in the folder itself, or else those of each side."""
    places = {"": folder} | {side: subfolder(folder, *names) for side, names in SIDES.items()}
    pairs = [(side, subfolder(place, *PICTURES), subfolder(place, *MASKS)) for side, place in places.items() if place]
    return [pair for pair in pairs if all(pair[1:])]


def _check_places(folder: Path, places: list[tuple[str, Path, Path]]) -> None:
    """Refuse what would be left out without a word: sides beside images of no side, and images without masks."""
    sides = {side for side, *_ in places}
    for side, names in SIDES.items():
        place = subfolder(folder, *names)
        if place and "" in sides and any(files_in(path, IMAGES) for path in (place, *subfolders(place))):
            raise ValueError(f"{folder} has images of its own and others in {place.name}/: keep one of the two")
        if place and side not in sides and (pictures := subfolder(place, *PICTURES)) and files_in(pictures, IMAGES):
            raise ValueError(f"{pictures} has no folder of masks beside it: add {place / 'masks'}, or move it away")
    for _, images, _ in places:
        for inner in subfolders(images):
            if files_in(inner, IMAGES):
                raise ValueError(f"{inner} lies inside a folder of images, where none is looked for: move its images")


def _class_folders(task: Task, masks: Path) -> list[Path]:
    """`masks/` itself, or the folders `0`, `1`, ... in it, one for each class."""
    parts = {path.name: path for path in subfolders(masks) if path.name.isdecimal()}
    wanted = [str(k) for k in range(len(task.labels))]
    if parts and sorted(parts) != wanted:
        raise ValueError(
            f"{masks} has the folders {', '.join(sorted(parts))}: task {task.name!r} needs "
            f"{', '.join(wanted)}, for {', '.join(task.class_names)}"
        )
    return [parts[name] for name in wanted] if parts else [masks]
