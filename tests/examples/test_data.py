"""Reading, checking, splitting and augmenting data folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation.data import (
    EpochSampler,
    ImageSet,
    Item,
    SegmentationData,
    check_no_leak,
    demo_items,
    folder_items,
    limit_items,
    split_items,
)
from segmentation.tasks import TASKS, get_task

SPINE = get_task("lumbar_spine")


def items(*groups: str, splits: str = "") -> list[Item]:
    words = splits.split() or [""] * len(groups)
    return [
        Item(str(k), group, split, lambda: None) for k, (group, split) in enumerate(zip(groups, words, strict=True))
    ]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", TASKS)
def test_folder_round_trip(folder, name):
    task = get_task(name)
    data = SegmentationData(task, folder(name), image_size=40, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, task.in_channels, 40, 40)
    assert batch["mask"].shape == (3, 1, 40, 40)
    assert set(batch["mask"].unique().tolist()) <= set(range(1 + len(task.labels)))
    assert type(batch["image"]) is torch.Tensor
    assert len(data.train_set) + len(data.val_set) == 9
    assert (data.train_set.num_subjects, data.val_set.num_subjects) == (2, 1)


def _no_folder(root):
    return root / "elsewhere"


def _empty(root):
    (root / "items.csv").write_text("id,file,group\n")


def _no_table(root):
    (root / "items.csv").unlink()


def _no_column(root):
    edit(root / "items.csv", "group", "patient")


def _no_group(root):
    edit(root / "items.csv", "3.png,subject_001", "3.png,")


def _no_image(root):
    (root / "images" / "4.png").unlink()


def _no_mask(root):
    (root / "masks" / "4.png").unlink()


def _text_as_image(root):
    (root / "images" / "5.png").write_text("not an image")


def _truncated(root):
    path = root / "images" / "5.png"
    path.write_bytes(path.read_bytes()[:300])


def _other_size(root):
    Image.new("L", (20, 10)).save(root / "masks" / "6.png")


def _sixteen_bits(root):
    Image.fromarray(np.full((40, 33), 4000, np.uint16)).save(root / "images" / "6.png")


def _other_value(root):
    Image.new("L", (33, 40), 77).save(root / "masks" / "7.png")


def _one_subject(root):
    path = root / "items.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:4]))


def _leak(root):
    lines = (root / "items.csv").read_text().splitlines()
    sides = ["split", *(["train", "train", "val"] * 3)]
    (root / "items.csv").write_text("\n".join(f"{line},{side}" for line, side in zip(lines, sides, strict=True)))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_no_folder, FileNotFoundError, "elsewhere.*is not a folder: give the folder with images/"),
        (_empty, ValueError, "items.csv lists no images: .* is empty"),
        (_no_table, FileNotFoundError, "has no items.csv: write one with the columns id, file, group"),
        (_no_column, ValueError, r"lacks the column\(s\) group: it needs id, file, group"),
        (_no_group, ValueError, "line 5: group is empty; every image needs"),
        (_no_image, FileNotFoundError, "line 6: .*images.4.png does not exist; add the file"),
        (_no_mask, FileNotFoundError, "line 6: .*masks.4.png does not exist; add the file"),
        (_text_as_image, ValueError, "images.5.png cannot be read as an image .*: replace or remove"),
        (_truncated, ValueError, "images.5.png cannot be read as an image .*: replace or remove"),
        (_other_size, ValueError, "masks.6.png is 20x10 but its image .*6.png is 33x40: save both in the same size"),
        (
            _sixteen_bits,
            ValueError,
            r"images.6.png has more than 8 bits a pixel \(mode I;16\): save it with values 0 to",
        ),
        (_other_value, ValueError, r"masks.7.png holds the value 77, .* allowed are 0 \(background\), 1 \(L1\)"),
        (_one_subject, ValueError, r"no training subject: 3 images of 1 subject\(s\) need two or more"),
        (_leak, ValueError, "group 'subject_000' is in training and in validation .*put each subject on one side"),
    ],
)
def test_bad_folders(folder, damage, error, message):
    root = folder()
    root = damage(root) or root
    with pytest.raises(error, match=message):
        SegmentationData(SPINE, root, image_size=32)


def test_palette_masks_hold_labels_not_colours(folder):
    root = folder()
    expected = SegmentationData(SPINE, root, image_size=40).train_set.masks
    for path in (root / "masks").iterdir():
        labels = Image.open(path)
        labels.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0, 0, 255, 255, 255, 0, 255])
        labels.save(path)
        assert Image.open(path).mode == "P"
    assert torch.equal(SegmentationData(SPINE, root, image_size=40).train_set.masks, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "image-size 16 is too small.*use 32 or more"),
        ({"batch_size": 0}, "batch-size 0 must be at least 1"),
        ({"val_fraction": 1.0}, "val-fraction 1.0 must lie between 0 and 1"),
        ({"limit": 1}, "limit 1 leaves nothing to split"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(SPINE, **options)


def test_split_keeps_subjects_together_and_is_reproducible():
    everything = demo_items(SPINE, 32, number=60)
    train, val = split_items(everything, 0.2, seed=1)
    assert sorted(item.id for item in train + val) == [item.id for item in everything]
    assert not {item.group for item in train} & {item.group for item in val}
    assert len({item.group for item in val}) == 4
    assert split_items(everything[::-1], 0.2, seed=1)[1] == val[::-1]
    assert split_items(everything, 0.2, seed=2)[1] != val


def test_split_column_is_followed():
    train, val = split_items(items("a", "b", "a", splits="train val train"), 0.5, seed=0)
    assert ([item.id for item in train], [item.id for item in val]) == (["0", "2"], ["1"])
    with pytest.raises(ValueError, match="item '1' has the split 'test': use train or val"):
        split_items(items("a", "b", splits="train test"), 0.5, seed=0)


def test_leak_is_refused():
    check_no_leak(items("a", "b"), items("c"))
    with pytest.raises(ValueError, match=r"group 'b' is in training and in validation \(1 such\)"):
        check_no_leak(items("a", "b"), items("b", "c"))


def test_limit_takes_whole_subjects():
    everything = demo_items(SPINE, 32, number=60)
    chosen = limit_items(everything, 20, seed=0)
    assert len(chosen) == 18
    assert all(sum(item.group == member.group for member in chosen) == 3 for item in chosen)
    assert limit_items(everything, 100, seed=0) != everything
    assert sorted(limit_items(everything, 100, seed=0)) == sorted(everything)


@pytest.mark.parametrize("name", TASKS)
def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(name):
    task = get_task(name)
    images = ImageSet(task, demo_items(task, 40, number=3), 40, training=True, seed=7)
    first = images[2, 1]
    images[0, 0]
    assert torch.equal(images[2, 1]["image"], first["image"])
    assert torch.equal(images[2, 1]["mask"], first["mask"])
    assert not torch.equal(images[3, 1]["image"], first["image"])


@pytest.mark.parametrize("name", TASKS)
def test_augmented_masks_keep_their_labels_and_follow_the_image(name):
    task = get_task(name)
    images = ImageSet(task, demo_items(task, 64, number=3), 64, training=True, seed=0)
    images.images = (images.masks * 50).expand(-1, task.in_channels, -1, -1).contiguous()
    for epoch in range(8):
        sample = images[epoch, 0]
        assert set(sample["mask"].unique().tolist()) <= set(range(1 + len(task.labels)))
        bright = sample["image"].mean(0) > sample["image"].mean()
        truth = sample["mask"][0] > 0
        assert 2 * (bright & truth).sum() / (bright.sum() + truth.sum()) > 0.85


def test_images_are_normalised_one_by_one():
    task = get_task("isic2017")
    image = ImageSet(task, demo_items(task, 48, number=1), 48, training=False, seed=0)[0]["image"]
    assert torch.allclose(image.mean((1, 2)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(image.std((1, 2)), torch.ones(3), atol=1e-2)


def test_epoch_sampler_shuffles_anew_and_reproducibly():
    def epoch(number: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(range(20), num_replicas=1, rank=0, shuffle=True, seed=4)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(3) == epoch(3)
    assert {index for _, index in epoch(3)} == set(range(20))
    assert [index for _, index in epoch(3)] != [index for _, index in epoch(4)]
    assert {number for number, _ in epoch(3)} == {3}


def test_masks_of_one_bit_are_read(folder):
    root = folder("fetal_head")
    path = root / "masks" / "0.png"
    before = np.asarray(Image.open(path))
    Image.open(path).convert("1").save(path)
    mask = folder_items(get_task("fetal_head"), root)[0].read()[1]
    assert np.array_equal(mask, before // 255)
