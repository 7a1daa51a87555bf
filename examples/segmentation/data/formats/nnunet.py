"""nnU-Net: `imagesTr/NAME_0000.png`, `labelsTr/NAME.png`, `dataset.json`, and `splits_final.json` where it is there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data import simpleitk as sitk
from segmentation.data.formats.files import IMAGES, VOLUMES, by_stem, files_in, pair_up, stem, subfolder
from segmentation.data.formats.voxels import (
    as_stored,
    check_same_size,
    read_header,
    read_volume,
    slice_items,
    to_pixels,
    to_values,
)
from segmentation.data.item import Item, Pixels, check_sizes, read_image, read_values, to_classes
from segmentation.tasks import Task

DESCRIPTION = "nnU-Net: imagesTr/NAME_0000.png (or .tif, .nii.gz, .mha), labelsTr/NAME.png, dataset.json"
CHANNEL = re.compile(r"(.+)_(\d{4})")


def fits(folder: Path) -> bool:
    return subfolder(folder, "imagesTr") is not None and subfolder(folder, "labelsTr") is not None


def items(task: Task, folder: Path) -> list[Item]:
    """One item an image of `imagesTr`; of a volume, one item a slice that holds a label, across the largest spacing.

    Labels belong to the task's classes by name, or else in the order of their numbers. Several files a case are its
    channels. Fold 0 of `splits_final.json` is followed where it is there. Every case is a subject.
    """
    labels = _labels(task, folder / "dataset.json")
    images, masks = _cases(task, subfolder(folder, "imagesTr")), subfolder(folder, "labelsTr")
    pairs = pair_up(
        {case: files[0] for case, files in images.items()}, by_stem(files_in(masks, IMAGES + VOLUMES)), masks
    )
    sides = _sides(folder / "splits_final.json", images)
    found: list[Item] = []
    for case, _, mask in pairs:
        files = (*images[case], mask)
        if mask.name.lower().endswith(VOLUMES):
            part = _slices(task, case, files, labels)
        else:
            part = [Item(case, case, partial(read_flat, task.in_channels, labels, files), files=files)]
        found += [replace(item, split=sides[case]) for item in part]
    return found


def _slices(task: Task, case: str, files: tuple[Path, ...], labels: dict[int, str]) -> list[Item]:
    values, pixel_size = _read_mask(files)
    return slice_items(
        task, case, case, files, values, partial(to_classes, labels=labels, path=files[-1]), read_stack, pixel_size
    )


def read_flat(channels: int, labels: dict[int, str], files: tuple[Path, ...]) -> tuple[Pixels, NDArray[np.uint8]]:
    """Image (h w channels) of one file, or of one file a channel, and class numbers (h w) of the last file."""
    *image_paths, mask_path = files
    values = read_values(mask_path)
    planes = [read_image(path, channels if len(image_paths) == 1 else 1) for path in image_paths]
    for plane, path in zip(planes, image_paths, strict=True):
        check_sizes(plane, path, values, mask_path)
    return np.concatenate(planes, axis=2), to_classes(values, labels, mask_path)


def read_stack(*files: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w c) of one volume a channel, and mask values (s h w) of the last file."""
    values, _ = _read_mask(files)
    channels = [to_pixels(sitk.GetArrayFromImage(as_stored(read_volume(path))), path) for path in files[:-1]]
    return np.stack(channels, axis=3), values


def _read_mask(files: tuple[Path, ...]) -> tuple[NDArray[np.integer], tuple[float, float]]:
    """Mask values (s h w) of the last file, laid as its images, and the (row, column) size of a pixel in mm."""
    *image_paths, mask_path = files
    mask = read_volume(mask_path)
    for path in image_paths:
        header = read_header(path)
        check_same_size(header, path, mask, mask_path)
        mask.SetSpacing(header.GetSpacing())
    laid = as_stored(mask)
    width, height, _ = laid.GetSpacing()
    return to_values(sitk.GetArrayFromImage(laid), mask_path), (height, width)


def _cases(task: Task, folder: Path) -> dict[str, tuple[Path, ...]]:
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
    for case, files in cases.items():
        if len(files) not in (1, task.in_channels):
            raise ValueError(
                f"{files[-1]} is channel {len(files)} of case {case!r}: task {task.name!r} takes {task.in_channels}, "
                "in one file or in one each"
            )
    return {case: tuple(files) for case, files in cases.items()}


def _labels(task: Task, path: Path) -> dict[int, str]:
    """The value in label files of each class of the task, in the order of the classes."""
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
    by_name = {name.lower(): value for name, value in numbers.items()}
    wanted = [name.lower() for name in task.class_names]
    if sorted(by_name) == sorted(wanted):
        return {by_name[key]: name for key, name in zip(wanted, task.class_names, strict=True)}
    if len(numbers) != len(wanted):
        raise ValueError(
            f"{path} has the labels {', '.join(numbers)}: task {task.name!r} needs {', '.join(task.class_names)}"
        )
    return dict(zip(sorted(numbers.values()), task.class_names, strict=True))


def _sides(path: Path, cases: dict[str, Any]) -> dict[str, str]:
    """The side of each case in fold 0, or "" for all where there is no such file."""
    if not path.is_file():
        return dict.fromkeys(cases, "")
    try:
        fold = _read_json(path)[0]
        sides = {case: side for side in ("train", "val") for case in fold[side]}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} has no fold 0 with train and val: remove it, and the subjects are divided") from error
    if odd := sorted(sides.keys() ^ cases.keys()):
        where = "listed, but not in imagesTr" if odd[0] in sides else "in imagesTr, but not listed"
        raise ValueError(f"{path}: case {odd[0]!r} is {where} ({len(odd)} such): make both hold the same cases")
    return sides


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it gives the labels, nnU-Net cannot do without it either")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): replace it") from error
