"""Images need no SimpleITK; what does need it says so."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK

from data import layouts
from segmentation.data.datamodule import find_items
from segmentation.data.item import read_image
from segmentation.tasks import get_task

SCRIPT = """
import sys
sys.modules["SimpleITK"] = None
from pathlib import Path
from segmentation.data.datamodule import SegmentationData
data = SegmentationData("lumbar_spine", Path(sys.argv[1]), image_size=32)
for stage in ("fit", "test"):
    data.setup(stage)
print(len(data.train_set), [item.read()[1].shape for item in data.test_items])
"""


def test_a_folder_of_images_is_loaded_and_read(examples, folder):
    run = [sys.executable, "-c", SCRIPT, str(folder(number=15))]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": str(examples)}, check=True, capture_output=True)
    assert done.stdout.decode().strip() == f"9 {[(40, 33)] * 3}"


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
    with pytest.raises(ImportError, match="images with 16 bits per colour are read with SimpleITK"):
        read_image(path, 3)
