"""Splits by subject: drawn from a seed, kept in a file with hashes, refused where a subject stands on two sides."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.item import Item, Pixels

SIDES = ("train", "val", "test")
Table = dict[str, dict[str, str]]

HASH_SIDE = 16  # pixels: 16 x 16 differences, 256 bits


def limit_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` images, as whole subjects."""
    if limit < 3:
        raise ValueError(f"limit {limit} leaves nothing to split: give at least 3 images")
    sizes = Counter(item.group for item in items)
    chosen: set[str] = set()
    for group in ranked_groups(items, seed):
        if sum(sizes[known] for known in chosen) + sizes[group] <= limit:
            chosen.add(group)
    return [item for item in items if item.group in chosen]


def ranked_groups(items: Iterable[Item], seed: int) -> list[str]:
    """The subjects in an order that depends on the seed and their names alone: further subjects move no other."""
    return sorted(
        {item.group for item in items}, key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).hexdigest()
    )


def split_items(items: Sequence[Item], val_fraction: float, test_fraction: float, seed: int) -> list[Item]:
    """The items with their side filled in: as the data set says, and where it says nothing, fractions of the subjects.

    A data set that names `train` alone is divided into all three; one that names `train` and `val`, or `train` and
    `test`, gives the missing side from the training subjects; one that names all three is followed.
    """
    check_fractions(val_fraction, test_fraction)
    given = {item.split for item in items if item.split}
    if odd := next((item for item in items if given and item.split not in SIDES), None):
        raise ValueError(
            f"item {odd.id!r} has the split {odd.split!r}: use train, val or test for every image, or for none"
        )
    check_no_leak(items)
    free = ranked_groups([item for item in items if item.split in ("", "train")], seed)
    sides: dict[str, str] = {}
    for side, fraction in (("test", test_fraction), ("val", val_fraction)):
        if side not in given:
            number = max(1, round(fraction * len(free)))
            chosen = [group for group in free if group not in sides][:number]
            sides |= dict.fromkeys(chosen, side)
    done = [
        item if item.split in ("val", "test") else replace(item, split=sides.get(item.group, "train")) for item in items
    ]
    for side in SIDES:
        if not any(item.split == side for item in done):
            groups = len({item.group for item in items})
            raise ValueError(
                f"no {side} subject: {len(items)} images of {groups} subject(s) need three or more subjects"
            )
    return done


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuse fractions that leave a side empty."""
    for name, fraction in (("val-fraction", val_fraction), ("test-fraction", test_fraction)):
        if not 0 < fraction < 1 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"{name} {fraction} must lie between 0 and 1, and both together below 1, e.g. 0.15 and 0.2"
            )


def check_no_leak(items: Sequence[Item]) -> None:
    """Refuse a subject that stands on two sides of a split."""
    sides: dict[str, set[str]] = {}
    for item in items:
        sides.setdefault(item.group, set()).add(item.split)
    if both := sorted(group for group, found in sides.items() if len(found) > 1):
        first, second = sorted(sides[both[0]])[:2]
        raise ValueError(
            f"group {both[0]!r} is in {first!r} and in {second!r} ({len(both)} such): put each subject on one side"
        )


def difference_hash(image: Pixels) -> NDArray[np.bool_]:
    """256 bits of an image (h w c): is each cell of a 16 x 17 thumbnail of its grey values darker than the next?"""
    grey = image.astype(np.float32).mean(axis=2)
    thumbnail = Image.fromarray(grey).resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    return np.diff(np.asarray(thumbnail), axis=1).ravel() > 0


def join_duplicates(items: Sequence[Item], hashes: NDArray[np.bool_], bits: int) -> list[Item]:
    """The items with one group wherever images of two groups differ in at most `bits` of their hashes (n 256)."""
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    leader = {item.group: item.group for item in items}

    def find(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    for start in range(0, len(items), 1024):
        distance = (signs.shape[1] - signs[start : start + 1024] @ signs.T) / 2
        for i, j in np.argwhere(distance <= bits):
            first, second = sorted((find(items[start + i].group), find(items[j].group)))
            leader[second] = first
    return [replace(item, group=find(item.group)) for item in items]


def file_hash(item: Item) -> str:
    """SHA-256 of the item's files, or of its pixels where it has none (the demo)."""
    if item.files:
        stats = ((path, path.stat()) for path in item.files)
        parts = [_bytes_hash(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256(b"".join(parts)).hexdigest()
    image, mask = item.read()
    return _digest(image.tobytes(), mask.tobytes())


@lru_cache(maxsize=16)
def _bytes_hash(path: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a file, once for all slices of a volume."""
    return hashlib.sha256(path.read_bytes()).digest()


def split_table(items: Sequence[Item], digests: Sequence[str]) -> Table:
    """What a split file holds: group, side and SHA-256 of every id."""
    rows = sorted(zip(items, digests, strict=True), key=lambda row: row[0].id)
    return {item.id: {"group": item.group, "split": item.split, "sha256": digest} for item, digest in rows}


def split_hash(table: Table) -> str:
    """SHA-256 of a split: another one when an image, a mask, a group or a side changes."""
    return _digest(json.dumps(table, sort_keys=True).encode())


def write_split(path: Path, table: Table) -> None:
    """Write a split as JSON, beside its place first, so that a kill never leaves half a file."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps({"sha256": split_hash(table), "items": table}, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_split(path: Path) -> Table:
    """The table of a split file, refused if it was changed since it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table, intact = content["items"], content["sha256"] == split_hash(content["items"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"split {str(path)!r} cannot be read ({error!r}): give the split.json of a run") from error
    if not intact:
        raise ValueError(f"split {str(path)!r} was changed after it was written: its hash is not that of its items")
    return table


def follow_split(items: Sequence[Item], table: Table) -> list[Item]:
    """The items that a split lists, on its sides and in its groups."""
    if missing := sorted(table.keys() - {item.id for item in items}):
        raise ValueError(f"the split lists {missing[0]!r} ({len(missing)} such), which the data folder lacks")
    chosen = [
        replace(item, group=table[item.id]["group"], split=table[item.id]["split"])
        for item in items
        if item.id in table
    ]
    check_no_leak(chosen)
    return chosen


def check_unchanged(items: Sequence[Item], digests: Sequence[str], table: Table) -> None:
    """Refuse images or masks that are not those a split was made with."""
    if changed := [item.id for item, digest in zip(items, digests, strict=True) if table[item.id]["sha256"] != digest]:
        raise ValueError(f"image or mask of {changed[0]!r} ({len(changed)} such) changed since the split was written")


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
