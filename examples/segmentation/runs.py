"""Stand-in until the lab's own runs.py is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from segmentation.evaluation import whole_file
from segmentation.experiment import write_json

__all__ = ["read_config", "read_json", "whole_file", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings that a run was started with, from its config.yaml."""
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
