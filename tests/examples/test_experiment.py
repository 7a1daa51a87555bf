"""Experiments end to end on the demo: files, numbers, going on where they were stopped, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ablate
import experiment
from kan_mamba_layers import from_pretrained
from segmentation.checkpoints import Trained, load_run
from segmentation.data.module import SegmentationData
from segmentation.data.split import read_split, split_hash
from segmentation.evaluation import evaluate
from segmentation.experiment import read_rows
from segmentation.tasks import get_task

TRAIN = {
    "image_size": 32,
    "limit": 30,
    "epochs": 1,
    "trainer": {"enable_progress_bar": False, "accelerator": "cpu"},
}
TASK, MODELS = "lumbar_spine", ["unet", "km_unet_tiny"]
RUNS = [f"{model}-seed0" for model in MODELS]


def flags(out: Path, train: dict | None = None) -> list[str]:
    return [f"--task={TASK}", f"--out={out}", "--seeds=[0]", f"--train={json.dumps({**TRAIN, **(train or {})})}"]


def conduct(out: Path, *more: str, train: dict | None = None) -> dict:
    return experiment.main([*flags(out, train), f"--models={json.dumps(MODELS)}", *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a finished experiment, which no test changes."""
    out = tmp_path_factory.mktemp("experiment") / "out"
    conduct(out)
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """The same folder, for a test to change."""
    return shutil.copytree(done, tmp_path / "copy")


def checkpoint_times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.glob("runs/*/checkpoints/*.ckpt"))}


def cells(text: str, header: str) -> dict[str, list[str]]:
    """The rows of the Markdown table that has a column of this name: first cell -> the others, and the header."""
    block = next(block for block in text.split("\n\n") if re.search(rf"^\|.*\| {re.escape(header)} \|", block))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_an_experiment_leaves_every_file(done):
    for name in RUNS:
        folder = done / "runs" / name
        assert (folder / "test" / "scores.json").is_file()
        assert len(read_rows(folder / "test" / "images.csv")) == 6
        assert read_split(folder / "split.json") == read_split(done / "split.json")
    for picture in ("curves.png", "cost.png", *(f"cases-{model}.png" for model in MODELS)):
        assert min(Image.open(done / picture).size) > 200

    results = json.loads((done / "results.json").read_text())
    assert list(results["variants"]) == MODELS
    assert results["data"]["images"] == {"train": 18, "val": 6, "test": 6}
    assert results["data"]["split_sha256"] == split_hash(read_split(done / "split.json"))
    assert results["missing"] == []
    assert not list(done.rglob(".part-*"))


def test_the_page_holds_its_pictures(done):
    page, text = (done / "report.html").read_text(), (done / "report.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(path.name for path in done.glob("*.png"))
    assert page.count('src="data:image/png;base64,') == len(shown)
    assert page.count("src=") == len(shown)
    assert "href=" not in page
    assert page.count("<table>") == page.count("</table>") == len(re.findall(r"^\| ---", text, re.MULTILINE))


def test_the_numbers_of_the_report_are_those_of_the_images(done):
    text = (done / "report.md").read_text()
    scores, classes = cells(text, "pooled IoU"), cells(text, "L3")
    cost, difference = cells(text, "multiply-adds"), cells(text, "difference of Dice")
    tables = {name: read_rows(done / "runs" / f"{name}-seed0" / "test" / "images.csv") for name in MODELS}
    for name, rows in tables.items():
        tp, fp, fn = (np.array([row[key] for row in rows]) for key in ("tp", "fp", "fn"))
        iou, dice = tp / (tp + fp + fn), 2 * tp / (2 * tp + fp + fn)
        union = tp.sum() + fp.sum() + fn.sum()
        pooled = [tp.sum() / union, *[2 * tp.sum() / (union + tp.sum())] * 2]
        expected = [iou.mean(), dice.mean(), dice.mean(), *pooled]
        assert scores[f"`{name}`"] == ["1", *(f"{value:.3f}" for value in expected)]

        columns = [[row[f"dice_L{number}"] for row in rows] for number in range(1, 6)]
        means = [np.mean([value for value in column if value is not None]) for column in columns]
        assert classes[f"`{name}`"] == [f"{value:.3f}" for value in (*means, np.mean(means))]

        network = load_run(done / "runs" / f"{name}-seed0").network
        assert cost[f"`{name}`"][0] == f"{sum(p.numel() for p in network.parameters()):,}"
    gain = np.mean([a["dice"] - b["dice"] for a, b in zip(tables["km_unet_tiny"], tables["unet"], strict=True)])
    assert difference["`km_unet_tiny`"][0] == f"{gain:+.3f}"


@pytest.mark.parametrize("name", MODELS)
def test_scoring_a_saved_network_again_gives_the_same_rows(done, name):
    run, task = done / "runs" / f"{name}-seed0", get_task(TASK)
    items = SegmentationData(task, image_size=32, split=done / "split.json").test_items
    saved = [load_run(run)]
    if name != "unet":
        saved.append(Trained(from_pretrained(run / "model").eval(), task, 32, name))
    for trained in saved:
        before, again = read_rows(run / "test" / "images.csv"), evaluate(trained, items).rows
        assert [row["id"] for row in again] == [row["id"] for row in before]
        for old, new in zip(before, again, strict=True):
            assert old == pytest.approx(new, abs=1e-6)


def test_the_second_call_trains_nothing(copy):
    times, text = checkpoint_times(copy), (copy / "report.md").read_text()
    scored = [(copy / "runs" / name / "test" / "scores.json").stat().st_mtime_ns for name in RUNS]
    conduct(copy)
    assert checkpoint_times(copy) == times
    assert scored == [(copy / "runs" / name / "test" / "scores.json").stat().st_mtime_ns for name in RUNS]
    without_command = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert re.sub(r"```.*?```", "", (copy / "report.md").read_text(), flags=re.DOTALL) == without_command


def test_a_run_that_was_stopped_is_taken_up_again(copy):
    kept, stopped = (copy / "runs" / name for name in RUNS)
    before = checkpoint_times(kept.parent.parent)
    rows = read_rows(stopped / "test" / "images.csv")
    shutil.rmtree(stopped / "test")
    (stopped / "metrics.json").unlink()
    results = conduct(copy)
    assert results["missing"] == []
    assert json.loads((stopped / "metrics.json").read_text())["epochs"] == 1
    assert read_rows(stopped / "test" / "images.csv") == rows
    assert {path: time for path, time in checkpoint_times(copy).items() if kept in path.parents}.items() <= (
        before.items()
    )


def test_only_a_report_says_how_many_runs_are_missing(copy):
    (copy / "runs" / RUNS[1] / "metrics.json").unlink()
    results = conduct(copy, "--report-only")
    assert results["missing"] == ["km_unet_tiny, seed 0"]
    assert list(results["variants"]) == ["unet"]
    assert results["differences"] == {}
    text = (copy / "report.md").read_text()
    assert "**1 of 2 runs are in this report.** Missing: km_unet_tiny, seed 0." in text
    assert "--report-only" not in text
    assert not (copy / "runs" / RUNS[1] / "metrics.json").exists()


def test_only_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished run in .*: start the experiment without --report-only"):
        conduct(tmp_path / "none", "--report-only")


def test_a_run_of_another_recipe_is_not_mixed_in(done):
    with pytest.raises(ValueError, match=r"lr is 0.001, but the run in .*unet-seed0' was trained with 0.004"):
        conduct(done, train={"lr": 0.001})
    with pytest.raises(ValueError, match=r"split.json was made with \{'limit': 30\}, not with \{'limit': 33\}"):
        conduct(done, train={"limit": 33})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--train.epoch=2", "train sets 'epoch', which train.py does not know: did you mean epochs"),
        ('--train={"trainer": {"precison": 16}}', "train sets 'trainer.precison', .* did you mean trainer.precision"),
        ("--train.seed=3", "train sets 'seed', which is the same for all runs"),
        ('--train={"trainer": {"devices": 2}}', "train sets 'trainer.devices', which is the same for all runs"),
        ("--train.epochs=many", "train.py refuses its settings: .*epochs"),
        ('--per-model={"unet": {"image_size": 64}}', "per-model unet sets 'image_size', which is the same for all"),
        ('--per-model={"unet": {"learning": 1}}', "per-model unet sets 'learning', which train.py does not know"),
        ('--per-model={"unet_pp": {"lr": 1}}', "per-model names 'unet_pp', which is not one of the models"),
        ('--per-model={"km_unet_tiny": {"model_args": {"kan": 1}}}', "'kan' is not an argument of KMUNet"),
        ("--seeds=[1, 1]", r"seeds \[1, 1\] must be one or more, each of them once"),
        ("--models=[]", r"variants \[\] must be one or more"),
    ],
)
def test_settings_are_refused_by_name_before_anything_is_trained(tmp_path, setting, message):
    with pytest.raises((TypeError, ValueError), match=message):
        experiment.main([f"--task={TASK}", f"--out={tmp_path / 'out'}", f"--models={json.dumps(MODELS)}", setting])
    assert not (tmp_path / "out").exists()


def test_every_shown_config_is_a_plan(examples, tmp_path):
    configs = sorted((examples / "configs").rglob("*.yaml"))
    assert len(configs) == 10
    for config in configs:
        flags = [f"--config={config}", f"--out={tmp_path / 'out'}"]
        script = ablate if config.parent.name in ("recipe", "ablation") else experiment
        plan, _ = script.read_plan(flags)
        assert plan.task.name == config.stem
        assert len(plan.runs) == len(plan.variants) * len(plan.seeds) > 3


def test_an_ablation_ends_with_a_table_and_a_plot(tmp_path):
    out = tmp_path / "ablation"
    results = ablate.main([*flags(out), "--model=km_unet_tiny", "--variants=[use_kan=false]", "--side=val"])
    assert list(results["variants"]) == ["full", "use_kan=false"]
    assert results["side"] == "val"
    rows = cells((out / "report.md").read_text(), "arguments")
    assert rows["`full`"][0] == ""
    assert rows["`use_kan=false`"][0] == "`use_kan=False`"
    dice = [f"{results['variants'][name]['per_image']['dice']['mean']:.3f}" for name in ("full", "use_kan=false")]
    assert [rows["`full`"][2], rows["`use_kan=false`"][2]] == dice
    column = rows["variant"].index("parameters")
    without, full = (int(rows[name][column].replace(",", "")) for name in ("`use_kan=false`", "`full`"))
    assert 0 < without < full
    assert min(Image.open(out / "cost.png").size) > 200


def test_an_ablation_of_the_training(tmp_path):
    more = ['--model-args={"use_ema": false}', '--variants={"short": {"train": {"warmup": 0}, "expand": 2}}']
    plan, _ = ablate.read_plan([*flags(tmp_path / "ablation"), "--model=km_unet_tiny", *more])
    shared = {"use_ema": False}
    assert [(v.name, v.model_args, v.train) for v in plan.variants] == [
        ("full", shared, {}),
        ("short", shared | {"expand": 2}, {"warmup": 0}),
    ]


def test_variants_of_an_ablation():
    known = ablate.default_variants("km_unet_pp_tiny")
    assert known["full"] == {}
    assert known["use_ss2d=false"] == {"use_ss2d": False}
    assert ablate.choose_variants("km_unet_pp_tiny", ["use_kan=false"]) == {"full": {}, "use_kan=false": {"use_kan": 0}}
    assert ablate.choose_variants("km_unet_pp_tiny", {"a": {"expand": 1}}) == {"full": {}, "a": {"expand": 1}}
    shared = {"use_ema": False, "expand": 2}
    assert not {"use_ema=false", "ema_factor=8", "expand=2"} & ablate.default_variants("km_unet_tiny", **shared).keys()
    with pytest.raises(ValueError, match=r"variant 'a/b' cannot be the name of a folder"):
        ablate.choose_variants("km_unet_pp_tiny", {"a/b": {}})
    with pytest.raises(ValueError, match=r"variant 'use_none=false' is unknown for km_unet_pp_tiny: choose from full"):
        ablate.choose_variants("km_unet_pp_tiny", ["use_none=false"])
    with pytest.raises(ValueError, match=r"model 'unet' has no parts to leave out: choose one of"):
        ablate.default_variants("unet")
