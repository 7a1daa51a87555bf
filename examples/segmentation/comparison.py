"""The numbers of an experiment's report, computed from the rows that its runs left behind. No text is made here.

For each score of a variant: `mean`, over the seeds, of the mean over the images; `sd_seeds`, the standard deviation of
those means over the seeds (None for one seed); `sd_images`, the standard deviation over the images, averaged over the
seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from segmentation.data.split import SIDES, read_split, split_hash
from segmentation.evaluation import OVERLAP, SURFACE, overlap
from segmentation.experiment import Finished, Plan, Row, Variant
from segmentation.networks import build_network
from segmentation.surface import TOLERANCE

SAMPLES = 10_000  # of the bootstrap

# What the report that these experiments repeat printed, for its baseline, KM-UNet and KM-UNet++.
PRINTED = {
    "isic2017": {
        "unet": {"iou": 0.78, "dice": 0.81, "f1": 0.80},
        "km_unet": {"iou": 0.70, "dice": 0.81, "f1": 0.85},
        "km_unet_pp": {"iou": 0.81, "dice": 0.83, "f1": 0.86},
    },
    "fetal_head": {
        "unet": {"iou": 0.72, "dice": 0.74, "f1": 0.73},
        "km_unet": {"iou": 0.14, "dice": 0.24, "f1": 0.67},
        "km_unet_pp": {"iou": 0.54, "dice": 0.69, "f1": 0.72},
    },
    "lumbar_spine": {
        "unet": {"iou": 0.85, "dice": 0.86, "f1": 0.86},
        "km_unet": {"iou": 0.79, "dice": 0.88, "f1": 0.90},
        "km_unet_pp": {"iou": 0.86, "dice": 0.90, "f1": 0.91},
    },
}


def compare(plan: Plan, finished: dict[str, list[Finished]], baseline: str) -> dict[str, Any]:
    """Every number of the report, ready for JSON. `baseline`: the variant that the others are set against."""
    runs = [run for group in finished.values() for run in group]
    if not runs:
        raise FileNotFoundError(f"no finished run in {str(plan.out)!r}: start the experiment without --report-only")
    variants = {v.name: describe(plan, v, finished[v.name]) for v in plan.variants if v.name in finished}
    done = {run.run.folder for run in runs}
    against = finished.get(baseline, [])
    return {
        "task": plan.task.name,
        "title": plan.task.title,
        "classes": list(plan.task.class_names),
        "data": describe_split(plan),
        "image_size": plan.image_size,
        "side": plan.side,
        "flips": plan.flips,
        "unit": runs[0].scores["unit"],
        "tolerance": TOLERANCE,
        "unreadable": runs[0].scores["unreadable"],
        "seeds": list(plan.seeds),
        "runs": len(plan.runs),
        "missing": [str(run) for run in plan.runs if run.folder not in done],
        "variants": variants,
        "baseline": baseline if against else None,
        "differences": {
            name: difference(group, against) for name, group in finished.items() if against and name != baseline
        },
        **{name: _distinct(run.facts[name] for run in runs) for name in ("device", "date", "commit", "versions")},
    }


def describe_split(plan: Plan) -> dict[str, Any]:
    """Images and subjects of every side, by the split file."""
    table = read_split(plan.split)
    sides = {side: [row for row in table.values() if row["split"] == side] for side in SIDES}
    return {
        "name": "demo" if plan.data_dir is None else plan.data_dir.resolve().name,
        "demo": plan.data_dir is None,
        "images": {side: len(rows) for side, rows in sides.items()},
        "subjects": {side: len({row["group"] for row in rows}) for side, rows in sides.items()},
        "split_sha256": split_hash(table),
    }


def describe(plan: Plan, variant: Variant, group: Sequence[Finished]) -> dict[str, Any]:
    """The numbers of one variant, over its finished seeds."""
    tables = [finished.images for finished in group]
    numbers: dict[str, Any] = {
        "model": variant.model,
        "model_args": variant.model_args,
        "train": variant.train,
        "seeds": [finished.run.seed for finished in group],
        "epochs": [finished.facts["epochs"] for finished in group],
        "best_epochs": [finished.facts["best_epoch"] for finished in group],
        "images": len(tables[0]),
        "per_image": {score: over_seeds([column(rows, score) for rows in tables]) for score in OVERLAP + SURFACE},
        "printed": None if plan.data_dir is None else printed_scores(plan.task.name, variant.model),
        "pooled": {score: spread([pooled(rows, score) for rows in tables]) for score in OVERLAP},
        "cost": cost(plan, variant, group),
        "cases": cases(tables[0]),
    }
    if group[0].scores["unit"] == "mixed":  # a mean over millimetres and pixels means nothing
        numbers["per_image"] |= {score: over_seeds([]) for score in SURFACE}
    names = plan.task.class_names
    if len(names) > 1:
        numbers["classes"] = {name: over_seeds([column(rows, f"dice_{name}") for rows in tables]) for name in names}
        means = [[column(rows, f"dice_{name}") for name in names] for rows in tables]
        numbers["mean_of_classes"] = spread([_mean([v.mean() for v in values if len(v)]) for values in means])
    if any(_measurable(row) for row in tables[0]):
        numbers["circumference"] = circumference(tables)
    return numbers


def column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """The numbers in one column, in the order of the images, without the empty cells."""
    return np.array([row[name] for row in rows if row.get(name) is not None], dtype=np.float64)


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    return {"mean": _mean(known), "sd_seeds": float(np.std(known, ddof=1)) if len(known) > 1 else None}


def over_seeds(columns: Sequence[NDArray[np.float64]]) -> dict[str, float | None]:
    """Mean, and deviation over seeds and over images, of a score whose values come as one column a seed."""
    full = [values for values in columns if len(values)]
    return {
        **spread([values.mean() for values in full]),
        "sd_images": _mean([values.std(ddof=1) for values in full if len(values) > 1]),
    }


def pooled(rows: Sequence[Row], score: str) -> float:
    """The score of all pixels of all images together."""
    return overlap(*(int(column(rows, name).sum()) for name in ("tp", "fp", "fn")))[score]


def circumference(tables: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Errors of the head circumference in mm, and in how many images (a mean over seeds) no ellipse was found."""
    errors = [column(rows, "hc_error_mm") for rows in tables]
    images = sum(_measurable(row) for row in tables[0])
    return {
        "images": images,
        "no_ellipse": _mean([images - len(values) for values in errors]),
        "absolute_error_mm": over_seeds([np.abs(values) for values in errors]),
        "error_mm": over_seeds(errors),
    }


def difference(group: Sequence[Finished], against: Sequence[Finished]) -> dict[str, Any] | None:
    """Dice of one variant minus Dice of another, image by image, averaged over the seeds that both have.

    `low` and `high` bound the mean difference with 95 % confidence for other subjects like these; how other seeds would
    turn out is not in them. `verdict` is "above" or "below" where zero lies outside, else "none".
    """
    mine, theirs = ({f.run.seed: {row["id"]: row for row in f.images} for f in runs} for runs in (group, against))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    rows = [
        row for id_, row in mine[seeds[0]].items() if all(id_ in table[s] for s in seeds for table in (mine, theirs))
    ]
    differences = np.mean(
        [[mine[seed][row["id"]]["dice"] - theirs[seed][row["id"]]["dice"] for row in rows] for seed in seeds], axis=0
    )
    groups = [row["group"] for row in rows]
    interval = bootstrap_interval(differences, groups)
    low, high = interval or (None, None)
    return {
        "mean": float(differences.mean()),
        "low": low,
        "high": high,
        "verdict": "none" if interval is None or low <= 0 <= high else "above" if low > 0 else "below",
        "seeds": seeds,
        "images": len(rows),
        "subjects": len(set(groups)),
    }


def bootstrap_interval(
    differences: NDArray[np.float64], groups: Sequence[str], samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of `differences` (n) when subjects are drawn anew; None for one subject."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return None
    sums, sizes = np.bincount(member, weights=differences), np.bincount(member)
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    low, high = np.quantile((times @ sums) / (times @ sizes), (0.025, 0.975))  # times: samples subjects
    return float(low), float(high)


def cost(plan: Plan, variant: Variant, group: Sequence[Finished]) -> dict[str, Any]:
    """Parameters, multiply-adds for one image, and the time that training took."""
    network = build_network(variant.model, plan.task.in_channels, plan.task.num_classes, **variant.model_args)
    seconds = [row["seconds"] for finished in group for row in finished.history]
    return {
        "parameters": group[0].facts["parameters"],
        "multiply_adds": multiply_adds(network, plan.task.in_channels, plan.image_size),
        "seconds_per_epoch": _mean(seconds),
        "minutes": sum(seconds) / 60,
    }


def multiply_adds(network: torch.nn.Module, in_channels: int, size: int) -> int:
    """Half the floating-point operations of convolutions, matrix products, KAN layers and scans for one image."""
    image = torch.zeros(1, in_channels, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return counter.get_total_flops() // 2


def cases(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The images with the best, the median and the worst Dice."""
    ranked = sorted(rows, key=lambda row: (row["dice"], row["id"]))
    chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    return {name: {"id": row["id"], "dice": row["dice"]} for name, row in chosen.items()}


def printed_scores(task: str, model: str) -> dict[str, float] | None:
    """What the repeated report printed for this kind of network, if it had one."""
    kinds = PRINTED.get(task, {})
    if model == "unet":
        return kinds.get(model)
    return next((kinds[kind] for kind in ("km_unet_pp", "km_unet") if model.startswith(kind) and kind in kinds), None)


def _measurable(row: Row) -> bool:
    """Whether the true head circumference and the pixel size are known."""
    return row.get("hc_true_mm") is not None and row["unit"] == "mm"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of their first appearance."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
