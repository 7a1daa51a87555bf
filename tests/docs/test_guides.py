"""Examples of the guide that are whole programs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"


def run(page: str) -> dict[str, Any]:
    """What the blocks of a page define, one after the other."""
    scope: dict[str, Any] = {}
    for block in re.findall(r"```\{code-block\} python\n(.*?)```", (GUIDE / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), scope)
    return scope


def test_the_pipeline_of_monai() -> None:
    pytest.importorskip("monai")
    scope = run("monai.md")
    assert scope["logits"].shape == (2, 1, 40, 48)
    assert torch.isfinite(scope["loss"])


def test_what_a_model_sees() -> None:
    scope = run("explain.md")
    assert scope["corner"].shape == (64, 64) and scope["corner"].argmax() // 64 < 16
    assert scope["picture"].argmax() == 16 * 32 + 16


def test_scans_along_walks() -> None:
    scope = run("cross_selective_scan.md")
    assert scope["y"].shape == (2, 24, 32, 16) and scope["z"].shape == (1, 6, 24, 32, 16)
    assert not scope["windows"](scope["x"], scope["mask"])[~scope["mask"]].any()
