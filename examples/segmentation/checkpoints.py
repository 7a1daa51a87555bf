"""Reading what a run has saved; a damaged checkpoint is refused by name, never half used."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from segmentation.networks import build_network
from segmentation.tasks import Task, get_task

SETTINGS = ("task", "model", "model_args", "image_size")
PREFIX = "network."
RESUMABLE = ("last.ckpt", "previous.ckpt")  # newest first


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode on the CPU, and what it needs to be applied to an image."""

    network: nn.Module
    task: Task
    image_size: int
    name: str


def load_run(path: Path) -> Trained:
    """The network of a run: of its best epoch, or, where `path` is one of its .ckpt files, of that one."""
    folder, checkpoint = find_run(path)
    settings = read_settings(folder)
    content = read_checkpoint(checkpoint)
    task = get_task(settings["task"])
    network = build_network(settings["model"], task.in_channels, task.num_classes, **settings["model_args"])
    weights = {
        name.removeprefix(PREFIX): value for name, value in content["state_dict"].items() if name.startswith(PREFIX)
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} does not fit the model that {str(folder / 'config.yaml')!r} names "
            f"({settings['model']}, {settings['model_args']}): keep both from one run"
        ) from error
    return Trained(network.eval(), task, settings["image_size"], settings["model"])


def find_run(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `path` means: a run folder, or a .ckpt file inside one."""
    path = Path(path)
    if path.suffix != ".ckpt":
        return path, path / "checkpoints" / "best.ckpt"
    folders = [folder for folder in path.absolute().parents[:2] if (folder / "config.yaml").is_file()]
    if not folders:
        raise FileNotFoundError(f"checkpoint {str(path)!r} is in no run folder: config.yaml must be beside it or above")
    return folders[0], path


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a run was started with, from its config.yaml."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"run {str(folder)!r} has no config.yaml: give the folder that train.py wrote (--out)")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is no YAML ({error}): restore it from the run") from error
    if missing := [name for name in SETTINGS if not isinstance(settings, dict) or name not in settings]:
        raise ValueError(f"{config} lacks {missing[0]!r}: give the folder that train.py wrote (--out)")
    return settings


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole content of a checkpoint on the CPU. Refused where it is cut off or any byte of it has changed."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} is missing: train first, or give another .ckpt file")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load leaves the checksums unread
                raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if missing := [name for name in ("state_dict", "epoch") if name not in content]:
            raise ValueError(f"no {missing[0]} in it")
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, pickle.PickleError, zipfile.BadZipFile) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {str(path)!r} is truncated or damaged ({reason})") from error
    return content


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of `folder` to resume from, and one sentence for each newer one that is damaged."""
    refused: list[str] = []
    for path in (folder / name for name in RESUMABLE):
        if not path.exists():
            continue
        try:
            read_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            return path, [f"{sentence}: using {path.name} instead" for sentence in refused]
    return None, refused
