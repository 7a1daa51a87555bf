"""Calls of kan_linear that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kan_mamba_layers import kan_linear

FUSED = ("cpu", "chunked")
ALL = ("auto", "reference", *FUSED)
fused = pytest.mark.parametrize("backend", FUSED)


def kan_inputs(
    rows: int = 20, i: int = 3, o: int = 4, g: int = 5, s: int = 3, dtype: torch.dtype = torch.float32
) -> dict:
    """Everything that a gradient may be asked for, and the grid."""
    knots = -1 + 2 / g * torch.arange(-s, g + s + 1)
    return {
        "x": 1.5 * torch.randn(rows, i, dtype=dtype),
        "base_weight": torch.randn(o, i, dtype=dtype),
        "spline_weight": torch.randn(o, i, g + s, dtype=dtype),
        "spline_scaler": torch.randn(o, i, dtype=dtype),
        "bias": torch.randn(o, dtype=dtype),
        "grid": knots.to(torch.promote_types(dtype, torch.float32)).repeat(i, 1),
    }


def kan(backend: str, grid: Tensor, **options: object) -> Callable[..., Tensor]:
    """A function of all inputs but the grid."""
    return lambda **x: kan_linear(**x, grid=grid, backend=backend, **options)


def case(backend: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[Callable[..., Tensor], dict]:
    inputs = kan_inputs(dtype=dtype)
    return kan(backend, inputs.pop("grid"), **options), inputs
