"""nnU-Net: imagesTr/NAME_0000.png (.tif, .nii.gz, .mha), labelsTr/NAME.png, dataset.json (and splits_final.json)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data.formats import voxels
from segmentation.data.formats.files import IMAGES, VOLUMES, composed, files_in, pair_up, stem, subfolder
from segmentation.data.item import Item, Pixels, named, read_raw, to_classes
from segmentation.tasks import Task

CHANNEL = re.compile(r"(.+)_(\d{4})")


def fits(folder: Path) -> bool:
    return all(subfolder(folder, part) for part in ("imagesTr", "labelsTr"))


def items(task: Task, folder: Path, fold: int = 0) -> list[Item]:
    """One item per image of `imagesTr`; of a volume, one item per slice that holds a label, across the largest spacing.

    Labels belong to the task's classes by name, or else in the order of their numbers. Several files per case are its
    channels. A fold of `splits_final.json` is followed where it is there. Every case is a subject.
    """
    labels = _labels(task, folder / "dataset.json")
    images, masks = _cases(task, subfolder(folder, "imagesTr")), subfolder(folder, "labelsTr")
    firsts = {case: files[0] for case, files in images.items()}
    pairs = pair_up(firsts, files_in(masks, IMAGES + VOLUMES), masks)
    sides = _sides(folder / "splits_final.json", images, fold)
    found: list[Item] = []
    for case, _, mask in pairs:
        files, split = (*images[case], mask), sides[case]
        if mask.name.lower().endswith(VOLUMES):
            classes = partial(to_classes, labels=labels, path=mask, threshold=task.mask_threshold)
            values, pixel_size, cut = _read_mask(*files)
            facts = {"group": case, "split": split, "pixel_size": pixel_size, "cut": cut}
            found += voxels.slice_items(task, case, files, read_stack, values, classes, **facts)
        else:
            found.append(Item.of_files(partial(read_flat, labels), task, case, *files, split=split))
    return found


def read_flat(labels: dict[int, str], task: Task, *files: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """Image (h w c) of one file, or of one file per channel, and class numbers (h w) of the last file."""
    *image_paths, mask_path = files
    channels = task.in_channels // len(image_paths)
    pairs = [read_raw(channels, path, mask_path) for path in image_paths]
    classes = to_classes(pairs[0][1], labels, mask_path, task.mask_threshold)
    return np.concatenate([image for image, _ in pairs], axis=2), classes


def read_stack(*files: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w c) of one volume per channel, and mask values (s h w) of the last file."""
    values, _, (plane, _) = _read_mask(*files)
    return np.stack([voxels.read_pixels(path, (plane, voxels.STORED)) for path in files[:-1]], axis=3), values


def _read_mask(*files: Path) -> tuple[NDArray[np.integer], tuple[float, float], voxels.Cut]:
    """Mask values (s h w) of the last file, the size of a pixel in mm (row to row, column to column), and the cut."""
    *image_paths, mask_path = files
    mask = voxels.read_mask(mask_path, *image_paths)
    return *voxels.to_arrays(voxels.as_stored(mask), mask_path), voxels.cut_of(mask)


def _cases(task: Task, folder: Path) -> dict[str, list[Path]]:
    """The files of each case in the order of its channels: one, or as many as the task has channels."""
    cases: dict[str, list[Path]] = {}
    for path in files_in(folder, IMAGES + VOLUMES):
        match = CHANNEL.fullmatch(stem(path))
        if not match:
            raise ValueError(f"{path} has no channel in its name: nnU-Net calls it {stem(path)}_0000")
        files = cases.setdefault(match[1], [])
        if int(match[2]) != len(files):
            raise ValueError(f"{path} is not channel {len(files)} of its case: number the channels from 0000 on")
        files.append(path)
    if odd := [case for case, files in cases.items() if len(files) not in (1, task.in_channels)]:
        files = cases[odd[0]]
        raise ValueError(
            f"{files[-1]} is channel {len(files)} of case {odd[0]!r}: task {task.name!r} takes {task.in_channels}, "
            "in one file or in one each"
        )
    return cases


def _labels(task: Task, path: Path) -> dict[int, str]:
    """The value in label files of each class of the task, in the order of the classes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it gives the labels, nnU-Net cannot do without it either")
    content = _read_json(path)
    table = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} has no labels: it needs, for example, {{'background': 0, 'lesion': 1}}")
    if all(isinstance(name, str) for name in table.values()):  # the first nnU-Net's way round
        table = {name: value for value, name in table.items()}
    if any(name.lower() == "ignore" for name in table):
        raise ValueError(f"{path} has an ignore label, which these networks cannot train with: remove it")
    try:
        numbers = {name: int(value) for name, value in table.items() if int(value) != 0}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has labels that are no whole numbers (regions are not supported): {table}") from error
    if len(numbers) != len(task.class_names):
        raise ValueError(
            f"{path} has the labels {', '.join(numbers)}: task {task.name!r} needs {', '.join(task.class_names)}"
        )
    by_name = {name.lower(): value for name, value in numbers.items()}
    in_order = dict(zip(task.class_names, sorted(numbers.values()), strict=True))
    is_named = by_name.keys() == {name.lower() for name in task.class_names}
    return {by_name[name.lower()] if is_named else value: name for name, value in in_order.items()}


def _sides(path: Path, cases: Collection[str], number: int) -> dict[str, str]:
    """The side of each case in a fold, or "" for all where there is no such file."""
    if not path.is_file():
        return dict.fromkeys(cases, "")
    try:
        fold = _read_json(path)[number]
        sides = {composed(case): side for side in ("train", "val") for case in fold[side]}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} has no fold {number} with train and val: remove it, and the subjects are divided"
        ) from error
    if odd := sorted(sides.keys() ^ set(cases)):
        where = "listed, but not in imagesTr" if odd[0] in sides else "in imagesTr, but not listed"
        raise ValueError(f"{path}: case {odd[0]!r} is {where} ({len(odd)} such): make both hold the same cases")
    return sides


def _read_json(path: Path) -> Any:
    with named(path, "read as JSON", ValueError, fix="replace it"):
        return json.loads(path.read_text(encoding="utf-8-sig"))
