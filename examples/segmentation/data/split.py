"""Splits by subject: drawn from a seed, kept in a file with hashes, refused where a subject stands on two sides."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segmentation.data.item import Item
from segmentation.data.pixels import Pixels
from segmentation.runs import whole_file

SIDES = ("train", "val", "test")
Table = dict[str, dict[str, str]]

HASH_SIDE = 16  # pixels: 16 x 16 differences, 256 bits
EDGES_SIDE = 64  # pixels
CORRELATION = 0.9  # of the edges of look-alikes: the near-duplicates in ISIC 2017, HC18 and BUSI reach 0.92


def limit_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` images, as whole subjects."""
    if limit < 3:
        raise ValueError(f"data.limit {limit} leaves nothing to split: give at least 3 images")
    sizes, chosen = Counter(item.group for item in items), set()
    for group in ranked_groups(items, seed):
        if sizes[group] <= limit:
            chosen.add(group)
            limit -= sizes[group]
    if not chosen:
        least = min(sizes.values(), default=0)
        raise ValueError(
            f"data.limit {limit} is less than the {least} images of the smallest subject: give at least 3 subjects"
        )
    return [item for item in items if item.group in chosen]


def ranked_groups(items: Iterable[Item], seed: int) -> list[str]:
    """The subjects in an order that depends on the seed and their names alone: further subjects move no other."""
    groups = {item.group for item in items}
    return sorted(groups, key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).hexdigest())


def split_items(
    items: Sequence[Item], val_fraction: float, test_fraction: float, seed: int, fold: int | None = None, folds: int = 5
) -> list[Item]:
    """The items with their side filled in: as the data set says, and where it says nothing, fractions of the subjects.

    A data set that names `train` alone is divided into all three; one that names `train` and `val`, or `train` and
    `test`, gives the missing side from the training subjects; one that names all three is followed. With a `fold` those
    subjects that are not tested on are validated on in turn, each in one of `folds`; with a `test_fraction` of 0 all
    are tested on in turn, and `val_fraction` of the rest are validated on.
    """
    given = {item.split for item in items if item.split}
    if odd := [item for item in items if given and item.split not in SIDES]:
        raise ValueError(f"item {odd[0].id!r} has the split {odd[0].split!r}: use train, val or test for all, or none")
    check_no_leak(items)
    free = ranked_groups([item for item in items if item.split in ("", "train")], seed)
    sides: dict[str, str] = {}
    in_turn = "val" if test_fraction or "test" in given else "test"
    for side, fraction in (("test", test_fraction), ("val", val_fraction)):
        if side not in given:
            left = [group for group in free if group not in sides]
            number = max(1, round(fraction * len(free)))
            sides |= dict.fromkeys(left[:number] if fold is None or side != in_turn else left[fold::folds], side)
    done = [
        item if item.split in ("val", "test") else replace(item, split=sides.get(item.group, "train")) for item in items
    ]
    if missing := [side for side in SIDES if side not in {item.split for item in done}]:
        groups, least = len({item.group for item in items}), 3 if fold is None else folds + 1
        raise ValueError(f"no {missing[0]} subject: {len(items)} images of {groups} subject(s) need {least} or more")
    return done


def check_no_leak(items: Sequence[Item]) -> None:
    """Refuse a subject that stands on two sides of a split."""
    sides: dict[str, set[str]] = {}
    for item in items:
        sides.setdefault(item.group, set()).add(item.split)
    if both := sorted(group for group, found in sides.items() if len(found) > 1):
        first, second = sorted(sides[both[0]])[:2]
        raise ValueError(f"group {both[0]!r} is in {first!r} and in {second!r}: put each subject on one side")


def difference_hash(image: Pixels) -> NDArray[np.bool_]:
    """256 bits of an image (h w c): is each cell of a 16 x 17 thumbnail of its grey values darker than the next?"""
    return np.diff(_thumbnail(image, HASH_SIDE + 1, HASH_SIDE), axis=1).ravel() > 0


def edges(image: Pixels) -> NDArray[np.float32]:
    """Differences between neighbours in a 64 x 64 thumbnail of an image (h w c), of length 1, or 0 if all are equal."""
    thumbnail = _thumbnail(image, EDGES_SIDE, EDGES_SIDE)
    vector = np.concatenate([np.diff(thumbnail, axis=axis).ravel() for axis in (0, 1)])
    return vector / max(np.linalg.norm(vector), 1e-6)


def _thumbnail(image: Pixels, width: int, height: int) -> NDArray[np.float32]:
    grey = Image.fromarray(image.mean(axis=2, dtype=np.float32))
    return np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR))


def look_alikes(
    items: Sequence[Item], hashes: NDArray[np.bool_], edges: NDArray[np.float32], bits: int
) -> NDArray[np.intp]:
    """Pairs (p 2) of items of two groups that show one picture; with 0 bits none.

    At most `bits` of their hashes (n 256) differ. Those of flat pictures with small objects tell little, so their
    `edges` (n d), which are strong at the objects, must correlate too.
    """
    if bits == 0:
        return np.empty((0, 2), int)
    group = np.unique([item.group for item in items], return_inverse=True)[1]
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    pairs = []
    for start in range(0, len(items), 1024):
        rows = np.arange(start, min(start + 1024, len(items)))
        alike = signs[rows] @ signs.T >= signs.shape[1] - 2 * bits
        alike &= (group[rows, None] != group) & (rows[:, None] < np.arange(len(items)))
        rows = rows[alike.any(axis=1)]
        alike = alike[rows - start] & (edges[rows] @ edges.T >= CORRELATION)
        i, j = np.nonzero(alike)
        pairs.append(np.stack([rows[i], j], axis=1))
    return np.concatenate(pairs)


def join_look_alikes(items: Sequence[Item], pairs: NDArray[np.intp]) -> list[Item]:
    """The items with one group wherever two look alike, as far as the data set gives neither groups nor sides.

    Of the groups that come together the alphabetically first one gives its name.
    """
    names, group = np.unique([item.group for item in items], return_inverse=True)
    free = [(i, j) for i, j in pairs if items[i].own_group and items[j].own_group and items[i].split == items[j].split]
    rows, columns = group[np.reshape(free, (-1, 2)).astype(int)].T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(names)))
    _, part = connected_components(graph, directed=False)
    _, first = np.unique(part, return_index=True)
    return [replace(item, group=str(name)) for item, name in zip(items, names[first][part][group], strict=True)]


def part_look_alikes(items: Sequence[Item], pairs: NDArray[np.intp]) -> list[tuple[Item, Item]]:
    """(to leave out, to keep) of each pair on two sides of a split: training yields to validation, both to the test."""
    both = [sorted((items[i], items[j]), key=lambda item: SIDES.index(item.split)) for i, j in pairs]
    return [(first, second) for first, second in both if first.split != second.split]


def file_hash(item: Item) -> str:
    """SHA-256 of the item's files, or of its pixels where it has none (the demo)."""
    if item.files:
        digests = [_bytes_hash(path, path.stat().st_size, path.stat().st_mtime_ns) for path in item.files]
    else:
        digests = [hashlib.sha256(array.tobytes()).digest() for array in item.read()]
    return hashlib.sha256(b"".join(digests)).hexdigest()


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
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).digest()
    return hashlib.sha256(digest).hexdigest()


def write_split(path: Path, table: Table) -> None:
    """Write a split as JSON."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps({"sha256": split_hash(table), "items": table}, indent=1) + "\n", encoding="utf-8")


def read_split(path: Path) -> Table:
    """The table of a split file, refused if it was changed since it was written."""
    name = f"data.split {str(path)!r}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table, intact = content["items"], content["sha256"] == split_hash(content["items"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} cannot be read ({error!r}): give the split.json of a run") from error
    if not intact:
        raise ValueError(f"{name} was changed after it was written: its hash is not that of its items")
    return table


def follow_split(items: Sequence[Item], table: Table) -> list[Item]:
    """The items that a split lists, on its sides and in its groups; reading one that changed since is refused."""
    if missing := sorted(table.keys() - {item.id for item in items}):
        raise ValueError(f"data.split lists {missing[0]!r} ({len(missing)} such), which data.folder lacks")
    chosen = []
    for item in items:
        if row := table.get(item.id):
            read = partial(read_unchanged, item, row["sha256"])
            chosen.append(replace(item, group=row["group"], split=row["split"], read=read))
    check_no_leak(chosen)
    return chosen


def read_unchanged(item: Item, digest: str) -> tuple[Pixels, NDArray[np.uint8]]:
    """Image and mask of an item, refused where they are not those that a split was made with."""
    pair = item.read()
    if file_hash(item) != digest:
        raise ValueError(f"image or mask of {item.id!r} changed since the split was written")
    return pair


def refuse_other_split(given: Path | None, own_split: Path) -> None:
    """Refuse a split that is not the one that a run was trained with; it may be gone, since the run has a copy."""
    if given and given.exists() and split_hash(read_split(given)) != split_hash(read_split(own_split)):
        raise ValueError(
            f"data.split {str(given)!r} is not the split that the run was started with: give --data.split {own_split}, "
            "or another --run"
        )


def seen_in(items: Sequence[Item], own_split: Path) -> list[str]:
    """The ids of the items that are among the training and validation images of a split, by their hashes."""
    seen = {row["sha256"] for row in read_split(own_split).values() if row["split"] != "test"}
    readable = [item for item in items if all(path.is_file() for path in item.files)]
    return [item.id for item in readable if file_hash(item) in seen]


def warn_of_weights(items: Sequence[Item], their_split: Path) -> None:
    """Warn where weights to begin with were trained or chosen on some of the test images."""
    if known := seen_in(items, their_split):
        warnings.warn(
            f"{len(known)} of {len(items)} test images, such as {known[0]!r}, are among those that the weights to "
            f"begin with were trained or chosen on: --data.split {their_split} keeps them out of the test",
            stacklevel=2,
        )


def refuse_seen(items: Sequence[Item], own_split: Path, split: Path | None) -> str | None:
    """Refuse items that a run was trained on or chosen by; a warning where only their ids are those of such items.

    Where the run's own split is followed, the side was chosen knowingly.
    """
    if split and split_hash(read_split(split)) == split_hash(read_split(own_split)):
        return None
    table = {name: row for name, row in read_split(own_split).items() if row["split"] != "test"}
    if known := seen_in(items, own_split):
        raise ValueError(
            f"{len(known)} of {len(items)} images, such as {known[0]!r}, are among those that the run was trained or "
            f"validated on: add --data.split {own_split} to score those that it has not seen"
        )
    if alike := [item.id for item in items if item.id in table]:
        return (
            f"{len(alike)} of {len(items)} images, such as {alike[0]!r}, have the same ids as training or validation "
            "images of the run: if they show the same subjects, these scores are too good"
        )
    return None
