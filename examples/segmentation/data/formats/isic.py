"""ISIC 2016, 2017 and 2018, task 1, in the challenges' own folders: images, and masks in a folder beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from segmentation.data.formats.files import IMAGES, by_stem, files_in, masks_by_stem, pair_up, stem, subfolder
from segmentation.data.item import Item, read_pair
from segmentation.tasks import Task


class Year(NamedTuple):
    """How a challenge named its folders, with {} for the name of a set, and the side that each set is for."""

    images: str
    masks: str
    sides: dict[str, str]


YEARS = {
    2016: Year(
        "ISBI2016_ISIC_Part1_{}_Data",
        "ISBI2016_ISIC_Part1_{}_GroundTruth",
        {"Training": "train", "Test": "test"},
    ),
    2017: Year(
        "ISIC-2017_{}_Data",
        "ISIC-2017_{}_Part1_GroundTruth",
        {"Training": "train", "Validation": "val", "Test_v2": "test"},
    ),
    2018: Year(
        "ISIC2018_Task1-2_{}_Input",
        "ISIC2018_Task1_{}_GroundTruth",
        {"Training": "train", "Validation": "val", "Test": "test"},
    ),
}
DESCRIPTION = "ISIC 2016, 2017 or 2018, task 1: the official folders, e.g. " + " and ".join(
    name.format("Training") for name in YEARS[2017][:2]
)


def fits(folder: Path) -> bool:
    return bool(_years(folder))


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image, without superpixels; every image is its own subject, for nothing is known of patients.

    Where the training images are there, the official sides are followed; the other sets alone are not divided.
    """
    years = _years(folder)
    if len(years) > 1:
        raise ValueError(
            f"{folder} holds the folders of ISIC {' and '.join(map(str, years))}, which share images: "
            "give a folder with those of one year"
        )
    year = YEARS[years[0]]
    divided = subfolder(folder, year.images.format("Training")) is not None
    found = []
    for name, side in year.sides.items():
        images = subfolder(folder, year.images.format(name))
        if images is None:
            continue
        masks = subfolder(folder, year.masks.format(name))
        if masks is None:
            raise FileNotFoundError(
                f"{images} has no {year.masks.format(name)} beside it: add the masks or remove the images"
            )
        files = files_in(images, IMAGES)
        pictures = by_stem(path for path in files if not stem(path).lower().endswith("_superpixels"))
        pairs = pair_up(pictures, masks_by_stem(files_in(masks, IMAGES), pictures, "_segmentation"), masks)
        found += [
            Item(key, key, partial(read_pair, task, *pair), split=side if divided else "", files=tuple(pair))
            for key, *pair in pairs
        ]
    return found


def _years(folder: Path) -> list[int]:
    """The challenges that a folder has images of."""
    return [
        number
        for number, year in YEARS.items()
        if any(subfolder(folder, year.images.format(name)) for name in year.sides)
    ]
