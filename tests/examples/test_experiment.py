"""An experiment from one command: every file, nothing done twice, numbers that can be computed again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ablate
import experiment
from kan_mamba_layers import from_pretrained
from segmentation.checkpoints import load_run
from segmentation.comparison import bootstrap_interval, printed_scores
from segmentation.data import demo_items
from segmentation.evaluation import evaluate
from segmentation.experiment import read_rows
from segmentation.splits import follow_split, read_split
from segmentation.tasks import get_task

TRAINER = {"enable_progress_bar": False, "accelerator": "cpu"}
TRAIN = "--train=" + json.dumps({"image_size": 32, "limit": 30, "epochs": 1, "trainer": TRAINER})
CONFIGS = sorted((Path(experiment.__file__).parent / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("experiment")
    return ["--task=fetal_head", f"--out={out}", "--seeds=[0, 1]", "--models=[unet, km_unet_tiny]", TRAIN]


@pytest.fixture(scope="module")
def out(flags) -> Path:
    return Path(flags[1].removeprefix("--out="))


@pytest.fixture(scope="module")
def results(flags) -> dict:
    return experiment.main(flags)


def test_every_file_is_there(results, out):
    names = "report.md report.html results.json curves.png cost.png split.json cases-unet.png cases-km_unet_tiny.png"
    for name in names.split():
        assert (out / name).stat().st_size > 500
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 4
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["runs"], results["missing"]) == (4, [])


def test_the_numbers_are_those_of_the_images(results, out):
    text = (out / "report.md").read_text()
    for name in ("unet", "km_unet_tiny"):
        means = []
        for seed in (0, 1):
            rows = read_rows(out / "runs" / f"{name}-seed{seed}" / "test" / "images.csv")
            means.append(sum(row["dice"] for row in rows) / len(rows))
            assert all(row["dice"] == pytest.approx(row["f1"], abs=1e-12) for row in rows)
        dice = results["variants"][name]["per_image"]["dice"]
        assert dice["mean"] == pytest.approx(sum(means) / 2)
        assert dice["sd_seeds"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
        assert f"{dice['mean']:.3f}" in text


def test_the_figures_of_the_repeated_report_stand_beside_the_right_networks():
    assert printed_scores("fetal_head", "unet") == {"iou": 0.72, "dice": 0.74, "f1": 0.73}
    assert printed_scores("fetal_head", "km_unet_tiny") == {"iou": 0.14, "dice": 0.24, "f1": 0.67}
    assert printed_scores("lumbar_spine", "km_unet_pp_base") == {"iou": 0.86, "dice": 0.90, "f1": 0.91}
    assert printed_scores("isic2017", "unet_pp") is None


def test_checkpoints_give_the_table_again(results, out):
    task = get_task("fetal_head")
    items = [
        item for item in follow_split(demo_items(task, 32), read_split(out / "split.json")) if item.split == "test"
    ]
    run = out / "runs" / "km_unet_tiny-seed0"
    trained = load_run(run)
    written = read_rows(run / "test" / "images.csv")
    reloaded = type(trained)(from_pretrained(run / "model").eval(), trained.task, trained.image_size, trained.name)
    for network in (trained, reloaded):
        again = evaluate(network, items).rows
        assert [row["id"] for row in again] == [row["id"] for row in written]
        for row, before in zip(again, written, strict=True):
            for score in ("iou", "dice", "hd95", "surface_dice"):
                assert row[score] == pytest.approx(before[score], abs=1e-6)


def test_a_second_call_trains_and_scores_nothing(results, flags, out):
    kept = [*out.glob("runs/*/checkpoints/*.ckpt"), *out.glob("runs/*/test/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) >= 12
    assert experiment.main(flags) == results
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_report_of_what_is_finished(results, flags, out):
    scores = out / "runs" / "unet-seed1" / "test" / "scores.json"
    text = scores.read_text()
    scores.unlink()
    try:
        partial = experiment.main([*flags, "--report-only"])
    finally:
        scores.write_text(text)
    assert partial["missing"]
    assert partial["variants"]["unet"]["seeds"] == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('--train={"epoch": 3}', "'epoch', which train.py does not know: did you mean .*epochs"),
        ('--train={"seed": 3}', "'seed', which is the same for all runs: leave it out there"),
        ('--per-model={"unet": {"limit": 3}}', "'limit', which is the same for all runs"),
        ('--per-model={"resnet": {"lr": 0.1}}', "per-model names 'resnet', which is not one of the models"),
        ("--models=[unet, nonet]", "model 'nonet' is unknown"),
        ("--seeds=[1, 1]", "each of them once"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_trained(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        experiment.main(["--task=fetal_head", f"--out={tmp_path / 'out'}", settings])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_config_files_are_understood(path, tmp_path):
    settings = experiment.build_parser().parse_args([f"--config={path}", f"--out={tmp_path}"])
    variants = [
        experiment.Variant(model, model, settings.per_model.get(model, {}).get("model_args", {}))
        for model in settings.models
    ]
    plan = experiment.make_plan(settings, variants)
    assert plan.task.name == path.stem
    assert plan.image_size == (128 if path.parent.name == "cpu" else 256)


def test_intervals_cover_a_known_difference_and_have_no_width_without_one():
    rng = np.random.default_rng(0)
    groups = [f"subject{k // 3}" for k in range(90)]
    low, high = bootstrap_interval(0.1 + 0.05 * rng.standard_normal(90), groups)
    assert 0.07 < low < 0.1 < high < 0.13
    assert bootstrap_interval(np.zeros(90), groups) == (0.0, 0.0)
    assert bootstrap_interval(np.zeros(3), ["a"] * 3) is None


def test_an_ablation_leaves_a_table_and_a_plot(tmp_path):
    flags = ["--task=fetal_head", "--model=u_kan_tiny", f"--out={tmp_path}", "--seeds=[0]", TRAIN]
    results = ablate.main([*flags, "--variants=[use_kan=false]"])
    assert list(results["variants"]) == ["full", "use_kan=false"]
    full, without = (results["variants"][name]["cost"]["parameters"] for name in results["variants"])
    assert without < full
    assert (tmp_path / "cost.png").stat().st_size > 500
    assert "use_kan=false" in (tmp_path / "report.md").read_text()
