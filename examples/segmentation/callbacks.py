"""Averaged weights, and what lets a run be resumed exactly: seeds by epoch, curves in the checkpoint, whole files."""

import io
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from segmentation.runs import whole_file, write_csv


class EpochSeed(Callback):
    """Seeds Python, NumPy and PyTorch from (seed, epoch, process) at the start of every epoch (dropout, drop path)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        entropy = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        lightning.seed_everything(int(entropy.generate_state(1)[0]), verbose=False)


class History(Callback):
    """One row of metrics per epoch, kept in the checkpoint and written to `path` after every epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._start = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        self.rows.append({"epoch": trainer.current_epoch + 1, **metrics, "seconds": time.perf_counter() - self._start})
        if trainer.is_global_zero:
            write_csv(self.path, self.rows)


class Checkpoints(ModelCheckpoint):
    """Lightning's, in a folder that may be moved or copied between two sessions without losing the best epoch."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return path and os.path.join(str(self.dirpath), os.path.basename(path))

        paths = {name: here(path) for name, path in state_dict.items() if name.endswith("_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})


class Patience(EarlyStopping):
    """Stops after some epochs without a better validation Dice; where it stopped, a resumed run stops at once."""

    def __init__(self, epochs: int) -> None:
        super().__init__("val/dice", mode="max", patience=epochs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})  # what is asked for now

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class WholeEpochs(Callback):
    """Trains for the fewest whole epochs that contain the optimiser steps, so that the last step is validated."""

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"trainer.max_steps {steps} must be at least 1; leave it out to train for max_epochs")
        self.steps = steps

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.fit_loop.max_epochs = 1
            trainer.fit_loop.max_epochs = math.ceil(self.steps / trainer.estimated_stepping_batches)


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights, with which the network is validated and kept as the best one.

    The decay grows from 2/11 to `decay` as (1 + n) / (10 + n) over the steps n, so that short runs are not held back by
    their first weights.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay {decay} must lie between 0 and 1, e.g. 0.99; null means no averaging")

        super().__init__(multi_avg_fn=partial(average, decay))


def average(decay: float, means: list[Tensor], values: list[Tensor], number: Tensor) -> None:
    """Make the mean of the weights that of all steps after step `number`; of counters it is the last value."""
    if means[0].is_floating_point():
        torch._foreach_lerp_(means, values, 1 - min(decay, (1 + int(number)) / (10 + int(number))))
    else:
        torch._foreach_copy_(means, values)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that a kill cannot cut off, flushed to the disk before they take their place.

    The last checkpoint but one stays as `previous.ckpt`, in case the disk damages the last.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # into a full disk, torch.save itself fails without saying why
        torch.save(checkpoint, content)
        with whole_file(path) as draft:
            with draft.open("wb") as stream:
                stream.write(content.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            if path.stem == "last" and path.exists():
                os.replace(path, path.with_name("previous.ckpt"))
