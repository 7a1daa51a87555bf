"""What lets a run be continued exactly: random numbers that depend on the epoch, and curves in the checkpoint."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback, EarlyStopping


class EpochSeed(Callback):
    """Seeds Python, NumPy and PyTorch from (seed, epoch, process) at the start of every epoch (dropout, drop path)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        entropy = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        lightning.seed_everything(int(entropy.generate_state(1)[0]), verbose=False)


class History(Callback):
    """One row of metrics an epoch, kept in the checkpoint and written to `history.csv` after every epoch."""

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
            self.write()

    def write(self) -> None:
        """Write the table beside its place and move it there, so a kill never leaves half a file."""
        draft = self.path.with_suffix(".part")
        with draft.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, fieldnames=list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
        os.replace(draft, self.path)


class Patience(EarlyStopping):
    """Early stopping on val/dice that, when a run which had already stopped is resumed, trains no further epoch."""

    def __init__(self, epochs: int) -> None:
        super().__init__("val/dice", mode="max", patience=epochs)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True
