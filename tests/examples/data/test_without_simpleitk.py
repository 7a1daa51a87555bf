"""Images need no SimpleITK; what does need it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK

from data import layouts
from segmentation.data.formats import find_items
from segmentation.data.item import read_image
from segmentation.tasks import get_task

SCRIPT = """
import json, sys
sys.modules["SimpleITK"] = None
import evaluate, predict, train
for script, flags in ((train, json.loads(sys.argv[1])), (evaluate, json.loads(sys.argv[2]))):
    script.main(flags)
"""


def test_a_folder_of_images_is_trained_on_and_scored(examples, folder, tmp_path):
    out = tmp_path / "run"
    train = ["--task=lumbar_spine", "--model=unet", "--epochs=1", "--image-size=32", f"--data-dir={folder(number=15)}"]
    train += [f"--out={out}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    paths = os.pathsep.join([str(examples), str(examples.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(train), json.dumps([f"--run={out}"])],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    assert (out / "evaluation-test" / "scores.json").is_file()


@pytest.mark.parametrize("layout", ["spider", "nnunet_volumes"])
def test_volumes_name_what_is_missing(monkeypatch, tmp_path, layout):
    task, write = layouts.LAYOUTS[layout]
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match="SimpleITK, which is not installed: python -m pip install SimpleITK"):
        find_items(get_task(task), tmp_path)


def test_deep_colours_name_what_is_missing(monkeypatch, tmp_path):
    path = tmp_path / "deep.png"
    pixels = np.zeros((4, 5, 3), np.uint16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=True), str(path))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match="images with 16 bits a colour are read with SimpleITK"):
        read_image(path, 3)
