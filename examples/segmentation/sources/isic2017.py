"""ISIC 2017, part 1, as the challenge hands it out: folders of images, and of masks beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segmentation.items import Item, read_pair
from segmentation.sources.files import IMAGES, by_stem, files_in, masks_by_stem, pair_up, stem, subfolder
from segmentation.tasks import Task

DESCRIPTION = "ISIC-2017_Training_Data/ and ISIC-2017_Training_Part1_GroundTruth/, with Validation and Test_v2 likewise"
SIDES = {"Training": "train", "Validation": "val", "Test_v2": "test"}


def fits(folder: Path) -> bool:
    return any(subfolder(folder, f"ISIC-2017_{side}_Data") for side in SIDES)


def items(task: Task, folder: Path) -> list[Item]:
    """One item an image, superpixels left out; every image is a subject of its own, for nothing is known of patients.

    Where the training images are there, the official sides are followed; the other sets alone are not divided.
    """
    divided = subfolder(folder, "ISIC-2017_Training_Data") is not None
    found = []
    for name, side in SIDES.items():
        images = subfolder(folder, f"ISIC-2017_{name}_Data")
        if images is None:
            continue
        masks = subfolder(folder, f"ISIC-2017_{name}_Part1_GroundTruth")
        if masks is None:
            raise FileNotFoundError(
                f"{images} has no ISIC-2017_{name}_Part1_GroundTruth beside it: add the masks or remove the images"
            )
        files = files_in(images, IMAGES)
        pictures = by_stem(path for path in files if not stem(path).lower().endswith("_superpixels"))
        pairs = pair_up(pictures, masks_by_stem(files_in(masks, IMAGES), pictures, "_segmentation"), masks)
        found += [
            Item(key, key, partial(read_pair, task, *pair), split=side if divided else "", files=tuple(pair))
            for key, *pair in pairs
        ]
    return found
