"""Training on few images, from weights and from none."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import few_images
from segmentation.data.datamodule import find_items
from segmentation.data.split import file_hash, ranked_groups, split_table, write_split
from segmentation.tasks import get_task

# Two images of each subject, and a last one with a single image.
TABLE = {
    f"{side}{i}": {"split": side, "group": f"{side}{i // 2}", "sha256": f"{side}{i}"}
    for side, number in (("train", 21), ("val", 20), ("test", 6))
    for i in range(number)
}


@pytest.mark.parametrize("number", [1, 4, 13, 21])
def test_whole_subjects_are_drawn_and_the_test_side_stays(number: int) -> None:
    drawn = few_images.draw(TABLE, number, 0)
    assert Counter(row["split"] for row in drawn.values()) == {"train": number, "val": 12, "test": 6}
    assert all(TABLE[key] == row for key, row in drawn.items())
    groups = {row["group"] for row in drawn.values()}
    assert drawn.keys() == {key for key, row in TABLE.items() if row["group"] in groups}
    assert few_images.draw(TABLE, number, 0) == drawn


def test_too_few_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"numbers 30: 30 images of the train side .* which has 21"):
        few_images.draw(TABLE, 30, 0)


def test_no_subject_is_cut_in_parts() -> None:
    table = {
        f"{side}{i}": {"split": side, "group": f"{side}{i // 9}", "sha256": f"{side}{i}"}
        for side, number in (("train", 45), ("val", 18), ("test", 9))
        for i in range(number)
    }
    assert Counter(row["split"] for row in few_images.draw(table, 30, 0).values()) == {"train": 27, "val": 9, "test": 9}
    with pytest.raises(ValueError, match=r"numbers 8: 8 images of the train side .* has 45, 9 or more of a subject"):
        few_images.draw(table, 8, 0)


def test_every_start_is_trained_scored_and_drawn(tmp_path: Path, folder, monkeypatch) -> None:
    monkeypatch.setattr(few_images, "STEPS", 1)
    monkeypatch.setattr(few_images, "VALIDATION", 3)
    data, split, out = folder("fetal_head", number=15), tmp_path / "split.json", tmp_path / "out"
    items = find_items(get_task("fetal_head"), data)
    sides = dict(zip(ranked_groups(items, 0), ("train", "train", "val", "test", "test"), strict=True))
    items = [replace(item, split=sides[item.group]) for item in items]
    write_split(split, split_table(items, [file_hash(item) for item in items]))
    found = few_images.few_images(data, split, "fetal_head", numbers=(3,), seeds=(0,), out=out)
    for start in ("fetal_head", "nothing"):
        scores = json.loads((out / "3" / f"{start}-seed0" / "test" / "scores.json").read_text())
        assert found[start] == {3: [scores["per_image"]["dice"]["mean"]]} and scores["images"] == 6
    assert found["fetal_head"][3][0] > found["nothing"][3][0], "one step is not enough to forget"
    assert min(Image.open(out / "curve.png").size) > 300
    write_split(tmp_path / "other.json", split_table(items, [file_hash(item)[::-1] for item in items]))
    with pytest.raises(ValueError, match=r"out .* holds trainings on other images: give another folder"):
        few_images.few_images(data, tmp_path / "other.json", "fetal_head", numbers=(3,), seeds=(0,), out=out)
    before = (out / "3" / "nothing-seed0" / "history.csv").stat().st_mtime_ns
    assert few_images.few_images(data, split, "fetal_head", numbers=(3,), seeds=(0,), out=out) == found
    assert (out / "3" / "nothing-seed0" / "history.csv").stat().st_mtime_ns == before, "not trained again"
