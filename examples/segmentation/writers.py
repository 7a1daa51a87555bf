"""What `test` and `predict` write: masks as they are found, and at the end the tables and pictures of all of them."""

import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.ellipse import head_circumference
from segmentation.data.formats.files import VOLUMES, case_stem, stem
from segmentation.data.formats.voxels import is_silent, read_header
from segmentation.data.item import Item, to_classes
from segmentation.data.pixels import read_values
from segmentation.figures import Case, draw_cases, overlay
from segmentation.prediction import Prediction, write_volume
from segmentation.runs import whole_file, write_csv, write_json
from segmentation.scores import Row, summarise
from segmentation.tasks import Task


class Writer(Callback):
    """Writes to `out` and keeps a row of each image, and a reason of each that cannot be read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[Row] = []
        self.unreadable: list[dict[str, str]] = []


class ScoreWriter(Writer):
    """Of a test: masks/ID.png, images.csv, scores.json and cases.png; `facts` go into scores.json."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        super().__init__(out)
        self.facts = facts
        self.scores: dict[str, Any] = {}
        self._items: dict[str, Item] = {}

    def on_test_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        refuse_twins((self._mask(item.id).name, item.id) for item in trainer.datamodule.test_items)
        (self.out / "masks").mkdir(parents=True, exist_ok=True)

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: dict, batch: Item, *_: int
    ) -> None:
        if "reason" in outputs:
            self.unreadable.append({"id": batch.id, "reason": outputs["reason"]})
            return
        self.rows.append(outputs["row"])
        self._items[batch.id] = batch
        write_mask(outputs["classes"], pl_module.task, self._mask(batch.id))

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
        cases = []
        for name, row in {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}.items():
            path, label = self._mask(row["id"]), f"{name}: {row['id']}, Dice {row['dice']:.3f}"
            found = to_classes(read_values(path), task.labels, path)
            cases.append(Case(label, *self._items[row["id"]].read(), found, task.class_names))
        draw_cases(self.out / "cases.png", cases)

    def _mask(self, name: str) -> Path:
        return self.out / "masks" / f"{name.replace('/', '-')}.png"


class MaskWriter(Writer):
    """Of a prediction: the mask and overlay of each image, the labels of each volume, and predictions.csv.

    Heads are measured: in millimetres with `sizes`, millimetres per pixel by the stems of file names, or `size`, that
    of all others; in pixels without both.
    """

    def __init__(self, out: Path, sizes: dict[str, float], size: float | None = None) -> None:
        super().__init__(out)
        self.sizes, self.size = sizes, size
        self.silent: list[str] = []  # volumes whose headers do not say how they lie

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Prediction,
        batch: Sequence[Path],
        *_: int,
    ) -> None:
        if outputs.reason:
            self.unreadable.append({"file": str(batch[0]), "reason": outputs.reason})
            return
        classes, (mask, *overlays) = outputs.classes, (self.out / name for name in output_names(batch))
        row: Row = {"file": batch[0].name, "foreground": int((classes > 0).sum())}
        if outputs.image is None:
            write_volume(outputs, mask)
            self.silent += [batch[0].name] * is_silent(read_header(batch[0]))
        else:
            write_mask(classes, pl_module.task, mask)
            _save(Image.fromarray(overlay(outputs.image, classes)), overlays[0])
            if self.sizes or self.size:
                row["hc_mm"] = self._circumference(batch[0], classes)
            elif pl_module.task.name == "fetal_head":
                row["hc_pixels"] = head_circumference(classes, (1, 1))
        self.rows.append(row)

    def on_predict_end(self, *_: Any) -> None:
        if self.rows:
            write_csv(self.out / "predictions.csv", self.rows)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, error: BaseException
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.on_predict_end()

    def _circumference(self, path: Path, classes: NDArray[np.uint8]) -> float | None:
        if size := self.sizes.get(stem(path), self.size):
            return head_circumference(classes, (size, size))
        warnings.warn(f"no pixel size is given for {path.name}: its hc_mm stays empty", stacklevel=2)
        return None


def write_mask(classes: NDArray[np.uint8], task: Task, path: Path) -> None:
    """Write class numbers (h w) as the task's label values."""
    _save(Image.fromarray(np.array([0, *task.labels], np.uint8)[classes]), path)


def _save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as draft:
        image.save(draft)


def output_names(files: Sequence[Path]) -> tuple[str, ...]:
    """The output files of a case: a volume, or mask and overlay."""
    name = case_stem(files)
    return (f"{name}.mha",) if files[0].name.lower().endswith(VOLUMES) else (f"{name}.png", f"{name}-overlay.png")


def check_outputs(cases: Sequence[tuple[Path, ...]], table: Path | None, out: Path) -> None:
    """Refuse to write over an input, or two masks or overlays to one file, before anything is written."""
    for path in [*chain.from_iterable(cases), *([table] if table else [])]:
        places = (path.resolve(), path.parent.resolve() / path.name)  # what a link leads to, and the link
        if any(out.resolve() in place.parents for place in places):
            raise ValueError(
                f"out {str(out)!r} holds the input {str(path)!r}, which stays as it is: give another folder"
            )
    refuse_twins((name, files[0]) for files in cases for name in output_names(files))


def refuse_twins(names: Iterable[tuple[str, object]]) -> None:
    """Refuse (name, source) of two sources that would be written to one file."""
    taken: dict[str, object] = {}
    for name, source in names:
        if (first := taken.setdefault(name, source)) != source:
            raise ValueError(f"{first} and {source} would both be written as {name!r}: rename one of them")
