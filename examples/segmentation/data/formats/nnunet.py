"""nnU-Net: imagesTr/NAME_0000.png (.tif, .nii.gz, .mha), labelsTr/NAME.png, dataset.json (and splits_final.json)."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from segmentation.data.formats import voxels
from segmentation.data.formats.files import CHANNEL, IMAGES, VOLUMES, composed, files_in, pair_up, stem, subfolder
from segmentation.data.item import Item, read_files, slice_items, to_classes
from segmentation.data.pixels import named
from segmentation.tasks import Task


def fits(folder: Path) -> bool:
    return all(subfolder(folder, part) for part in ("imagesTr", "labelsTr"))


def items(task: Task, folder: Path, fold: int = 0) -> list[Item]:
    """One item per image of `imagesTr`; of a volume, one item per slice that holds a label, across the largest spacing.

    Labels belong to the task's classes by name, or else by its values, or else in the order of their numbers. Several
    files per case are its channels. A fold of `splits_final.json` is followed if it is there. Every case is a subject.
    """
    labels = _labels(task, folder / "dataset.json")
    images, masks = (files_in(subfolder(folder, part), IMAGES + VOLUMES) for part in ("imagesTr", "labelsTr"))
    cases = _cases(task, images)
    sides = _sides(folder / "splits_final.json", cases, fold)
    find_cut = voxels.one_cut([files[0] for files in cases.values() if files[0].name.lower().endswith(VOLUMES)])
    read_stored = partial(voxels.read_stack, find_cut)
    found: list[Item] = []
    for case, _, mask in pair_up({case: files[0] for case, files in cases.items()}, masks):
        files, facts = (*cases[case], mask), {"split": sides[case], "channel_files": len(cases[case])}
        if mask.name.lower().endswith(VOLUMES):
            classes = partial(to_classes, labels=labels, path=mask, threshold=task.mask_threshold)
            values, pixel_size, cut = voxels.read_mask(find_cut, *files)
            facts |= {"group": case, "pixel_size": pixel_size, "cut": cut}
            found += slice_items(task, case, files, read_stored, values, classes, **facts)
        else:
            found.append(Item.of_files(partial(read_files, labels=[labels]), task, case, *files, **facts))
    return found


def _cases(task: Task, images: list[Path]) -> dict[str, list[Path]]:
    """The files of each case in the order of its channels: one, or as many as the task has channels."""
    cases: dict[str, list[Path]] = {}
    for path in images:
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
    return cases


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
    names = task.class_names
    if len(numbers) != len(names):
        raise ValueError(f"{path} has the labels {', '.join(numbers)}: task {task.name!r} needs {', '.join(names)}")
    by_name, wanted = {name.lower(): value for name, value in numbers.items()}, {name.lower() for name in names}
    if by_name.keys() == wanted:
        return {by_name[name.lower()]: name for name in names}
    if by_name.keys() & wanted:
        raise ValueError(f"{path} has the labels {', '.join(numbers)}: name those of task {task.name!r} alike, or none")
    if set(numbers.values()) == set(task.labels):
        return dict(task.labels)
    return dict(zip(sorted(numbers.values()), names, strict=True))


def _sides(path: Path, cases: Collection[str], number: int) -> dict[str, str]:
    """The side of each case in a fold, or "" for all where there is no such file."""
    if not path.is_file():
        return dict.fromkeys(cases, "")
    try:
        fold = _read_json(path)[number]
        sides = {composed(case): side for side in ("train", "val") for case in fold[side]}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} has no fold {number} with train and val: without the file folds are drawn") from error
    if odd := sorted(sides.keys() ^ set(cases)):
        where = "listed, but not in imagesTr" if odd[0] in sides else "in imagesTr, but not listed"
        raise ValueError(f"{path}: case {odd[0]!r} is {where} ({len(odd)} such): make both hold the same cases")
    return sides


def _read_json(path: Path) -> Any:
    with named(path, "read as JSON", OSError, ValueError, fix="restore it as nnU-Net has it"):
        return json.loads(path.read_text(encoding="utf-8-sig"))
