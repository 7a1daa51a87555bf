"""The lab's commands end to end, on the demo and on folders: files, the same scores by every way, refusals."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
import yaml
from PIL import Image

import lab
import quickstart
from kan_mamba_layers import from_pretrained
from segmentation.console import console, say, scores_table
from segmentation.data.datamodule import find_items
from segmentation.data.demo import draw
from segmentation.data.ellipse import head_circumference
from segmentation.data.item import to_classes
from segmentation.data.pixels import read_values
from segmentation.data.split import read_split, split_hash, write_split
from segmentation.module import Segmentation
from segmentation.networks import weights_folder
from segmentation.runs import flatten, read_config
from segmentation.scores import score_image
from segmentation.tasks import get_task

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL = ["--data.image_size=32", "--data.limit=30", "--trainer.max_epochs=1"]


def fit(run: Path, task: str = "isic2017", network: str = "unet", *more: str) -> dict:
    """What metrics.json says of a training."""
    lab.main(["fit", f"--run={run}", f"--data.task={task}", f"--model.network={network}", *SMALL, *QUIET, *more])
    return json.loads((run / "metrics.json").read_text())


def score(run: Path, *more: str) -> dict:
    return lab.main(["test", f"--run={run}", *QUIET, *more]).writer.scores


def predict(run: Path, out: Path, *inputs: object) -> lab.MaskWriter:
    return lab.main(["predict", f"--run={run}", f"--out={out}", *QUIET, *map(str, inputs)]).writer


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


def flat(printed: str) -> str:
    return printed.replace("\n", "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on the demo of the spine."""
    run = tmp_path_factory.mktemp("trained") / "spine"
    fit(run, "lumbar_spine", "km_unet_pp_tiny", "--model.model_args.use_kan=false", "--trainer.max_epochs=3")
    return run


@pytest.fixture(scope="module")
def skin(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("skin") / "run"
    fit(run)
    return run


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_fit_leaves_every_file(trained):
    facts = json.loads((trained / "metrics.json").read_text())
    assert facts["model_args"] == read_config(trained)["model"]["model_args"] == {"use_kan": False}
    assert (facts["epochs"], facts["steps"], facts["seed"]) == (3, 6, 0)
    assert facts["images"] == {"train": 18, "val": 6, "test": 6}
    assert facts["subjects"] == {"train": 6, "val": 2, "test": 2}
    assert facts["split_sha256"] == split_hash(read_split(trained / "split.json"))
    assert list(facts["metrics"]["classes"]) == ["L1", "L2", "L3", "L4", "L5"]
    assert torch.__version__.startswith(facts["versions"]["torch"])  # with what a build adds to it, or without
    rows = rows_of(trained / "history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for column in ("train/loss", "train/iou", "val/loss", "val/iou", "val/dice"):
        assert all(math.isfinite(float(row[column])) for row in rows)
    best = max(rows, key=lambda row: float(row["val/dice"]))
    assert facts["best_epoch"] == int(best["epoch"])
    for name in ("iou", "dice"):
        assert facts["metrics"]["per_image"][name]["mean"] == pytest.approx(float(best[f"val/{name}"]), abs=1e-6)
    assert all(min(Image.open(trained / picture).size) > 200 for picture in ("curves.png", "cases.png"))
    assert any((trained / "tensorboard").glob("events.out.tfevents.*"))
    weights = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    network = from_pretrained(trained / "model")
    assert all(torch.equal(value, weights[f"network.{name}"]) for name, value in network.state_dict().items())


def test_a_run_that_followed_a_split_is_scored_like_the_one_that_made_it(skin, tmp_path):
    fit(tmp_path / "run", "isic2017", "unet", f"--data.split={skin / 'split.json'}")
    assert score(tmp_path / "run")["side"] == "test"
    assert (tmp_path / "run" / "test" / "images.csv").is_file()


def test_fit_test_and_the_written_masks_agree(copied, capsys):
    """The demo's images are as large as the network's, so validation sees what a test sees."""
    scores = score(copied, "--data.side=val")
    facts = json.loads((copied / "metrics.json").read_text())
    # Validation keeps images in half precision, so a pixel of this hardly trained network may change its class: one of
    # the 6144 of all images, or one of a class with few.
    for part in ("iou", "dice", "f1"):
        assert scores["per_image"][part] == pytest.approx(facts["metrics"]["per_image"][part], abs=2e-4)
    assert flatten(scores["classes"]) == pytest.approx(flatten(facts["metrics"]["classes"]), abs=0.01)
    printed = capsys.readouterr().out
    for text in ("mean per image ± sd", "pooled over pixels", "HD95 (px)", "surface Dice (2 px)", "L5 Dice"):
        assert text in flat(printed), text
    assert json.loads((copied / "val" / "scores.json").read_text()) == scores
    assert (scores["data"], scores["side"], scores["checkpoint"], scores["images"]) == ("demo", "val", "best.ckpt", 6)
    task, table = get_task("lumbar_spine"), read_split(copied / "split.json")
    rows = rows_of(copied / "val" / "images.csv")
    assert [row["id"] for row in rows] == [name for name, row in table.items() if row["split"] == "val"]
    items = {item.id: item for item in lab.SegmentationData("lumbar_spine", image_size=32)._find()}
    for row in rows:
        path = copied / "val" / "masks" / f"{row['id']}.png"
        found = to_classes(read_values(path), task.labels, path)
        again = score_image(task, items[row["id"]], found, items[row["id"]].read()[1])
        for name, value in again.items():
            if isinstance(value, float):
                assert float(row[name]) == pytest.approx(value, abs=1e-6), name
    assert min(Image.open(copied / "val" / "cases.png").size) > 200


def test_sides_windows_and_checkpoints_have_folders_of_their_own(copied):
    scores = score(copied)
    assert score(copied, "--data.side=all", "--model.window=true")["images"] == 30
    assert (copied / "all-window" / "scores.json").is_file()
    shutil.copy(copied / "checkpoints" / "best.ckpt", copied / "checkpoints" / "last.ckpt")
    last = score(copied / "checkpoints" / "last.ckpt")
    assert last == {**scores, "checkpoint": "last.ckpt"}
    assert json.loads((copied / "test-last" / "scores.json").read_text()) == last
    with pytest.raises(ValueError, match="flips cannot be averaged for lumbar_spine"):
        score(copied, "--model.flips=true")
    best = copied / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": Segmentation("lumbar_spine", "unet").state_dict(), "epoch": 0}, best)
    with pytest.raises(ValueError, match=r"best\.ckpt' does not fit the network of .*km_unet_pp_tiny, {'use_kan': F"):
        score(copied)


def test_the_best_epoch_is_kept_wherever_the_run_is_resumed(tmp_path, folder, monkeypatch):
    """A training that gets worse from its second epoch on, moved, resumed and scored from another folder."""
    step = Segmentation.training_step
    monkeypatch.setattr(
        Segmentation, "training_step", lambda self, batch: step(self, batch) * (-1 if self.current_epoch else 1)
    )
    folder("fetal_head", number=15, size=(32, 32))
    monkeypatch.chdir(tmp_path)
    first = fit(Path("run"), "fetal_head", "unet", "--data.folder=data", "--model.lr=0.05", "--trainer.max_epochs=3")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = Path(shutil.move(tmp_path / "run", "moved"))
    lab.main(["fit", f"--run={moved}", "--resume", "--trainer.max_epochs=4"])
    again = json.loads((moved / "metrics.json").read_text())
    assert (first["best_epoch"], again["best_epoch"], again["epochs"]) == (1, 1, 4)
    assert again["metrics"] == first["metrics"]
    dice = [float(row["val/dice"]) for row in rows_of(moved / "history.csv")]
    assert first["metrics"]["per_image"]["dice"]["mean"] == pytest.approx(dice[0], abs=1e-6)
    assert max(dice[1:]) < dice[0] - 0.1
    scores = score(moved, "--data.side=val")
    assert scores["per_image"]["dice"] == pytest.approx(first["metrics"]["per_image"]["dice"], abs=1e-6)
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_ends(tmp_path):
    with pytest.raises(ValueError, match=r"/loss is nan in epoch 1, so this training has diverged: start again with a"):
        fit(tmp_path / "run", "isic2017", "unet", "--model.lr=1e18")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_training_that_could_not_begin_leaves_no_run_behind(tmp_path, copied):
    with pytest.raises(ValueError, match="weight_decay must be a finite number"):
        fit(tmp_path / "new", "isic2017", "unet", "--model.weight_decay=-1")
    assert not any((tmp_path / "new").iterdir())
    assert fit(tmp_path / "new", "isic2017", "unet")["steps"] > 0
    before = {
        path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    }
    with pytest.raises(ValueError, match="num_workers"):
        lab.main(["fit", f"--run={copied}", "--resume", "--data.num_workers=-1", "--trainer.max_epochs=4"])
    after = {path: path.read_bytes() for path in before if path.name != "config.yaml"}
    assert after.items() <= before.items() and (copied / "config.yaml").is_file()


def test_a_config_file_repeats_a_run(skin, tmp_path):
    """With any number of workers and any logger, but with another seed."""
    config, first = [f"--config={skin / 'config.yaml'}", *QUIET], json.loads((skin / "metrics.json").read_text())
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    lab.main(["fit", *config, f"--run={tmp_path / 'again'}", "--data.num_workers=2", *logger])
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["metrics"] == first["metrics"]
    (metrics,) = (tmp_path / "log").rglob("metrics.csv")
    rates = [float(row["lr"]) for row in rows_of(metrics) if row["lr"]]
    assert rates == pytest.approx([0.004] * again["steps"])
    lab.main(["fit", *config, f"--run={tmp_path / 'other'}", "--seed_everything=3", "--trainer.logger=false"])
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["metrics"] != first["metrics"]
    assert any(skin.rglob("events.out.*")) and not list(tmp_path.rglob("events.out.*"))


def test_what_a_resumed_run_may_change(copied, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: add --resume to continue that run, or give another --run"):
        fit(tmp_path)
    with pytest.raises(ValueError, match=r"model\.lr is 0\.1, but the run in .* was started with 0\.004: resume with"):
        lab.main(["fit", f"--run={copied}", "--resume", "--model.lr=0.1"])
    with pytest.raises(ValueError, match=r"model\.model_args\.use_ema is False, but the run in .* with None"):
        lab.main(["fit", f"--run={copied}", "--resume", "--model.model_args.use_ema=false"])
    shutil.rmtree(copied / "checkpoints")
    before = json.loads((copied / "metrics.json").read_text())
    capsys.readouterr()
    lab.main(["fit", f"--run={copied}", "--resume"])
    assert "resuming from" not in capsys.readouterr().out  # but started afresh
    again = json.loads((copied / "metrics.json").read_text())
    for name in ("metrics", "split_sha256", "epochs"):
        assert again[name] == before[name]
    score(copied)
    lab.main(["fit", f"--run={copied}", "--resume", "--trainer.max_epochs=5", "--model.lr=0.004"])
    facts = json.loads((copied / "metrics.json").read_text())
    assert facts["epochs"] == 5
    scored = json.loads((copied / "test" / "scores.json").read_text())["epoch"]
    assert (scored, facts["best_epoch"]) == (before["best_epoch"], score(copied)["epoch"])


@pytest.fixture
def other_split(copied, tmp_path) -> Path:
    """The split of the run with a subject of the validation and one of the test in each other's place."""
    table = read_split(copied / "split.json")
    groups = {side: next(row["group"] for row in table.values() if row["split"] == side) for side in ("val", "test")}
    turned = {groups["val"]: "test", groups["test"]: "val"}
    path = tmp_path / "other.json"
    write_split(path, {key: row | {"split": turned.get(row["group"], row["split"])} for key, row in table.items()})
    return path


def test_no_subject_moves_to_another_side_when_a_run_is_resumed(copied, other_split, tmp_path):
    with pytest.raises(ValueError, match=r"other\.json' is not the split that the run was started with: give --data"):
        lab.main(["fit", f"--run={copied}", "--resume", f"--data.split={other_split}", "--trainer.max_epochs=4"])
    same = tmp_path / "same.json"
    shutil.copy(copied / "split.json", same)
    for split in (same, tmp_path / "gone.json"):
        lab.main(["fit", f"--run={copied}", "--resume", f"--data.split={split}"])
    assert read_split(copied / "split.json") == read_split(same)


def test_a_test_by_another_split_scores_no_image_of_the_training(copied, other_split):
    with pytest.raises(ValueError, match=r"3 of 6 images, such as .*trained or validated on: add --data\.split "):
        score(copied, f"--data.split={other_split}")
    assert score(copied, f"--data.split={copied / 'split.json'}", "--data.side=val")["images"] == 6


def test_early_stopping_and_no_further_epoch_when_resumed(tmp_path):
    flags = ["--trainer.callbacks=segmentation.callbacks.Patience", "--trainer.callbacks.epochs=1", "--model.lr=1e-12"]
    first = fit(tmp_path / "run", "isic2017", "unet", *flags, "--trainer.max_epochs=9")
    assert first["epochs"] < 9
    lab.main(["fit", f"--run={tmp_path / 'run'}", "--resume"])
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {**again, "command": ""} == {**first, "command": ""}
    longer = ["--trainer.callbacks=segmentation.callbacks.Patience", "--trainer.callbacks.epochs=2"]
    lab.main(["fit", f"--run={tmp_path / 'run'}", "--resume", *longer, "--trainer.max_epochs=9"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == first["epochs"] + 1


@pytest.mark.parametrize(("steps", "more", "expected"), [(4, [], 6), (3, ["--trainer.accumulate_grad_batches=2"], 4)])
def test_steps_come_in_whole_epochs_and_the_learning_rate_falls_to_the_last(tmp_path, steps, more, expected):
    facts = fit(tmp_path, "isic2017", "unet", "--data.batch_size=6", f"--trainer.max_steps={steps}", *more)
    assert (facts["steps"], facts["epochs"]) == (expected, 2)  # an epoch has three batches
    first, second = (float(row["lr"]) for row in rows_of(tmp_path / "history.csv"))
    assert first > second > 0
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)


def test_what_would_skip_validations_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.limit_val_batches 3.* would skip validations: leave it out"):
        fit(tmp_path, "isic2017", "unet", "--trainer.limit_val_batches=3")


def test_images_of_ones_own(tmp_path, folder, capsys):
    """Train, score, find damaged and changed files, and score other folders, moved, enlarged or unknown."""
    data, run = folder("fetal_head", number=15, size=(40, 56)), tmp_path / "run"
    facts = fit(
        run, "fetal_head", "unet", f"--data.folder={data}", "--data.val_fraction=0.2", "--data.test_fraction=0.4"
    )
    assert (facts["data"], facts["images"]) == ("data", {"train": 6, "val": 3, "test": 6})
    scores = score(run, "--model.flips=true")
    assert (scores["images"], scores["unreadable"], scores["options"]) == (6, 0, ["flips"])
    moved, enlarged = (Path(shutil.copytree(data, tmp_path / name)) for name in ("moved", "enlarged"))
    for path in enlarged.glob("*/*.png"):
        Image.open(path).resize((60, 70), Image.Resampling.NEAREST).save(path)

    table = read_split(run / "split.json")
    first, second, *others = [
        one for one in find_items(get_task("fetal_head"), data) if table[one.id]["split"] == "test"
    ]
    first.files[0].write_bytes(first.files[0].read_bytes()[:-60])
    image = Image.open(second.files[0])
    image.putpixel((0, 0), 255 - image.getpixel((0, 0)))
    image.save(second.files[0])
    capsys.readouterr()
    scores = score(run)
    assert (scores["images"], scores["unreadable"]) == (len(others), 2)
    printed = flat(capsys.readouterr().out)
    assert f"left out: {first.id}: {first.files[0]} cannot be read as an image" in printed
    assert f"left out: {second.id}: image or mask of {second.id!r} changed since the split was written" in printed

    with pytest.raises(
        ValueError, match=r"9 of 15 images, such as .* trained or validated on: add --data\.split .*split"
    ):
        score(run, f"--data.folder={moved}")
    assert score(run, f"--data.folder={moved}", f"--data.split={run / 'split.json'}")["images"] == 6
    scores = score(run, f"--data.folder={enlarged}")
    assert (scores["images"], scores["side"], scores["split_sha256"]) == (15, "all", None)
    assert (run / "enlarged-all" / "images.csv").is_file()
    assert "9 of 15 images, such as" in flat(capsys.readouterr().out)  # by their names
    with pytest.raises(ValueError, match=r"data\.side 'test' holds no image: choose another"):
        score(run, f"--data.folder={enlarged}", "--data.side=test")


def test_a_run_of_one_fold_scores_all_images_of_another_folder(skin, tmp_path):
    """Whose sides are its own: the fold of the training is none of theirs."""
    run = Path(shutil.copytree(skin, tmp_path / "run"))
    config = read_config(run)
    config["data"] |= {"fold": 1, "test_fraction": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for number, side in enumerate(("train", "val", "test")):
        image, mask = draw("isic2017", 0, number, (40, 33))
        for kind, picture in (("images", image), ("masks", Image.fromarray(mask * 255))):
            (tmp_path / "other" / side / kind).mkdir(parents=True)
            picture.save(tmp_path / "other" / side / kind / f"{number}.png")
    scores = score(run, f"--data.folder={tmp_path / 'other'}")
    assert (scores["side"], scores["images"]) == ("all", 3)


def test_a_folder_of_odd_images_with_a_broken_one(skin, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    draw("isic2017", 0, 0, (61, 47))[0].save(images / "colour.jpg")
    draw("fetal_head", 0, 0, (40, 33))[0].save(images / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 4000, (35, 51)).astype(np.uint16)).save(images / "deep.png")
    (images / "broken.png").write_bytes(b"nothing")
    found = predict(skin, out, images)
    assert [row["file"] for row in found.rows] == ["colour.jpg", "deep.png", "grey.png"]
    assert "broken.png cannot be read as an image" in found.unreadable[0]["reason"]
    assert "3 of 4 files predicted" in capsys.readouterr().out
    for name, size in (("colour", (47, 61)), ("grey", (33, 40)), ("deep", (51, 35))):
        mask = Image.open(out / f"{name}.png")
        assert (mask.mode, mask.size) == ("L", size)
        assert set(np.unique(mask)) <= {0, 255}
        assert Image.open(out / f"{name}-overlay.png").size == size
    rows = {row["file"]: int(row["foreground"]) for row in rows_of(out / "predictions.csv")}
    assert rows["grey.png"] == (np.asarray(Image.open(out / "grey.png")) > 0).sum()
    with pytest.raises(FileExistsError, match="is not empty: add --overwrite"):
        predict(skin, out, images)
    assert predict(skin, out, "--overwrite", "--model.flips=true", "--model.window=true", images).rows


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (["a.png"], "images", "out '.*images' holds the input '.*a.png', which stays as it is"),
        (["a.png"], ".", "holds the input"),
        (["a.png"], "link", "holds the input"),
        (["x.png", "x-overlay.png"], "out", "x-overlay.png and .*x.png would both be written as 'x-overlay.png'"),
        (["a.png", "a.jpg"], "out", "would both be written as 'a"),
        (["a.png"], "images/a.png", "is a file: give a folder"),
    ],
)
def test_no_input_and_no_mask_is_written_over(skin, tmp_path, names, out, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for name in names:
        draw("isic2017", 0, 0, (40, 40))[0].save(tmp_path / "images" / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("images/*")}
    with pytest.raises((ValueError, FileExistsError), match=message):
        predict(skin, tmp_path / out, "--overwrite", tmp_path / "images")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert not (tmp_path / "out").exists()


def test_no_test_writes_over_other_files(skin, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_text("mine")
    for out in (tmp_path, skin, skin / "checkpoints"):
        with pytest.raises(FileExistsError, match=r"holds files that are no scores of 'run': give another"):
            score(skin, f"--out={out}")
    again = [score(skin, f"--out={tmp_path / 'new'}") for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(FileExistsError, match=r"is a run, whose curves\.png must stay: give another folder"):
        lab.main(["compare", str(skin), f"--out={skin}"])


def test_head_circumferences_are_those_of_the_written_masks(tmp_path):
    """Also of a network that was trained in bfloat16, with a process that reads."""
    facts = fit(tmp_path / "run", "fetal_head", "unet_pp", "--trainer.precision=bf16-mixed", "--data.num_workers=1")
    assert math.isfinite(facts["metrics"]["per_image"]["iou"]["mean"])
    images = [tmp_path / f"{index}_HC.png" for index in range(2)]
    for index, path in enumerate(images):
        draw("fetal_head", 0, index, (54, 80))[0].save(path)
    table = tmp_path / "sizes.csv"
    table.write_text("filename,pixel size(mm) \n0_HC.png,0.5\n")
    found = predict(tmp_path / "run", tmp_path / "out", f"--pixel_size_csv={table}", *images)
    mask = np.asarray(Image.open(tmp_path / "out" / "0_HC.png")) > 0
    assert [row["hc_mm"] for row in found.rows] == [head_circumference(mask, (0.5, 0.5)), None]


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, -1, 1, 0, 0, 0, -1, 0)])
def test_volumes_keep_their_geometry(trained, tmp_path, direction):
    volume = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 900, (5, 40, 36)).astype(np.int16))
    volume.SetSpacing((0.8, 0.9, 4.0))
    volume.SetOrigin((3.0, -2.0, 7.0))
    volume.SetDirection(direction)
    SimpleITK.WriteImage(volume, str(tmp_path / "volume.mha"))
    (row,) = predict(trained, tmp_path / "out", tmp_path / "volume.mha").rows
    labels = SimpleITK.ReadImage(str(tmp_path / "out" / "volume.mha"))
    for name in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(labels, f"Get{name}")() == pytest.approx(getattr(volume, f"Get{name}")())
    values = SimpleITK.GetArrayFromImage(labels)
    assert (values > 0).sum() == row["foreground"]
    assert values.max() <= 5


def test_volumes_with_silent_headers_are_laid_as_those_of_the_training(copied, tmp_path, capsys):
    volume = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 900, (3, 40, 36)).astype(np.int16))
    SimpleITK.WriteImage(volume, str(tmp_path / "volume.mha"))
    with pytest.raises(SystemExit, match="1"):
        predict(copied, tmp_path / "out", tmp_path / "volume.mha")
    assert "volume.mha does not say how it lies" in flat(capsys.readouterr().out)
    path = copied / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["SegmentationData"] == {"cuts": [], "channel_files": 1}
    torch.save(content | {"SegmentationData": {"cuts": [["", "as stored"]]}}, path)
    assert predict(copied, tmp_path / "out", tmp_path / "volume.mha").rows


@pytest.mark.parametrize("silent", [False, True])
def test_a_volume_is_cut_as_it_is_stored_where_the_training_saw_pictures(silent, skin, tmp_path, capsys):
    """Slices along the last axis give the masks of the same pictures, whatever the direction of the volume is."""
    planes = np.random.default_rng(0).integers(0, 255, (3, 40, 36)).astype(np.uint8)
    volume = SimpleITK.GetImageFromArray(planes)
    volume.SetSpacing((1.0, 1.0, 5.0))
    volume.SetOrigin((0.0 if silent else 3.0, 0.0, 0.0))
    SimpleITK.WriteImage(volume, str(tmp_path / "volume.mha"))
    for k, plane in enumerate(planes):
        Image.fromarray(plane).save(tmp_path / f"{k}.png")
    predict(skin, tmp_path / "out", tmp_path / "volume.mha", *(tmp_path / f"{k}.png" for k in range(3)))
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out" / "volume.mha")))
    masks = [np.asarray(Image.open(tmp_path / "out" / f"{k}.png")) for k in range(3)]
    assert np.array_equal(found, np.stack(masks) // 255)
    assert ("taken as stored, for no header says how they lie: volume.mha" in flat(capsys.readouterr().out)) == silent


def test_a_name_that_no_table_can_hold_is_refused_before_anything_is_predicted(skin, tmp_path):
    path = os.fsencode(tmp_path / "in") + b"/caf\xe9.png"
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(path)).write_bytes((skin / "cases.png").read_bytes())
    with pytest.raises(ValueError, match=r"input .*caf.* has a name that is no UTF-8, which no table can hold: rename"):
        predict(skin, tmp_path / "out", tmp_path / "in")


def test_channels_in_files_of_their_own_are_predicted_together(skin, tmp_path):
    run, colours, channels = Path(shutil.copytree(skin, tmp_path / "run")), tmp_path / "colours", tmp_path / "channels"
    path = run / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"SegmentationData": {"cuts": [], "channel_files": 3}}, path)
    for number in (0, 1):
        image, _ = draw("isic2017", 5, number, (60, 47))
        for folder in (colours, channels):
            folder.mkdir(exist_ok=True)
        image.save(colours / f"a.{number}.png")
        for k, channel in enumerate(image.split()):
            channel.save(channels / f"a.{number}_000{k}.png")
    predict(skin, tmp_path / "of_colours", colours)
    found = predict(run, tmp_path / "of_channels", channels, *sorted(channels.iterdir())[::-1])
    assert [row["file"] for row in found.rows] == ["a.0_0000.png", "a.1_0000.png"]
    for name in ("a.0.png", "a.1.png", "a.0-overlay.png"):
        masks = (Image.open(tmp_path / out / name) for out in ("of_colours", "of_channels"))
        assert np.array_equal(*map(np.asarray, masks)), name
    assert {path.name for path in (tmp_path / "of_channels").iterdir()} == {
        path.name for path in (tmp_path / "of_colours").iterdir()
    }
    assert len(predict(run, tmp_path / "whole", colours).rows) == 2  # one file that holds all channels
    (channels / "a.1_0001.png").unlink()
    with pytest.raises(ValueError, match=r"a\.1 has the channel\(s\) a\.1_0000\.png, a\.1_0002\.png: give 3 "):
        predict(run, tmp_path / "out", channels)
    Image.new("L", (60, 47)).save(channels / "a.0_0002.png")
    Image.new("L", (47, 60)).save(channels / "a.0_0001.png")
    Image.new("L", (60, 47)).save(tmp_path / "grey.png")
    unreadable = predict(
        run, tmp_path / "mixed", tmp_path / "grey.png", *channels.glob("a.0*"), colours / "a.1.png"
    ).unreadable
    reasons = sorted(entry["reason"] for entry in unreadable)
    assert len(reasons) == 2 and "a.0_0002.png is 60x47 but its image" in reasons[0]
    assert "grey.png is grey, but images of the training had 3 channels" in reasons[1]


def test_a_prediction_or_test_that_is_interrupted_says_what_is_done(skin, tmp_path, monkeypatch, capsys):
    handler, classes_of, calls = signal.getsignal(signal.SIGINT), Segmentation.classes_of, []

    def interrupted(self: Segmentation, image: np.ndarray) -> np.ndarray:
        calls.append(image)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return classes_of(self, image)

    monkeypatch.setattr(Segmentation, "classes_of", interrupted)
    for number in range(4):
        draw("isic2017", 5, number, (60, 47))[0].save(tmp_path / f"{number}.png")
    try:
        with pytest.raises(SystemExit, match="130"):
            predict(skin, tmp_path / "out", *(tmp_path / f"{number}.png" for number in range(4)))
        assert flat(capsys.readouterr().out).endswith(f"Interrupted. What was predicted is in {tmp_path / 'out'}")
        assert [row["file"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["0.png", "1.png"]
        calls.clear()
        with pytest.raises(SystemExit, match="130"):
            score(skin, f"--out={tmp_path / 'scores'}")
        assert f"Nothing was scored: remove {tmp_path / 'scores'} before it is --out" in flat(capsys.readouterr().out)
        assert {path.name for path in (tmp_path / "scores").iterdir()} == {"masks"}
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on


def test_nothing_readable_and_wrong_calls(skin, tmp_path, capsys):
    broken = tmp_path / "broken.mha"
    broken.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="1"):
        predict(skin, tmp_path / "out", broken)
    assert "skipped: " in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist: give an image"):
        predict(skin, tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pixel sizes measure heads"):
        predict(skin, tmp_path / "out2", f"--pixel_size_csv={broken}", broken)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Lightning, shown in tests alone
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("fit --data.task=isic2017 --data.folder=nowhere", r"data\.folder '/.*nowhere' is not a folder"),
        ("fit --data.task=isic2017 --data.split=nowhere", r"data\.split '/.*nowhere' cannot be read"),
        ("fit --data.task=isic", "isic' is unknown"),
        ("fit --data.task=isic2017 --model.lr=much", "model.lr"),
        ("fit --data.task=isic2017 --model.network=unit", "did you mean unet"),
        ("fit --data.task=isic2017 --model.network=unet --model.model_args.depth=3", r"model_args .*do not fit 'unet'"),
        ("fit --data.task=isic2017 --trainer.max_epochs=0", "max_epochs 0 must be at least 1"),
        ("fit --data.task=isic2017 --trainer.max_epochs=-1", "max_epochs -1 must be at least 1"),
        ("fit --data.task=isic2017 --trainer.precision=bf16-true", "precision bf16-true is not supported: use"),
        ("fit --data.task=isic2017 --trainer.devices=99 --trainer.accelerator=cuda", "CUDA"),
        ("fit --data.task=isic2017 --config=wrong.yaml", "batchsize"),
        ("fit --data.task=isic2017 --run=wrong.yaml", r"run 'wrong\.yaml' is a file: give a folder"),
        ("fit --data.task=isic2017 --run=wrong.yaml/deep --data.limit=12 --data.image_size=32", "Not a directory"),
        ("fit --data.task=isic2017 --run=full --resume", r"'full' has no config\.yaml"),
        ("test --run=nowhere", r"'nowhere' has no config\.yaml"),
        ("test", "run"),
        ("predict --run=full --out=out a.png", r"has no config\.yaml"),
        ("compare nowhere --out=out", "holds no run"),
        ("compare", "runs"),
        ("train", "command 'train' is unknown: use fit, test, predict, compare"),
    ],
)
def test_a_wrong_call_ends_with_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "wrong.yaml").write_text("data: {batchsize: 3}")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    verb, *flags = arguments.split()
    monkeypatch.setattr("sys.argv", ["lab.py", verb, *QUIET * (verb == "fit"), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(lab.__file__, run_name="__main__")
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{reason}.*\n", printed.err) and not printed.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("script", "flags", "reason"),
    [
        ("quickstart", ["--networks", '["unett"]'], r"model 'unett' is unknown"),
        (
            "few_images",
            ["--folder", "nowhere", "--split", "nothing.json"],
            r"data\.split 'nothing\.json' cannot be read",
        ),
    ],
)
def test_other_scripts_end_with_one_line_too(tmp_path, monkeypatch, capsys, examples, script, flags, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(examples / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: {reason}.*\n", printed.err) and not printed.out
    assert not (tmp_path / "runs").exists()


def test_brackets_and_colons_are_printed_as_they_are(capsys):
    say("runs/[unet]/:x: [/]")
    per_image = {"dice": {"mean": 0.5, "sd": None}}
    console.print(scores_table("[unet]:x:", {"per_image": per_image, "pooled": {}, "empty": {"predictions": 0}}))
    printed = capsys.readouterr().out
    assert "runs/[unet]/:x: [/]" in printed and "[unet]:x:" in printed.partition("\n")[2]


def test_help_names_every_command(capsys):
    lab.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"lab.py {verb} " in printed for verb in ("fit", "test", "predict", "compare"))


def test_quickstart_compares_all_tasks(tmp_path, capsys):
    found = quickstart.quickstart(out=tmp_path, networks=("km_unet_tiny", "unet"), epochs=1, size=32, images=12)
    tasks = ("isic2017", "fetal_head", "lumbar_spine")
    assert [(s["task"], s["network"]) for s in found] == [(t, n) for t in tasks for n in ("km_unet_tiny", "unet")]
    assert min(Image.open(tmp_path / "overview.png").size) > 300
    assert "test subjects, mean per image" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("task", "name"), [("isic2017", "isic2017"), ("fetal_head", "hc18"), ("lumbar_spine", "lumbar_spine")]
)
def test_real_images(shared, tmp_path, task, name):
    if not (shared / "data" / name).is_dir():
        pytest.skip(f"no real images at {shared / 'data' / name}")
    facts = fit(tmp_path / "run", task, "unet", f"--data.folder={shared / 'data' / name}")
    assert facts["data"] == name
    assert 0 <= facts["metrics"]["per_image"]["iou"]["mean"] <= facts["metrics"]["per_image"]["dice"]["mean"] <= 1


def test_weights_of_the_library_predict_files_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    draw("fetal_head", 0, 0, (61, 83))[0].save(images / "grey.png")
    draw("isic2017", 0, 0, (97, 40))[0].save(images / "portrait.jpg")
    deep = np.asarray(draw("fetal_head", 0, 1, (50, 70))[0]).astype(np.uint16) * 200
    Image.fromarray(deep).save(images / "deep.png")
    command = ["predict", "--pretrained=fetal_head", *QUIET, str(images)]
    millimetres = lab.main([*command, "--pixel_size=0.2", "--out=out"]).writer.rows
    assert [row["file"] for row in millimetres] == ["deep.png", "grey.png", "portrait.jpg"]
    pixels = lab.main(command).writer.rows
    for row, again, size in zip(millimetres, pixels, ((70, 50), (83, 61), (40, 97)), strict=True):
        name = Path(row["file"]).stem
        mask = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert mask.shape == size[::-1] and Image.open(tmp_path / "out" / f"{name}-overlay.png").size == size
        assert np.array_equal(mask, np.asarray(Image.open(tmp_path / "predictions" / f"{name}.png")))
        assert row["hc_mm"] == (again["hc_pixels"] and pytest.approx(0.2 * again["hc_pixels"]))
        assert row["hc_mm"] == pytest.approx(head_circumference(mask, (0.2, 0.2)))
    assert any(row["hc_mm"] for row in millimetres)


def test_weights_of_the_library_keep_the_grid_of_a_volume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    volume = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 900, (40, 33, 5)).astype(np.int16))
    volume.SetSpacing((4.0, 0.9, 0.8))
    volume.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
    SimpleITK.WriteImage(volume, "spine.mha")
    lab.main(["predict", "--pretrained=lumbar_spine", *QUIET, "spine.mha"])
    assert "taken as stored" not in capsys.readouterr().out
    labels = SimpleITK.ReadImage("predictions/spine.mha")
    assert labels.GetSize() == volume.GetSize() and labels.GetSpacing() == pytest.approx(volume.GetSpacing())
    assert labels.GetDirection() == pytest.approx(volume.GetDirection())
    silent = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 900, (3, 40, 36)).astype(np.int16))
    SimpleITK.WriteImage(silent, "silent.mha")
    lab.main(["predict", "--pretrained=lumbar_spine", *QUIET, "--overwrite", "silent.mha"])
    assert "taken as stored, for no header says how they lie: silent.mha" in flat(capsys.readouterr().out)
    assert SimpleITK.ReadImage("predictions/silent.mha").GetSize() == (36, 40, 3)


def test_weights_of_the_library_are_scored_on_other_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = lab.main(["test", "--pretrained=lumbar_spine", "--data.limit=6", *QUIET]).writer.scores
    assert (scores["network"], scores["run"], scores["side"]) == ("km_unet_pp_tiny", "lumbar_spine", "all")
    assert (scores["checkpoint"], scores["epoch"], scores["image_size"]) == (None, None, 128)
    assert (tmp_path / "runs" / "lumbar_spine" / "all" / "images.csv").is_file()


def test_a_training_may_begin_with_weights_of_the_library(tmp_path):
    run = tmp_path / "run"
    assert fit(run, "fetal_head", "km_unet_pp_tiny", "--model.pretrained=fetal_head", "--model.lr=0")["epochs"] == 1
    kept = dict(from_pretrained(run / "model").named_parameters())
    weights = from_pretrained(weights_folder("fetal_head")).named_parameters()
    assert all(torch.equal(kept[name], value) for name, value in weights)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pretrained=head"], "pretrained 'head' is none of the weights: choose breast_lesion, fetal_head"),
        ([], "give either the folder of a run with --run, or the name of weights with --pretrained"),
        (["--pretrained=fetal_head", "--run=x"], "give either the folder of a run"),
        (["--pretrained=skin_lesion", "--pixel_size=1"], "pixel sizes measure heads, but .* is of isic2017"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        lab.main(["predict", *flags, *QUIET, "image.png"])
    assert not list(tmp_path.iterdir())
