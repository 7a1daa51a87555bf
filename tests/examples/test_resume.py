"""A training that is stopped or killed, and resumed, equals an unbroken one bit for bit; damaged files are named."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

FLAGS = [
    "--data.task=isic2017", "--model.network=km_unet_tiny", "--model.model_args={drop_path: 0.2}",
    "--trainer.max_epochs=3", "--data.image_size=32", "--data.batch_size=3", "--data.limit=15",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
# One process imports everything; its children train. They are real processes, with the signals that a user's has.
FORKS = multiprocessing.get_context("forkserver")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(scope="module", autouse=True)
def server(examples):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(examples), str(examples.parent)]))
        FORKS.set_forkserver_preload(["lab"])
        yield


def train(flags: list[str], log: Path, stop_after: int, by: int) -> None:
    """In a child: `fit`, ended right after a row of history.csv is written, before that epoch's checkpoint is there."""
    import lab
    from segmentation import callbacks

    sys.stdout = sys.stderr = log.open("w", buffering=1)
    multiprocessing.set_start_method("fork", force=True)  # of processes that load data, as in a program of its own
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    write = callbacks.write_csv

    def write_and_stop(path: Path, rows: list) -> None:
        write(path, rows)
        if len(rows) == stop_after:
            os.kill(os.getpid(), by)

    callbacks.write_csv = write_and_stop
    lab.main(["fit", *flags])


def start(out: Path, *flags: str, stop_after: int = 0, by: int = 0) -> BaseProcess:
    log = out.with_suffix(".log")
    child = FORKS.Process(target=train, args=([f"--run={out}", *FLAGS, *flags], log, stop_after, int(by)))
    child.start()
    return child


def run(out: Path, *flags: str, stop_after: int = 0, by: int = 0) -> tuple[int, str]:
    """The exit code of a training, and what it printed."""
    child = start(out, *flags, stop_after=stop_after, by=by)
    child.join()
    return child.exitcode, out.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    status, printed = run(out)
    assert status == 0, printed
    return out


def test_stopped_killed_and_damaged_equals_unbroken(unbroken, tmp_path):
    """Ctrl-C, then a kill, then a truncated checkpoint, in whose place the one before it is taken."""
    out = tmp_path / "run"
    last = out / "checkpoints" / "last.ckpt"
    status, printed = run(out, stop_after=2, by=signal.SIGINT)
    assert status == 130, printed
    assert printed.rstrip().endswith(f"Go on with:\n    python examples/lab.py fit --run {out} --resume")

    status, printed = run(out, "--resume", stop_after=3, by=signal.SIGKILL)
    assert status == -signal.SIGKILL, printed
    assert f"resuming from {last}" in printed
    assert not (out / "metrics.json").exists()

    last.write_bytes(last.read_bytes()[:-5000])
    status, printed = run(out, "--resume")
    assert status == 0, printed
    assert f"{str(last)!r} is truncated or damaged" in printed
    assert f"resuming from {last.with_name('previous.ckpt')}" in printed
    assert_same_run(unbroken, out)


def test_worker_processes_go_on_with_the_epoch_that_was_reached(unbroken, tmp_path):
    """They draw their first batches before Lightning tells them the epoch."""
    flags = ["--data.num_workers=1", "--resume"]
    status, printed = run(tmp_path / "run", *flags, stop_after=2, by=signal.SIGKILL)
    assert status == -signal.SIGKILL, printed
    status, printed = run(tmp_path / "run", *flags)
    assert status == 0, printed
    assert_same_run(unbroken, tmp_path / "run")


@pytest.mark.nightly
def test_killed_ten_times_at_random_moments(tmp_path):
    unbroken, broken, draw = tmp_path / "unbroken", tmp_path / "broken", random.Random(0)
    flags = ["--trainer.max_epochs=40", "--data.limit=9", "--resume"]
    assert run(unbroken, *flags)[0] == 0

    def rows() -> int:
        history = broken / "history.csv"
        return len(history.read_text().splitlines()) if history.exists() else 0

    for _ in range(10):
        goal, child = rows() + 1, start(broken, *flags)
        while rows() < goal:
            assert child.is_alive(), "the training ended before it was killed"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    status, printed = run(broken, *flags)
    assert status == 0, printed
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
    lines = [(out / "history.csv").read_text().splitlines() for out in (unbroken, broken)]
    curves = [[line.rpartition(",")[0] for line in some] for some in lines]  # without the seconds
    assert curves[0] == curves[1]
    assert len(curves[0]) == 1 + facts[0]["epochs"]
