"""Comparisons of run folders, against numpy by hand, closed forms and scipy; and what is refused or missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from segmentation.compare import compare, interval
from segmentation.report import write_report
from segmentation.runs import flatten

SUBJECTS, IMAGES = 40, 120
SIDES = dict.fromkeys(("train", "val", "test"), 9)
COMMON = {"task": "lumbar_spine", "image_size": 64, "split_sha256": "5" * 64}
SCORES = COMMON | {"checkpoint": "best.ckpt", "epoch": 2, "side": "test", "options": [], "data": "demo"}
SCORES |= {"unreadable": 0, "unreadable_images": []}
FACTS = COMMON | {"network": "unet", "model_args": {}, "parameters": 1_234_567, "multiply_adds": 3 * 10**9}
FACTS |= {"data": "demo", "images": SIDES, "subjects": SIDES, "epochs": 2, "best_epoch": 2, "command": "lab.py fit"}
FACTS |= {"device": "cpu, 2 cores", "date": "2026-01-02", "versions": {"torch": "2.13"}, "commit": None}
HISTORY = "epoch,train/iou,train/loss,val/iou,val/loss,seconds\n1,.4,.9,.5,.8,20\n2,.6,.7,.7,.6,10\n"


def write_run(
    folder: Path,
    dice: np.ndarray,
    seed: int = 0,
    on: str = "test",
    model: dict | None = None,
    fold: int | None = None,
    **more,
) -> Path:
    """A run that scored these Dice values image by image; `more`: facts, scores, or columns of images.csv."""
    dice, names = np.asarray(dice, dtype=float), [f"{n:03d}" for n in range(len(dice))]
    columns = {"id": names, "group": [f"{n % SUBJECTS:02d}" for n in range(len(dice))], "iou": dice / (2 - dice)}
    columns |= {"dice": dice, "f1": dice, "hd95": 4.0, "surface_dice": 0.5, "unit": "px"}
    columns |= {"tp": 8, "fp": 1, "fn": 3, "tn": 4, "sensitivity": 0.75, "specificity": 0.25}
    columns |= {name: values for name, values in more.items() if isinstance(values, list) and name not in SCORES}
    (folder / on).mkdir(parents=True)
    pd.DataFrame(columns).to_csv(folder / on / "images.csv", index=False)
    (folder / "history.csv").write_text(HISTORY)
    for name, content in (("metrics.json", FACTS | {"seed": seed}), (f"{on}/scores.json", SCORES)):
        changed = {key: more.get(key, value) for key, value in content.items()}
        (folder / name).write_text(json.dumps(changed), encoding="utf-8")
    config = {"seed_everything": seed, "trainer": {"max_epochs": 2, "logger": str(folder)}}
    config["model"] = {"network": "unet", "model_args": {}, "lr": 0.004} | (model or {})
    config["data"] = {"task": "lumbar_spine", "batch_size": 8, "seed": seed, "folder": None, "fold": fold}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def compared(*runs: Path, on: str = "test", baseline: str | None = None) -> dict:
    return compare(list(runs), on, baseline)[0]


def page_of(results: tuple, out: Path) -> str:
    """The report, whose pictures are drawn but not written, because that takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **more: Image.new("L", (1, 1)).save(path))
        write_report(out, *results)
    return (out / "report.html").read_text()


def gain(folder: Path, ours: np.ndarray, theirs: np.ndarray, **more) -> dict:
    """The difference that is found between two runs."""
    for name, dice in (("unet-seed0", theirs), ("ours-seed0", ours)):
        write_run(folder / name, dice, **more)
    return compared(folder)["differences"]["ours"]


@pytest.fixture
def base() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.3, 0.6, IMAGES)


def test_means_and_deviations(tmp_path):
    first, second = np.array([0.2, 0.4, 0.6]), np.array([0.5, 0.9, 0.1])
    for seed, dice, l1, l2, tp in (
        (0, first, [0.5, "", 0.7], ["", "", ""], [8, 0, 2]),
        (3, second, [0.1] * 3, [0.5, "", 1], [5, 5, 5]),
    ):
        ious = {f"iou_L{k}": [value and value / (2 - value) for value in part] for k, part in ((1, l1), (2, l2))}
        write_run(tmp_path / f"net-seed{seed}", dice, seed, dice_L1=l1, dice_L2=l2, tp=tp, **ious)
    net = compared(tmp_path)["variants"]["net"]
    means = [first.mean(), second.mean()]
    deviation = (first.std(ddof=1) + second.std(ddof=1)) / 2
    expected = {"mean": np.mean(means), "sd_seeds": np.std(means, ddof=1), "sd_images": deviation}
    assert net["per_image"]["dice"] == pytest.approx(expected)
    assert net["seeds"] == [0, 3]
    counts = [(10, 3, 9), (15, 3, 9)]
    pooled = [tp / (tp + fp + fn) for tp, fp, fn in counts]
    assert net["pooled"]["iou"] == pytest.approx({"mean": np.mean(pooled), "sd_seeds": np.std(pooled, ddof=1)})
    assert net["pooled"]["dice"]["mean"] == pytest.approx((20 / 32 + 30 / 42) / 2)
    classes = {name: score["mean"] for name, score in net["classes"].items()}
    assert classes == pytest.approx({"L1": (0.6 + 0.1) / 2, "L2": 0.75}), "empty cells are left out, and so are classes"
    of_seeds = [0.6, (0.1 + 0.75) / 2]
    assert net["mean_of_classes"] == pytest.approx({"mean": np.mean(of_seeds), "sd_seeds": np.std(of_seeds, ddof=1)})
    cost = {"parameters": 1_234_567, "multiply_adds": 3 * 10**9, "seconds_per_epoch": 10.0, "minutes": 1.0}
    assert net["cost"] == pytest.approx(cost)


def test_one_seed_has_no_deviation_and_mixed_units_no_mean(tmp_path):
    mixed = {"unit": ["mm", "px"], "hd95": [1.0, 2.0]}
    run = write_run(tmp_path / "net-seed0", [0.4, 0.6], **mixed)
    results = compare([run], "test", None)
    scores = results[0]["variants"]["net"]["per_image"]
    assert scores["dice"]["sd_seeds"] is None
    assert scores["hd95"] == scores["surface_dice"] == {"mean": None, "sd_seeds": None, "sd_images": None}
    assert page_of(results, tmp_path / "out").count("<td>n/a</td>") > 3


def test_errors_of_the_circumference(tmp_path):
    heads = {"hc_mm": [102, 96, "", ""], "hc_true_mm": [100, 100, 100, ""], "hc_error_mm": [2, -4, "", ""]}
    for seed in range(3):
        run = write_run(tmp_path / f"net-seed{seed}", [0.5] * 4, seed, epochs=60, image_size=256, **heads)
        table = run / "test" / "images.csv"
        table.write_text(table.read_text().replace(",px,", ",mm,"))
    results = compare([tmp_path], "test", None)
    errors = results[0]["variants"]["net"]["circumference"]
    assert (errors["images"], errors["no_ellipse"]) == (3, 1)
    assert errors["absolute_error_mm"] == pytest.approx({"mean": 3, "sd_seeds": 0, "sd_images": np.sqrt(2)})
    assert errors["error_mm"] == pytest.approx({"mean": -1, "sd_seeds": 0, "sd_images": np.sqrt(18)})
    page = page_of(results, tmp_path / "out")
    assert "small budget" not in page
    assert "<td>3.00 ± 0.00</td>" in page and "<td>-1.00 ± 4.24</td>" in page


def test_the_interval_covers_what_it_promises():
    """Differences of 0 in the mean, ten subjects with one to seventeen images each: 5 % of the verdicts are false."""
    rng, draws, false = np.random.default_rng(0), 2000, 0
    for _ in range(draws):
        images = rng.integers(1, 18, 10)
        values = rng.normal(0, 0.02, 10) + rng.normal(0, 0.06 / np.sqrt(images))
        low, high = interval(pd.DataFrame(values))
        false += not low <= 0 <= high
    assert stats.binomtest(false, draws, 0.05).pvalue > 0.01
    values = rng.normal(1, 2, 7)
    expected = tuple(stats.ttest_1samp(values, 0).confidence_interval())
    assert interval(pd.DataFrame(values)) == pytest.approx(expected)
    assert interval(pd.DataFrame([0.3])) == interval(pd.DataFrame([[0.3, 0.4]])) == (None, None)


@pytest.mark.parametrize("of_trainings", [0.0, 0.3, 0.6, 2.0])
@pytest.mark.parametrize(
    ("sizes", "seeds"), [([30], 2), ([30], 3), ([6] * 5, 1), ([6] * 5, 3), ([20, 5, 5], 2)], ids=str
)
def test_the_interval_covers_other_trainings_too(sizes, seeds, of_trainings):
    """No difference in the mean; 30 subjects, and a training for each fold and seed. Subjects alone would not do."""
    rng, draws, false, narrow = np.random.default_rng(0), 1000, 0, 0
    fold = np.repeat(range(len(sizes)), sizes)
    index = pd.MultiIndex.from_arrays([range(30), fold], names=["group", "fold"])
    for _ in range(draws):
        trainings = of_trainings * rng.normal(0, 1, (len(sizes), seeds))
        gains = rng.normal(0, 1, (30, 1)) + trainings[fold] + rng.normal(0, 1, (30, seeds))
        low, high = interval(pd.DataFrame(gains, index))
        false += not low <= 0 <= high
        narrow += stats.ttest_1samp(gains.mean(axis=1), 0).pvalue < 0.05
    assert false / draws < 0.07  # 5 %, and three standard deviations of 1,000 draws
    assert of_trainings < 1 or narrow / draws > 0.2


@pytest.mark.parametrize("sizes", [[6] * 5, [1] * 20], ids=str)
def test_the_interval_covers_what_the_seeds_of_a_fold_share(sizes):
    """Their training images and test subjects, also where every subject is a fold of its own."""
    rng, draws, false = np.random.default_rng(0), 1000, 0
    fold = np.repeat(range(len(sizes)), sizes)
    index = pd.MultiIndex.from_arrays([range(len(fold)), fold], names=["group", "fold"])
    for _ in range(draws):
        gains = rng.normal(0, 1, (len(fold), 1)) + 0.5 * rng.normal(0, 1, (len(sizes), 1))[fold]
        low, high = interval(pd.DataFrame(gains + rng.normal(0, 0.1, (len(fold), 2)), index))
        false += not low <= 0 <= high
    assert false / draws < 0.07


def test_the_interval_over_folds_from_the_sums_of_squares():
    """The same analysis inside each of three folds, by explicit sums, and Student's t over the means of the folds."""
    rng = np.random.default_rng(3)
    parts = [rng.normal(0, 2, (n, 1)) + rng.normal(0, 1, (1, 2)) + rng.normal(0, 0.5, (n, 2)) for n in (5, 4, 6)]
    gains, sums = np.concatenate(parts), np.zeros(3)
    for part in parts:
        a = sum(2 * (row.mean() - part.mean()) ** 2 for row in part)
        b = sum(len(part) * (column.mean() - part.mean()) ** 2 for column in part.T)
        sums += a, b, sum((x - part.mean()) ** 2 for x in part.flat) - a - b
    ms = sums / (12, 3, 12)
    both = ms[0] + ms[1] - ms[2]
    assert both > max(ms[:2])
    degrees = both**2 / (ms[0] ** 2 / 12 + ms[1] ** 2 / 3 + ms[2] ** 2 / 12)
    widths = [stats.t.ppf(0.975, d) * np.sqrt(s / 30) for s, d in ((ms[0], 12), (ms[1], 3), (both, degrees))]
    shares, means = np.array([5, 4, 6]) / 15, np.array([part.mean() for part in parts])
    spread = (shares * (means - gains.mean()) ** 2).sum() * (shares**2).sum() / (1 - (shares**2).sum())
    widths.append(stats.t.ppf(0.975, 2) * np.sqrt(spread))
    index = pd.MultiIndex.from_arrays([range(15), np.repeat([4, 0, 2], (5, 4, 6))], names=["group", "fold"])
    expected = gains.mean() - max(widths), gains.mean() + max(widths)
    assert interval(pd.DataFrame(gains, index)) == pytest.approx(expected)
    means = np.array([3.0, 3.0, 4.0, 4.0, 8.0, 8.0])
    index = pd.MultiIndex.from_arrays([range(6), [0, 0, 1, 1, 2, 2]], names=["group", "fold"])
    expected = tuple(stats.ttest_1samp([3, 4, 8], 0).confidence_interval())
    assert interval(pd.DataFrame(means, index)) == pytest.approx(expected)


def test_the_interval_from_the_sums_of_squares():
    """A two-way analysis of variance by explicit sums."""
    rng = np.random.default_rng(5)
    gains = rng.normal(0, 2, (6, 1)) + np.array([[0.9, -0.4]]) + rng.normal(0, 0.5, (6, 2))
    total = sum((x - gains.mean()) ** 2 for x in gains.flat)
    a = sum(2 * (row.mean() - gains.mean()) ** 2 for row in gains)
    b = sum(6 * (column.mean() - gains.mean()) ** 2 for column in gains.T)
    ms = a / 5, b / 1, (total - a - b) / 5
    both = ms[0] + ms[1] - ms[2]
    assert both > max(ms[:2])
    degrees = both**2 / (ms[0] ** 2 / 5 + ms[1] ** 2 / 1 + ms[2] ** 2 / 5)
    half = max(stats.t.ppf(0.975, d) * np.sqrt(s / 12) for s, d in ((ms[0], 5), (ms[1], 1), (both, degrees)))
    assert interval(pd.DataFrame(gains)) == pytest.approx((gains.mean() - half, gains.mean() + half))


def test_verdicts(tmp_path, base):
    rng = np.random.default_rng(1)
    noise, loud = rng.normal(0, 0.02, IMAGES), rng.normal(0, 0.1, IMAGES)
    above = gain(tmp_path / "above", base + 0.05 + noise, base)
    assert above["mean"] == pytest.approx(0.05 + noise.mean())
    assert 0 < above["low"] < 0.05 < above["high"] < 0.1
    assert (above["verdict"], above["images"], above["subjects"]) == ("above", IMAGES, SUBJECTS)
    below = gain(tmp_path / "below", base, base + 0.05 + noise)
    assert below["verdict"] == "below"
    assert [below["low"], below["high"]] == pytest.approx([-above["high"], -above["low"]], abs=1e-3)
    same = gain(tmp_path / "same", base, base)
    assert [same["mean"], same["low"], same["high"], same["verdict"]] == [0, 0, 0, "none"]
    none = gain(tmp_path / "none", base + loud - loud.mean(), base)
    assert none["low"] < 0 < none["high"] and none["verdict"] == "none"
    one = gain(tmp_path / "one", [0.6], [0.5])
    assert (one["low"], one["high"], one["verdict"], one["subjects"]) == (None, None, "too few subjects", 1)


@pytest.mark.parametrize(("subjects", "verdict"), [(9, "too few subjects"), (10, "above")])
def test_few_subjects_give_no_verdict_and_each_counts_once(tmp_path, base, subjects, verdict):
    groups = [f"{min(n, subjects - 1)}" for n in range(IMAGES)]  # the last has nearly all images
    gains = 0.2 + 0.001 * np.arange(IMAGES)
    found = gain(tmp_path, base + gains, base, group=groups)
    means = pd.Series(gains).groupby(groups).mean()
    interval = stats.ttest_1samp(means, 0).confidence_interval()
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([means.mean(), *interval])
    assert (found["verdict"], found["subjects"]) == (verdict, subjects)
    page = page_of(compare([tmp_path], "test", None), tmp_path / "out")
    assert ("<td>too few subjects to say</td>" in page) == (subjects < 10)


def test_differences_are_paired_by_image_and_seed(tmp_path, base):
    for seed, more in ((0, 0.1), (1, 0.3), (5, 0.35)):
        write_run(tmp_path / f"ours-seed{seed}", base + more, seed)
    write_run(tmp_path / "unet-seed1", base, 1)
    table = write_run(tmp_path / "unet-seed0", base, 0) / "test" / "images.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *reversed(rows)]) + "\n")
    write_run(tmp_path / "alone-seed7", base, 7)
    found = compared(tmp_path)["differences"]
    assert found["ours"]["seeds"] == [0, 1]
    half = stats.t.ppf(0.975, 1) * 0.1  # the seeds' gains are 0.1 and 0.3 for every subject
    limits = [found["ours"][name] for name in ("mean", "low", "high")]
    assert limits == pytest.approx([0.2, 0.2 - half, 0.2 + half])
    assert found["alone"] is None
    assert compared(tmp_path, baseline="ours")["differences"]["unet"]["mean"] == pytest.approx(-0.2)


def test_names_of_images_stay_what_they_are(tmp_path):
    odd = {"id": ["NA", "007", "1e3"], "group": ["null", "01", "1"]}
    results = compared(*(write_run(tmp_path / name, [0.5] * 3, **odd) for name in ("unet", "other")))
    assert results["differences"]["other"]["subjects"] == 3


def test_what_differs_between_variants_is_told_apart_from_the_recipe(tmp_path):
    write_run(tmp_path / "full-seed0", [0.5])
    write_run(tmp_path / "full-seed1", [0.5], 1)
    write_run(tmp_path / "no-kan-seed0", [0.5], model={"model_args": {"use_kan": False}})
    results, groups = compare([tmp_path], "test", None)
    assert results["baseline"] == "full"
    recipe = {"model.network": "unet", "model.lr": 0.004, "data.task": "lumbar_spine", "data.batch_size": 8}
    assert results["recipe"] == recipe | {"trainer.max_epochs": 2}
    name = "model.model_args.use_kan"
    assert results["settings"] == {"full": {name: None}, "no-kan": {name: False}}
    page = page_of((results, groups), tmp_path / "out")
    assert re.search(r"<th>no-kan</th>\s*<td>False</td>", page)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "isic2017"}, "were scored with task 'isic2017' and 'lumbar_spine'"),
        ({"image_size": 96}, "were scored with image_size 96 and 64"),
        ({"side": "val"}, "were scored with side 'val' and 'test'"),
        ({"options": ["flips"]}, r"were scored with options \['flips'\] and \[\]"),
        ({"split_sha256": "6" * 64}, "were scored with split_sha256 .*: score them alike"),
        ({"id": ["1", "2"]}, "were scored on different images"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, change, message):
    write_run(tmp_path / "a", [0.5, 0.6])
    write_run(tmp_path / "b", [0.5, 0.6], **change)
    with pytest.raises(ValueError, match=f"/b' and .*/a' {message}"):
        compared(tmp_path)


def test_two_runs_of_one_variant(tmp_path):
    first = write_run(tmp_path / "one" / "unet-seed0", [0.5])
    again = write_run(tmp_path / "two" / "unet-seed1", [0.5])  # the seed is that of metrics.json
    with pytest.raises(ValueError, match=r"one/unet-seed0' and .*two/unet-seed1' are both 'unet' with seed 0"):
        compared(first, again)
    other = write_run(tmp_path / "three" / "unet-seed2", [0.5], 2, model={"lr": 0.1})
    with pytest.raises(ValueError, match=r"are both 'unet', but differ in model.lr: give their folders names of two"):
        compared(first, other)
    assert compared(first, tmp_path / "one", first)["runs"] == 1
    facts = json.loads((first / "metrics.json").read_text()) | {"split_sha256": "7" * 64}
    apart = write_run(tmp_path / "four" / "ours-seed0", [0.5])
    (apart / "metrics.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="followed two splits"):
        compared(first, apart)


def test_runs_that_are_not_finished_are_named(tmp_path):
    write_run(tmp_path / "unet-seed0", [0.5])
    (write_run(tmp_path / "unet-seed1", [0.5], 1) / "metrics.json").unlink()
    write_run(tmp_path / "unet-seed2", [0.5], 2, on="val")
    write_run(tmp_path / "unet-seed3", [0.5], 3, epoch=1)
    results, groups = compare([tmp_path], "test", None)
    assert results["missing"] == [
        "unet-seed1 is not trained to its end",
        "unet-seed2 is not scored on test",
        "unet-seed3 was trained on after it was scored: score it again with test",
    ]
    assert "1 of 4 runs are in this report" in page_of((results, groups), tmp_path / "out")
    assert compared(tmp_path, on="val")["seeds"] == [2]
    with pytest.raises(ValueError, match=r"no run is finished \(unet-seed1 is not trained to its end\): train"):
        compared(tmp_path / "unet-seed1")
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=rf"runs '.*{wrong}' holds no run: give a folder that fit wrote"):
            compared(tmp_path / wrong)
    with pytest.raises(ValueError, match="baseline 'none' is no finished variant: choose one of unet"):
        compared(tmp_path, baseline="none")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"iou": [0.3, 0.3]}, "dice of '000' is not that of its IoU; score the run again with test"),
        ({"dice_L1": ["", 0.9], "iou_L1": ["", 0.5]}, "dice_L1 of '001' is not"),
        ({"dice_L1": [0.9, 0.9], "iou_L1": [0.9 / 1.1, ""]}, "dice_L1 of '001' is not"),
        ({"hd95": None}, "lacks the column 'hd95': score the run again"),
        ({"dice_L1": [0.9, 0.9]}, "lacks the column 'iou_L1'"),
    ],
)
def test_scores_that_no_mask_can_have_are_refused(tmp_path, damage, message):
    path = write_run(tmp_path / "net", [0.5, 0.6]) / "test" / "images.csv"
    frame = pd.read_csv(path, dtype={"id": str}).assign(**damage)
    frame[[name for name in frame if damage.get(name, 0) is not None]].to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"net/test/images\.csv.* {message}"):
        compared(tmp_path)


def test_the_report_holds_the_numbers_and_the_pictures(tmp_path):
    for name, dice in (("unet-seed0", [0.5, 0.7]), ("<i>net<i>-seed0", [0.6, 0.7])):
        run = write_run(tmp_path / "runs" / name, dice, unreadable_images=[{"id": "lost", "reason": "<broken>"}])
        Image.new("RGB", (3, 3)).save(run / "test" / "cases.png")
    out = tmp_path / "out"
    results, groups = compare([tmp_path / "runs"], "test", None)
    write_report(out, results, groups)
    assert json.loads((out / "results.json").read_text()) == results
    page = (out / "report.html").read_text()
    unet, net, *_ = (re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL))
    numbers = "1 0.436 0.600 0.600 0.750 0.250 4.0 0.500 0.667 0.800 0.800 0.0"
    assert unet == ["unet", *numbers.split()]
    assert net[:4] == ["&lt;i&gt;net&lt;i&gt;", "1", "0.484", "0.650"]
    assert all(f"<td>{number}</td>" in page for number in ("+0.050", "1,234,567"))
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 4
    assert "<i>" not in page and "<broken>" not in page
    assert "href=" not in page
    assert "This is a small budget (at most 2 epochs, images of 64x64 pixels" in page
    assert min(Image.open(out / "curves.png").size) > 400
    assert not list(out.glob(".part-*"))


def folded(folder: Path, variant: str, dice: np.ndarray, seed: int, **more) -> None:
    """Three folds of one seed, each of which scored a third of the images."""
    for fold in range(3):
        part = slice(fold, None, 3)
        names = {
            "id": [f"{n:03d}" for n in range(len(dice))][part],
            "group": [f"{n // 6 * 3 + n % 3}" for n in range(len(dice))][part],  # two images each
        }
        run = folder / f"{variant}-fold{fold}-seed{seed}"
        write_run(run, dice[part], seed, fold=fold, split_sha256=str(fold) * 64, **names, **more)


def test_the_folds_of_a_cross_validation_count_as_one_run(tmp_path, base):
    """The same numbers as from runs that scored all images at once."""
    apart, whole = tmp_path / "folds", tmp_path / "whole"
    groups = [f"{n // 6 * 3 + n % 3}" for n in range(IMAGES)]
    noise = np.random.default_rng(1).normal(0, 0.02, (2, IMAGES))
    for variant, more in (("unet", 0), ("ours", 0.05)):
        for seed in (0, 1):
            dice = base + more + noise[seed] * (variant == "ours")
            folded(apart, variant, dice, seed)
            write_run(whole / f"{variant}-seed{seed}", dice, seed, group=groups)
    together, expected = compare([apart], "test", None), compared(whole)
    assert together[0]["folds"] == [0, 1, 2] and expected["folds"] == []
    assert together[0]["seeds"] == together[0]["variants"]["ours"]["seeds"] == [0, 1]
    for name in ("per_image", "per_subject", "pooled", "images", "empty_predictions"):
        for variant in ("unet", "ours"):
            found, wanted = (flatten({name: r["variants"][variant][name]}) for r in (together[0], expected))
            assert found == pytest.approx(wanted), name
    found, wanted = (r["differences"]["ours"] for r in (together[0], expected))
    assert all(found[name] == pytest.approx(wanted[name]) for name in ("mean", "images", "subjects", "seeds"))
    assert "This is fold 0 of a cross-validation of 3 folds" in page_of(together, tmp_path / "out")
    others = sorted(apart.iterdir(), key=lambda run: "fold2" not in run.name)
    assert "This is fold 2 of a cross-validation of 3 folds" in page_of(compare(others, "test", None), tmp_path / "2")


def test_the_interval_of_folds_covers_their_trainings(tmp_path, base):
    """A gain that each fold has of its own: with one seed Student's t over the folds, not over the subjects."""
    gains = np.array([0.01, 0.03, 0.08])[np.arange(IMAGES) % 3]
    folded(tmp_path, "unet", base, 0)
    folded(tmp_path, "ours", base + gains, 0)
    found = compared(tmp_path)["differences"]["ours"]
    expected = stats.ttest_1samp([0.01, 0.03, 0.08], 0).confidence_interval()
    assert [found["low"], found["high"]] == pytest.approx(list(expected))
    assert found["verdict"] == "none"


def test_folds_of_two_units_have_no_mean_distance(tmp_path, base):
    folded(tmp_path, "unet", base, 0)
    table = tmp_path / "unet-fold1-seed0" / "test" / "images.csv"
    table.write_text(table.read_text().replace(",px,", ",mm,"))
    results = compared(tmp_path)
    assert results["unit"] == "mixed" and results["variants"]["unet"]["per_image"]["hd95"]["mean"] is None


def test_seeds_may_have_training_images_of_their_own(tmp_path):
    for seed in (0, 1):
        for name in ("unet", "ours"):
            write_run(tmp_path / f"{name}-seed{seed}", [0.5, 0.6 + 0.1 * seed], seed, split_sha256=str(seed) * 64)
    results = compare([tmp_path], "test", None)
    assert results[0]["seeds"] == [0, 1]
    assert "Every seed has a split of its own" in page_of(results, tmp_path / "out")


def test_the_page_names_the_images_that_were_scored(tmp_path):
    run = write_run(tmp_path / "unet", [0.5, 0.6], on="other-all", data="other", side="all")
    facts = json.loads((run / "metrics.json").read_text()) | {"data": "own"}
    (run / "metrics.json").write_text(json.dumps(facts))
    page = page_of(compare([run], "other-all", None), tmp_path / "out")
    words = "on the 2 images of side <code>all</code> of <code>other</code> at their own size"
    assert words in " ".join(page.split()) and "The data in <code>own</code>" in page


@pytest.mark.parametrize(
    "setting",
    [
        {"callbacks": [{"class_path": "segmentation.callbacks.Patience"}]},
        {"devices": 8},
        {"num_nodes": 2},
        {"limit_train_batches": 4},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_trainings_of_another_length_are_no_seeds_of_one_variant(tmp_path, setting):
    write_run(tmp_path / "unet-seed0", [0.5, 0.6])
    path = write_run(tmp_path / "unet-seed1", [0.5, 0.6], 1) / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["trainer"] |= setting
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"differ in trainer.{next(iter(setting))}"):
        compared(tmp_path)


def test_folds_that_do_not_fit_are_refused(tmp_path, base):
    folded(tmp_path / "a", "unet", base, 0)
    write_run(
        tmp_path / "a" / "ours-fold1-seed0",
        base[1::3],
        fold=1,
        split_sha256="1" * 64,
        id=[f"{n:03d}" for n in range(IMAGES)][1::3],
        group=[f"{n // 6 * 3 + n % 3}" for n in range(IMAGES)][1::3],
    )
    with pytest.raises(ValueError, match="'ours' with seed 0 lacks fold 0: train and score it"):
        compared(tmp_path / "a")
    for fold in (0, 1):
        write_run(tmp_path / "b" / f"unet-fold{fold}", [0.5, 0.6], fold=fold)
    with pytest.raises(ValueError, match="are of folds 0 and 1, but both were scored on '000'"):
        compared(tmp_path / "b")
