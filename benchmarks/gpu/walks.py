"""Scans along a table of positions, and scans under a mask: what is true of them, and what they cost.

Checks are identities, like those of the suspects.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import cross
from benchmarks.gpu.calls import scan_backward, scan_forward, scan_inputs
from benchmarks.gpu.compare import Results, same_numbers
from benchmarks.gpu.guards import between, between_nan, guarded
from benchmarks.gpu.launchers import scan
from benchmarks.gpu.tasks import Setting, Task
from benchmarks.gpu.tune import medians

SIZES = ((1, 9, 7, 33, 16, 2), (2, 37, 31, 65, 16, 10), (3, 1, 50, 31, 17, 3))  # b h w d n r of the checks
REHEARSED = (1, 1, 2, 2, 1, 1)
TIMED = ((8, 128, 128, 32, 16, 1), (8, 64, 64, 64, 16, 2))  # the first two levels of a base KMUNet
NOWHERE = 1 << 30  # a position outside all memory


def four_directions(height: int, width: int, device: str) -> Tensor:  # 4 l
    """The directions of an image as a table."""
    rows = torch.arange(height * width, dtype=torch.int32, device=device)
    columns = rows.view(height, width).T.flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def thinned(b: int, l: int, device: str) -> Tensor:  # b l
    """Every third position is masked."""
    return (torch.arange(l, device=device) % 3 > 0).float().repeat(b, 1)


def scan_results(x: dict[str, Tensor], grad_y: Tensor, height: int, width: int) -> Results:
    """Outputs and gradients, between sentinels."""
    with guarded(scan):
        y, last, saved = scan_forward(x, height, width)
        grads = scan_backward(x, grad_y, saved, height, width)
    return {"y": y, "last": last, **{f"grad {name}": grad for name, grad in grads.items()}}


def make(size: tuple[int, ...], device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs between NaN, and a gradient of y."""
    x = {name: between_nan(value) for name, value in scan_inputs(*size, device).items()}
    return x, torch.randn(x["u"].shape, generator=torch.Generator().manual_seed(1)).to(x["u"])


def table_agrees(size: tuple[int, ...], setting: Setting) -> dict[str, Any]:
    """Along a table of the four directions the results are those of the four directions."""
    _, height, width, *_ = size
    x, grad_y = make(size, setting.device)
    table = {**x, "orders": between(four_directions(height, width, setting.device), NOWHERE)}
    found = scan_results(table, grad_y, 1, height * width)
    return {"worst": same_numbers(found, scan_results(x, grad_y, height, width), "a table of the four directions")}


def mask_agrees(size: tuple[int, ...], setting: Setting) -> dict[str, Any]:
    """Under a mask the results are those of the other positions alone, along a table and along the directions."""
    b, height, width, *_ = size
    x, grad_y = make(size, setting.device)
    mask, orders = thinned(b, height * width, setting.device), four_directions(height, width, setting.device)
    kept = mask[0] > 0
    short = {**x, "u": x["u"][:, kept], "coeffs": x["coeffs"][:, kept]}
    place = kept.cumsum(0, dtype=torch.int32) - 1  # of a position among those that are kept
    short["orders"] = torch.stack([place[order[kept[order]]] for order in orders.long()])
    grad_y = grad_y * mask[..., None]
    expected = scan_results(short, grad_y[:, kept], 1, int(kept.sum()))
    masked = {**x, "mask": between_nan(mask)}
    along = {"directions": (masked, height, width), "table": ({**masked, "orders": orders}, 1, height * width)}
    worst = 0.0
    for name, (inputs, *shape) in along.items():
        found = scan_results(inputs, grad_y, *shape)
        found |= {key: found[key][:, kept] for key in ("y", "grad u", "grad coeffs")}
        worst = max(worst, same_numbers(found, expected, f"a mask along the {name}"))
    return {"worst": worst}


def costs(size: tuple[int, ...], setting: Setting) -> dict[str, Any]:
    """Seconds of a forward and of a backward pass along the four directions, by a table of them, and under a mask."""
    b, height, width, *_ = size
    x = scan_inputs(*size, setting.device)
    length = height * width
    orders = four_directions(height, width, setting.device)
    walks = {
        "directions": (x, height, width),
        "table": ({**x, "orders": orders}, 1, length),
        "random": ({**x, "orders": orders[:, torch.randperm(length, device=setting.device)]}, 1, length),
        "masked": ({**x, "mask": thinned(b, length, setting.device)}, height, width),
    }
    calls = {}
    for name in walks if not setting.rehearsal else ("table",):
        inputs, *shape = walks[name]
        y, _, saved = scan_forward(inputs, *shape)
        calls[f"{name} forward"] = partial(scan_forward, inputs, *shape)
        calls[f"{name} backward"] = partial(scan_backward, inputs, torch.ones_like(y), saved, *shape)
    return {"walks": medians(calls, setting)}


def checks(setting: Setting) -> Iterator[Task]:
    """A rehearsal leaves the check of a mask, which scans along a table too."""
    for size in SIZES if not setting.rehearsal else [REHEARSED]:
        name = cross(*size).name
        yield Task(f"walks/mask/{name}", partial(mask_agrees, size))
        if not setting.rehearsal:
            yield Task(f"walks/table/{name}", partial(table_agrees, size))


def timings(setting: Setting) -> Iterator[Task]:
    """After each other."""
    for size in TIMED if not setting.rehearsal else [REHEARSED]:
        yield Task(f"walks/{cross(*size).name}", partial(costs, size), limit=240, alone=True)
