"""One launch of each Triton kernel, by name: small for memory checkers, heavy for profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import launchers

Call = Callable[[str, bool], None]  # device, heavy


def scan_inputs(
    b: int, h: int, w: int, d: int, n: int, r: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """What the launcher of the scan takes, for four directions, by its own names."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs = {
        "u": normal(b, h * w, d).to(dtype),
        "coeffs": normal(b, h * w, 4, r + 2 * n),
        "dt_proj_weight": normal(4, d, r) * r**-0.5,
        "dt_proj_bias": normal(4, d) - 1,
        "A": -4 * torch.rand(4, d, n, generator=draw),
        "D": normal(d),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def scan_call(x: dict[str, Tensor], height: int, width: int) -> launchers.ScanCall:
    """The call of such inputs, under softplus, along the four directions or the ``orders`` among them."""
    absent = {"x_proj_weight": None, "delta": None, "initial_state": None}
    return launchers.ScanCall(**x, **absent, height=height, width=width, softplus=True)


def scan_forward(x: dict[str, Tensor], height: int, width: int, plan: Any = None, save: bool = True) -> Any:
    """y, last states and saved states."""
    return launchers.scan.forward(scan_call(x, height, width), save, plan=plan)


def scan_backward(
    x: dict[str, Tensor], grad_y: Tensor, saved: Tensor, height: int, width: int, plan: Any = None
) -> dict[str, Tensor]:
    """The gradients, by the names of the inputs."""
    call = scan_call(x, height, width)
    b, (k, d, n) = len(x["u"]), x["A"].shape
    grads = (grad_y, x["A"].new_zeros(b, k, d, n))
    found = launchers.scan.backward(call, [saved], grads, [True] * 9 + [False] * 2, plan=plan)
    return {name: grad for name, grad in zip(call._fields, found, strict=False) if name in (*x, "initial_state")}


def kan_inputs(
    rows: int, i: int, o: int, g: int, s: int, device: str, dtype: torch.dtype = torch.float32, uniform: bool = True
) -> dict[str, Tensor]:
    """What the launcher of kan_linear takes, and a gradient."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    grid = (torch.arange(-s, g + s + 1) * (2 / g) - 1).repeat(i, 1)  # i g+2s+1
    if not uniform:
        grid = grid + torch.rand(grid.shape, generator=draw) / g
    inputs = {
        "x": normal(rows, i).to(dtype),
        "base_weight": normal(o, i).to(dtype),
        "spline_weight": normal(o, i, g + s).to(dtype),
        "grid": grid,
        "grad_y": normal(rows, o).to(dtype),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def kan_call(x: dict[str, Tensor], extrapolation: str, uniform: bool) -> launchers.KANCall:
    """The call of such inputs, of silu and without a bias."""
    tensors = {name: value for name, value in x.items() if name != "grad_y"}
    return launchers.KANCall(**tensors, activated=None, bias=None, extrapolation=extrapolation, uniform=uniform)


def kan_forward(x: dict[str, Tensor], extrapolation: str = "zero", uniform: bool = True, tiles: Any = None) -> Tensor:
    """The output."""
    return launchers.kan.forward(kan_call(x, extrapolation, uniform), False, tiles=tiles)[0]


def kan_backward(
    x: dict[str, Tensor],
    wanted: tuple[bool, bool],
    extrapolation: str = "zero",
    uniform: bool = True,
    tiles: Any = (None, None),
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of the activation, and of both weights; wanted are those of x, of the weights."""
    inputs, weights = wanted
    flags = [inputs, False, weights, weights, False, False]
    call = kan_call(x, extrapolation, uniform)
    return launchers.kan.backward(call, [], [x["grad_y"]], flags, tiles=tiles)[:4]


def _scan(plan: tuple[int, int, bool] | None, back: bool) -> Call:
    def call(device: str, heavy: bool) -> None:
        size = (8, 128, 128, 32, 16, 1) if heavy else (1, 5, 7, 33, 4, 2)
        inputs = scan_inputs(*size, device)
        chosen = None if plan is None or heavy else launchers.scan.Plan(*plan)
        y, _, saved = scan_forward(inputs, *size[1:3], plan=chosen)
        if back:
            scan_backward(inputs, torch.ones_like(y), saved, *size[1:3], plan=chosen and chosen._replace(pair=False))

    return call


def _kan(uniform: bool, back: tuple[bool, bool]) -> Call:
    def call(device: str, heavy: bool) -> None:
        size, dtype = ((65536, 64, 64, 5, 3), torch.bfloat16) if heavy else ((37, 19, 23, 5, 3), torch.float32)
        x = kan_inputs(*size, device, dtype, uniform)
        if any(back):
            kan_backward(x, back, "linear", uniform)
        else:
            kan_forward(x, "linear", uniform)

    return call


# By the kernel that a call is there for; the scans launch `merge` too, and in several chunks `chunk_ends` and `carry`.
CALLS: dict[str, Call] = {
    "scan": _scan((32, 48, False), back=False),
    "scan-pair": _scan((32, 48, True), back=False),
    "scan-chunks": _scan((32, 16, True), back=False),
    "scan_backward": _scan((32, 48, False), back=True),
    "scan_backward-chunks": _scan((32, 16, False), back=True),
    "kan_forward": _kan(True, (False, False)),
    "kan_forward-knots": _kan(False, (False, False)),
    "grad_input": _kan(True, (True, False)),
    "grad_input-knots": _kan(False, (True, False)),
    "grad_weights": _kan(True, (False, True)),
    "grad_weights-knots": _kan(False, (False, True)),
}


def run_call(name: str, device: str, heavy: bool = False) -> None:
    """Make one call and wait for it."""
    CALLS[name](device, heavy)
    if device == "cuda":
        torch.cuda.synchronize()
