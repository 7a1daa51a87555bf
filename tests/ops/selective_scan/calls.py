"""Inputs, calls and oracles of the scans shared by several tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from helpers import Array, cross_scan_oracle, scan_oracle, strided, to_array
from kan_mamba_layers import cross_selective_scan, selective_scan

Call = Callable[..., Tensor]
Inputs = dict[str, Tensor]


def normal(seed: int) -> Call:
    """A function that draws a tensor of a given shape in float64, so that every dtype sees the same numbers."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_inputs(
    b: int = 2,
    h: int = 3,
    w: int = 4,
    d: int = 3,
    r: int = 2,
    n: int = 2,
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Arguments of `cross_selective_scan`; `weight_dtype` is the dtype of the weights if it differs from that of x."""
    randn = normal(seed)
    x, weights = (
        randn(b, h, w, d),
        {
            "x_proj_weight": randn(4, r + 2 * n, d) * max(d, 1) ** -0.5,
            "dt_proj_weight": randn(4, d, r) * max(r, 1) ** -0.5,
            "dt_proj_bias": randn(4, d) - 1,
            "A_log": randn(4 * d, n),
            "D": randn(4 * d),
        },
    )
    return {"x": strided(x.to(dtype), layout), **{k: v.to(weight_dtype or dtype) for k, v in weights.items()}}


def line_inputs(
    b: int = 2,
    d: int = 4,
    length: int = 7,
    n: int = 3,
    *,
    B: str = "bnl",
    C: str = "bnl",
    groups: int = 2,
    skip: bool = True,
    gate: bool = False,
    bias: bool = False,
    initial: bool = False,
    positive: bool = True,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Arguments of `selective_scan`; the parameters that Mamba keeps in float32 or wider are not narrowed.

    With `positive`, delta is a step size; without it, delta has any sign and needs softplus.
    """
    randn, wide = normal(seed), torch.promote_types(dtype, torch.float32)

    def signal(*shape: int) -> Tensor:
        return strided(randn(*shape).to(dtype), layout)

    def parameter(*shape: int) -> Tensor:
        return randn(*shape).to(wide)

    shapes = {"dn": (d, n), "bnl": (b, n, length), "bgnl": (b, groups, n, length)}
    delta = signal(b, d, length)
    inputs = {
        "u": signal(b, d, length),
        "delta": strided((delta.abs() * 0.5).contiguous(), layout) if positive else delta,
        "A": -parameter(d, n).exp(),
        "B": parameter(d, n) if B == "dn" else signal(*shapes[B]),
        "C": parameter(d, n) if C == "dn" else signal(*shapes[C]),
    }
    if skip:
        inputs["D"] = parameter(d)
    if gate:
        inputs["z"] = signal(b, d, length)
    if bias:
        inputs["delta_bias"] = parameter(d) - 1
    if initial:
        inputs["initial_state"] = parameter(b, d, n)
    return inputs


# Every optional argument of a sequence, for use with softplus; B comes in `groups`.
full_line_inputs = partial(line_inputs, B="bgnl", groups=1, gate=True, bias=True, initial=True, positive=False)


def operator_inputs(
    b: int,
    length: int,
    d: int,
    n: int,
    r: int = 0,
    *,
    directions: int = 1,
    groups: int = 1,
    initial: bool = False,
    coeffs: bool = True,
    seed: int = 0,
) -> Inputs:
    """Tensors of the operator beneath both scans: `coeffs` or the weight that makes them; steps of rank r, or given."""
    randn, columns = normal(seed), r + 2 * n
    inputs = {"u": randn(b, length, d)}
    if coeffs:
        inputs["coeffs"] = randn(b, length, directions * groups, columns)
    else:
        inputs["x_proj_weight"] = randn(directions, columns, d) * d**-0.5
    if r == 0:
        inputs["delta"] = randn(b, length, directions, d)
    inputs["dt_proj_weight"] = randn(directions, d, r) * max(r, 1) ** -0.5
    inputs["dt_proj_bias"] = randn(directions, d) - 1
    inputs["A"] = -randn(directions, d, n).exp()
    inputs["D"] = randn(d)
    if initial:
        inputs["initial_state"] = randn(b, directions, d, n)
    return {k: v.float() for k, v in inputs.items()}


def on_images(backend: str) -> Call:
    return lambda **x: cross_selective_scan(**x, backend=backend)


def on_lines(backend: str, **options: object) -> Call:
    return lambda **x: selective_scan(**x, backend=backend, **options)


def on_lines_with_state(backend: str) -> Call:
    """Concatenates output and last state, so that gradients flow through both; with softplus."""

    def function(**x: Tensor) -> Tensor:
        y, last = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
        return torch.cat([y, last.to(y.dtype)], -1)

    return function


def fused_line(b: int = 2, d: int = 4, length: int = 37, n: int = 3, **options: object) -> Inputs:
    return full_line_inputs(b, d, length, n, **{"B": "bnl", "C": "bgnl", "groups": 2, **options})


def fused_image(b: int = 2, h: int = 5, w: int = 8) -> Inputs:
    return image_inputs(b, h, w, 6, 2, 3)


# Per scan: a call that the fused operator serves, and a function that makes its inputs.
FUSED: dict[str, tuple[Call, Callable[[], Inputs]]] = {
    "selective_scan": (on_lines("auto", delta_softplus=True), fused_line),
    "cross_selective_scan": (on_images("auto"), fused_image),
}


def image_oracle(inputs: Inputs) -> Array:
    return cross_scan_oracle(**{k: to_array(v) for k, v in inputs.items()})


def line_oracle(inputs: Inputs, softplus: bool = False) -> tuple[Array, Array]:
    """Output and last state."""
    return scan_oracle(**{k: to_array(v) for k, v in inputs.items()}, delta_softplus=softplus)
