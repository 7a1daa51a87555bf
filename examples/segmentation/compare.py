"""Run folders, side by side: the numbers of results.json.

A run's variant is the name of its folder without `-foldK` and `-seedN` at its end. The folds of a cross-validation
count as one run, whose test images are those of all folds. For each score of a variant: `mean`, over the seeds, of the
mean over the images; `sd_seeds`, the standard deviation of those means over the seeds (None for one seed); `sd_images`,
the standard deviation over the images, averaged over the seeds.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from segmentation.runs import Run, flatten, read_config, read_json
from segmentation.scores import (
    COUNTS,
    OVERLAP,
    RATES,
    SURFACE,
    TOLERANCE,
    common_unit,
    number,
    overlap,
    rates,
    subject_dice,
)

LEAST_SUBJECTS = 10  # for a verdict
TEXT = {"id": str, "group": str, "unit": str}  # columns of images.csv that hold no numbers
ALIKE = ("task", "image_size", "side", "options")  # what the scores of all runs have in common
# The recipe: all settings of model and data but those that a run may have of its own, and some of the trainer.
FREE = {f"data.{name}" for name in ("folder", "split", "seed", "fold", "num_workers", "side", "inputs")}
TRAINER = {f"trainer.{name}" for name in ("max_epochs", "max_steps", "precision", "accumulate_grad_batches")}
TRAINER |= {f"trainer.{name}" for name in ("callbacks", "devices", "limit_train_batches", "num_nodes")}
TRAINER |= {f"trainer.gradient_clip_{name}" for name in ("val", "algorithm")}

Numbers = dict[str, Any]


def compare(runs: list[Path], on: str, baseline: str | None) -> tuple[Numbers, dict[str, list[Run]]]:
    """Every number of the report, ready for JSON, and the runs of each variant, the baseline first.

    Args:
        runs: run folders, and folders of run folders.
        on: the folder inside each run that its scores are in.
        baseline: the variant that the others are set against (default: `unet`, or else the first).
    """
    finished, missing = read_runs(find_runs(runs), on)
    groups = group_alike(finished)
    baseline = baseline or ("unet" if "unet" in groups else next(iter(groups)))
    if baseline not in groups:
        raise ValueError(f"baseline {baseline!r} is no finished variant: choose one of {', '.join(groups)}")
    groups = {baseline: groups[baseline]} | groups
    finished = [run for group in groups.values() for run in group]
    first, images = finished[0], pd.concat([run.images for run in finished])
    classes = [column.removeprefix("dice_") for column in first.images if column.startswith("dice_")]
    settings = dict.fromkeys(name for run in finished for name in run.recipe)
    own = [name for name in settings if any(differ(name, first, run) for run in finished)]
    results = {
        **{name: first.scores[name] for name in ("task", "image_size", "side", "options")},
        "unit": common_unit(images),
        "classes": classes,
        "data": {name: first.facts[name] for name in ("data", "images", "subjects", "split_sha256")},
        "scored": {"data": _distinct([run.scores["data"] for run in finished]), "images": images["id"].nunique()},
        "fold": first.fold,
        "folds": sorted({run.fold for run in finished if run.fold is not None}),
        "splits": len({run.facts["split_sha256"] for run in finished}),
        "tolerance": TOLERANCE,
        "unreadable": _distinct([image for run in finished for image in run.scores["unreadable_images"]]),
        "seeds": sorted({run.facts["seed"] for run in finished}),
        "variants": {v: describe(group, images[images["variant"] == v], classes) for v, group in groups.items()},
        "baseline": baseline,
        "differences": {name: difference(images, name, baseline) for name in groups if name != baseline},
        "recipe": {name: first.recipe[name] for name in settings if name not in own},
        "settings": {v: {name: group[0].recipe.get(name) for name in own} for v, group in groups.items()},
        **{name: _distinct([run.facts[name] for run in finished]) for name in ("device", "date", "commit", "versions")},
        "commands": [run.facts["command"] for run in finished],
        **{"on": on, "runs": len(finished) + len(missing), "missing": missing},
    }
    return results, groups


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
        elif scores["checkpoint"] == "best.ckpt" and scores["epoch"] != facts["best_epoch"]:
            missing.append(f"{folder.name} was trained on after it was scored: score it again with test")
        else:
            variant, history = re.sub(r"(-(fold|seed)\d+)+$", "", folder.name), pd.read_csv(folder / "history.csv")
            settings = flatten(read_config(folder))
            recipe = {name: value for name, value in settings.items() if in_recipe(name)}
            fold, of_run = settings.get("data.fold"), {"variant": variant, "seed": facts["seed"]}
            images = read_images(folder / on / "images.csv").assign(**of_run, fold=fold or 0)
            finished.append(Run(folder, variant, fold, facts, recipe, scores, history, images))
    if not finished:
        raise ValueError(f"no run is finished ({'; '.join(missing)}): train with fit, then score with test")
    return finished, missing


def read_images(path: Path) -> pd.DataFrame:
    """The scores of all images; refused where a column is missing, or a Dice is not that of its IoU J, 2J / (1 + J)."""
    images = pd.read_csv(path, dtype=TEXT, keep_default_na=False, na_values=[""])
    again = "score the run again with test"
    overlaps = {name: name.replace("dice", "iou", 1) for name in images if name.startswith("dice")}
    for name in (*TEXT, *OVERLAP, *RATES, *SURFACE, *COUNTS, *overlaps.values()):
        if name not in images:
            raise ValueError(f"{path} lacks the column {name!r}: {again}")
    for name, column in overlaps.items():
        dice, iou = images[name], images[column]
        wrong = dice.notna() & ~((dice - 2 * iou / (1 + iou)).abs() < 1e-6)
        if wrong.any():
            image = images["id"][wrong.idxmax()]
            raise ValueError(f"{path} was changed or damaged: {name} of {image!r} is not that of its IoU; {again}")
    return images


def in_recipe(setting: str) -> bool:
    """Whether a setting says how a network is trained, not where its files are."""
    return setting in TRAINER or (setting.startswith(("model.", "data.")) and setting not in FREE)


def group_alike(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by variant: all scored alike, those of a fold and seed split alike, those of a variant trained alike."""
    folds, groups = dict[int | None, Run](), dict[str, list[Run]]()
    trainings: dict[tuple[int | None, int], Run] = {}  # of each fold and seed, which may have images of its own
    for run in runs:
        first = folds.setdefault(run.fold, run)
        alike = trainings.setdefault((run.fold, run.facts["seed"]), run)
        for other, name in (*((runs[0], name) for name in ALIKE), (alike, "split_sha256")):
            if run.scores[name] != other.scores[name]:
                raise ValueError(
                    f"{str(run.folder)!r} and {str(other.folder)!r} were scored with {name} {run.scores[name]!r} and "
                    f"{other.scores[name]!r}: score them alike, or compare them apart"
                )
        pair = f"{str(run.folder)!r} and {str(alike.folder)!r}"
        if run.facts["split_sha256"] != alike.facts["split_sha256"]:
            raise ValueError(f"{pair} followed two splits (split_sha256): train them with one --data.split")
        pair = f"{str(run.folder)!r} and {str(first.folder)!r}"
        shown = [sorted(zip(one.images["id"], one.images["group"], strict=True)) for one in (run, first)]
        if shown[0] != shown[1]:
            raise ValueError(f"{pair} were scored on different images: score them again with test")
        for other in groups.setdefault(run.variant, []):
            both = f"{str(other.folder)!r} and {str(run.folder)!r} are both {run.variant!r}"
            if (other.facts["seed"], other.fold) == (run.facts["seed"], run.fold):
                raise ValueError(f"{both} with seed {run.facts['seed']}: leave one out, or rename its folder")
            if odd := next((name for name in {**other.recipe, **run.recipe} if differ(name, other, run)), None):
                raise ValueError(f"{both}, but differ in {odd}: give their folders names of two variants")
        groups[run.variant].append(run)
    check_folds(folds, groups)
    return groups


def check_folds(folds: Mapping[int | None, Run], groups: Mapping[str, Sequence[Run]]) -> None:
    """No two folds may score one image, and no variant may lack a fold that others have."""
    owners: dict[str, Run] = {}
    for run in folds.values():
        for image in run.images["id"]:
            if (other := owners.setdefault(image, run)) is not run:
                raise ValueError(
                    f"{str(other.folder)!r} and {str(run.folder)!r} are of folds {other.fold} and {run.fold}, but both "
                    f"were scored on {image!r}: compare runs of one cross-validation, or of one split"
                )
    for variant, group in groups.items():
        by_seed = defaultdict(set)
        for run in group:
            by_seed[run.facts["seed"]].add(run.fold)
        for seed, done in by_seed.items():
            if lacking := set(folds) - done:
                raise ValueError(
                    f"{variant!r} with seed {seed} lacks fold {min(lacking)}: train and score it, or leave its other "
                    "folds out"
                )


def differ(setting: str, first: Run, second: Run) -> bool:
    """Whether two runs had two values of a setting, or one had none."""
    values = [run.recipe.get(setting, KeyError) for run in (first, second)]
    return bool(values[0] != values[1])


def describe(group: Sequence[Run], images: pd.DataFrame, class_names: Sequence[str]) -> Numbers:
    """The numbers of one variant, over its seeds."""
    facts, histories = [run.facts for run in group], [run.history["seconds"] for run in group]
    by_seed, seeds = images.groupby("seed"), sorted({fact["seed"] for fact in facts})
    pooled = pd.DataFrame([overlap(*row[:3]) | rates(*row) for row in by_seed[list(COUNTS)].sum().to_numpy().tolist()])
    warm = pd.concat([seconds.iloc[min(1, len(seconds) - 1) :] for seconds in histories])
    numbers: Numbers = {
        **{name: facts[0][name] for name in ("network", "model_args")},
        "seeds": seeds,
        "epochs": [fact["epochs"] for fact in facts],
        "best_epochs": [fact["best_epoch"] for fact in facts],
        "images": len(images) // len(seeds),
        "per_image": {score: over_seeds(images, score) for score in OVERLAP + RATES + SURFACE},
        "pooled": {score: spread(pooled[score]) for score in OVERLAP + RATES},
        "per_subject": {"dice": spread(pd.Series([subject_dice(rows).mean() for _, rows in by_seed]))},
        "empty_predictions": float((images["tp"] + images["fp"] == 0).sum() / len(seeds)),
        "cost": {
            **{name: facts[0][name] for name in ("parameters", "multiply_adds")},
            **{"seconds_per_epoch": float(warm.median()), "minutes": float(pd.concat(histories).sum() / 60)},
        },
    }
    if common_unit(images) == "mixed":  # a mean over millimetres and pixels means nothing
        numbers["per_image"] |= {score: over_seeds(images.iloc[:0], score) for score in SURFACE}
    if class_names:
        numbers["classes"] = {name: over_seeds(images, f"dice_{name}") for name in class_names}
        columns = [f"dice_{name}" for name in class_names]
        numbers["mean_of_classes"] = spread(by_seed[columns].mean().mean(axis=1))
    if "hc_true_mm" in images and (known := images["hc_true_mm"].notna() & (images["unit"] == "mm")).any():
        errors = images.assign(error=images["hc_error_mm"].abs())
        numbers["circumference"] = {
            "images": int(known.sum()) // len(seeds),
            "no_ellipse": float((known.sum() - images["hc_error_mm"].notna().sum()) / len(seeds)),
            "absolute_error_mm": over_seeds(errors, "error"),
            "median_absolute_error_mm": spread(errors.groupby("seed")["error"].median()),
            "error_mm": over_seeds(images, "hc_error_mm"),
        }
    return numbers


def over_seeds(images: pd.DataFrame, column: str) -> Numbers:
    """Mean, and deviation over seeds and over images, of one column of a variant's images; empty cells are left out."""
    by_seed = images.groupby("seed")[column]
    return {**spread(by_seed.mean()), "sd_images": number(by_seed.std().mean())}


def spread(values: pd.Series) -> Numbers:
    """Mean and sample standard deviation of one value per seed."""
    return {"mean": number(values.mean()), "sd_seeds": number(values.std())}


def difference(images: pd.DataFrame, name: str, baseline: str) -> Numbers | None:
    """Dice of one variant minus Dice of another, image by image, averaged over the seeds that both have.

    `mean` is that of the subjects, each of which counts once. `low` and `high` bound it with 95 % confidence for other
    subjects like these, and, with several seeds or folds, for other trainings. `verdict` is "above" or "below" where
    zero lies outside, else "none"; "too few subjects" where there are fewer than ten, whose spread says little of that
    of others.
    """
    pairs = images[images["variant"].isin([name, baseline])]
    dice = pairs.pivot(index=["id", "group", "fold"], columns=["variant", "seed"], values="dice")
    seeds = sorted(set(dice[name]) & set(dice[baseline]))
    if not seeds:
        return None
    gains = dice[name][seeds] - dice[baseline][seeds]  # images x seeds
    subjects = gains.groupby(level=["group", "fold"]).mean()  # subjects x seeds
    low, high = interval(subjects)
    verdict = "too few subjects"
    if low is not None and high is not None and len(subjects) >= LEAST_SUBJECTS:
        verdict = "above" if low > 0 else "below" if high < 0 else "none"
    return {
        **{"mean": float(subjects.to_numpy().mean()), "low": low, "high": high, "verdict": verdict},
        **{"seeds": [int(seed) for seed in seeds], "images": len(gains), "subjects": len(subjects)},
    }


def interval(gains: pd.DataFrame) -> tuple[float | None, float | None]:
    """95 % interval of the mean of gains, subjects x seeds, for other subjects and trainings; None for one subject.

    The level `fold` of the index, if there is one, tells which subjects the same trainings scored, one for each seed.
    Subjects and trainings are random effects that cross within a fold. With R seeds of S subjects the mean squares of
    this analysis of variance give the variance of the mean, (MS_subjects + MS_trainings - MS_rest) / (S R), with
    Satterthwaite's degrees of freedom. Few trainings may be alike by chance, and those of a fold share their images. So
    the interval is never narrower than Student's t over subjects alone, trainings alone, or the means of the folds.
    """
    table = gains.to_numpy(dtype=float)
    (subjects, seeds), mean = table.shape, table.mean()
    if subjects < 2:
        return None, None
    fold = gains.index.get_level_values("fold") if "fold" in gains.index.names else pd.Index([0] * subjects)
    folds, same = fold.nunique(), np.equal.outer(fold.to_numpy(), fold.to_numpy())  # subjects x subjects
    of_training = same / same.sum(axis=1) @ table  # subjects x seeds: the mean over the subjects of the fold
    of_fold, of_subject = of_training.mean(axis=1, keepdims=True), table.mean(axis=1, keepdims=True)
    effects = of_subject - of_fold, of_training - of_fold, table - of_training - of_subject + of_fold
    inside = subjects - folds
    degrees = [max(freedom, 1) for freedom in (inside, folds * (seeds - 1), inside * (seeds - 1))]
    squares = [
        (np.broadcast_to(effect, table.shape) ** 2).sum() / degree  # 0 where there is no freedom
        for effect, degree in zip(effects, degrees, strict=True)
    ]
    candidates = [(square / table.size, degree) for square, degree in zip(squares[:2], degrees[:2], strict=True)]
    both = squares[0] + squares[1] - squares[2]
    if seeds > 1 and both > max(squares[:2]):
        weight = sum(square**2 / degree for square, degree in zip(squares, degrees, strict=True))
        candidates.append((both / table.size, both**2 / weight))
    if folds > 1:  # their means, weighted by their subjects
        share = same.sum() / subjects**2  # sum over the folds of the squared weights
        candidates.append((((of_fold - mean) ** 2).mean() * share / (1 - share), folds - 1))
    half = max(stats.t.ppf(0.975, degree) * variance**0.5 for variance, degree in candidates)
    return number(mean - half), number(mean + half)


def _distinct(values: list[Any]) -> list[Any]:
    """Each value once, in the order of their first appearance."""
    return [value for n, value in enumerate(values) if value not in values[:n]]
