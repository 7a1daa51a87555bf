"""Reading, checking, splitting and augmenting data folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

from segmentation.data.demo import DEMOS
from segmentation.data.formats import find_items
from segmentation.data.item import read_image, read_values, to_classes
from segmentation.data.module import EpochSampler, ImageSet, Loaded, SegmentationData, demo_items, to_input, to_target
from segmentation.data.split import read_split, split_hash, write_split
from segmentation.tasks import Task, get_task

SPINE = get_task("lumbar_spine")


def demo_set(task: Task, size: int, number: int, training: bool, seed: int = 0) -> ImageSet:
    items = demo_items(task, size, number)
    loaded = Loaded(items, size)
    return ImageSet(task, items, loaded.images, loaded.masks, training, seed)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", DEMOS)
def test_folder_round_trip(folder, name):
    task = get_task(name)
    data = SegmentationData(task, folder(name), image_size=40, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, task.in_channels, 40, 40)
    assert batch["mask"].shape == (3, 1, 40, 40)
    assert set(batch["mask"].unique().tolist()) <= set(range(1 + len(task.labels)))
    assert type(batch["image"]) is torch.Tensor
    assert len(data.train_set) == len(data.val_set) == len(data.test_items) == 3


def _no_folder(root):
    return root / "elsewhere"


def _empty(root):
    (root / "items.csv").write_text("id,file,group\n")


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
        (_no_column, ValueError, r"lacks the column\(s\) group: it needs id, file, group"),
        (_no_group, ValueError, "line 5: group is empty; every image needs"),
        (_no_image, FileNotFoundError, "line 6: .*images.4.png does not exist; add the file"),
        (_no_mask, FileNotFoundError, "line 6: .*masks.4.png does not exist; add the file"),
        (_text_as_image, ValueError, "images.5.png cannot be read as an image .*: replace or remove"),
        (_truncated, ValueError, "images.5.png cannot be read as an image .*: replace or remove"),
        (_other_size, ValueError, "masks.6.png is 20x10 but its image .*6.png is 33x40: save both in the same size"),
        (_other_value, ValueError, r"masks.7.png holds the value 77, .* allowed are 0 \(background\), 1 \(L1\)"),
        (_one_subject, ValueError, r"no train subject: 3 images of 1 subject\(s\) need three or more subjects"),
        (_leak, ValueError, "group 'subject_000' is in 'train' and in 'val' .*put each subject on one side"),
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
        ({"split": Path("nowhere.json")}, "split 'nowhere.json' cannot be read"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(SPINE, **options)


def test_all_broken_images_are_named_at_once(folder):
    root = folder()
    for number in (2, 5):
        (root / "images" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 9 images or masks cannot be used:\n  .*2.png .*\n  .*5.png"):
        SegmentationData(SPINE, root, image_size=32)


def test_a_split_file_is_followed_whatever_the_seed(folder, tmp_path):
    root = folder(number=30)
    first = SegmentationData(SPINE, root, image_size=32, limit=24)
    path = tmp_path / "split.json"
    write_split(path, first.split)
    again = SegmentationData(SPINE, root, image_size=32, split=path, split_seed=5)
    assert again.split == first.split
    assert [item.id for item in again.items] == [item.id for item in first.items]  # the order of training follows it
    assert split_hash(again.split) == split_hash(read_split(path)) == split_hash(first.split)
    other = SegmentationData(SPINE, root, image_size=32, limit=24, split_seed=5)
    assert split_hash(other.split) != split_hash(first.split)
    (root / "masks" / f"{first.test_items[0].id}.png").write_bytes((root / "masks" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="changed since the split was written"):
        SegmentationData(SPINE, root, image_size=32, split=path)


def test_copies_of_an_image_stay_on_one_side(folder):
    root = folder(number=30)
    copies = [1, 7, 13, 19]
    for number in copies[1:]:
        (root / "images" / f"{number}.png").write_bytes((root / "images" / "1.png").read_bytes())
    data = SegmentationData(SPINE, root, image_size=32)
    assert len({item.split for item in data.items if int(item.id) in copies}) == 1
    assert len({item.group for item in data.items}) == 7


def test_values_of_every_depth_reach_the_network():
    for dtype, low, high in ((np.uint8, 0, 255), (np.uint16, 100, 4100), (np.float32, -3, 5)):
        image = np.linspace(low, high, 40 * 40).reshape(40, 40, 1).astype(dtype)
        values = to_input(image, 40)
        assert values.shape == (1, 40, 40)
        assert torch.allclose(values.flatten(), torch.linspace(0, 1, 1600), atol=1 / 255)
        assert len(values.half().unique()) == len(np.unique(image)) if dtype == np.uint8 else 1000
    assert to_input(np.full((9, 9, 3), 7, np.uint16), 32).abs().max() == 0
    target = to_target(np.repeat(np.arange(6, dtype=np.uint8), 10)[None].repeat(30, 0), 64)
    assert target.shape == (1, 64, 64)
    assert target.unique().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", DEMOS)
def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(name):
    task = get_task(name)
    images = demo_set(task, 40, 3, training=True, seed=7)
    first = images[2, 1]
    images[0, 0]
    assert torch.equal(images[2, 1]["image"], first["image"])
    assert torch.equal(images[2, 1]["mask"], first["mask"])
    assert not torch.equal(images[3, 1]["image"], first["image"])


@pytest.mark.parametrize("name", DEMOS)
def test_augmented_masks_keep_their_labels_and_follow_the_image(name):
    task = get_task(name)
    images = demo_set(task, 64, 3, training=True)
    images.images = (images.masks / 5).expand(-1, task.in_channels, -1, -1).contiguous()
    for epoch in range(8):
        sample = images[epoch, 0]
        assert set(sample["mask"].unique().tolist()) <= set(range(1 + len(task.labels)))
        bright = sample["image"].mean(0) > sample["image"].mean()
        truth = sample["mask"][0] > 0
        assert 2 * (bright & truth).sum() / (bright.sum() + truth.sum()) > 0.85


def test_images_are_normalised_one_by_one():
    task = get_task("isic2017")
    image = demo_set(task, 48, 1, training=False)[0]["image"]
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
    mask = find_items(get_task("fetal_head"), root)[0].read()[1]
    assert np.array_equal(mask, before // 255)


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


@pytest.mark.parametrize(
    ("picture", "channels", "expected"),
    [
        (Image.fromarray(GREY), 1, GREY[..., None]),
        (Image.fromarray(GREY), 3, GREY[..., None].repeat(3, 2)),
        (Image.fromarray(GREY.astype(np.uint16) * 200), 1, GREY[..., None].astype(np.uint16) * 200),
        (Image.fromarray(GREY).convert("RGB"), 1, GREY[..., None]),
        (Image.fromarray(GREY).convert("LA"), 1, GREY[..., None]),
        (Image.fromarray(GREY).convert("RGBA"), 3, GREY[..., None].repeat(3, 2)),
        (Image.fromarray(GREY).convert("P"), 3, GREY[..., None].repeat(3, 2)),
        (Image.fromarray(GREY).convert("1", dither=0), 1, np.where(GREY[..., None] > 127, 255, 0).astype(np.uint8)),
    ],
    ids=["grey", "grey-as-colour", "16-bit", "colour-as-grey", "grey-alpha", "colour-alpha", "palette", "1-bit"],
)
def test_images_keep_their_depth(tmp_path, picture, channels, expected):
    path = tmp_path / "image.png"
    picture.save(path)
    pixels = read_image(path, channels)
    assert pixels.dtype == expected.dtype
    assert np.array_equal(pixels, expected)


def test_colours_of_sixteen_bits_are_not_cut_to_eight(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 4, 3)).astype(np.uint16)
    path = tmp_path / "image.png"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=True), str(path))
    assert np.array_equal(read_image(path, 3), pixels)
    assert read_image(path, 1).dtype == np.uint16


def test_masks_in_colours_are_refused_and_grey_ones_in_colour_files_read(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(GREY).convert("RGB").save(path)
    assert np.array_equal(read_values(path), GREY)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    with pytest.raises(ValueError, match=r"mask.png is a mask in colours: save it as grey values"):
        read_values(path)


def test_a_mask_of_one_class_may_use_one_or_255():
    for value in (1, 255):
        classes = to_classes(np.array([[0, value]]), {255: "lesion"}, Path("mask.png"))
        assert classes.tolist() == [[0, 1]]
    with pytest.raises(
        ValueError, match=r"mask.png holds the value 1, .* allowed are 0 \(background\), 255 \(lesion\)"
    ):
        to_classes(np.array([[0, 1, 255]]), {255: "lesion"}, Path("mask.png"))


def test_augmentation_can_be_switched_off():
    augmented, plain = (SegmentationData(SPINE, image_size=32, limit=30, augment=on).train_set for on in (True, False))
    first, second = ([torch.equal(of[0, k]["image"], of[1, k]["image"]) for k in range(4)] for of in (augmented, plain))
    assert not all(first)
    assert all(second)
    assert plain[0, 0]["image"].std() == pytest.approx(1, abs=1e-2)  # still normalised
