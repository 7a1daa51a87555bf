"""Inputs and calls of kan_linear shared by several tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import strided
from kan_mamba_layers import kan_linear

FUSED = ("cpu", "chunked")
ALL = ("auto", "reference", *FUSED)
fused = pytest.mark.parametrize("backend", FUSED)
# Spline orders and knots: all coincide at the ends of the interval, or two at its upper or lower end.
KNOTS_THAT_COINCIDE = (
    (1, [0.0, 0, 1, 2, 3, 3]),
    (2, [0.0, 0, 0, 1, 2, 3, 3, 3]),
    (3, [-1.0, -1, -1, -1, 0.2, 1, 1, 1, 1]),
    (3, [0.0] * 4 + [1.0] * 4),
    (2, [0.0, 1, 2, 3, 4, 4, 5, 6]),
    (3, [-3.0, -2, -1, 0, 1, 2, 2, 3, 4, 5]),
    (3, [-3.0, -2, -1, 0, 0, 1, 2, 3, 4, 5]),
)


def kan_inputs(
    rows: int | tuple[int, ...] = 20,
    i: int = 3,
    o: int = 4,
    g: int = 5,
    s: int = 3,
    *,
    uniform: bool = True,
    scaler: bool = True,
    bias: bool = True,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    spread: float = 1.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of `kan_linear`: every differentiable tensor, and the grid; `rows` may be leading sizes."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    knots = (-1 + 2 / g * torch.arange(-s, g + s + 1, dtype=torch.float64)).repeat(i, 1)  # i m
    if not uniform:
        knots = knots + 1.2 / g * torch.rand(knots.shape, generator=draw, dtype=torch.float64)
    x = spread * randn(*([rows] if isinstance(rows, int) else rows), i)
    inputs = {
        "x": strided(x, layout) if x.ndim > 1 else x,
        "base_weight": randn(o, i),
        "spline_weight": randn(o, i, g + s),
    }
    if scaler:
        inputs["spline_scaler"] = randn(o, i)
    if bias:
        inputs["bias"] = randn(o)
    return {**inputs, "grid": knots.to(torch.promote_types(dtype, torch.float32))}


def kan(
    backend: str, grid: Tensor, extrapolation: str = "zero", uniform: bool = False, **options: object
) -> Callable[..., Tensor]:
    """`kan_linear` as a function of every tensor but the grid."""
    options = {"extrapolation": extrapolation, "uniform": uniform, "backend": backend, **options}
    return lambda spline_scaler=None, **x: kan_linear(**x, spline_scaler=spline_scaler, grid=grid, **options)


def case(backend: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[Callable[..., Tensor], dict]:
    inputs = kan_inputs(dtype=dtype)
    return kan(backend, inputs.pop("grid"), **options), inputs
