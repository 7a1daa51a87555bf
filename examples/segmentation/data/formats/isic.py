"""ISIC 2016, 2017 or 2018, task 1: ISIC-2017_Training_Data, ISIC-2017_Training_Part1_GroundTruth, and so on."""

from __future__ import annotations

from pathlib import Path

from segmentation.data.formats.files import IMAGES, by_stem, files_in, pair_up, stem, subfolder
from segmentation.data.item import Item, read_pair
from segmentation.tasks import Task

YEARS = {  # the folders of images and of masks, with {} for the name of a set
    2016: ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth"),
    2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth"),
    2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"),
}
SIDES = {"Training": "train", "Validation": "val", "Test": "test", "Test_v2": "test"}  # by the sets' names of all years


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
    [(year, sets)] = years.items()
    found = []
    for name, images in sets.items():
        masks = subfolder(folder, YEARS[year][1].format(name))
        if masks is None:
            raise FileNotFoundError(
                f"{images} has no {YEARS[year][1].format(name)} beside it: add the masks or remove the images"
            )
        files = files_in(images, IMAGES)
        pictures = by_stem(path for path in files if not stem(path).lower().endswith("_superpixels"))
        side = SIDES[name] if "Training" in sets else ""
        pairs = pair_up(pictures, files_in(masks, IMAGES), masks, "_segmentation")
        found += [Item.of_files(read_pair, task, *pair, split=side) for pair in pairs]
    return found


def _years(folder: Path) -> dict[int, dict[str, Path]]:
    """The challenges that a folder has images of: the folder of each set, by its name."""
    found = {
        year: {name: place for name in SIDES if (place := subfolder(folder, images.format(name)))}
        for year, (images, _) in YEARS.items()
    }
    return {year: sets for year, sets in found.items() if sets}
