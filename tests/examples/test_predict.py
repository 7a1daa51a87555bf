"""Prediction of files, folders and volumes: sizes and geometry are kept, millimetres measured, broken files named."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
import yaml
from PIL import Image

import predict
from segmentation.data.demo import draw
from segmentation.data.ellipse import head_circumference
from segmentation.networks import build_network
from segmentation.tasks import get_task


def make_run(folder: Path, name: str) -> Path:
    """A run folder with fresh weights."""
    task = get_task(name)
    torch.manual_seed(0)
    network = build_network("unet", task.in_channels, task.num_classes)
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 0}, folder / "checkpoints" / "best.ckpt")
    settings = {"task": name, "model": "unet", "model_args": {}, "image_size": 32, "data_dir": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(tmp_path: Path, name: str, *inputs: Path, more: tuple[str, ...] = ()) -> dict:
    folder = tmp_path / "run"
    if not folder.exists():
        make_run(folder, name)
    return predict.main([f"--run={folder}", f"--out={tmp_path / 'out'}", *more, *map(str, inputs)])


def test_a_folder_of_odd_images_with_a_broken_one(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    draw("isic2017", 0, 0, (61, 47))[0].save(images / "colour.jpg")
    draw("fetal_head", 0, 0, (40, 33))[0].save(images / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 4000, (35, 51)).astype(np.uint16)).save(images / "deep.png")
    (images / "broken.png").write_bytes(b"nothing")
    result = run(tmp_path, "isic2017", images)
    assert [row["file"] for row in result["rows"]] == ["colour.jpg", "deep.png", "grey.png"]
    assert "broken.png cannot be read as an image" in result["unreadable"][0]["reason"]
    assert "3 of 4 files predicted" in capsys.readouterr().out
    for name, size in (("colour", (47, 61)), ("grey", (33, 40)), ("deep", (51, 35))):
        mask = Image.open(tmp_path / "out" / f"{name}.png")
        assert (mask.mode, mask.size) == ("L", size)
        assert set(np.unique(mask)) <= {0, 255}
        assert Image.open(tmp_path / "out" / f"{name}-overlay.png").size == size
    rows = {
        row["file"]: int(row["foreground"]) for row in csv.DictReader((tmp_path / "out" / "predictions.csv").open())
    }
    assert rows["grey.png"] == (np.asarray(Image.open(tmp_path / "out" / "grey.png")) > 0).sum()
    with pytest.raises(FileExistsError, match="is not empty: add --overwrite"):
        run(tmp_path, "isic2017", images)
    assert run(tmp_path, "isic2017", images, more=("--overwrite", "--flips", "--window"))["rows"]


def test_head_circumferences_are_those_of_the_written_masks(tmp_path):
    for index in range(2):
        draw("fetal_head", 0, index, (54, 80))[0].save(tmp_path / f"{index}_HC.png")
    table = tmp_path / "sizes.csv"
    table.write_text("filename,pixel size(mm) \n0_HC.png,0.5\n")
    result = run(
        tmp_path, "fetal_head", tmp_path / "0_HC.png", tmp_path / "1_HC.png", more=(f"--pixel-size-csv={table}",)
    )
    mask = np.asarray(Image.open(tmp_path / "out" / "0_HC.png")) > 0
    assert result["rows"][0]["hc_mm"] == head_circumference(mask, (0.5, 0.5))
    assert result["rows"][1]["hc_mm"] is None


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, -1, 1, 0, 0, 0, -1, 0)])
def test_volumes_keep_their_geometry(tmp_path, direction):
    volume = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 900, (5, 40, 36)).astype(np.int16))
    volume.SetSpacing((0.8, 0.9, 4.0))
    volume.SetOrigin((3.0, -2.0, 7.0))
    volume.SetDirection(direction)
    SimpleITK.WriteImage(volume, str(tmp_path / "volume.mha"))
    result = run(tmp_path, "lumbar_spine", tmp_path / "volume.mha")
    labels = SimpleITK.ReadImage(str(tmp_path / "out" / "volume.mha"))
    for name in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(labels, f"Get{name}")() == pytest.approx(getattr(volume, f"Get{name}")())
    values = SimpleITK.GetArrayFromImage(labels)
    assert (values > 0).sum() == result["rows"][0]["foreground"] > 0
    assert values.max() <= 5


def test_nothing_readable_and_wrong_calls(tmp_path):
    broken = tmp_path / "broken.mha"
    broken.write_bytes(b"nothing")
    result = run(tmp_path, "isic2017", broken)
    assert not result["rows"]
    assert "broken.mha" in result["unreadable"][0]["reason"]
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist: give an image"):
        run(tmp_path, "isic2017", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*empty"):
        run(tmp_path, "isic2017", tmp_path / "empty")
    for name in ("one.png", "one.jpg"):
        draw("isic2017", 0, 0, (32, 32))[0].save(tmp_path / name)
    with pytest.raises(ValueError, match=r"would both be written as 'one': rename one"):
        run(tmp_path, "isic2017", tmp_path / "one.png", tmp_path / "one.jpg")
    with pytest.raises(ValueError, match="pixel-size-csv measures heads"):
        run(tmp_path, "isic2017", tmp_path / "one.png", more=(f"--pixel-size-csv={broken}",))
