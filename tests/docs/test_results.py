"""The figures of the two pages of results are those of the recorded runs beside them."""

import json
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from kan_mamba_layers import list_pretrained

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from segmentation.compare import compare, interval  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "docs" / name for name in ("results.md", "short_trainings.md")]


def printed() -> list[str]:
    """The lines of both pages."""
    return [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]


def recorded(folder: Path) -> list[dict]:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    assert runs
    return runs


def recorded_runs() -> list[dict]:
    """What `lab.py compare` says today of the runs whose texts are kept."""
    return [compare([folder], "test", None)[0] for folder in sorted((RESULTS / "long").iterdir())]


def over_seeds(score: dict) -> str:
    return f"{score['mean']:.3f}" + ("" if score["sd_seeds"] is None else f" ± {score['sd_seeds']:.3f}")


def against(results: dict, name: str) -> str:
    d = results["differences"].get(name)
    return "" if d is None else f"{d['mean']:+.3f}, {d['low']:+.3f} to {d['high']:+.3f}"


def experiment_rows(results: dict, name: str) -> list[list[str]]:
    variant = results["variants"][name]
    scores = {key: over_seeds(score) for key, score in variant["per_image"].items()}
    hd95 = f"{variant['per_image']['hd95']['mean']:.1f} {results['unit']}"
    shown = [scores["iou"], scores["dice"], f"{variant['pooled']['dice']['mean']:.3f}", hd95, scores["surface_dice"]]
    rows = [[*shown, against(results, name), f"{variant['cost']['minutes']:.0f}"]]
    if errors := variant.get("circumference"):
        rows.append([f"{errors['absolute_error_mm']['mean']:.2f} mm", f"{errors['no_ellipse']:.0f}"])
    if classes := variant.get("classes"):
        rows.append([over_seeds(score) for score in (*classes.values(), variant["mean_of_classes"])])
    return rows


def long_rows(results: dict, name: str) -> list[list[str]]:
    variant, gain = results["variants"][name], results["differences"].get(name)
    shown = [over_seeds(variant["per_image"][score]) for score in ("iou", "dice", "surface_dice")]
    hd95 = f"{variant['per_image']['hd95']['mean']:.1f} {results['unit']}"
    seeds = ", ".join(map(str, variant["seeds"]))
    return [[seeds, *shown, hd95, against(results, name), gain["verdict"] if gain else ""]]


def screen_rows(task: str) -> list[str]:
    """The rows of one task of the screen, from the scores of single images."""
    dice = pd.read_csv(RESULTS / "screen" / f"{task}.csv", dtype={"id": str, "group": str}).set_index(["id", "group"])
    runs = pd.read_csv(RESULTS / "screen" / f"{task}-runs.csv")
    dice.columns = pd.MultiIndex.from_tuples([tuple(name.rsplit("-seed", 1)) for name in dice])  # variant, seed
    rows = []
    for name, costs in runs.groupby("variant"):
        own, gains = dice[name].mean(), (dice[name] - dice["full_resolution"]).dropna(axis=1)
        low, high = interval(gains.groupby(level="group").mean())  # subjects x seeds
        spread = f" ± {own.std():.3f}" if len(own) > 1 else ""
        mean = gains.groupby(level="group").mean().to_numpy().mean()
        gain = "" if name == "full_resolution" else f"{mean:+.3f}, {low:+.3f} to {high:+.3f}"
        parts = [f"{own.mean():.3f}{spread}", gain]
        parts += [f"{costs['hd95'].mean():.1f}", f"{costs['surface_dice'].mean():.3f}"]
        parts += [f"{costs['parameters'].iloc[0]:,}", f"{costs['cpu_seconds'].mean():.0f}"]
        rows.append(f"| `{name}` | {' | '.join(parts)} |")
    return rows


def few_rows() -> list[str]:
    """The rows of the trainings on few images, from the scores of single images."""
    dice = pd.read_csv(RESULTS / "few_images" / "dice.csv", dtype={"id": str, "group": str}).set_index(["id", "group"])
    dice.columns = pd.MultiIndex.from_tuples([tuple(name.split("-")) for name in dice])  # start, number, seed
    dice = dice.sort_index(axis=1)
    rows = []
    for number in ("10", "30", "100"):
        means = [dice[start, number].mean() for start in ("fetal_head", "nothing")]
        gains = (dice["fetal_head", number] - dice["nothing", number]).groupby(level="group").mean()
        low, high = interval(gains)
        shown = [f"{mean.mean():.3f} ± {mean.std():.3f}" for mean in means]
        gain = f"{gains.to_numpy().mean():+.3f}, {low:+.3f} to {high:+.3f}"
        rows.append(f"| {number} | {' | '.join(shown)} | {gain} |")
    return rows


WHOLE = "km_unet_pp_tiny"


def without_parts(task: str) -> dict:
    """`km_unet_pp_tiny` and the same without a part."""
    runs = [run for run in (RESULTS / "long" / task).iterdir() if re.fullmatch(rf"{WHOLE}(-fold\d)?-seed\d", run.name)]
    return compare([RESULTS / "parts" / task, *sorted(runs)], "test", WHOLE)[0]


def part_rows(task: str) -> list[str]:
    """The rows of the ablation; on spines with the mean of the five vertebrae."""
    results, rows = without_parts(task), []
    for name, variant in results["variants"].items():
        images, difference = variant["per_image"], results["differences"].get(name)
        cells = [", ".join(map(str, variant["seeds"])), over_seeds(images["dice"])]
        if task == "lumbar_spine":
            cells += [over_seeds(variant["mean_of_classes"])]
        else:
            cells += [over_seeds(images["iou"]), over_seeds(images["surface_dice"])]
        cells += [against(results, name), difference["verdict"] if difference else ""]
        if task == "lumbar_spine":
            cells.append("" if name == WHOLE else "{:+.3f}, {:+.3f} to {:+.3f}".format(*of_vertebrae(name)))
        rows.append(f"| `{name}` | {' | '.join(cells)} | {variant['cost']['parameters']:,} |")
    return rows


def of_vertebrae(name: str) -> list[float]:
    """The difference in the mean of the five vertebrae, and its interval."""
    return gain(spines(name, "parts"), spines(WHOLE), "vertebrae")


def ablation_rows(results: dict, name: str) -> list[list[str]]:
    variant = results["variants"][name]
    scores = [variant["per_image"]["dice"], *([variant["mean_of_classes"]] if "classes" in variant else [])]
    cost = [f"{variant['cost']['parameters']:,}", f"{variant['cost']['seconds_per_epoch']:.1f}"]
    return [[*map(over_seeds, scores), against(results, name), *cost]]


def test_the_rows_of_the_tables_are_those_of_the_recorded_results():
    expected = []
    for kind, side, rows in (
        ("experiments", "test", experiment_rows),
        ("recipe", "val", ablation_rows),
        ("ablation", "val", ablation_rows),
    ):
        for results in recorded(RESULTS / kind):
            assert results["side"] == side
            variants = results["variants"]
            expected += [f"| `{name}` | {' | '.join(row)} |" for name in variants for row in rows(results, name)]
    for results in recorded_runs():
        variants = results["variants"]
        expected += [f"| `{name}` | {' | '.join(row)} |" for name in variants for row in long_rows(results, name)]
    for task in ("lumbar_spine", "isic2017", "fetal_head"):
        expected += screen_rows(task)
    for task in ("lumbar_spine", "isic2017"):
        expected += part_rows(task)
    assert sorted(line for line in printed() if line.startswith("| `")) == sorted(expected)


def test_the_rows_of_few_images_are_those_of_the_recorded_scores():
    assert set(few_rows()) <= set(printed())


def spines(network: str, kind: str = "long") -> pd.DataFrame:
    """Dice, and its mean over the vertebrae, of every image in the folds: columns (score, seed)."""
    images = []
    for run in (RESULTS / kind / "lumbar_spine").glob(f"{network}-fold?-seed?"):
        table = pd.read_csv(run / "test" / "images.csv", dtype={"id": str, "group": str})
        fold, seed = re.search(r"-fold(\d)-seed(\d)$", run.name).groups()
        images.append(table.assign(fold=int(fold), seed=int(seed)))
    together = pd.concat(images)
    together["vertebrae"] = together[[f"dice_L{k}" for k in range(1, 6)]].mean(axis=1)
    return together.pivot(index=["id", "group", "fold"], columns="seed", values=["dice", "vertebrae"])


def gain(ours: pd.DataFrame, theirs: pd.DataFrame, score: str) -> list[float]:
    """What a score of `spines` gains, over subjects and the seeds that both have, and its interval."""
    subjects = (ours[score] - theirs[score]).dropna(axis=1).groupby(level=["group", "fold"]).mean()
    return [subjects.to_numpy().mean(), *interval(subjects)]


def test_the_text_on_spines_has_the_figures_of_the_recorded_scores():
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    ours, unet, nested = map(spines, (WHOLE, "unet", "unet_pp"))
    for words, other, score in (
        ("From the U-Net to `km_unet_pp_tiny` it changes by {:+.3f} ({:+.3f} to {:+.3f})", unet, "vertebrae"),
        ("is level with the U-Net**: the difference is {:+.3f} ({:+.3f} to {:+.3f}), over 34", unet, "dice"),
        ("Beside the U-Net++, of one seed, the lead is {:.3f} ({:.3f} to {:.3f})", nested, "dice"),
    ):
        assert words.format(*gain(ours, other, score)) in text
    of_seeds = (ours["dice"] - unet["dice"]).groupby(level="group").mean().mean()
    assert "Of single seeds it is {:+.3f}, {:+.3f} and {:+.3f}".format(*of_seeds) in text
    first = ours.xs(0, axis=1, level="seed")
    without = first.drop(index="sub39", level="group").mean()
    assert "without which the means of all images are {:.3f} and {:.3f}".format(*without) in text
    means = first.drop(index=["sub39", "sub49"], level="group").mean()
    assert "Without both the means are {:.3f} and {:.3f}".format(*means) in text
    assert f"have a Dice of vertebra against rest of {first['dice'].median():.3f} or more" in text
    subjects = ours["vertebrae"].groupby(level="group").mean()
    assert (subjects.loc["sub39"] < 0.05).all() and f"crooked spine ({subjects.loc['sub49', 0]:.2f})" in text


def test_the_text_on_unet_pp_has_the_figures_of_the_recorded_scores():
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    heads, skin = (compare([RESULTS / "long" / task], "test", "unet_pp")[0] for task in ("fetal_head", "isic2017"))
    found = [results["differences"] for results in (heads, skin)]
    words = [f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" for d in (x["km_unet_pp_tiny"] for x in found)]
    assert f"on heads and skin** (`--baseline unet_pp`): {words[0]} and {words[1]}." in text
    lead = skin["differences"]["unet"]
    assert f"which is ahead by {lead['mean']:.3f} ({lead['low']:.3f} to {lead['high']:.3f})" in text
    assert f"{spines('unet_pp')['vertebrae'].to_numpy().mean():.3f} after U-Net++" in text


def agreement(task: str) -> tuple[float, float]:
    """Rank correlation of the Dice of images: the mean over pairs of trainings of one network, and of the two."""
    dice = {}
    for run in (RESULTS / "long" / task).glob("*-seed?"):
        network = run.name.rsplit("-", 1)[0]
        if network in ("unet", "km_unet_pp_tiny"):
            dice[network, run.name] = pd.read_csv(run / "test" / "images.csv", dtype={"id": str}).set_index("id")[
                "dice"
            ]
    rho = pd.DataFrame(dice).corr("spearman")
    pairs = [(rho.loc[a, b], a[0] == b[0]) for a, b in combinations(rho.columns, 2)]
    alike, unlike = ([value for value, same in pairs if same is wanted] for wanted in (True, False))
    return float(np.mean(alike)), float(np.mean(unlike))


def test_the_text_on_ss2d_has_the_figures_of_the_recorded_scores():
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    whole, without = spines(WHOLE), spines("no-ss2d", "parts")
    for score, words in (
        ("dice", "Dice of all vertebrae as one class {:.3f} lower ({:.3f} to {:+.3f})"),
        ("vertebrae", "the mean of the five is {:.3f} lower ({:.3f} to {:.3f})"),
    ):
        assert words.format(*gain(whole, without, score)) in text
    dice = whole["dice"].mean()
    five = without_parts("lumbar_spine")["variants"][WHOLE]["mean_of_classes"]
    assert f"the whole network has {dice[1]:.3f} and {dice[2]:.3f} itself with its other seeds" in text
    of_five = []
    for seed in range(3):
        runs = [RESULTS / "long" / "lumbar_spine" / f"{WHOLE}-fold{fold}-seed{seed}" for fold in range(5)]
        of_five.append(compare(runs, "test", None)[0]["variants"][WHOLE]["mean_of_classes"]["mean"])
    ranges = dice.max() - dice.min(), max(of_five) - min(of_five)
    assert "Its seeds differ by up to {:.3f} in Dice and {:.3f} in the mean of the five".format(*ranges) in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"the mean over their five labels is {over_seeds(five)} for `{WHOLE}`" in readme


def test_the_text_on_parts_has_the_verdicts_of_the_recorded_scores():
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert "No part is shown to pay, on either task" in text and "the mean without KAN, with three fifths" in text
    skin, spine = without_parts("isic2017"), without_parts("lumbar_spine")
    assert {difference["verdict"] for difference in skin["differences"].values()} == {"none"}
    verdicts = {name: difference["verdict"] for name, difference in spine["differences"].items()}
    assert set(verdicts.values()) == {"none"}
    variants = skin["variants"]
    assert max(variants, key=lambda name: variants[name]["per_image"]["dice"]["mean"]) == "no-kan"
    parameters = [variants[name]["cost"]["parameters"] for name in ("no-kan", WHOLE)]
    assert abs(parameters[0] / parameters[1] - 0.6) < 0.01


def test_the_text_on_hard_images_has_the_correlations_of_the_recorded_scores():
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    skin, heads = agreement("isic2017"), agreement("fetal_head")
    assert f"{skin[0]:.2f} on skin and {heads[0]:.2f} on heads" in text
    assert f"and {skin[1]:.2f} and {heads[1]:.2f} if they are of the two" in text


def test_dice_of_the_means_bounds_the_mean_dice():
    """Dice is 2J / (1 + J) of an image's IoU J, which is concave: no mean of it lies above that of the mean J."""
    kept = [results for kind in ("experiments", "recipe", "ablation") for results in recorded(RESULTS / kind)]
    for results in [*kept, *recorded_runs()]:
        for name, variant in results["variants"].items():
            for scores in (variant["per_image"], variant["pooled"]):
                iou, dice = scores["iou"]["mean"], scores["dice"]["mean"]
                assert dice <= 2 * iou / (1 + iou) + 1e-6, (results["task"], name)


def test_the_guide_shows_the_scores_of_the_cards():
    lines = (ROOT / "docs" / "guide" / "pretrained.md").read_text(encoding="utf-8").splitlines()
    for name in list_pretrained():
        card = (ROOT / "kan_mamba_layers" / "weights" / name / "README.md").read_text(encoding="utf-8")
        iou, dice, distance = (
            re.search(rf"^\| {score}[^|]*\| ([\d.]+)", card, re.MULTILINE).group(1) for score in ("IoU", "Dice", "HD95")
        )
        unit = re.search(r"HD95 \((\w+)\)", card).group(1)
        images, subjects = re.search(r"(\d+) images of (\d+) subjects \(test\)", " ".join(card.split())).groups()
        assert f"| `{name}` | {images} | {subjects} | {iou} | {dice} | {distance} {unit} |" in lines
        assert float(dice) <= 2 * float(iou) / (1 + float(iou)) + 1e-3


def test_the_percentile_bootstrap_over_few_subjects_is_too_narrow():
    """The figures of the section on the intervals, by simulation and from the quantiles."""
    draw = np.random.default_rng(0)
    for subjects, missed in ((7, 0.13), (5, 0.17)):
        differences = draw.standard_normal((2000, subjects))  # none on average
        counts = draw.multinomial(subjects, np.full(subjects, 1 / subjects), 1000)
        low, high = np.percentile(differences @ counts.T / subjects, [2.5, 97.5], axis=1)
        assert abs(((low > 0) | (high < 0)).mean() - missed) < 0.02
    for subjects, wider in ((7, 1.35), (5, 1.58), (45, 1.04)):
        ratio = stats.t.ppf(0.975, subjects - 1) / stats.norm.ppf(0.975) * (subjects / (subjects - 1)) ** 0.5
        assert abs(ratio - wider) < 0.005


def test_the_readme_shows_the_dice_of_the_long_trainings():
    found = [results["variants"] for results in recorded_runs()]
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for model in ("unet", "unet_pp", "km_unet_pp_tiny"):
        rows = [variants.get(model) for variants in found]
        dice = ["not run" if row is None else over_seeds(row["per_image"]["dice"]) for row in rows]
        assert f"| `{model}` | {' | '.join(dice)} |" in lines
