"""A run folder: files that are written whole, checkpoints that are read safely, and what a finished run leaves."""

import json
import os
import pickle
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

PACKAGES = ("torch", "lightning", "monai", "numpy", "kan_mamba_layers")
RESUMABLE = ("last.ckpt", "previous.ckpt")  # newest first
STARTED = ("config.yaml", "split.json", "history.csv", "tensorboard")  # what a fit writes before its first checkpoint


@dataclass(frozen=True)
class Run:
    """What one training and one scoring left behind."""

    folder: Path
    variant: str
    fold: int | None  # of a cross-validation
    facts: dict[str, Any]  # metrics.json
    recipe: dict[str, Any]  # the settings that say how a network is trained, by their dotted names
    scores: dict[str, Any]  # scores.json
    history: pd.DataFrame  # a row per epoch
    images: pd.DataFrame  # a row per image, with variant and seed


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place once it is written: a kill or a full disk leaves the earlier file."""
    draft = path.with_name(f".part-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: SimpleITK's
        reason = getattr(error, "strerror", None) or str(error).strip().rpartition("\n")[2]
        raise OSError(f"{path} cannot be written ({reason}): what was there before is kept") from error
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows whole or not at all; what is not known stays empty."""
    with whole_file(path) as draft:
        pd.DataFrame(rows).to_csv(draft, index=False)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): restore it, or make it again") from error
    return content


def holds_files(option: str, folder: Path) -> bool:
    """Whether there is something in a folder that `option` names to be written to; refused where it is a file."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{option} {str(folder)!r} is a file: give a folder")
    return folder.is_dir() and any(folder.iterdir())


def check_resumed(run: Path, settings: dict[str, Any], free: Collection[str]) -> None:
    """Refuse to resume a run with other settings than it has in its config.yaml, but for the `free` ones."""
    before, after = flatten(read_config(run)), flatten(settings)
    for name in before | after:
        if not name.startswith("trainer.") and name not in free and before.get(name) != after.get(name):
            raise ValueError(
                f"{name} is {after.get(name)!r}, but the run in {str(run)!r} was started with "
                f"{before.get(name)!r}: resume with the same settings, or give another --run"
            )


@contextmanager
def taken_back(run: Path) -> Iterator[None]:
    """Take back what a new run wrote if it fails before its first checkpoint, so that it may be started again."""
    try:
        yield
    except Exception:
        if not any(run.glob("checkpoints/*.ckpt")):
            for path in (run / name for name in STARTED):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def find_run(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `path` means: a run folder, or a .ckpt file inside one."""
    if path.suffix != ".ckpt":
        return path, path / "checkpoints" / "best.ckpt"
    for folder in path.absolute().parents[:2]:
        if (folder / "config.yaml").is_file():
            return folder, path
    raise FileNotFoundError(f"checkpoint {str(path)!r} is in no run folder: config.yaml must be beside it or above")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings that a run was started with, from its config.yaml."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"run {str(folder)!r} has no config.yaml: give the folder that fit wrote (--run)")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({error}): restore it from the run") from error
    for name in ("model", "data", "trainer"):
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise ValueError(f"{path} lacks {name!r}: give the folder that fit wrote (--run)")
    return config


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole content of a checkpoint on the CPU. Refused where it is cut off or any byte of it has changed."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} is missing: train first, or give another .ckpt file")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load leaves the checksums unread
                raise ValueError(f"wrong checksum of {damaged}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if missing := [name for name in ("state_dict", "epoch") if name not in content]:
            raise ValueError(f"no {missing[0]} in it")
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, pickle.PickleError, zipfile.BadZipFile) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {str(path)!r} is truncated or damaged ({reason})") from error
    return content


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint to resume from, None before the first, and a sentence for each damaged newer one."""
    refused: list[str] = []
    for path in (folder / name for name in RESUMABLE if (folder / name).exists()):
        try:
            read_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            return path, [f"{sentence}: using {path.name} instead" for sentence in refused]
    if refused:
        raise ValueError(f"{refused[0]}: no whole checkpoint is left in {str(folder)!r}; train again in another --run")
    return None, []


def provenance(device: torch.device) -> dict[str, Any]:
    """What made the numbers: the device, the versions of Python and the packages, and the commit of this checkout."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{device.type}, {os.cpu_count()} cores"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"device": name, "versions": versions, "commit": commit}
