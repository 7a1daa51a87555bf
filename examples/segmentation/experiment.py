"""An experiment: some networks, some seeds, one split. Which runs it has, and what its finished runs left behind."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from segmentation.checkpoints import load_run
from segmentation.data.demo import demo_items
from segmentation.data.formats import find_items
from segmentation.data.item import Item
from segmentation.data.split import check_unchanged, file_hash, follow_split, read_split, split_hash
from segmentation.evaluation import Progress, evaluate, whole_file, write_csv
from segmentation.tasks import Task

Row = dict[str, Any]
TEXT = {"id", "group", "unit"}  # the columns of images.csv that hold no numbers


@dataclass(frozen=True)
class Variant:
    """One row of the report: a network, its arguments, and settings of train.py that hold for it alone."""

    name: str
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed, and its folder."""

    variant: Variant
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def trained(self) -> bool:
        """Whether the training came to its end."""
        return (self.folder / "metrics.json").is_file()


@dataclass(frozen=True)
class Plan:
    """Everything that an experiment does. `data_dir` None: the demo; `side`: the images that are scored."""

    task: Task
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    data_dir: Path | None
    out: Path
    image_size: int
    train: dict[str, Any]
    flips: bool = False
    side: Literal["val", "test"] = "test"

    @property
    def split(self) -> Path:
        """The file with the subjects of every side, which all runs follow."""
        return self.out / "split.json"

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that an interrupted experiment has every variant as often as possible."""
        return [
            Run(variant, seed, self.out / "runs" / f"{variant.name}-seed{seed}")
            for seed in self.seeds
            for variant in self.variants
        ]


@dataclass(frozen=True)
class Finished:
    """What a run left behind: facts of its training, a row per epoch, a row per scored image, and the scores."""

    run: Run
    facts: dict[str, Any]
    history: list[Row]
    images: list[Row]
    scores: dict[str, Any]


def held_out_items(plan: Plan) -> list[Item]:
    """The images that the runs are scored on, by the split file."""
    found = demo_items(plan.task, plan.image_size) if plan.data_dir is None else find_items(plan.task, plan.data_dir)
    return [item for item in follow_split(found, read_split(plan.split)) if item.split == plan.side]


def evaluate_run(plan: Plan, run: Run, items: Sequence[Item], progress: Progress | None = None) -> None:
    """Score the best epoch of a run on `items`, where it was trained, unless that was done before."""
    checkpoint, folder = run.folder / "checkpoints" / "best.ckpt", run.folder / plan.side
    table = read_split(plan.split)
    made_from = {
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "split_sha256": split_hash(table),
        "flips": plan.flips,
    }
    if _read_scores(folder).items() >= made_from.items():
        return
    check_unchanged(items, [file_hash(item) for item in items], table)
    trained = load_run(run.folder)
    on_cpu = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))["device"].startswith("cpu")
    trained.network.to("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    evaluation = evaluate(trained, items, flips=plan.flips, progress=progress)
    folder.mkdir(exist_ok=True)
    scores = evaluation.scores()
    write_csv(folder / "images.csv", evaluation.rows)
    write_json(folder / "scores.json", {**made_from, **scores, "unreadable": evaluation.unreadable})


def read_finished(plan: Plan) -> dict[str, list[Finished]]:
    """The trained and scored runs by variant; all of them must have followed the plan's split."""
    expected = split_hash(read_split(plan.split)) if plan.split.is_file() else None
    finished: dict[str, list[Finished]] = {}
    for run in plan.runs:
        scores = _read_scores(run.folder / plan.side)
        if not run.trained or not scores:
            continue
        facts = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
        if not facts["split_sha256"] == scores["split_sha256"] == expected:
            raise ValueError(
                f"the run in {str(run.folder)!r} followed another split than {plan.split}: remove that run"
            )
        history, images = (read_rows(run.folder / name) for name in ("history.csv", f"{plan.side}/images.csv"))
        finished.setdefault(run.variant.name, []).append(Finished(run, facts, history, images, scores))
    return {variant.name: finished[variant.name] for variant in plan.variants if variant.name in finished}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file: numbers but for the columns of text; an empty cell is None."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            {name: cell if name in TEXT else float(cell) if cell else None for name, cell in row.items()}
            for row in csv.DictReader(stream)
        ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON without a chance that a kill leaves half a file."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_scores(folder: Path) -> dict[str, Any]:
    """The content of scores.json; empty where the run was not scored."""
    path = folder / "scores.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
