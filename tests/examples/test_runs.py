"""Run folders: files that are whole or not there, and checkpoints that are whole or refused by name."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from segmentation.callbacks import WholeFiles
from segmentation.runs import (
    RESUMABLE,
    find_run,
    latest_checkpoint,
    read_checkpoint,
    read_config,
    whole_file,
    write_csv,
)


def save(path: Path, epoch: int = 0) -> nn.Module:
    network = nn.Linear(50, 50)
    torch.save({"state_dict": network.state_dict(), "epoch": epoch}, path)
    return network


def test_an_interrupt_leaves_the_earlier_file(tmp_path):
    (tmp_path / "a.csv").write_text("earlier")

    def interrupted() -> None:
        with whole_file(tmp_path / "a.csv") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.csv", "earlier")]


def test_a_full_disk_leaves_the_earlier_files_and_says_so(tmp_path):
    """A limit on the size of files stands for the disk."""
    weights = {"state_dict": {"w": torch.zeros(10_000)}, "epoch": 0}
    write_csv(tmp_path / "history.csv", [{"epoch": 1}])
    WholeFiles().save_checkpoint(weights, tmp_path / "best.ckpt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        with pytest.raises(OSError, match=r"history\.csv cannot be written \(File too large\): "):
            write_csv(tmp_path / "history.csv", [{"epoch": 1}] * 10_000)
        with pytest.raises(OSError, match=r"best\.ckpt cannot be written \(File too large\): "):
            WholeFiles().save_checkpoint(weights, tmp_path / "best.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, part):
    path = tmp_path / "best.ckpt"
    save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"best\.ckpt' is truncated or damaged \("):
        read_checkpoint(path)


def test_one_changed_byte_of_a_weight_is_refused(tmp_path):
    path = tmp_path / "best.ckpt"
    weight = save(path).weight
    content = bytearray(path.read_bytes())
    place = content.find(weight.detach().numpy().tobytes())
    assert place > 0
    content[place + 40] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # which notices nothing
    with pytest.raises(ValueError, match=r"best\.ckpt' is truncated or damaged \(wrong checksum of "):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_explained(tmp_path):
    path = tmp_path / "best.ckpt"
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match=r"truncated or damaged \(no state_dict in it"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt' is missing"):
        read_checkpoint(path)


def test_what_is_no_run_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml: give the folder that fit wrote"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {task: isic2017}")
    with pytest.raises(ValueError, match=r"config\.yaml lacks 'model'"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML"):
        read_config(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert find_run(checkpoint) == (tmp_path, checkpoint)
    assert find_run(tmp_path) == (tmp_path, tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(FileNotFoundError, match=r"alone\.ckpt' is in no run folder"):
        find_run(tmp_path / "a" / "b" / "alone.ckpt")


def test_training_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])
    last, previous = (tmp_path / name for name in RESUMABLE)
    save(last, epoch=2)
    save(previous, epoch=1)
    assert latest_checkpoint(tmp_path) == (last, [])
    last.write_bytes(last.read_bytes()[:-100])
    found, (sentence,) = latest_checkpoint(tmp_path)
    assert found == previous
    assert "last.ckpt' is truncated or damaged (" in sentence
    assert sentence.endswith("): using previous.ckpt instead")
    torch.save({"state_dict": {}}, previous)
    with pytest.raises(
        ValueError, match=r"last\.ckpt' is truncated or damaged .*no whole checkpoint is left in .*--run"
    ):
        latest_checkpoint(tmp_path)
