"""Training end to end on the demo: every file of a run, the errors of the script, the quickstart, real folders."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import quickstart
import train
from kan_mamba_layers import from_pretrained
from segmentation.data.split import read_split, split_hash
from segmentation.module import LOSSES, Segmentation
from segmentation.networks import build_network
from segmentation.tasks import get_task

QUIET = ["--image-size=32", "--limit=30", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SCORES = {"iou", "dice", "f1"}


def run(out: Path, task: str = "isic2017", model: str = "unet", epochs: int = 1, *more: str) -> dict:
    return train.main([f"--task={task}", f"--model={model}", f"--epochs={epochs}", f"--out={out}", *QUIET, *more])


def test_a_run_leaves_every_file(tmp_path):
    out = tmp_path / "run"
    facts = run(out, "lumbar_spine", "km_unet_pp_tiny", 2, '--model-args={"use_kan": false}')

    saved = json.loads((out / "metrics.json").read_text())
    assert saved | facts == saved
    assert facts["model_args"] == {"use_kan": False}
    assert facts["epochs"] == 2
    assert facts["images"] == {"train": 18, "val": 6, "test": 6}
    assert facts["subjects"] == {"train": 6, "val": 2, "test": 2}
    assert facts["split_sha256"] == split_hash(read_split(out / "split.json"))
    assert set(saved["metrics"]) == {"per_image", "pooled", "classes"}
    assert list(saved["metrics"]["classes"]) == ["L1", "L2", "L3", "L4", "L5"]
    assert set(saved["metrics"]["per_image"]) == set(saved["metrics"]["classes"]["L3"]["pooled"]) == SCORES
    assert saved["versions"]["torch"] == torch.__version__

    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for column in ("train/loss", "train/iou", "val/loss", "val/iou", "val/dice"):
        assert all(math.isfinite(float(row[column])) for row in rows)
    assert facts["metrics"]["per_image"]["dice"] == pytest.approx(max(float(row["val/dice"]) for row in rows))

    for picture in ("curves.png", "panel.png"):
        assert min(Image.open(out / picture).size) > 200
    assert (out / "checkpoints" / "best.ckpt").is_file()
    assert (out / "checkpoints" / "last.ckpt").is_file()
    assert any((out / "tensorboard").glob("events.out.tfevents.*"))
    assert train.build_parser().parse_path(out / "config.yaml").model_args == {"use_kan": False}

    network = from_pretrained(out / "model").eval()
    best = torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, best[f"network.{name}"]) for name, value in network.state_dict().items())


def test_a_config_file_repeats_a_run(tmp_path):
    first = run(tmp_path / "first", "isic2017", "unet", 1, "--ema-decay=null")
    config = tmp_path / "first" / "config.yaml"
    assert train.build_parser().parse_path(config).ema_decay is None
    again = train.main([f"--config={config}", f"--out={tmp_path / 'again'}"])
    assert again["metrics"] == first["metrics"]


def test_a_used_run_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: add --resume to continue that run, or give another --out"):
        run(tmp_path)


def test_resuming_with_other_settings_is_refused(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"seed is 5, but the run in .* was started with 0: resume with the same"):
        run(tmp_path / "run", "isic2017", "unet", 1, "--resume", "--seed=5")


def test_resuming_without_a_checkpoint_starts_afresh(tmp_path, capsys):
    first = run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    capsys.readouterr()
    again = run(tmp_path / "run", "isic2017", "unet", 1, "--resume")
    assert "resuming from" not in capsys.readouterr().out
    assert again["metrics"] == first["metrics"]


def test_early_stopping_and_no_further_epoch_when_resumed(tmp_path):
    flags = ["--patience=1", "--lr=1e-12"]
    first = run(tmp_path / "run", "isic2017", "unet", 9, *flags)
    assert first["epochs"] < 9
    again = run(tmp_path / "run", "isic2017", "unet", 9, *flags, "--resume")
    assert again.pop("command") == first.pop("command") + " --resume"
    assert again == first


@pytest.mark.parametrize(("steps", "more", "expected"), [(4, [], 6), (3, ["--trainer.accumulate_grad_batches=2"], 4)])
def test_steps_come_in_whole_epochs_and_the_learning_rate_falls_to_the_last(tmp_path, steps, more, expected):
    flags = ["--batch-size=6", f"--steps={steps}", "--resume", *more]  # an epoch has three batches
    facts = run(tmp_path, "isic2017", "unet", 99, *flags)
    assert (facts["steps"], facts["epochs"]) == (expected, 2)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    assert run(tmp_path, "isic2017", "unet", 99, *flags) == facts  # a finished run trains no further


def test_max_steps_of_the_trainer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps 5 would end within an epoch, .* use --steps 5"):
        run(tmp_path, "isic2017", "unet", 1, "--trainer.max_steps=5")


def test_bfloat16_and_worker_processes(tmp_path):
    facts = run(tmp_path / "run", "fetal_head", "unet_pp", 1, "--trainer.precision=bf16-mixed", "--num-workers=1")
    assert math.isfinite(facts["metrics"]["per_image"]["iou"])


def test_augmentation_does_not_depend_on_worker_processes(tmp_path):
    runs = [run(tmp_path / number, "isic2017", "unet", 1, f"--num-workers={number}") for number in "02"]
    assert runs[0]["metrics"] == runs[1]["metrics"]


def test_no_weight_decay_for_vectors_and_marked_parameters():
    module = Segmentation(get_task("isic2017"), build_network("km_unet_tiny", 3, 1))
    module._trainer = type("Trainer", (), {"estimated_stepping_batches": 40})()
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith(("A_logs", "Ds", "dt_projs_bias"))
        assert (id(parameter) in plain) == exempt
        assert (id(parameter) in decayed) != exempt
    assert [group["weight_decay"] > 0 for group in optimizer.param_groups] == [True, False]


def test_splines_and_scans_may_learn_at_a_pace_of_their_own():
    network = build_network("km_unet_tiny", 3, 1)
    module = Segmentation(get_task("isic2017"), network, lr=0.01, spline_lr=0.5, scan_lr=0.1)
    module._trainer = type("Trainer", (), {"estimated_stepping_batches": 40})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    expected = {
        "spline_weight": 0.005,
        "base_weight": 0.005,
        "A_logs": 0.001,
        "in_proj.weight": 0.001,
        "dwconv.weight": 0.01,
    }
    for ending, rate in expected.items():
        found = {rates[id(p)] for name, p in network.named_parameters() if name.endswith(ending)}
        assert sorted(found) == pytest.approx([rate]), ending
    assert len(rates) == len(list(network.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_sums_they_are_called(loss):
    module = Segmentation(get_task("isic2017"), build_network("unet", 3, 1), loss=loss)
    logits, mask = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 1, 8, 8)).float()
    p = logits.sigmoid()
    dice = (1 - 2 * (p * mask).sum((2, 3)) / (p + mask).sum((2, 3))).mean()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask)
    expected = {"dice": dice, "ce": entropy, "dice_ce": dice + entropy}[loss]
    assert module.loss(logits, mask).item() == pytest.approx(expected.item(), abs=1e-5)


def test_warm_up_may_be_left_out():
    module = Segmentation(get_task("isic2017"), build_network("unet", 3, 1), warmup=0)
    module._trainer = type("Trainer", (), {"estimated_stepping_batches": 40})()
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert schedule(0) == schedule(1) == 1
    assert schedule(40) == 0


def test_quickstart_compares_all_tasks(tmp_path, capsys):
    runs = quickstart.quickstart(out=tmp_path, models=["km_unet_tiny", "unet"], epochs=1, size=32, images=12)
    assert [(run["task"], run["model"]) for run in runs] == [
        (task, model) for task in ("isic2017", "fetal_head", "lumbar_spine") for model in ("km_unet_tiny", "unet")
    ]
    assert min(Image.open(tmp_path / "overview.png").size) > 300
    assert "validation, mean per image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "name"), [("isic2017", "isic2017"), ("fetal_head", "hc18"), ("lumbar_spine", "lumbar_spine")]
)
def test_real_images(shared, tmp_path, task, name):
    if not (shared / "data" / name).is_dir():
        pytest.skip(f"no real images at {shared / 'data' / name}")
    facts = run(tmp_path / "run", task, "unet", 1, f"--data-dir={shared / 'data' / name}")
    assert facts["data"] == name
    assert 0 <= facts["metrics"]["per_image"]["iou"] <= facts["metrics"]["per_image"]["dice"] <= 1
