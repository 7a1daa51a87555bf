"""What `test` and `predict` write: masks as they are found, and at the end the tables and pictures of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
from lightning.pytorch.callbacks import Callback

from segmentation.data.item import Item, to_classes
from segmentation.data.pixels import read_values
from segmentation.figures import Case, draw_cases
from segmentation.prediction import Prediction, refuse_twins, write_mask, write_prediction
from segmentation.runs import whole_file, write_json
from segmentation.scores import Row, summarise


class ScoreWriter(Callback):
    """Of a test: masks/ID.png, images.csv, scores.json and cases.png in `out`; `facts` go into scores.json."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts = out, facts
        self.scores: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.unreadable: list[dict[str, str]] = []
        self._items: dict[str, Item] = {}

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        refuse_twins((self._mask(item.id).name, item.id) for item in trainer.datamodule.test_items)

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Mapping, batch: Item, *_: int
    ) -> None:
        if "reason" in outputs:
            self.unreadable.append({"id": batch.id, "reason": outputs["reason"]})
            return
        self.rows.append(outputs["row"])
        self._items[batch.id] = batch
        path = self._mask(batch.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mask(outputs["classes"], pl_module.task, path)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self.rows:
            reason = f": {self.unreadable[0]['reason']}" if self.unreadable else ""
            raise ValueError(f"none of {len(self.unreadable)} images could be read{reason}")
        task, counts = pl_module.task, {"images": len(self.rows), "unreadable": len(self.unreadable)}
        summary = summarise(self.rows, task.class_names)
        self.scores = self.facts | counts | summary | {"unreadable_images": self.unreadable}
        write_csv(self.out / "images.csv", self.rows)
        write_json(self.out / "scores.json", self.scores)
        ranked = sorted(self.rows, key=lambda row: (row["dice"], row["id"]))
        chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
        cases = []
        for name, row in chosen.items():
            image, truth = self._items[row["id"]].read()
            path = self._mask(row["id"])
            found = to_classes(read_values(path), task.labels, path)
            label = f"{name}: {row['id']}, Dice {row['dice']:.3f}"
            cases.append(Case(label, image, truth, found, task.class_names))
        draw_cases(self.out / "cases.png", cases)

    def _mask(self, name: str) -> Path:
        return self.out / "masks" / f"{name.replace('/', '-')}.png"


class MaskWriter(Callback):
    """Of a prediction: the masks, overlays and volumes, and predictions.csv, in `out`."""

    def __init__(self, out: Path, sizes: dict[str, float]) -> None:
        self.out, self.sizes = out, sizes
        self.rows: list[Row] = []
        self.unreadable: list[dict[str, str]] = []

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Prediction,
        batch: Path,
        *_: int,
    ) -> None:
        if outputs.reason:
            self.unreadable.append({"file": str(batch), "reason": outputs.reason})
        else:
            self.rows.append(write_prediction(outputs, pl_module.task, self.out, self.sizes))

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.rows:
            write_csv(self.out / "predictions.csv", self.rows)


def write_csv(path: Path, rows: list[Row]) -> None:
    """Rows as a CSV file, written whole; what is not known stays empty."""
    with whole_file(path) as draft:
        pd.DataFrame(rows).to_csv(draft, index=False)
