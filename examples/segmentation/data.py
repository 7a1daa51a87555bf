"""Images and masks from a folder or from the demo, split by subject, as a LightningDataModule.

A data folder holds `images/`, `masks/<id>.png` (same size as the image) and `items.csv` with the columns `id`, `file`
(name in `images/`) and `group` (the subject), and if wanted `split` (`train` or `val`). Everything is read, checked and
resized once, before training starts; epochs then run from memory.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from segmentation import demo
from segmentation.tasks import Task

DEMO_IMAGES = 120


class Item(NamedTuple):
    """One image with its mask, not read yet: `read()` gives the image and its mask of class numbers."""

    id: str
    group: str
    split: str
    read: Callable[[], tuple[Image.Image, NDArray[np.uint8]]]


def demo_items(task: Task, size: int, number: int = DEMO_IMAGES, seed: int = 0) -> list[Item]:
    """The synthetic demo of `task`: `number` square images of `size` pixels."""
    return [
        Item(f"demo_{k:04d}", demo.subject_of(k), "", partial(demo.draw, task.name, seed, k, (size, size)))
        for k in range(number)
    ]


def folder_items(task: Task, folder: Path) -> list[Item]:
    """The items of a data folder; every file that `items.csv` names must be there."""
    table = folder / "items.csv"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data-dir {str(folder)!r} is not a folder: give the folder with images/, masks/, items.csv"
        )
    if not table.is_file():
        raise FileNotFoundError(
            f"data-dir {str(folder)!r} has no items.csv: write one with the columns id, file, group"
        )
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    if missing := {"id", "file", "group"} - set(reader.fieldnames or ()):
        raise ValueError(f"{table} lacks the column(s) {', '.join(sorted(missing))}: it needs id, file, group")
    if not rows:
        raise ValueError(f"{table} lists no images: the data folder {str(folder)!r} is empty")

    items = []
    for line, row in enumerate(rows, start=2):
        if empty := [column for column in ("id", "file", "group") if not row[column]]:
            raise ValueError(f"{table} line {line}: {empty[0]} is empty; every image needs an id, a file and a group")
        image, mask = folder / "images" / row["file"], folder / "masks" / f"{row['id']}.png"
        for path in (image, mask):
            if not path.is_file():
                raise FileNotFoundError(f"{table} line {line}: {path} does not exist; add the file or remove the line")
        items.append(Item(row["id"], row["group"], row.get("split") or "", partial(read_pair, task, image, mask)))
    return items


def read_pair(task: Task, image_path: Path, mask_path: Path) -> tuple[Image.Image, NDArray[np.uint8]]:
    """An image (RGB or grey, as the task wants) and its mask, pixel values turned into classes 1, 2, ..."""
    image = _open(image_path).convert("RGB" if task.in_channels == 3 else "L")
    mask_image = _open(mask_path)
    if mask_image.size != image.size:
        raise ValueError(
            f"{mask_path} is {mask_image.width}x{mask_image.height} but its image {image_path} is "
            f"{image.width}x{image.height}: save both in the same size"
        )
    values = np.asarray(mask_image if mask_image.mode == "P" else mask_image.convert("L"))  # P: labels, not colours
    classes = np.full(256, 255, np.uint8)
    classes[[0, *task.labels]] = range(1 + len(task.labels))
    mask = classes[values]
    if (mask == 255).any():
        raise ValueError(
            f"{mask_path} holds the value {values[mask == 255].min()}, which is no label of {task.name}: "
            f"allowed are 0 (background), " + ", ".join(f"{value} ({name})" for value, name in task.labels.items())
        )
    return image, mask


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow raises each of these for broken files
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
    if image.mode.startswith(("I", "F")):  # conversion to bytes would clip its values
        raise ValueError(f"{path} has more than 8 bits a pixel (mode {image.mode}): save it with values 0 to 255")
    return image


def limit_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` images, as whole subjects drawn at random."""
    if limit < 2:
        raise ValueError(f"limit {limit} leaves nothing to split: give at least 2 images")
    chosen: list[Item] = []
    for group in _shuffled_groups(items, seed):
        members = [item for item in items if item.group == group]
        if len(chosen) + len(members) <= limit:
            chosen += members
    return chosen


def split_items(items: Sequence[Item], val_fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, val), no subject on both sides: by the column `split` if filled, else a fraction of the subjects."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val-fraction {val_fraction} must lie between 0 and 1, e.g. 0.2")
    if any(item.split for item in items):
        if odd := next((item for item in items if item.split not in ("train", "val")), None):
            raise ValueError(
                f"item {odd.id!r} has the split {odd.split!r}: use train or val for every image, or for none"
            )
        val_groups = None
    else:
        groups = _shuffled_groups(items, seed)
        val_groups = set(groups[: max(1, round(val_fraction * len(groups)))])
    val = [item for item in items if (item.split == "val" if val_groups is None else item.group in val_groups)]
    chosen = {item.id for item in val}
    train = [item for item in items if item.id not in chosen]
    for side, name in ((train, "training"), (val, "validation")):
        if not side:
            raise ValueError(
                f"no {name} subject: {len(items)} images of {len(_groups(items))} subject(s) need two or more"
            )
    check_no_leak(train, val)
    return train, val


def check_no_leak(train: Sequence[Item], val: Sequence[Item]) -> None:
    """Refuse a subject that stands on both sides of a split."""
    if both := sorted(_groups(train) & _groups(val)):
        raise ValueError(
            f"group {both[0]!r} is in training and in validation ({len(both)} such): put each subject on one side"
        )


def _groups(items: Sequence[Item]) -> set[str]:
    return {item.group for item in items}


def _shuffled_groups(items: Sequence[Item], seed: int) -> list[str]:
    return np.random.default_rng(seed).permutation(sorted(_groups(items))).tolist()


class ImageSet(Dataset):
    """One side of the split in memory, as bytes; augmentation is a pure function of (seed, epoch, index)."""

    def __init__(self, task: Task, items: Sequence[Item], size: int, training: bool, seed: int) -> None:
        self.items, self.seed, self.training = list(items), seed, training
        self.transform = task.transform(size, training)
        with ThreadPoolExecutor() as pool:
            pairs = list(pool.map(lambda item: _resize(*item.read(), size), self.items))
        self.images = torch.stack([image for image, _ in pairs])  # n c h w, bytes
        self.masks = torch.stack([mask for _, mask in pairs])  # n 1 h w, class numbers

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_subjects(self) -> int:
        return len(_groups(self.items))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | int]:
        epoch, index = key if self.training else (0, key)
        if self.training:
            self.transform.set_random_state(
                seed=int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
            )
        pair = self.transform({"image": self.images[index] / 255, "mask": self.masks[index].float()})
        return {**pair, "index": index}


def _resize(image: Image.Image, mask: NDArray[np.uint8], size: int) -> tuple[Tensor, Tensor]:
    """Bytes of an image (c h w) and of its mask (1 h w), squashed to a square of `size` pixels."""
    pixels = np.atleast_3d(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))  # h w c
    labels = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    return torch.tensor(pixels).permute(2, 0, 1).contiguous(), torch.tensor(labels)[None]


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) and hands out (epoch, index), so that a resumed run sees what an unbroken one sees."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


class SegmentationData(lightning.LightningDataModule):
    """The data of one run. No `data_dir`: the synthetic demo of the task."""

    def __init__(
        self,
        task: Task,
        data_dir: Path | None = None,
        *,
        image_size: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.2,
        limit: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if image_size < 32:
            raise ValueError(f"image-size {image_size} is too small: the networks halve it five times, use 32 or more")
        if batch_size < 1:
            raise ValueError(f"batch-size {batch_size} must be at least 1")
        self.task, self.seed = task, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        items = demo_items(task, image_size) if data_dir is None else folder_items(task, data_dir)
        if limit is not None:
            items = limit_items(items, limit, split_seed)
        train, val = split_items(items, val_fraction, split_seed)
        self.train_set = ImageSet(task, train, image_size, training=True, seed=seed)
        self.val_set = ImageSet(task, val, image_size, training=False, seed=seed)

    def train_dataloader(self) -> DataLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(self.train_set, num_replicas=world, rank=rank, shuffle=True, seed=self.seed)
        full = len(sampler) >= self.batch_size  # a last batch of one starves BatchNorm
        return self._loader(self.train_set, sampler=sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set)

    def _loader(self, dataset: ImageSet, **kwargs: object) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # leaves the global random state alone
            **kwargs,
        )
