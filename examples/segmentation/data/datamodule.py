"""Images in memory, split by subject, as a LightningDataModule.

What training uses is read, checked and resized once, before it starts; epochs then run from memory. Which folders are
understood is said in `formats`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kan_mamba_layers import Segmenter
from segmentation.data import split as splits
from segmentation.data.demo import demo_items
from segmentation.data.formats import busi, folders, hc18, isic, myosegmentum, nnunet, spider, table
from segmentation.data.formats.files import join_channels, list_files, subfolders
from segmentation.data.formats.voxels import SAGITTAL, STORED, Cut
from segmentation.data.item import Item
from segmentation.data.pixels import to_target
from segmentation.tasks import Task, get_task

# A module has `fits(folder)`, `items(task, folder)` and says in its docstring what fits. The first is taken.
FORMATS = (table, isic, hc18, busi, nnunet, spider, myosegmentum, folders)
DEPTH = 5  # how far below the given folder the data set may lie
THREADS = 4  # that read images: one of 27 megapixels takes half a gigabyte meanwhile
SHOWN = 5  # names in a remark
SAGITTAL_TASKS = ("lumbar_spine", "spine_vertebrae", "spine_structures")


def find_items(task: Task, folder: Path, fold: int | None = None) -> list[Item]:
    """The items of a data folder, sorted by id: images are found and paired with their masks, and read when used.

    `folder` may also be one that holds exactly one data set, such as what an archive was unpacked into. With a `fold`
    the sides are those of that fold, where the data set has folds of its own.
    """
    name = f"data.folder {str(folder)!r}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is not a folder: give one with a data set (looked for {folder.absolute()})")
    hits = _search(folder, DEPTH)
    if len(hits) > 1:
        raise ValueError(f"{name} holds {len(hits)} data sets: give one of" + "".join(f"\n  {hit}" for _, hit in hits))
    if not hits:
        known = "".join(f"\n  {' '.join((known.__doc__ or '').split())}" for known in FORMATS)
        raise ValueError(f"{name} holds nothing that is understood. Understood are:{known}")
    [(found, place)] = hits
    own_folds = {"fold": fold or 0} if found is nnunet else {}
    items = sorted(found.items(task, place, **own_folds), key=lambda item: item.id)
    if fold is not None and not own_folds and any(item.split == "val" for item in items):
        raise ValueError(f"data.fold {fold} would move the validation images that {place} itself has: leave it out")
    if not items:
        raise ValueError(f"data.folder {str(place)!r} holds no image with a label of task {task.name!r}")
    return items


def _search(folder: Path, depth: int) -> list[tuple[ModuleType, Path]]:
    """All data sets in a folder; inside of one no other is looked for."""
    if found := next((known for known in FORMATS if known.fits(folder)), None):
        return [(found, folder)]
    return [hit for inner in subfolders(folder) for hit in _search(inner, depth - 1)] if depth else []


def load(items: Sequence[Item], size: int) -> tuple[Tensor, Tensor, NDArray[np.bool_], NDArray[np.float32]]:
    """Images (n c size size), masks (n 1 size size), `splits.difference_hash` and `splits.edges` (n d).

    Images are kept in half precision, which holds 8 and 11 bits exactly.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(partial(_load, size=size), items))
    if broken := [str(result) for result in read if isinstance(result, Exception)]:
        shown = "".join(f"\n  {message}" for message in broken[:20])
        raise ValueError(f"{len(broken)} of {len(items)} images or masks cannot be used:{shown}")
    images, masks, hashes, edges = zip(*read, strict=True)
    return torch.stack(images), torch.stack(masks), np.stack(hashes), np.stack(edges)


def _load(item: Item, size: int) -> tuple[Tensor, Tensor, NDArray[np.bool_], NDArray[np.float32]] | Exception:
    try:
        image, mask = item.read()
        pair = Segmenter.to_square(image, size).half(), to_target(mask, size)
        return *pair, splits.difference_hash(image), splits.edges(image)
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
        task: isic2017, fetal_head, lumbar_spine, breast_lesion, spine_vertebrae or spine_structures; or your own,
            as "rgb:hair,skin" or "grey:lesion=77", with the values in masks where they are not 1, 2, ...
        folder: images and masks, as `formats` understands them; without it, the synthetic demo of the task.
        image_size: sides of the squares that images are squashed to.
        batch_size: images in one batch.
        val_fraction: share of the subjects to validate on, where the data set does not say.
        test_fraction: share of the subjects that training never touches, where the data set does not say; with a fold
            and 0, each subject is tested on in one of the folds.
        limit: at most that many images, as whole subjects.
        split: a split.json to follow, which then decides on the sides.
        split_seed: seed of the split and of the choice under `limit`.
        fold: which part of the subjects to validate on, from 0; instead of val_fraction. With test_fraction 0, which
            part to test on.
        folds: number of parts that the subjects, without those of a test_fraction, are divided into.
        duplicate_bits: images count as the same where so few of 256 bits differ and their edges agree; 0: no check.
        mask_threshold: in masks with greys, from 0 to 254, what is brighter is the class.
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
    # How the volumes of the training were cut, the most frequent way first; so were those of the library's weights.
    cuts: Sequence[Cut] = ((SAGITTAL, STORED),)
    channel_files = 1  # how many files each image of the training consisted of

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
        fold: int | None = None,
        folds: int = 5,
        duplicate_bits: int = 8,
        mask_threshold: int | None = None,
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
        if folds < 2 or not 0 <= (fold or 0) < folds:
            raise ValueError(f"data.fold {fold} of data.folds {folds}: give two folds or more, and count from 0")
        if not 0 <= duplicate_bits <= 256:
            raise ValueError(f"data.duplicate_bits {duplicate_bits} must lie between 0 (no check) and 256")
        if not 0 <= (mask_threshold or 0) < 255:
            raise ValueError(f"data.mask_threshold {mask_threshold} must lie between 0 and 254, e.g. 127")
        untested = test_fraction == 0 and fold is None
        if untested or test_fraction < 0 or not 0 < val_fraction < 1 - test_fraction:
            fractions = f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction}"
            hint = "a data.test_fraction of 0 needs a data.fold"
            raise ValueError(f"{fractions} must lie above 0, and together below 1, e.g. 0.15 and 0.2; {hint}")
        self.task = replace(get_task(task), mask_threshold=mask_threshold)
        self.folder, self.image_size, self.batch_size = folder, image_size, batch_size
        self.fractions, self.split_seed = (val_fraction, test_fraction), split_seed
        self.fold, self.folds, self.duplicate_bits = fold, folds, duplicate_bits
        self.limit, self.split = limit, split
        self.seed, self.augment, self.num_workers, self.side = seed, augment, num_workers, side or "test"
        self._done: set[Callable[[], None]] = set()

    def setup(self, stage: str) -> None:
        """Find and read what a stage needs, once: "fit" (and "validate") or "test"."""
        setups = {"fit": self._setup_fit, "validate": self._setup_fit, "test": self._setup_test}
        if (setup := setups.get(stage)) and setup not in self._done:
            setup()
            self._done.add(setup)

    def _setup_fit(self) -> None:
        items = self._find(self.fold)
        images, masks, *looks = load(items, self.image_size)
        if self.split is None:
            items = self._divide(items, splits.look_alikes(items, *looks, self.duplicate_bits))
        for side in ("train", "val"):
            chosen = [index for index, item in enumerate(items) if item.split == side]
            pairs = [items[index] for index in chosen], images[chosen], masks[chosen]
            setattr(self, f"{side}_set", ImageSet(self.task, *pairs, side == "train", self.seed, self.augment))
        self.items = [item for item in items if item.split]
        self.test_items = [item for item in items if item.split == "test"]
        if self.split is None:
            with ThreadPoolExecutor(THREADS) as pool:
                self.table = splits.split_table(self.items, list(pool.map(splits.file_hash, self.items)))
        else:
            self.table = splits.read_split(self.split)
        self.cuts = [cut for cut, _ in Counter(item.cut for item in self.items if any(item.cut)).most_common()]
        planes = sorted({plane for plane, _ in self.cuts if plane})
        if len(planes) > 1:
            rank_zero_warn(f"volumes are cut in several planes, whose columns and rows point to {', '.join(planes)}")
        present = self.train_set.masks.unique().tolist()
        if absent := [name for number, name in enumerate(self.task.class_names, start=1) if number not in present]:
            rank_zero_warn(f"no mask of the {len(self.train_set)} training images holds {', '.join(absent)}")

    def _divide(self, items: Sequence[Item], pairs: NDArray[np.intp]) -> list[Item]:
        """The items on their sides; without a side where one of a pair that looks alike is on another side."""
        items = splits.join_look_alikes(items, pairs)
        sizes = Counter(item.group for item in items)
        if joined := sorted((item.group, item.id) for item in items if item.own_group and sizes[item.group] > 1):
            names = _listed([name for _, name in joined])
            rank_zero_warn(f"{len(joined)} images joined because they look alike: {names}")
        items = splits.split_items(items, *self.fractions, self.split_seed, self.fold, self.folds)
        if both := splits.part_look_alikes(items, pairs):
            left_out = {first.id for first, _ in both}
            files = [[f"{item.files[0] if item.files else item.id} ({item.split})" for item in pair] for pair in both]
            likes = f"look like one of another side: {_listed([' like '.join(pair) for pair in files])}"
            rank_zero_warn(f"{len(left_out)} image(s) left out that {likes}")
            items = [replace(item, split="") if item.id in left_out else item for item in items]
            if missing := set(splits.SIDES) - {item.split for item in items}:
                raise ValueError(f"no {min(missing)} image is left, all {likes}; --data.duplicate_bits 0 keeps them")
        return items

    def _setup_test(self) -> None:
        # Without a fold: that of a run is one of the images it was trained on.
        items = self.items if self._setup_fit in self._done else self._find()
        self.test_items = [item for item in items if self.side in ("all", item.split)]
        if not self.test_items:
            raise ValueError(f"data.side {self.side!r} holds no image: choose another, or a data.split that has one")
        scored = [item.cut for item in self.test_items]
        known, planes = ({plane for plane, _ in cuts if plane} for cuts in (self.cuts, scored))
        if known and planes - known:
            rank_zero_warn(
                f"slices whose columns and rows point to {', '.join(sorted(planes))} are scored, but those of the "
                f"training point to {', '.join(sorted(known))}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps for predictions."""
        channel_files = max(item.channel_files for item in self.items)
        return {"cuts": [list(cut) for cut in self.cuts], "channel_files": channel_files}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cuts = [(plane, way) for plane, way in state_dict.get("cuts", ())]
        if not self.cuts and self.task.name in SAGITTAL_TASKS:  # trained on slices that nothing is known of
            self.cuts = [(SAGITTAL, "")]
        self.channel_files = state_dict.get("channel_files", 1)

    def _find(self, fold: int | None = None) -> list[Item]:
        """The items, not read yet; those of `split` on its sides, refused when they are read where they changed."""
        if self.folder is None:
            items = demo_items(self.task, self.image_size)
        else:
            items = find_items(self.task, self.folder, fold)
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
        return DataLoader(self.test_items, batch_size=None, generator=torch.Generator())

    def predict_dataloader(self) -> DataLoader:
        """The images and volumes of `inputs` one by one: the paths of their channels, or one path."""
        cases = join_channels(list_files(self.inputs), self.channel_files)
        return DataLoader(cases, batch_size=None, generator=torch.Generator())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Items stay as they are: only the pixels read from them go to a device."""
        if isinstance(batch, Item):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _loader(self, dataset: ImageSet, **options: Any) -> DataLoader:
        options |= {"batch_size": self.batch_size, "num_workers": self.num_workers}
        options |= {"persistent_workers": self.num_workers > 0}
        return DataLoader(dataset, generator=torch.Generator(), **options)  # leaves the global random state alone


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], "..."] if len(names) > SHOWN else names)
