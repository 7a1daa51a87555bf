"""Splits by subject: reproducible, without leaks, near-duplicates together, kept in files that notice every change."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from segmentation.data.item import Item
from segmentation.data.split import (
    check_no_leak,
    difference_hash,
    edges,
    file_hash,
    follow_split,
    join_look_alikes,
    limit_items,
    look_alikes,
    part_look_alikes,
    ranked_groups,
    read_split,
    refuse_seen,
    split_items,
    split_table,
    write_split,
)


def items(*groups: str, splits: str = "") -> list[Item]:
    words = splits.split() or [""] * len(groups)
    return [
        Item(f"{k:02d}", group, lambda: None, split) for k, (group, split) in enumerate(zip(groups, words, strict=True))
    ]


def people(number: int, images: int = 3) -> list[Item]:
    return items(*(f"subject{k // images}" for k in range(number * images)))


def sides(found: list[Item]) -> dict[str, set[str]]:
    return {side: {item.group for item in found if item.split == side} for side in ("train", "val", "test")}


def test_sides_are_disjoint_complete_and_of_the_wanted_size():
    found = split_items(people(20), 0.15, 0.2, seed=1)
    assert [item.id for item in found] == [item.id for item in people(20)]
    parts = sides(found)
    assert {side: len(groups) for side, groups in parts.items()} == {"train": 13, "val": 3, "test": 4}
    assert len(set.union(*parts.values())) == 20


def test_a_split_depends_on_the_seed_and_on_names_alone():
    assert sides(split_items(people(20)[::-1], 0.15, 0.2, 1)) == sides(split_items(people(20), 0.15, 0.2, 1))
    assert sides(split_items(people(20), 0.15, 0.2, 2)) != sides(split_items(people(20), 0.15, 0.2, 1))
    order = ranked_groups(people(20), 3)
    assert [group for group in ranked_groups(people(30), 3) if group in set(order)] == order


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train val test train", {"train": {"a", "d"}, "val": {"b"}, "test": {"c"}}),
        ("train val train train", None),
        ("train train train train", None),
        ("train train test train", None),
    ],
)
def test_sides_that_the_data_set_names_are_followed_and_the_others_drawn(given, expected):
    found = split_items(items("a", "b", "c", "d", splits=given), 0.25, 0.25, seed=0)
    assert expected is None or sides(found) == expected
    for item, side in zip(found, given.split(), strict=True):
        assert side == "train" or item.split == side
    assert all(sides(found).values())


@pytest.mark.parametrize(
    ("groups", "given", "message"),
    [
        ("a b", "", r"no train subject: 2 images of 2 subject\(s\) need three or more subjects"),
        ("a b c", "train fold1 val", "item '01' has the split 'fold1': use train, val or test for every image, or for"),
        ("a b a", "train train val", "group 'a' is in 'train' and in 'val' .*put each subject on one side"),
        ("a b c", "train train ", "split"),
    ],
)
def test_bad_splits(groups, given, message):
    names = groups.split()
    splits = " ".join(given.split()) if len(given.split()) == len(names) else ""
    found = items(*names, splits=splits)
    if given.endswith(" "):
        found[:2] = [replace(item, split="train") for item in found[:2]]
    with pytest.raises(ValueError, match=message):
        split_items(found, 0.2, 0.2, seed=0)


@pytest.mark.parametrize(("val", "test"), [(0, 0.2), (0.2, 1.0), (0.6, 0.5), (0.5, 0.5)])
def test_bad_fractions(val, test):
    with pytest.raises(ValueError, match="must lie between 0 and 1, and both together below 1"):
        split_items(people(9), val, test, seed=0)


def test_leaks_are_refused():
    check_no_leak(items("a", "a", "b", splits="train train test"))
    with pytest.raises(ValueError, match=r"group 'b' is in 'test' and in 'train' \(1 such\)"):
        check_no_leak(items("a", "b", "b", splits="train train test"))


def test_limit_takes_whole_subjects():
    chosen = limit_items(people(20), 20, seed=0)
    assert len(chosen) == 18
    assert all(sum(item.group == member.group for member in chosen) == 3 for item in chosen)
    with pytest.raises(ValueError, match=r"data.limit 2 leaves nothing to split: give at least 3 images"):
        limit_items(people(20), 2, seed=0)


def test_hashes_find_copies_and_tell_images_apart():
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((6, 30, 40, 1)).cumsum(1).cumsum(2)
    smooth -= smooth.min((1, 2, 3), keepdims=True)
    images = [(255 * image / image.max()).astype(np.uint8) for image in smooth]
    first = difference_hash(images[0])
    assert first.shape == (256,)
    brighter = (0.7 * images[0] + 60).astype(np.uint8)
    assert (difference_hash(brighter) != first).sum() <= 8
    assert all((difference_hash(image) != first).sum() > 30 for image in images[1:])


BACKGROUNDS = {
    "flat": np.full((128, 128), 90),
    "slope": np.linspace(0, 150, 128)[None].repeat(128, 0),
    "noise": np.random.default_rng(0).integers(0, 90, (128, 128)),
}


def with_object(background: np.ndarray, seed: int) -> np.ndarray:
    """A bright square in a picture (h w 1)."""
    picture = background.astype(np.uint8)[..., None].copy()
    y, x = np.random.default_rng(seed).integers(10, 110, 2)
    picture[y : y + 7, x : x + 7] = 250
    return picture


def alike(pictures: list[np.ndarray], bits: int = 8) -> list[list[int]]:
    found = items(*(f"g{k}" for k in range(len(pictures))))
    looks = (np.stack([look(picture) for picture in pictures]) for look in (difference_hash, edges))
    return look_alikes(found, *looks, bits).tolist()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_small_objects_on_one_background_do_not_look_alike(background):
    pictures = [with_object(BACKGROUNDS[background], seed) for seed in (0, 1, 2, 3, 0)]
    hashes = [difference_hash(picture) for picture in pictures]
    assert max((one != hashes[0]).sum() for one in hashes) <= 16
    assert alike(pictures, bits=16) == [[0, 4]]
    assert alike(pictures, bits=0) == []


def test_a_picture_looks_like_its_larger_darker_noisy_copy_and_like_no_other():
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((6, 90, 120)).cumsum(1).cumsum(2)
    pictures = [(255 * (p - p.min()) / np.ptp(p)).astype(np.uint8)[..., None] for p in smooth]
    copy = np.asarray(Image.fromarray(pictures[2][..., 0]).resize((240, 180), Image.Resampling.BILINEAR))
    pictures.append((0.7 * copy + 30 + rng.normal(0, 1, copy.shape)).astype(np.uint8)[..., None])
    assert alike(pictures) == [[2, 6]]


def test_look_alikes_without_groups_come_into_one_also_through_a_third():
    alone = [replace(item, own_group=True) for item in items("d", "c", "b", "a", "z")]
    pairs = np.array([[0, 1], [1, 2], [3, 4]])
    assert [item.group for item in join_look_alikes(alone, pairs)] == ["b", "b", "b", "a", "a"]
    given = [replace(alone[0], own_group=False), *alone[1:3], replace(alone[3], split="val"), alone[4]]
    assert [item.group for item in join_look_alikes(given, pairs)] == ["d", "b", "b", "a", "z"]
    assert [item.group for item in join_look_alikes(alone, np.empty((0, 2), int))] == ["d", "c", "b", "a", "z"]


def test_of_look_alikes_on_two_sides_the_one_that_trains_more_goes():
    found = items(*"abcd", splits="test train val train")
    parted = part_look_alikes(found, np.array([[0, 1], [0, 2], [1, 3], [2, 3]]))
    assert [(first.id, second.id) for first, second in parted] == [("01", "00"), ("02", "00"), ("03", "02")]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_validate_on_every_subject_once_and_test_on_the_same(folds):
    found = [sides(split_items(people(20), 0.15, 0.2, 1, fold, folds)) for fold in range(folds)]
    validated = [group for parts in found for group in parts["val"]]
    assert len(validated) == len(set(validated)) == 16 and len({frozenset(parts["test"]) for parts in found}) == 1
    for parts in found:
        assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 16
    with pytest.raises(ValueError, match=r"no val subject: 12 images of 4 subject\(s\) need 10 or more subjects"):
        split_items(people(4), 0.15, 0.2, 1, 8, 9)


def test_files_of_a_split_are_followed_and_changes_noticed(tmp_path):
    found = split_items(people(5), 0.2, 0.2, seed=0)
    digests = [f"digest{k}" for k in range(len(found))]
    path = tmp_path / "split.json"
    table = split_table(found, digests)
    write_split(path, table)
    assert read_split(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]
    followed = follow_split([replace(item, split="", group="?") for item in found], table)
    assert [(item.id, item.group, item.split) for item in followed] == [(i.id, i.group, i.split) for i in found]
    with pytest.raises(ValueError, match=r"data.split lists '00' \(1 such\), which data.folder lacks"):
        follow_split(found[1:], table)

    content = json.loads(path.read_text())
    content["items"]["00"]["split"] = "test" if content["items"]["00"]["split"] != "test" else "val"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"split.json' was changed after it was written"):
        read_split(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"split.json' cannot be read .*: give the split.json of a run"):
        read_split(path)


def test_file_hashes_see_every_byte(tmp_path):
    image, mask = tmp_path / "image", tmp_path / "mask"
    image.write_bytes(b"ab")
    mask.write_bytes(b"c")
    item = Item("1", "1", lambda: None, files=(image, mask))
    before = file_hash(item)
    image.write_bytes(b"a")
    mask.write_bytes(b"bc")  # the same bytes on end
    assert file_hash(item) != before
    drawn = Item("1", "1", lambda: (np.zeros((2, 2, 1), np.uint8), np.zeros((2, 2), np.uint8)))
    assert file_hash(drawn) == file_hash(drawn)


@pytest.fixture
def files(tmp_path) -> list[Item]:
    """Fifteen items of one file each, on their sides."""
    found = []
    for item in split_items(people(5), 0.2, 0.4, seed=0):
        path = tmp_path / item.id
        path.write_text(item.id)
        found.append(replace(item, files=(path,), read=path.read_text))
    return found


def test_items_that_changed_since_the_split_cannot_be_read(files):
    followed = follow_split(files, split_table(files, [file_hash(item) for item in files]))
    assert [item.read() for item in followed] == [item.id for item in files]
    files[3].files[0].write_text("other")
    with pytest.raises(ValueError, match="image or mask of '03' changed since the split was written"):
        followed[3].read()


def test_images_of_the_training_are_not_scored(files, tmp_path):
    path = tmp_path / "split.json"
    write_split(path, split_table(files, [file_hash(item) for item in files]))
    test = [item for item in files if item.split == "test"]
    assert len(test) == 6 and refuse_seen(test, path) is None
    with pytest.raises(ValueError, match=r"9 of 15 images, such as .* validated on: add --data.split .*split\.json"):
        refuse_seen([replace(item, id=f"new {item.id}") for item in files], path)
    for item in files:
        item.files[0].write_text(f"enlarged {item.id}")
    assert "9 of 15 images, such as '" in refuse_seen(files, path)
    files[0].files[0].unlink()
    assert "have the same ids as training or validation images" in refuse_seen(files, path)
    assert refuse_seen([replace(item, id=f"new {item.id}") for item in files], path) is None


def joined_one_by_one(groups: list[str], pairs: np.ndarray) -> list[str]:
    """By renaming the later of two groups to the earlier one until nothing changes."""
    groups = list(groups)
    while apart := next(((i, j) for i, j in pairs if groups[i] != groups[j]), None):
        first, second = sorted(groups[k] for k in apart)
        groups = [first if group == second else group for group in groups]
    return groups


@pytest.mark.parametrize("seed", range(4))
def test_joined_groups_are_called_like_the_alphabetically_first(seed):
    rng = np.random.default_rng(seed)
    groups = [f"g{k}" for k in rng.integers(0, 40, 80)]
    pairs = rng.integers(0, 80, (20, 2))
    found = [item.group for item in join_look_alikes([replace(i, own_group=True) for i in items(*groups)], pairs)]
    assert found == joined_one_by_one(groups, pairs)
    assert len(set(found)) < len(set(groups))
