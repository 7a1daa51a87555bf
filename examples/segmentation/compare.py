"""Run folders, side by side: results.json, report.html, curves.png and cost.png.

A run's variant is the name of its folder without a final `-seedN`. For each score of a variant: `mean`, over the seeds,
of the mean over the images; `sd_seeds`, the standard deviation of those means over the seeds (None for one seed);
`sd_images`, the standard deviation over the images, averaged over the seeds.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from scipy import stats

from segmentation.figures import draw_cost, draw_curves
from segmentation.runs import flatten, holds_files, read_config, read_json, whole_file, write_json
from segmentation.scores import COUNTS, OVERLAP, RATES, SURFACE, TOLERANCE, overlap, rates, subject_dice

LEAST_SUBJECTS = 10  # for a verdict
VERDICTS = {"none": "no difference seen", "too few subjects": "too few subjects to say"}
TEXT = {"id": str, "group": str, "unit": str}  # columns of images.csv that hold no numbers
NUMBERS = OVERLAP + RATES + SURFACE + COUNTS
ALIKE = ("task", "image_size", "side", "options", "split_sha256")  # what the scores of all runs have in common
# The recipe: all settings of model and data but those that a run may have of its own, and some of the trainer.
FREE = {f"data.{name}" for name in ("folder", "split", "seed", "num_workers", "side", "inputs")}
TRAINER = {f"trainer.{name}" for name in ("max_epochs", "max_steps", "precision", "accumulate_grad_batches")}
TRAINER |= {f"trainer.gradient_clip_{name}" for name in ("val", "algorithm")}

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one training and one scoring left behind."""

    folder: Path
    variant: str
    facts: Numbers  # metrics.json
    recipe: Numbers
    scores: Numbers  # scores.json
    history: pd.DataFrame  # a row per epoch
    images: pd.DataFrame  # a row per image, with variant and seed

    @property
    def shown(self) -> list[tuple[str, str]]:
        """Image and subject of every row, sorted."""
        return sorted(zip(self.images["id"], self.images["group"], strict=True))


def compare(runs: list[Path], out: Path, *, on: str = "test", baseline: str | None = None) -> Numbers:
    """Compare runs by the scores in their folders `on`, write everything to `out`, and return the numbers.

    Args:
        runs: run folders, and folders of run folders.
        out: folder of the report.
        on: the folder inside each run that its scores are in.
        baseline: the variant that the others are set against (default: `unet`, or else the first).
    """
    if holds_files("out", out) and (out / "config.yaml").is_file():
        raise FileExistsError(f"out {str(out)!r} is a run, whose curves.png must stay: give another folder")
    finished, missing = read_runs(find_runs(runs), on)
    groups = group_alike(finished)
    baseline = baseline or ("unet" if "unet" in groups else next(iter(groups)))
    if baseline not in groups:
        raise ValueError(f"baseline {baseline!r} is no finished variant: choose one of {', '.join(groups)}")
    groups = {baseline: groups[baseline]} | groups  # which comes first
    results = {**collect(groups, baseline), "on": on, "runs": len(finished) + len(missing), "missing": missing}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    histories = {name: [run.history for run in group] for name, group in groups.items()}
    draw_curves(out / "curves.png", histories, results["recipe"].get("model.loss", "of each variant"))
    cost = {name: {**v["cost"], **v["per_image"]["dice"]} for name, v in results["variants"].items()}
    frame = pd.DataFrame.from_dict(cost, orient="index", dtype=float).rename(columns={"mean": "dice"})
    draw_cost(out / "cost.png", frame)
    cases = {name: group[0].folder / on / "cases.png" for name, group in groups.items()}
    write_report(out, results, {name: path for name, path in cases.items() if path.is_file()})
    return results


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and in them, each of them once."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        folders = [folder for folder in (path, *inside) if (folder / "config.yaml").is_file()]
        if not folders:
            raise ValueError(f"runs {str(path)!r} holds no run: give a folder that fit wrote, or a folder of such")
        found += folders
    return list(dict.fromkeys(folder.resolve() for folder in found))


def read_runs(folders: Iterable[Path], on: str) -> tuple[list[Run], list[str]]:
    """The runs that are trained and scored, and what the others lack."""
    finished, missing = [], []
    for folder in folders:
        facts, scores = read_json(folder / "metrics.json"), read_json(folder / on / "scores.json")
        if not (facts and scores):
            missing.append(f"{folder.name} is not {f'scored on {on}' if facts else 'trained to its end'}")
            continue
        if scores["checkpoint"] == "best.ckpt" and scores["epoch"] != facts["best_epoch"]:
            missing.append(f"{folder.name} was trained on after it was scored: score it again with test")
            continue
        options: Numbers = {"dtype": TEXT, "keep_default_na": False, "na_values": [""]}
        variant, history = re.sub(r"-seed\d+$", "", folder.name), pd.read_csv(folder / "history.csv")
        images = pd.read_csv(folder / on / "images.csv", **options).assign(variant=variant, seed=facts["seed"])
        if lacking := [name for name in (*TEXT, *NUMBERS) if name not in images]:
            raise ValueError(
                f"{folder / on / 'images.csv'} lacks the column {lacking[0]!r}: score the run again with test"
            )
        recipe = {name: value for name, value in flatten(read_config(folder)).items() if in_recipe(name)}
        finished.append(Run(folder, variant, facts, recipe, scores, history, images))
    if not finished:
        raise ValueError(f"no run is finished ({'; '.join(missing)}): train with fit, then score with test")
    return finished, missing


def in_recipe(setting: str) -> bool:
    """Whether a setting says how a network is trained, not where its files are."""
    return setting in TRAINER or (setting.startswith(("model.", "data.")) and setting not in FREE)


def group_alike(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by variant. All must be split and scored alike, and those of a variant differ in the seed alone."""
    first, groups = runs[0], dict[str, list[Run]]()
    for run in runs:
        pair = f"{str(run.folder)!r} and {str(first.folder)!r}"
        for name in ALIKE:
            if run.scores[name] != first.scores[name]:
                values = f"{run.scores[name]!r} and {first.scores[name]!r}"
                raise ValueError(f"{pair} were scored with {name} {values}: score them alike, or compare them apart")
        if run.facts["split_sha256"] != first.facts["split_sha256"]:
            raise ValueError(f"{pair} followed two splits (split_sha256): train them with one --data.split")
        if run.shown != first.shown:
            raise ValueError(f"{pair} were scored on different images: score them again with test")
        for other in groups.setdefault(run.variant, []):
            both = f"{str(other.folder)!r} and {str(run.folder)!r} are both {run.variant!r}"
            if other.facts["seed"] == run.facts["seed"]:
                raise ValueError(f"{both} with seed {run.facts['seed']}: leave one out, or rename its folder")
            if odd := next((name for name in {**other.recipe, **run.recipe} if differ(name, other, run)), None):
                raise ValueError(f"{both}, but differ in {odd}: give their folders names of two variants")
        groups[run.variant].append(run)
    return groups


def differ(setting: str, first: Run, second: Run) -> bool:
    """Whether two runs had two values of a setting, or one had none."""
    values = [run.recipe.get(setting, KeyError) for run in (first, second)]
    return bool(values[0] != values[1])


def collect(groups: dict[str, list[Run]], baseline: str) -> Numbers:
    """Every number of the report, ready for JSON."""
    runs = [run for group in groups.values() for run in group]
    first, images = runs[0], pd.concat([run.images for run in runs])
    names = [column.removeprefix("dice_") for column in first.images if column.startswith("dice_")]
    variants = {name: describe(group, images[images["variant"] == name], names) for name, group in groups.items()}
    settings = dict.fromkeys(name for run in runs for name in run.recipe)
    own = [name for name in settings if any(differ(name, first, run) for run in runs)]
    others = [name for name in groups if name != baseline]
    return {
        **{name: first.scores[name] for name in ("task", "image_size", "side", "options", "unit")},
        "classes": names,
        "data": {name: first.facts[name] for name in ("data", "images", "subjects", "split_sha256")},
        "tolerance": TOLERANCE,
        "unreadable": _distinct(image for run in runs for image in run.scores["unreadable_images"]),
        "seeds": sorted({run.facts["seed"] for run in runs}),
        "variants": variants,
        "baseline": baseline,
        "differences": {name: difference(images, name, baseline) for name in others},
        "recipe": {name: first.recipe[name] for name in settings if name not in own},
        "settings": {v: {name: group[0].recipe.get(name) for name in own} for v, group in groups.items()},
        **{name: _distinct(run.facts[name] for run in runs) for name in ("device", "date", "commit", "versions")},
        "commands": [run.facts["command"] for run in runs],
    }


def describe(group: Sequence[Run], images: pd.DataFrame, class_names: Sequence[str]) -> Numbers:
    """The numbers of one variant, over its seeds."""
    facts = [run.facts for run in group]
    counts = images.groupby("seed")[list(COUNTS)].sum()
    pooled = pd.DataFrame([overlap(*row[:3]) | rates(*row) for row in counts.to_numpy().tolist()])
    of_subjects = pd.Series([subject_dice(one).mean() for _, one in images.groupby("seed")])
    seconds = pd.concat([run.history["seconds"] for run in group])
    warm = pd.concat([run.history["seconds"].iloc[min(1, len(run.history) - 1) :] for run in group])
    numbers: Numbers = {
        **{name: facts[0][name] for name in ("network", "model_args")},
        "seeds": [fact["seed"] for fact in facts],
        "epochs": [fact["epochs"] for fact in facts],
        "best_epochs": [fact["best_epoch"] for fact in facts],
        "images": len(group[0].images),
        "per_image": {score: over_seeds(images, score) for score in OVERLAP + RATES + SURFACE},
        "pooled": {score: spread(pooled[score]) for score in OVERLAP + RATES},
        "per_subject": {"dice": spread(of_subjects)},
        "empty_predictions": float((images["tp"] + images["fp"] == 0).sum() / len(group)),
        "cost": {
            **{name: facts[0][name] for name in ("parameters", "multiply_adds")},
            **{"seconds_per_epoch": float(warm.median()), "minutes": float(seconds.sum() / 60)},
        },
    }
    check_bound(group[0], numbers["per_image"])
    check_bound(group[0], numbers["pooled"])
    if group[0].scores["unit"] == "mixed":  # a mean over millimetres and pixels means nothing
        numbers["per_image"] |= {score: over_seeds(images.iloc[:0], score) for score in SURFACE}
    if class_names:
        numbers["classes"] = {name: over_seeds(images, f"dice_{name}") for name in class_names}
        for name, dice in numbers["classes"].items():
            check_bound(group[0], {"dice": dice, "iou": over_seeds(images, f"iou_{name}")})
        columns = [f"dice_{name}" for name in class_names]
        numbers["mean_of_classes"] = spread(images.groupby("seed")[columns].mean().mean(axis=1))
    if "hc_true_mm" in images and (known := images["hc_true_mm"].notna() & (images["unit"] == "mm")).any():
        errors = images.assign(error=images["hc_error_mm"].abs())
        numbers["circumference"] = {
            "images": int(known.sum()) // len(group),
            "no_ellipse": float((known.sum() - images["hc_error_mm"].notna().sum()) / len(group)),
            "absolute_error_mm": over_seeds(errors, "error"),
            "median_absolute_error_mm": spread(errors.groupby("seed")["error"].median()),
            "error_mm": over_seeds(images, "hc_error_mm"),
        }
    return numbers


def over_seeds(images: pd.DataFrame, column: str) -> Numbers:
    """Mean, and deviation over seeds and over images, of one column of a variant's images; empty cells are left out."""
    by_seed = images.groupby("seed")[column]
    return {**spread(by_seed.mean()), "sd_images": _number(by_seed.std(ddof=1).mean())}


def spread(values: pd.Series[float]) -> Numbers:
    """Mean and standard deviation of one value per seed."""
    return {"mean": _number(values.mean()), "sd_seeds": _number(values.std(ddof=1))}


def check_bound(run: Run, scores: Numbers) -> None:
    """Refuse a mean Dice that no masks can have: Dice is 2J / (1 + J) of one IoU J, and of means at most that."""
    dice, iou = scores["dice"]["mean"], scores["iou"]["mean"]
    if dice is not None and dice > 2 * iou / (1 + iou) + 1e-9:
        raise ValueError(
            f"a mean Dice of {dice:.3f} is more than the mean IoU {iou:.3f} of {run.variant!r} allows: an images.csv "
            f"was changed or damaged, score the runs of this variant, such as {str(run.folder)!r}, again with test"
        )


def difference(images: pd.DataFrame, name: str, baseline: str) -> Numbers | None:
    """Dice of one variant minus Dice of another, image by image, averaged over the seeds that both have.

    `mean` is that of the subjects, each of which counts once. `low` and `high` bound it with 95 % confidence for other
    subjects like these; how other seeds would turn out is not in them. `verdict` is "above" or "below" where zero lies
    outside, else "none"; "too few subjects" where there are less than ten, whose spread says little of that of others.
    """
    pairs = images[images["variant"].isin([name, baseline])]
    dice = pairs.pivot(index=["id", "group"], columns=["variant", "seed"], values="dice")
    seeds = sorted(set(dice[name]) & set(dice[baseline]))
    if not seeds:
        return None
    gains = (dice[name][seeds] - dice[baseline][seeds]).mean(axis=1)
    subjects = gains.groupby(level="group").mean()
    low, high = t_interval(subjects)
    verdict = "too few subjects"
    if low is not None and high is not None and len(subjects) >= LEAST_SUBJECTS:
        verdict = "above" if low > 0 else "below" if high < 0 else "none"
    return {
        "mean": float(subjects.mean()),
        "low": low,
        "high": high,
        "verdict": verdict,
        "seeds": [int(seed) for seed in seeds],
        "images": len(gains),
        "subjects": len(subjects),
    }


def t_interval(values: pd.Series[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of independent values by Student's t; None for a single one."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return _number(values.mean() - half), _number(values.mean() + half)


def make_tables(results: Numbers) -> dict[str, pd.DataFrame]:
    """The tables of the report as text, a row per variant; empty ones where there is nothing to tell."""
    unit = results["unit"].replace("mixed", "mm or px")
    names = {
        "iou": "IoU",
        "dice": "Dice",
        "f1": "F1",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "hd95": f"HD95 ({unit})",
        "surface_dice": f"surface Dice ({TOLERANCE:g} {unit})",
    }
    tables: dict[str, dict[str, Numbers]] = {
        name: {} for name in ("scores", "spread", "classes", "circumference", "differences", "cost")
    }
    for variant, v in results["variants"].items():
        digits = {score: 1 if score == "hd95" else 3 for score in names}
        tables["scores"][variant] = {
            "seeds": len(v["seeds"]),
            **{title: _plus_minus(v["per_image"][score], digits[score]) for score, title in names.items()},
            **{f"pooled {names[score]}": _plus_minus(v["pooled"][score]) for score in ("iou", "dice")},
            "Dice per subject": _plus_minus(v["per_subject"]["dice"]),
            "nothing found": _text(v["empty_predictions"], 1),
        }
        tables["spread"][variant] = {
            title: _text(v["per_image"][score]["sd_images"], digits[score]) for score, title in names.items()
        }
        if "classes" in v:
            tables["classes"][variant] = {name: _plus_minus(dice) for name, dice in v["classes"].items()}
            tables["classes"][variant]["mean"] = _plus_minus(v["mean_of_classes"])
        if errors := v.get("circumference"):
            tables["circumference"][variant] = {
                "images": errors["images"],
                "mean absolute error (mm)": _plus_minus(errors["absolute_error_mm"], 2),
                "median (mm)": _plus_minus(errors["median_absolute_error_mm"], 2),
                "mean error ± sd over images (mm)": " ± ".join(
                    _text(errors["error_mm"][name], 2) for name in ("mean", "sd_images")
                ),
                "without an ellipse": _text(errors["no_ellipse"], 1),
            }
        if d := results["differences"].get(variant):
            tables["differences"][variant] = {
                "difference of Dice": f"{d['mean']:+.3f}",
                "95 % interval": "n/a" if d["low"] is None else f"{d['low']:+.3f} to {d['high']:+.3f}",
                "verdict": VERDICTS.get(d["verdict"], d["verdict"]),
                **{"images": d["images"], "subjects": d["subjects"], "seeds": len(d["seeds"])},
            }
        tables["cost"][variant] = {
            "parameters": f"{v['cost']['parameters']:,}",
            "multiply-adds": f"{v['cost']['multiply_adds'] / 1e9:.3f} G",
            "seconds per epoch": f"{v['cost']['seconds_per_epoch']:.1f}",
            "minutes in all": f"{v['cost']['minutes']:.1f}",
        }
    tables["settings"] = {variant: own for variant, own in results["settings"].items() if own}
    tables["recipe"] = {name: {"value": value} for name, value in results["recipe"].items()}
    return {name: pd.DataFrame.from_dict(rows, orient="index", dtype=object).map(str) for name, rows in tables.items()}


def write_report(out: Path, results: Numbers, cases: dict[str, Path]) -> None:
    """report.html, from the template beside this file; the page holds its pictures."""
    pictures = {"curves": out / "curves.png", "cost": out / "cost.png"}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    templates.filters["embedded"] = lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    page = templates.get_template("report.html.jinja")
    with whole_file(out / "report.html") as draft:
        text = page.render(**results, tables=make_tables(results), pictures=pictures, cases=cases)
        draft.write_text(text, encoding="utf-8")


def _plus_minus(values: Numbers, digits: int = 3) -> str:
    """Mean ± deviation over seeds, where there are several."""
    deviation = "" if values["sd_seeds"] is None else f" ± {values['sd_seeds']:.{digits}f}"
    return _text(values["mean"], digits) + deviation


def _text(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of their first appearance."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
