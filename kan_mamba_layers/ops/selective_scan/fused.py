"""The operator of the fused scan, and the backends that run it."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kan_mamba_layers.ops.operator import FusedBackend, FusedOp, explained, register
from kan_mamba_layers.ops.selective_scan import chunked
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.formula import formula


@explained
def load(backend: str) -> FusedBackend:
    """A fused backend, imported at its first use: it brings Numba or Triton along."""
    match backend:
        case "cpu":
            from kan_mamba_layers.ops.selective_scan import cpu

            return cpu
        case _:
            from kan_mamba_layers.ops.selective_scan import triton

            return triton


def _shapes(call: ScanCall, save: bool, backend: str) -> Sequence[Tensor]:
    b, l, d = call.u.shape
    k, _, n = call.A.shape
    backends: Any = load(backend)
    # One dimension: one of chunks would tie exported graphs to sizes with more than one chunk.
    states = math.prod(backends.saved_shape(b, l, d, k, call.groups, n)) if save else 0
    return call.u.new_empty(b, l, d), call.A.new_empty(b, k, d, n), call.A.new_empty(states)


def _flops(call: ScanCall) -> int:
    """In each direction 9 b l d n operations, as published for the scan, and those of the two projections."""
    (b, l, d), (k, _, n), r = call.u, call.A, call.dt_proj_weight[2]
    projection = 0 if call.x_proj_weight is None else 2 * (r + 2 * n)
    return b * l * d * k * (9 * n + 2 * r + projection)


def _gradient_flops(call: ScanCall, wanted: Sequence[bool]) -> int:
    """The forward pass again, and twice its operations."""
    return 3 * _flops(call)


def _formula(call: ScanCall) -> Sequence[Tensor]:
    y, last = formula(call, chunked.scan)
    return y.to(call.u.dtype), last


# (y: b l d, last state: b k d n), and the saved states
fused_scan = register(
    ScanCall,
    FusedOp(
        name="selective_scan",
        load=load,
        results=2,
        saved=1,
        shapes=_shapes,
        flops=_flops,
        gradient_flops=_gradient_flops,
        formula=_formula,
    ),
)
