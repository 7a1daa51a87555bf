"""Images in memory, split by subject, as a LightningDataModule.

Everything is read, checked and resized once, before training starts; epochs then run from memory. Which folders are
understood is said in `sources`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from segmentation.data import split as splits
from segmentation.data.demo import demo_items
from segmentation.data.formats import find_items
from segmentation.data.item import Item, Pixels
from segmentation.tasks import Task


def to_input(image: Pixels, size: int) -> Tensor:
    """Values (c size size) of an image (h w c), squashed to a square; bytes become 0 ... 1, deeper pixels are
    stretched from their least to their greatest value."""
    values = image.astype(np.float32)
    low, high = (0.0, 255.0) if image.dtype == np.uint8 else (values.min(), values.max())
    values = (values - low) / max(high - low, np.finfo(np.float32).tiny)
    channels = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))
        for plane in np.moveaxis(values, 2, 0)
    ]
    return torch.from_numpy(np.stack(channels))


def to_target(mask: NDArray[np.uint8], size: int) -> Tensor:
    """Class numbers (1 size size) of a mask (h w), squashed to a square."""
    return torch.tensor(np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)))[None]


class Loaded:
    """All items in memory at the size of training, with what tells near-duplicates and changed files.

    Attributes:
        images: n c size size, half precision, which keeps 8 and 11 bits exactly.
        masks: n 1 size size, class numbers.
        hashes: n 256, see `splits.difference_hash`.
        digests: SHA-256 of every item.
    """

    def __init__(self, items: Sequence[Item], size: int) -> None:
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(partial(_load, size=size), items))
        if broken := [str(result) for result in read if isinstance(result, Exception)]:
            shown = "".join(f"\n  {message}" for message in broken[:20])
            raise ValueError(f"{len(broken)} of {len(items)} images or masks cannot be used:{shown}")
        images, masks, hashes, digests = zip(*read, strict=True)
        self.images, self.masks = torch.stack(images), torch.stack(masks)
        self.hashes, self.digests = np.stack(hashes), list(digests)


def _load(item: Item, size: int) -> tuple[Tensor, Tensor, NDArray[np.bool_], str] | Exception:
    try:
        image, mask = item.read()
        return (
            to_input(image, size).half(),
            to_target(mask, size),
            splits.difference_hash(image),
            splits.file_hash(item),
        )
    except (ValueError, OSError) as error:
        return error


class ImageSet(Dataset):
    """One side of the split; augmentation is a pure function of (seed, epoch, index)."""

    def __init__(
        self,
        task: Task,
        items: Sequence[Item],
        images: Tensor,
        masks: Tensor,
        training: bool,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        self.items, self.images, self.masks = list(items), images, masks
        self.training, self.seed = training, seed
        self.transform = task.transform(images.shape[-1], training and augment)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_subjects(self) -> int:
        return len({item.group for item in self.items})

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | int]:
        epoch, index = key if self.training else (0, key)
        if self.training:
            self.transform.set_random_state(
                seed=int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
            )
        pair = self.transform({"image": self.images[index].float(), "mask": self.masks[index].float()})
        return {**pair, "index": index}


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) and hands out (epoch, index), so that a resumed run sees what an unbroken one sees."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


class SegmentationData(lightning.LightningDataModule):
    """The data of one run. No `data_dir`: the synthetic demo of the task.

    Attributes:
        items: every item with its side; `test_items` are those that training never touches.
        train_set, val_set: the two sides that training uses, in memory.
        split: the table that `splits.write_split` writes.
        first_epoch: the one that training begins with, more than 0 where it is continued.
    """

    def __init__(
        self,
        task: Task,
        data_dir: Path | None = None,
        *,
        image_size: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        limit: int | None = None,
        split: Path | None = None,
        split_seed: int = 0,
        duplicate_bits: int = 8,
        seed: int = 0,
        augment: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if image_size < 32:
            raise ValueError(f"image-size {image_size} is too small: the networks halve it five times, use 32 or more")
        if batch_size < 1:
            raise ValueError(f"batch-size {batch_size} must be at least 1")
        splits.check_fractions(val_fraction, test_fraction)
        self.task, self.seed, self.augment = task, seed, augment
        self.batch_size, self.num_workers = batch_size, num_workers
        self.first_epoch = 0
        found = demo_items(task, image_size) if data_dir is None else find_items(task, data_dir)
        if len({item.id for item in found}) < len(found):
            raise ValueError(f"data-dir {str(data_dir)!r} holds two images of one id: rename one of them")
        if limit is not None:
            found = splits.limit_items(found, limit, split_seed)
        table = None if split is None else splits.read_split(split)
        if table is not None:
            found = splits.follow_split(found, table)
        loaded = Loaded(found, image_size)
        if table is None:
            grouped = splits.join_duplicates(found, loaded.hashes, duplicate_bits)
            self.items = splits.split_items(grouped, val_fraction, test_fraction, split_seed)
            table = splits.split_table(self.items, loaded.digests)
        else:
            self.items = found
            splits.check_unchanged(found, loaded.digests, table)
        self.split = table
        self.train_set, self.val_set = (self._side(loaded, side) for side in ("train", "val"))
        self.test_items = [item for item in self.items if item.split == "test"]

    def train_dataloader(self) -> DataLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(self.train_set, num_replicas=world, rank=rank, shuffle=True, seed=self.seed)
        sampler.set_epoch(self.first_epoch)  # worker processes begin before Lightning tells which epoch it is
        full = len(sampler) >= self.batch_size  # a last batch of one starves BatchNorm
        return self._loader(self.train_set, sampler=sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set)

    def _side(self, loaded: Loaded, side: str) -> ImageSet:
        chosen = [index for index, item in enumerate(self.items) if item.split == side]
        images, masks = loaded.images[chosen], loaded.masks[chosen]
        items = [self.items[k] for k in chosen]
        return ImageSet(self.task, items, images, masks, side == "train", self.seed, self.augment)

    def _loader(self, dataset: ImageSet, **kwargs: object) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # leaves the global random state alone
            **kwargs,
        )
