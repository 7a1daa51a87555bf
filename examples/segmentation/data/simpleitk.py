"""SimpleITK, imported where it is first used: only volumes and colours of 16 bits need it, and it is large."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """What SimpleITK calls `name`."""
    if name.startswith("__"):  # what Python asks any module for
        raise AttributeError(name)
    try:
        return getattr(importlib.import_module("SimpleITK"), name)
    except ImportError as error:
        raise ImportError(
            "volumes and images with 16 bits per colour are read with SimpleITK, which is not installed: "
            "python -m pip install SimpleITK"
        ) from error
