"""Examples of the guide that are whole programs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"


def test_the_pipeline_of_monai() -> None:
    pytest.importorskip("monai")
    (block,) = re.findall(r"```\{code-block\} python\n(.*?)```", (GUIDE / "monai.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(block, "monai.md", "exec"), scope)
    assert scope["logits"].shape == (2, 1, 40, 48)  # type: ignore[attr-defined]
    assert torch.isfinite(scope["loss"])  # type: ignore[arg-type]
