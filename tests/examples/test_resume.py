"""A training that is interrupted and then killed, and each time resumed, equals an unbroken one bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FLAGS = [
    "--task=isic2017", "--model=km_unet_tiny", '--model-args={"drop_path": 0.2}', "--epochs=4", "--image-size=32",
    "--batch-size=6", "--limit=30", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip

# Ends the process right after a row of history.csv is written: that epoch's checkpoint is not there yet.
DRIVER = """
import os, signal, sys
import torch, train
from segmentation.callbacks import History
torch.set_num_threads(1)
epoch, sign, *argv = sys.argv[1:]
write = History.write
def write_and_stop(self):
    write(self)
    if len(self.rows) == int(epoch):
        os.kill(os.getpid(), int(sign))
History.write = write_and_stop
train.main(argv)
"""


def start(examples: Path, out: Path, *flags: str, stop_after: int = 0, by: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", DRIVER, str(stop_after), str(int(by)), f"--out={out}", *FLAGS, *flags]
    path = os.pathsep.join([str(examples), str(examples.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_resumed_equals_uninterrupted(examples, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert start(examples, unbroken).returncode == 0

    interrupted = start(examples, broken, stop_after=2, by=signal.SIGINT)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "Go on with:" in interrupted.stdout
    assert f"--out={broken}" in interrupted.stdout
    assert interrupted.stdout.rstrip().endswith("--resume")

    killed = start(examples, broken, "--resume", stop_after=3, by=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (broken / "metrics.json").exists()

    resumed = start(examples, broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {broken}" in resumed.stdout

    facts = [json.loads((out / "metrics.json").read_text()) for out in (unbroken, broken)]
    for fact in facts:
        del fact["seconds"], fact["commit"]  # of the clock, and of whoever commits meanwhile
    assert facts[0] == facts[1]
    for name in ("best", "last"):
        states = [torch.load(out / "checkpoints" / f"{name}.ckpt", weights_only=True) for out in (unbroken, broken)]
        weights = [state["state_dict"] for state in states]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    curves = [
        [line.rsplit(",", 1)[0] for line in (out / "history.csv").read_text().splitlines()]
        for out in (unbroken, broken)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 5
