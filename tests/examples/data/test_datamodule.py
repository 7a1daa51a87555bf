"""The data of a run: read at `setup`, split, loaded, augmented reproducibly, and handed out."""

from __future__ import annotations

import json
import time
import warnings
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from data.layouts import blob, colours, grey, save, save_pairs
from segmentation.data.datamodule import EpochSampler, ImageSet, SegmentationData, load
from segmentation.data.demo import DEMOS, demo_items
from segmentation.data.item import Item
from segmentation.data.split import read_split, split_hash, write_split
from segmentation.tasks import get_task


def demo_set(name: str, size: int, number: int, training: bool, seed: int = 0, augment: bool = True) -> ImageSet:
    task = get_task(name)
    items = demo_items(task, size, number)
    images, masks, *_ = load(items, size)
    return ImageSet(task, items, images, masks, training, seed, augment)


def ready(task: str, folder=None, stage: str = "fit", **options) -> SegmentationData:
    data = SegmentationData(task, folder, **{"image_size": 32} | options)
    data.setup(stage)
    return data


def test_folder_round_trip(folder):
    task = get_task("lumbar_spine")
    data = ready("lumbar_spine", folder("lumbar_spine"), image_size=40, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, task.in_channels, 40, 40)
    assert batch["mask"].shape == (3, 1, 40, 40)
    assert set(batch["mask"].unique().tolist()) <= set(range(1 + len(task.labels)))
    assert type(batch["image"]) is torch.Tensor
    assert len(data.train_set) == len(data.val_set) == len(data.test_items) == 3


def test_the_constructor_reads_nothing_and_setup_reads_once(folder, tmp_path):
    data = SegmentationData("lumbar_spine", tmp_path / "data", image_size=32)
    folder()
    data.setup("fit")
    first = data.train_set
    for stage in ("validate", "fit", *TrainerFn):  # Lightning names stages by an enumeration
        data.setup(stage)
    assert data.train_set is first and data.first_epoch == 0


SIDES = ["split", *(["train", "train", "val"] * 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows[:-1], rows[1]], "data.folder .* holds two images of one id: rename one"),
        (lambda rows: rows[:4], r"no train subject: 3 images of 1 subject\(s\) need 3 or more"),
        (lambda rows: map(",".join, zip(rows, SIDES, strict=True)), "group 'subject_000' is in 'train' and in 'val'"),
    ],
)
def test_tables_that_cannot_be_split(folder, change, message):
    table = folder() / "items.csv"
    table.write_text("\n".join(change(table.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        ready("lumbar_spine", table.parent)


def test_all_that_is_unreadable_is_named_at_once(folder):
    root = folder()
    for number in (2, 5):
        (root / "images" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 9 images or masks cannot be used:\n  .*2\.png .*\n  .*5\.png"):
        ready("lumbar_spine", root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "liver"}, "task 'liver' is unknown: choose one of isic2017"),
        *(
            ({"task": f"rgb:{classes}"}, f"task 'rgb:{classes}' is unknown: .* or describe your own as grey:CLASS,...")
            for classes in ("", "a,a", "a,b=1", "a=x", "a=0", "a=256", "a,,b")
        ),
        ({"fold": 5}, "data.fold 5 of data.folds 5: give two folds or more, and count from 0"),
        ({"fold": 0, "folds": 1}, "data.fold 0 of data.folds 1: give two folds or more"),
        *(
            ({"duplicate_bits": bits}, f"data.duplicate_bits {bits} must lie between 0 .* and 256")
            for bits in (-1, 257)
        ),
        ({"mask_threshold": 255}, "data.mask_threshold 255 must lie between 0 and 254, e.g. 127"),
        ({"image_size": 31}, "data.image_size 31 is too small.*use 32 or more"),
        ({"batch_size": 0}, "data.batch_size 0 must be at least 1"),
        *(
            (
                {"val_fraction": val, "test_fraction": test},
                f"data.val_fraction {val} and data.test_fraction {test} must",
            )
            for val, test in ((0.0, 0.2), (0.2, 0.0), (0.2, 1.0), (0.5, 0.5), (0.2, -0.1))
        ),
        *(
            (
                {"val_fraction": val, "test_fraction": test, "fold": 0},
                f"data.val_fraction {val} and data.test_fraction {test} must",
            )
            for val, test in ((0.0, 0.0), (1.0, 0.0), (0.2, -0.1), (0.5, 0.5))
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(**{"task": "lumbar_spine", **options})


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("fit", {"limit": 1}, "data.limit 1 leaves nothing to split"),
        ("fit", {"folder": Path("nowhere")}, "data.folder 'nowhere' is not a folder: give one with a data set"),
        ("fit", {"split": Path("nowhere.json")}, "data.split 'nowhere.json' cannot be read"),
        ("test", {"split": Path("nowhere.json")}, "data.split 'nowhere.json' cannot be read"),
    ],
)
def test_what_cannot_be_set_up(tmp_path, monkeypatch, stage, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready("lumbar_spine", stage=stage, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([Path("nowhere")], "input 'nowhere' does not exist: give an image, a volume or a folder"),
        ([Path("a.txt")], r"input 'a.txt' is no image: files may end in \.png .*\.nii\.gz"),
        ([Path("empty")], r"no image in \['empty'\]: files may end in \.png .*\.nii\.gz"),
        ([], r"no image in \[\]"),
    ],
)
def test_what_cannot_be_predicted(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    data = SegmentationData("lumbar_spine")
    data.inputs = inputs
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.predict_dataloader()


def test_a_split_file_is_followed_whatever_the_seed(folder, tmp_path):
    root, path = folder(number=30), tmp_path / "split.json"
    first = ready("lumbar_spine", root, limit=24)
    write_split(path, first.table)
    again = ready("lumbar_spine", root, split=path, split_seed=5)
    assert again.table == first.table
    assert [item.id for item in again.items] == [item.id for item in first.items]  # the order of training follows it
    assert torch.equal(again.train_set.images, first.train_set.images)
    assert split_hash(again.table) == split_hash(read_split(path)) == split_hash(first.table)
    assert split_hash(ready("lumbar_spine", root, limit=24, split_seed=5).table) != split_hash(first.table)
    changed = first.test_items[0].id
    (root / "masks" / f"{changed}.png").write_bytes((root / "masks" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=f"1 of 24 .*\n.*{changed}' changed since the split was written"):
        ready("lumbar_spine", root, split=path)
    test = ready("lumbar_spine", root, "test", split=path)  # scores the others
    assert [item.id for item in test.test_items] == [item.id for item in first.test_items]
    for item in test.test_items[1:]:
        item.read()
    with pytest.raises(ValueError, match=f"{changed}' changed since the split was written"):
        test.test_items[0].read()


def write_official(root: Path, kind: str, sides: str = "train train train train val val test test") -> None:
    """Eight noisy pictures on the sides that a data set has; number 4 is number 0 again."""
    rows, value = ["id,file,group,split"], 1 if kind == "nnunet" else 255
    for k, side in enumerate(sides.split()):
        place = root / side if kind == "folders" else root
        images = f"imagesTr/{k}_0000.png" if kind == "nnunet" else f"images/{k}.png"
        masks = f"labelsTr/{k}.png" if kind == "nnunet" else f"masks/{k}.png"
        save(place / images, np.kron(grey(0 if k == 4 else k), np.ones((2, 2), np.uint8)))
        save(place / masks, np.kron(blob(k), np.full((2, 2), value, np.uint8)))
        rows.append(f"{k},{k}.png,person{k},{side}")
    if kind == "table":
        (root / "items.csv").write_text("\n".join(rows))
    if kind == "nnunet":
        folds = [{"train": [*"01235674".replace(val, "")], "val": [val]} for val in "45"]
        (root / "splits_final.json").write_text(json.dumps(folds))
        (root / "dataset.json").write_text('{"labels": {"background": 0, "lesion": 1}}')


@pytest.mark.parametrize(("kind", "left"), [("folders", 3), ("table", 3), ("nnunet", 5)])
def test_a_training_image_that_is_on_another_side_too_is_left_out(tmp_path, kind, left):
    write_official(tmp_path, kind)
    like = r"1 image\(s\) left out .*0(_0000)?\.png \(train\) like .*4(_0000)?\.png \(val\)"
    with pytest.warns(UserWarning, match=like):
        data = ready("breast_lesion", tmp_path)
    name = "{side}_{k}" if kind == "folders" else "{k}"
    assert name.format(side="train", k=0) not in data.table and len(data.items) == len(data.table) == 7
    assert data.table[name.format(side="val", k=4)]["split"] == "val"
    assert len(data.train_set) == len(data.train_set.images) == left
    kept = ready("breast_lesion", tmp_path, duplicate_bits=0)
    assert len(kept.items) == 8 and name.format(side="train", k=0) in kept.table


def test_a_side_of_copies_alone(tmp_path):
    write_official(tmp_path, "folders", "train val val val val val test test")
    message = r"no train image is left, .*duplicate_bits 0 keeps them"
    with pytest.warns(UserWarning, match=r"1 image\(s\) left out"), pytest.raises(ValueError, match=message):
        ready("breast_lesion", tmp_path)


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    seeds = [0 if k in (7, 13, 14, 15, 16) else k for k in range(20)]
    save_pairs(tmp_path, [grey(k) for k in seeds], [blob(k) * 255 for k in range(20)])
    with pytest.warns(UserWarning, match=r"6 images joined because they look alike: 0, 13, 14, 15, 16, \.\.\.$"):
        data = ready("breast_lesion", tmp_path)
    assert len({item.split for item in data.items if seeds[int(item.id)] == 0}) == 1
    assert len({item.group for item in data.items}) == 15 and len(data.items) == 20


def test_groups_of_a_table_are_kept_whatever_the_images_look_like(tmp_path):
    images = np.zeros((12, 64, 64), np.uint8)
    for number, image in enumerate(images):
        image[3 * number + 10 : 3 * number + 16, 20:26] = 255
    save_pairs(tmp_path, [*images], [*images])
    rows = ["id,file,group", *(f"{k},{k}.png,{k}" for k in range(12))]
    (tmp_path / "items.csv").write_text("\n".join(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ready("breast_lesion", tmp_path)
    assert {item.id: item.group for item in data.items} == {str(k): str(k) for k in range(12)}


def test_folds_of_the_data_set_or_of_its_subjects(tmp_path):
    write_official(tmp_path / "nnunet", "nnunet")
    assert [item.id for item in ready("breast_lesion", tmp_path / "nnunet", fold=1).val_set.items] == ["5"]
    with pytest.raises(ValueError, match="has no fold 2 with train and val"):
        ready("breast_lesion", tmp_path / "nnunet", fold=2)
    folds = [ready("fetal_head", limit=24, fold=fold, folds=3).val_set.items for fold in range(3)]
    validated = [{item.group for item in found} for found in folds]
    assert len(set.union(*validated)) == sum(map(len, validated)) == 6
    folds = [ready("fetal_head", limit=24, fold=fold, folds=3, test_fraction=0).test_items for fold in range(3)]
    tested = [{item.group for item in found} for found in folds]
    assert len(set.union(*tested)) == sum(map(len, tested)) == 8
    write_official(tmp_path / "folders", "folders")
    with pytest.raises(ValueError, match=r"data.fold 0 would move the validation images that .* itself has: leave it"):
        ready("breast_lesion", tmp_path / "folders", fold=0)


def test_masks_with_greys_need_a_threshold(tmp_path):
    save_pairs(tmp_path, [grey(k) for k in range(5)], [blob(k) * 255 for k in range(5)])
    for path in [*(tmp_path / "masks").iterdir()]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=50)
        path.unlink()
    message = r"(?s)5 of 5 .*no label.* as JPEG leaves them, give --data.mask_threshold 127"
    with pytest.raises(ValueError, match=message):
        ready("breast_lesion", tmp_path)
    data = ready("breast_lesion", tmp_path, mask_threshold=127)
    assert all((item.read()[1] != blob(int(item.id))).mean() < 0.02 for item in data.items)
    with pytest.raises(ValueError, match=r"data.mask_threshold is for masks of one class, and .* has a, b"):
        ready("grey:a,b", tmp_path, mask_threshold=127)


def test_own_classes_of_colour_images(tmp_path):
    save_pairs(tmp_path, [colours(k) for k in range(6)], [50 + 50 * blob(k) for k in range(6)])
    data = ready("rgb:hair=50,skin=100", tmp_path, batch_size=2)
    assert data.task.class_names == ("hair", "skin") and data.task.num_classes == 3
    assert data.train_set[0, 0]["image"].shape == (3, 32, 32) and data.train_set.masks.unique().tolist() == [1, 2]


@pytest.mark.parametrize(("value", "absent"), [(0, "vertebra, canal, disc"), (2, "vertebra, disc")])
def test_classes_that_no_training_mask_holds_are_named(tmp_path, value, absent):
    save_pairs(tmp_path, [grey(k) for k in range(5)], [np.full((30, 40), value, np.uint8)] * 5)
    with pytest.warns(UserWarning, match=f"no mask of the 3 training images holds {absent}$"):
        ready("spine_structures", tmp_path)


def test_sides_to_test_on(folder, tmp_path):
    """After a training and with a split file they are those of training; without, those that the data set names."""
    root, split = folder("fetal_head", number=15), tmp_path / "split.json"
    fit = ready("fetal_head", root)
    fit.setup("test")
    write_split(split, fit.table)
    sides = ("train", "val", "test", "all")
    data = {side: ready("fetal_head", root, "test", side=side, split=split).test_items for side in sides}
    assert [len(items) for items in data.values()] == [9, 3, 3, 15]
    assert [item.id for item in data["test"]] == [item.id for item in fit.test_items]
    assert {item.id for side in ("train", "val", "test") for item in data[side]} == {item.id for item in data["all"]}
    with pytest.raises(ValueError, match=r"data.side 'test' holds no image: choose another, or a data.split that has"):
        ready("fetal_head", root, "test", side="test")


class Reader(lightning.LightningModule):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def test_step(self, batch):
        self.seen.append(batch)

    predict_step = test_step


def test_a_trainer_gets_items_to_test_and_files_to_predict(folder):
    root = folder(number=6)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer, reader = lightning.Trainer(**quiet), Reader()
    data = SegmentationData("lumbar_spine")
    data.inputs = [root / "images", root / "masks" / "0.png", root / "images" / "0.png"]
    trainer.predict(reader, datamodule=data)
    assert [tuple(files) for files in reader.seen] == [
        *((path,) for path in sorted((root / "images").iterdir())),
        (root / "masks" / "0.png",),
    ]
    reader.seen.clear()
    trainer.test(reader, datamodule=SegmentationData("lumbar_spine", limit=6, side="all"), verbose=False)
    assert len(reader.seen) == 6 and all(type(item) is Item for item in reader.seen)


def test_few_images_are_in_memory_at_once_while_they_are_read():
    reading: set[int] = set()
    most = []

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        reading.add(index)
        time.sleep(0.002)
        most.append(len(reading))
        reading.remove(index)
        return np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4), np.uint8)

    load([Item(str(k), str(k), partial(read, k)) for k in range(40)], 32)
    assert len(most) == 40 and max(most) <= 4


@pytest.mark.parametrize("name", DEMOS)
def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(name):
    images = demo_set(name, 40, 3, training=True, seed=7)
    first = images[2, 1]
    images[0, 0]
    assert all(torch.equal(images[2, 1][key], first[key]) for key in ("image", "mask"))
    assert not torch.equal(images[3, 1]["image"], first["image"])


@pytest.mark.parametrize("name", DEMOS)
def test_augmented_masks_keep_their_labels_and_follow_the_image(name):
    task, images = get_task(name), demo_set(name, 64, 3, training=True)
    images.images = (images.masks / 5).expand(-1, task.in_channels, -1, -1).contiguous()
    for epoch in range(8):
        sample = images[epoch, 0]
        assert set(sample["mask"].unique().tolist()) <= set(range(1 + len(task.labels)))
        bright = sample["image"].mean(0) > sample["image"].mean()
        truth = sample["mask"][0] > 0
        assert 2 * (bright & truth).sum() / (bright.sum() + truth.sum()) > 0.85


def test_numbered_vertebrae_move_up_and_down_more_than_sideways_and_repeat_the_edges():
    images = demo_set("lumbar_spine", 64, 1, training=True)
    images.images = torch.ones_like(images.images)
    samples = [images[epoch, 0] for epoch in range(60)]
    places = torch.stack([sample["mask"][0].nonzero().float().mean(0) for sample in samples])  # epochs 2
    rows, columns = (places.amax(0) - places.amin(0)) / 64
    assert rows > 0.2 > columns  # twice 0.15 and twice 0.05 at most, and a little by rotation and zoom
    # No black comes in: of an image of one value nothing is left but noise, whose rows have no mean to speak of.
    assert all(sample["image"][0].mean(1).abs().max() < 1 for sample in samples)


@pytest.mark.parametrize("augment", [True, False])
def test_images_are_normalised_one_by_one_and_augmented_in_training(augment):
    plain = demo_set("isic2017", 48, 2, training=False)
    assert torch.allclose(plain[0]["image"].mean((1, 2)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(plain[0]["image"].std((1, 2)), torch.ones(3), atol=1e-2)
    training = demo_set("isic2017", 48, 2, training=True, augment=augment)
    same = [torch.equal(training[epoch, k]["image"], plain[k]["image"]) for epoch in range(2) for k in range(2)]
    assert not any(same) if augment else all(same)


def test_epoch_sampler_shuffles_anew_and_reproducibly():
    def epoch(number: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(range(20), num_replicas=1, rank=0, shuffle=True, seed=4)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(3) == epoch(3)
    assert {index for _, index in epoch(3)} == set(range(20))
    assert [index for _, index in epoch(3)] != [index for _, index in epoch(4)]
    assert {number for number, _ in epoch(3)} == {3}
