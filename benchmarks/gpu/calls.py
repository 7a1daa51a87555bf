"""One launch of each Triton kernel, by name: small for memory checkers, heavy for profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu import launchers

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
        "maps": normal(b, h * w, 4, r + 2 * n),
        "dt_weight": normal(4, d, r) * r**-0.5,
        "dt_bias": normal(4, d) - 1,
        "A": -4 * torch.rand(4, d, n, generator=draw),
        "D": normal(d),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def scan_forward(x: dict[str, Tensor], height: int, width: int, plan: Any = None, save: bool = True) -> Any:
    """y, last states and saved states."""
    weights = (x["dt_weight"], x["dt_bias"], x["A"], x["D"])
    return launchers.scan.forward(x["u"], x["maps"], None, *weights, None, height, width, True, save, plan=plan)


def scan_backward(
    x: dict[str, Tensor], grad_y: Tensor, saved: Tensor, height: int, width: int, plan: Any = None
) -> tuple[Tensor, ...]:
    """The gradients of u, maps, steps, dt_weight, dt_bias, A, D and of the initial state."""
    rest = (x["dt_weight"], x["dt_bias"], x["A"], x["D"], saved, height, width, True)
    return launchers.scan.backward(grad_y, None, x["u"], x["maps"], None, *rest, plan=plan)


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
        weights = (x["base_weight"], x["spline_weight"], x["grid"])
        if any(back):
            launchers.kan.backward(x["grad_y"], x["x"], None, *weights, "linear", uniform, *back)
        else:
            launchers.kan.forward(x["x"], None, *weights, None, "linear", uniform)

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
