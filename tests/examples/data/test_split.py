"""Splits by subject: reproducible, without leaks, near-duplicates together, kept in files that notice every change."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from segmentation.data import split as splits
from segmentation.data.item import Item


def items(*groups: str, sides: str = "") -> list[Item]:
    words = sides.split(" ") if sides else [""] * len(groups)
    pairs = zip(groups, words, strict=True)
    return [Item(f"{k:02d}", group, lambda: None, side) for k, (group, side) in enumerate(pairs)]


def people(number: int) -> list[Item]:
    return items(*(f"subject{k // 3}" for k in range(3 * number)))


def sides(found: list[Item]) -> dict[str, set[str]]:
    return {side: {item.group for item in found if item.split == side} for side in ("train", "val", "test")}


def test_sides_are_disjoint_complete_and_of_the_wanted_size():
    found = splits.split_items(people(20), 0.15, 0.2, seed=1)
    assert [item.id for item in found] == [item.id for item in people(20)]
    parts = sides(found)
    assert {side: len(groups) for side, groups in parts.items()} == {"train": 13, "val": 3, "test": 4}
    assert len(set.union(*parts.values())) == 20


def test_a_split_depends_on_the_seed_and_on_names_alone():
    first = sides(splits.split_items(people(20), 0.15, 0.2, 1))
    assert sides(splits.split_items(people(20)[::-1], 0.15, 0.2, 1)) == first
    assert sides(splits.split_items(people(20), 0.15, 0.2, 2)) != first
    order = splits.ranked_groups(people(20), 3)
    assert [group for group in splits.ranked_groups(people(30), 3) if group in set(order)] == order


def test_a_split_is_the_same_in_every_version():
    table = splits.split_table(splits.split_items(people(6), 0.2, 0.2, 5), [str(k) for k in range(18)])
    assert sides(splits.split_items(people(6), 0.2, 0.2, 5))["test"] == {"subject2"}
    assert splits.split_hash(table) == "c36661826e69004fc438b19e1b8d153a9cdb5615a4b89150edb4cc75262cadfe"


@pytest.mark.parametrize("given", ["train val test train", "train val train train", "train train train train",
                                   "train train test train"])  # fmt: skip
def test_sides_that_the_data_set_names_are_followed_and_the_others_drawn(given):
    found = splits.split_items(items(*"abcd", sides=given), 0.25, 0.25, seed=0)
    for item, side in zip(found, given.split(), strict=True):
        assert item.split == side or (side == "train" and item.split not in given)
    assert all(sides(found).values())


@pytest.mark.parametrize(
    ("groups", "given", "message"),
    [
        ("ab", "", r"no train subject: 2 images of 2 subject\(s\) need 3 or more"),
        ("abc", "train fold1 val", "item '01' has the split 'fold1': use train, val or test for all, or none"),
        ("abc", "train train ", "item '02' has the split '': use train, val or test for all, or none"),
        ("aba", "train train val", "group 'a' is in 'train' and in 'val': put each subject on one side"),
    ],
)
def test_bad_splits(groups, given, message):
    with pytest.raises(ValueError, match=message):
        splits.split_items(items(*groups, sides=given), 0.2, 0.2, seed=0)


def test_leaks_are_refused():
    splits.check_no_leak(items("a", "a", "b", sides="train train test"))
    with pytest.raises(ValueError, match="group 'b' is in 'test' and in 'train': put each"):
        splits.check_no_leak(items("a", "b", "b", sides="train train test"))


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_validate_on_every_subject_once_and_test_on_the_same(folds):
    found = [sides(splits.split_items(people(20), 0.15, 0.2, 1, fold, folds)) for fold in range(folds)]
    validated = [group for parts in found for group in parts["val"]]
    assert len(validated) == len(set(validated)) == 16 and len({frozenset(parts["test"]) for parts in found}) == 1
    for parts in found:
        assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 16
    with pytest.raises(ValueError, match=r"no val subject: 12 images of 4 subject\(s\) need 10 or more"):
        splits.split_items(people(4), 0.15, 0.2, 1, 8, 9)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_without_a_side_for_tests_test_on_every_subject_once(folds):
    found = [sides(splits.split_items(people(20), 0.15, 0, 1, fold, folds)) for fold in range(folds)]
    tested = [group for parts in found for group in parts["test"]]
    assert len(tested) == len(set(tested)) == 20 and {len(parts["val"]) for parts in found} == {3}
    for parts in found:
        assert sum(map(len, parts.values())) == len(set.union(*map(set, parts.values()))) == 20


def test_folds_leave_the_side_that_a_data_set_tests_on():
    given = items(*"abcdef", sides="train train train train train test")
    found = [sides(splits.split_items(given, 0.15, 0, 1, fold, 5)) for fold in range(5)]
    assert {frozenset(parts["test"]) for parts in found} == {frozenset("f")}
    assert set.union(*(set(parts["val"]) for parts in found)) == set("abcde")


def test_limit_takes_whole_subjects():
    chosen = splits.limit_items(people(20), 20, seed=0)
    assert len(chosen) == 18
    assert all(sum(item.group == member.group for member in chosen) == 3 for item in chosen)
    assert len(splits.limit_items(people(20), 3, seed=0)) == 3
    with pytest.raises(ValueError, match=r"data.limit 2 leaves nothing to split: give at least 3 images"):
        splits.limit_items(people(20), 2, seed=0)
    with pytest.raises(ValueError, match=r"data.limit 8 is less than the 9 images of the smallest subject: give"):
        splits.limit_items(items(*"a" * 9, *"b" * 10), 8, seed=0)


# Look-alikes.

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
    looks = (np.stack([look(picture) for picture in pictures]) for look in (splits.difference_hash, splits.edges))
    return splits.look_alikes(found, *looks, bits).tolist()


def test_edges_have_length_one_however_faint_and_none_in_a_flat_picture():
    picture = with_object(BACKGROUNDS["slope"], 0).astype(np.float32)
    for contrast in (1, 1e-3, 1e-5):
        assert np.linalg.norm(splits.edges(contrast * picture)) == pytest.approx(1, abs=1e-5)
    assert not splits.edges(np.full((90, 120, 3), 7.0, np.float32)).any()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_small_objects_on_one_background_do_not_look_alike(background):
    pictures = [with_object(BACKGROUNDS[background], seed) for seed in (0, 1, 2, 3, 0)]
    hashes = [splits.difference_hash(picture) for picture in pictures]
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
    hashes = np.stack([splits.difference_hash(picture) for picture in pictures])
    assert hashes.shape == (7, 256) and min((hashes[0] != other).sum() for other in hashes[1:]) > 30


def test_pairs_are_found_among_many_and_not_within_a_group():
    rng = np.random.default_rng(0)
    hashes, edges = rng.random((1100, 256)) > 0.5, np.ones((1100, 1), np.float32)
    hashes[[1050, 1060]], hashes[1070] = hashes[3], hashes[4]
    hashes[1050, :8], hashes[1060, :9] = ~hashes[3, :8], ~hashes[3, :9]  # 8 bits are near enough, 9 are not
    found = items(*(f"g{k if k != 1070 else 4}" for k in range(1100)))
    assert [pair for pair in splits.look_alikes(found, hashes, edges, 8).tolist() if 3 in pair] == [[3, 1050]]
    assert not any(4 in pair for pair in splits.look_alikes(found, hashes, edges, 8).tolist())


def test_look_alikes_without_groups_come_into_one_also_through_a_third():
    alone = [replace(item, own_group=True) for item in items("d", "c", "b", "a", "z")]
    pairs = np.array([[0, 1], [1, 2], [3, 4]])
    assert [item.group for item in splits.join_look_alikes(alone, pairs)] == ["b", "b", "b", "a", "a"]
    given = [replace(alone[0], own_group=False), *alone[1:3], replace(alone[3], split="val"), alone[4]]
    assert [item.group for item in splits.join_look_alikes(given, pairs)] == ["d", "b", "b", "a", "z"]
    assert [item.group for item in splits.join_look_alikes(alone, np.empty((0, 2), int))] == ["d", "c", "b", "a", "z"]


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
    groups, pairs = [f"g{k}" for k in rng.integers(0, 40, 80)], rng.integers(0, 80, (20, 2))
    found = splits.join_look_alikes([replace(item, own_group=True) for item in items(*groups)], pairs)
    assert [item.group for item in found] == joined_one_by_one(groups, pairs)
    assert len({item.group for item in found}) < len(set(groups))


def test_of_look_alikes_on_two_sides_the_one_that_trains_more_goes():
    found = items(*"abcd", sides="test train val train")
    parted = splits.part_look_alikes(found, np.array([[0, 1], [0, 2], [1, 3], [2, 3]]))
    assert [(first.id, second.id) for first, second in parted] == [("01", "00"), ("02", "00"), ("03", "02")]


# Files.


@pytest.fixture
def files(tmp_path) -> list[Item]:
    """Fifteen items of one file each, on their sides."""
    found = []
    for item in splits.split_items(people(5), 0.2, 0.4, seed=0):
        path = tmp_path / item.id
        path.write_text(item.id)
        found.append(replace(item, files=(path,), read=path.read_text))
    return found


def test_a_split_is_followed_and_changes_are_noticed(files, tmp_path):
    path, table = tmp_path / "split.json", splits.split_table(files, [splits.file_hash(item) for item in files])
    splits.write_split(path, table)
    assert splits.read_split(path) == table
    assert not [other for other in tmp_path.iterdir() if other not in [path, *(item.files[0] for item in files)]]
    followed = splits.follow_split([replace(item, split="", group="?") for item in files], table)
    assert [(item.id, item.group, item.split) for item in followed] == [(i.id, i.group, i.split) for i in files]
    assert [item.read() for item in followed] == [item.id for item in files]
    with pytest.raises(ValueError, match=r"data.split lists '00' \(1 such\), which data.folder lacks"):
        splits.follow_split(files[1:], table)
    with pytest.raises(ValueError, match="group 'subject0' is in"):
        splits.follow_split(files, table | {"00": {**table["00"], "split": "other"}})
    files[3].files[0].write_text("other")
    with pytest.raises(ValueError, match="image or mask of '03' changed since the split was written"):
        followed[3].read()
    path.write_text(path.read_text().replace('"test"', '"val"', 1))
    with pytest.raises(ValueError, match=r"split.json' was changed after it was written"):
        splits.read_split(path)
    for content in ("{", "[]", json.dumps({"items": {}})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"split.json' cannot be read .*: give the split.json of a run"):
            splits.read_split(path)


def test_file_hashes_see_every_byte(tmp_path):
    image, mask = tmp_path / "image", tmp_path / "mask"
    image.write_bytes(b"ab")
    mask.write_bytes(b"c")
    item = Item("1", "1", lambda: None, files=(image, mask))
    before = splits.file_hash(item)
    image.write_bytes(b"a")
    mask.write_bytes(b"bc")  # the same bytes on end
    assert splits.file_hash(item) != before
    drawn = [
        Item("1", "1", lambda k=k: (np.full((2, 2, 1), k, np.uint8), np.zeros((2, 2), np.uint8))) for k in (0, 0, 1)
    ]
    assert splits.file_hash(drawn[0]) == splits.file_hash(drawn[1]) != splits.file_hash(drawn[2])


def test_images_of_the_training_are_not_scored(files, tmp_path):
    path, renamed = tmp_path / "split.json", [replace(item, id=f"new {item.id}") for item in files]
    splits.write_split(path, splits.split_table(files, [splits.file_hash(item) for item in files]))
    test = [item for item in files if item.split == "test"]
    assert len(test) == 6 and splits.refuse_seen(test, path, None) is None
    with pytest.raises(ValueError, match=r"9 of 15 images, such as .* validated on: add --data.split .*split\.json"):
        splits.refuse_seen(renamed, path, None)
    assert splits.refuse_seen(renamed, path, path) is None, "the run's own split is followed"
    with pytest.warns(UserWarning, match=r"9 of 15 test images, such as .* weights to begin with .* --data\.split "):
        splits.warn_of_weights(renamed, path)
    for item in files:
        item.files[0].write_text(f"enlarged {item.id}")
    files[0].files[0].unlink()
    remark = splits.refuse_seen(files, path, None)
    assert "9 of 15 images, such as '" in remark and "have the same ids as training or validation images" in remark
    assert splits.refuse_seen(renamed, path, None) is None
