"""Images in memory, split by subject, as a LightningDataModule.

What training uses is read, checked and resized once, before it starts; epochs then run from memory. Which folders are
understood is said in `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from segmentation.data import split as splits
from segmentation.data.demo import demo_items
from segmentation.data.formats import busi, folders, hc18, isic, myosegmentum, nnunet, spider, table
from segmentation.data.formats.files import list_files, subfolders
from segmentation.data.item import Item, to_input, to_target
from segmentation.tasks import Task, get_task

# A module has `fits(folder)`, `items(task, folder)` and says in its docstring what fits. The first is taken.
FORMATS = (table, isic, hc18, busi, nnunet, spider, myosegmentum, folders)
DEPTH = 5  # how far below the given folder the data set may lie


def find_items(task: Task, folder: Path) -> list[Item]:
    """The items of a data folder, sorted by id: images are found and paired with their masks, and read when used.

    `folder` may also be one that holds exactly one data set, such as what an archive was unpacked into.
    """
    name = f"data.folder {str(folder)!r}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} is not a folder: give the folder with images/, masks/, items.csv, or a data set as downloaded"
        )
    hits = _search(folder, DEPTH)
    if len(hits) > 1:
        raise ValueError(f"{name} holds {len(hits)} data sets: give one of" + "".join(f"\n  {hit}" for _, hit in hits))
    if not hits:
        known = "".join(f"\n  {' '.join((known.__doc__ or '').split())}" for known in FORMATS)
        raise ValueError(f"{name} holds nothing that is understood. Understood are:{known}")
    [(found, place)] = hits
    items = sorted(found.items(task, place), key=lambda item: item.id)
    if not items:
        raise ValueError(f"data.folder {str(place)!r} holds no image with a label of task {task.name!r}")
    return items


def _search(folder: Path, depth: int) -> list[tuple[ModuleType, Path]]:
    """All data sets in a folder; inside of one no other is looked for."""
    if found := next((known for known in FORMATS if known.fits(folder)), None):
        return [(found, folder)]
    return [hit for inner in subfolders(folder) for hit in _search(inner, depth - 1)] if depth else []


def load(items: Sequence[Item], size: int) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
    """Images (n c size size), masks (n 1 size size) and `splits.difference_hash` (n 256) of all items.

    Images are kept in half precision, which holds 8 and 11 bits exactly.
    """
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(partial(_load, size=size), items))
    if broken := [str(result) for result in read if isinstance(result, Exception)]:
        shown = "".join(f"\n  {message}" for message in broken[:20])
        raise ValueError(f"{len(broken)} of {len(items)} images or masks cannot be used:{shown}")
    images, masks, hashes = zip(*read, strict=True)
    return torch.stack(images), torch.stack(masks), np.stack(hashes)


def _load(item: Item, size: int) -> tuple[Tensor, Tensor, NDArray[np.bool_]] | Exception:
    try:
        image, mask = item.read()
        return to_input(image, size).half(), to_target(mask, size), splits.difference_hash(image)
    except (ValueError, OSError) as error:
        return error


class ImageSet(Dataset):
    """One side of the split; augmentation is a pure function of (seed, epoch, index)."""

    def __init__(
        self, task: Task, items: Sequence[Item], images: Tensor, masks: Tensor, training: bool, seed: int = 0,
        augment: bool = True,
    ) -> None:  # fmt: skip
        self.items, self.images, self.masks = list(items), images, masks
        self.training, self.seed = training, seed
        self.transform = task.transform(images.shape[-1], training and augment)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | int]:
        epoch, index = key if self.training else (0, key)
        if self.training:
            (seed,) = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)
            self.transform.set_random_state(seed=int(seed))
        pair = self.transform({"image": self.images[index].float(), "mask": self.masks[index].float()})
        return {**pair, "index": index}


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) and hands out (epoch, index), so that a resumed run sees what an unbroken one sees."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


class SegmentationData(lightning.LightningDataModule):
    """The data of one run.

    Args:
        task: isic2017, fetal_head, lumbar_spine, breast_lesion, spine_vertebrae or spine_structures.
        folder: images and masks, as `formats` understands them; without it, the synthetic demo of the task.
        image_size: sides of the squares that images are squashed to.
        batch_size: images in one batch.
        val_fraction: share of the subjects to validate on, where the data set does not say.
        test_fraction: share of the subjects that training never touches, where the data set does not say.
        limit: at most that many images, as whole subjects.
        split: a split.json to follow, which then decides on the sides.
        split_seed: seed of the split and of the choice under `limit`.
        seed: seed of order and augmentation.
        augment: whether training images are augmented.
        num_workers: processes that augment images.
        side: the images of a test: one side of the split, or all (default: test, or all of other data without a split).
    """

    items: list[Item]  # all with their sides, after setup("fit")
    train_set: ImageSet  # the two sides that training uses, in memory
    val_set: ImageSet
    test_items: list[Item]  # those that training never touches; after setup("test") those of `side`
    table: splits.Table  # what `splits.write_split` writes
    first_epoch = 0  # the one that training begins with, more than 0 where it is resumed
    inputs: Sequence[Path] = ()  # images, volumes and folders of them, to predict

    def __init__(
        self,
        task: str,
        folder: Path | None = None,
        *,
        image_size: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        limit: int | None = None,
        split: Path | None = None,
        split_seed: int = 0,
        seed: int = 0,
        augment: bool = True,
        num_workers: int = 0,
        side: Literal["test", "val", "train", "all"] | None = None,
    ) -> None:
        super().__init__()
        if image_size < 32:
            raise ValueError(f"data.image_size {image_size} is too small: networks halve it five times, use 32 or more")
        if batch_size < 1:
            raise ValueError(f"data.batch_size {batch_size} must be at least 1")
        splits.check_fractions(val_fraction, test_fraction)
        self.task, self.folder, self.image_size, self.batch_size = get_task(task), folder, image_size, batch_size
        self.fractions, self.split_seed = (val_fraction, test_fraction), split_seed
        self.limit, self.split = limit, split
        self.seed, self.augment, self.num_workers, self.side = seed, augment, num_workers, side or "test"
        self._done: set[Callable[[], None]] = set()

    def setup(self, stage: str) -> None:
        """Find and read what a stage needs, once: "fit" (and "validate"), "test" or "predict"."""
        setups = {"fit": self._setup_fit, "validate": self._setup_fit, "test": self._setup_test}
        if (setup := setups.get(stage, self._setup_predict)) not in self._done:
            setup()
            self._done.add(setup)

    def _setup_fit(self) -> None:
        items = self._find()
        images, masks, hashes = load(items, self.image_size)
        if self.split is None:
            items = splits.split_items(splits.join_duplicates(items, hashes), *self.fractions, self.split_seed)
            with ThreadPoolExecutor() as pool:
                self.table = splits.split_table(items, list(pool.map(splits.file_hash, items)))
        else:
            self.table = splits.read_split(self.split)
        self.items, self.test_items = items, [item for item in items if item.split == "test"]
        for side in ("train", "val"):
            chosen = [index for index, item in enumerate(items) if item.split == side]
            pairs = [items[index] for index in chosen], images[chosen], masks[chosen]
            setattr(self, f"{side}_set", ImageSet(self.task, *pairs, side == "train", self.seed, self.augment))

    def _setup_test(self) -> None:
        items = self.items if self._setup_fit in self._done else self._find()
        self.test_items = [item for item in items if self.side in ("all", item.split)]
        if not self.test_items:
            raise ValueError(f"data.side {self.side!r} holds no image: choose another, or a data.split that has one")

    def _setup_predict(self) -> None:
        self._files = list_files(self.inputs)

    def _find(self) -> list[Item]:
        """The items, not read yet; those of `split` on its sides, refused when they are read where they changed."""
        items = demo_items(self.task, self.image_size) if self.folder is None else find_items(self.task, self.folder)
        if len({item.id for item in items}) < len(items):
            raise ValueError(f"data.folder {str(self.folder)!r} holds two images of one id: rename one of them")
        if self.limit is not None and self.split is None:
            items = splits.limit_items(items, self.limit, self.split_seed)
        return items if self.split is None else splits.follow_split(items, splits.read_split(self.split))

    def train_dataloader(self) -> DataLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(self.train_set, num_replicas=world, rank=rank, shuffle=True, seed=self.seed)
        sampler.set_epoch(self.first_epoch)  # worker processes begin before Lightning tells which epoch it is
        full = len(sampler) >= self.batch_size  # a last batch of one starves BatchNorm
        return self._loader(self.train_set, sampler=sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """The items of `side` one by one, to be read by whoever gets them."""
        return DataLoader(self.test_items, batch_size=None, collate_fn=_itself, generator=torch.Generator())

    def predict_dataloader(self) -> DataLoader:
        """The paths of all images and volumes of `inputs`, one by one."""
        return DataLoader(self._files, batch_size=None, collate_fn=_itself, generator=torch.Generator())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Items and paths stay as they are: only the pixels read from them go to a device."""
        if isinstance(batch, Item | Path):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _loader(self, dataset: ImageSet, **options: Any) -> DataLoader:
        options |= {"batch_size": self.batch_size, "num_workers": self.num_workers}
        options |= {"persistent_workers": self.num_workers > 0}
        return DataLoader(dataset, generator=torch.Generator(), **options)  # leaves the global random state alone


def _itself(batch: Any) -> Any:
    return batch
