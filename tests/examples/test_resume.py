"""A training that is stopped or killed, and resumed, equals an unbroken one bit for bit; damaged files are named."""

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
    "--data.task=isic2017", "--model.network=km_unet_tiny", "--model.model_args={drop_path: 0.2}",
    "--trainer.max_epochs=4", "--data.image_size=32", "--data.batch_size=6", "--data.limit=30",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip

# Ends the process right after a row of history.csv is written: that epoch's checkpoint is not there yet.
DRIVER = """
import os, signal, sys
import lab, torch
from segmentation.callbacks import History
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
epoch, sign, *argv = sys.argv[1:]
write = History.write
def write_and_stop(self):
    write(self)
    if len(self.rows) == int(epoch):
        os.kill(os.getpid(), int(sign))
History.write = write_and_stop
lab.main(["fit", *argv])
"""


def start(examples: Path, out: Path, *flags: str, stop_after: int = 0, by: int = 0) -> subprocess.CompletedProcess:
    return python(examples, DRIVER, str(stop_after), str(int(by)), f"--run={out}", *FLAGS, *flags)


def python(examples: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(examples), str(examples.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_stopped_killed_and_damaged_equals_uninterrupted(examples, tmp_path):
    """Ctrl-C, then a kill, then a truncated checkpoint, in whose place the one before it is taken."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert start(examples, unbroken).returncode == 0

    interrupted = start(examples, broken, stop_after=2, by=signal.SIGINT)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "Go on with:" in interrupted.stdout
    assert interrupted.stdout.rstrip().endswith(f"lab.py fit --run {broken} --resume")

    killed = start(examples, broken, "--resume", stop_after=4, by=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"resuming from {broken}" in killed.stdout
    assert not (broken / "metrics.json").exists()

    last = broken / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    resumed = start(examples, broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{str(last)!r} is truncated or damaged" in resumed.stdout
    assert f"resuming from {last.with_name('previous.ckpt')}" in resumed.stdout
    assert_same_run(unbroken, broken)

    for path in last.parent.glob("*.ckpt"):
        path.write_bytes(b"")
    refused = start(examples, broken, "--resume")
    assert refused.returncode == 1
    assert "no whole checkpoint is left in" in refused.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_worker_processes_go_on_with_the_epoch_that_was_reached(examples, tmp_path):
    """They draw their first batches before Lightning tells them the epoch."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert start(examples, unbroken, "--trainer.max_epochs=2").returncode == 0
    flags = ["--trainer.max_epochs=2", "--data.num_workers=1", "--resume"]
    assert start(examples, broken, *flags, stop_after=2, by=signal.SIGKILL).returncode == -signal.SIGKILL
    assert start(examples, broken, *flags).returncode == 0
    assert_same_run(unbroken, broken)


# One process imports everything; its children train, and are killed at moments drawn at random.
KILLER = """
import os, random, signal, sys, time
import lab, torch
torch.set_num_threads(1)
kills, history, *argv = sys.argv[1:]
draw = random.Random(0)
def rows():
    return len(open(history).readlines()) if os.path.exists(history) else 0
def start():
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        lab.main(["fit", *argv])
        status = 0
    finally:
        os._exit(status)
for kill in range(int(kills)):
    goal, delay = rows() + 1, draw.uniform(0, 0.3)
    child = start()
    while rows() < goal:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the training ended before it was killed"
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the training ended before it was killed"
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
@pytest.mark.nightly
def test_killed_ten_times_at_random_moments(examples, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for out, kills in ((unbroken, 0), (broken, 10)):
        flags = [f"--run={out}", *FLAGS, "--trainer.max_epochs=40", "--data.limit=9", "--data.batch_size=3", "--resume"]
        done = python(examples, KILLER, str(kills), str(out / "history.csv"), *flags)
        assert done.returncode == 0, done.stderr
    assert_same_run(unbroken, broken)
    assert not list(broken.rglob(".part-*"))


def assert_same_run(unbroken: Path, broken: Path) -> None:
    """The same scores, the same weights to the last bit, the same curves."""
    facts = [json.loads((out / "metrics.json").read_text()) for out in (unbroken, broken)]
    for fact in facts:
        for name in ("seconds", "commit", "command", "date"):  # of the clock, and of whoever commits meanwhile
            del fact[name]
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
    assert len(curves[0]) == 1 + facts[0]["epochs"]
