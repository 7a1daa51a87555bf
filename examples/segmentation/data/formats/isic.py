"""ISIC 2016, 2017 or 2018, task 1: ISIC-2017_Training_Data, ISIC-2017_Training_Part1_GroundTruth, and so on."""

from __future__ import annotations

from pathlib import Path

from segmentation.data.formats.files import IMAGES, apart, by_stem, files_in, pair_up, subfolder
from segmentation.data.item import Item, read_files
from segmentation.tasks import Task

YEARS = {  # the folders of images and of masks, with {} for the name of a set
    2016: ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth"),
    2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth"),
    2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"),
}
SIDES = {"Training": "train", "Validation": "val", "Test": "test", "Test_v2": "test"}  # by the sets' names of all years


def fits(folder: Path) -> bool:
    return any(_sets(folder, year) for year in YEARS)


def items(task: Task, folder: Path) -> list[Item]:
    """One item per image, without superpixels; every image is its own subject, for nothing is known of patients.

    Where the training images are there, the official sides are followed; the other sets alone are not divided.
    """
    year, *others = (year for year in YEARS if _sets(folder, year))
    if others:
        raise ValueError(f"{folder} holds ISIC {year} and {others[0]}, which share images: give a folder of one year")
    found, sets = [], _sets(folder, year)
    for name, images in sets.items():
        masks = subfolder(folder, YEARS[year][1].format(name))
        if masks is None:
            raise FileNotFoundError(f"{images} has no {YEARS[year][1].format(name)} beside it: add the masks")
        pictures, _ = apart(files_in(images, IMAGES), "_superpixels")
        side = SIDES[name] if "Training" in sets else ""
        pairs = pair_up(by_stem(pictures), files_in(masks, IMAGES), "_segmentation")
        found += [Item.of_files(read_files, task, *pair, split=side) for pair in pairs]
    return found


def _sets(folder: Path, year: int) -> dict[str, Path]:
    """The folder of images of each set of a year, by the name of the set."""
    return {name: place for name in SIDES if (place := subfolder(folder, YEARS[year][0].format(name)))}
