"""The scan of a :class:`.call.ScanCall` in plain PyTorch, around one of sequences: ``reference.scan`` or others."""

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.directions import flatten_directions, flatten_walks, sum_directions, sum_walks

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def formula(call: ScanCall, scan: Scan) -> tuple[Tensor, Tensor]:  # y: b l d, last state: b k d n
    """What the fused backends compute, with derivatives of any order."""
    directions, _, rank, states = *call.dt_proj_weight.shape, call.A.shape[2]
    u = call.u.to(call.A.dtype)  # b l d
    coeffs = coefficients(u, call) if call.coeffs is None else call.coeffs  # b l k*g r+2n
    groups = coeffs.shape[2] // directions
    if groups > 1:
        coeffs = coeffs.unflatten(2, (directions, groups)).flatten(3)  # b l k g*(r+2n)
    low, B, C = _by_group(_along(coeffs, call), groups).split([rank, states, states], -1)  # b k*g l r|n
    if call.delta is None:
        weight = call.dt_proj_weight.flatten().view(call.dt_proj_weight.shape)  # so that its gradient has its strides
        delta = low @ weight.mT  # b k l d
    else:
        delta = _along(call.delta, call)
    delta = delta + call.dt_proj_bias[:, None]
    if call.softplus:
        delta = F.softplus(delta)
    if call.mask is not None:
        delta = delta * _along(call.mask[:, :, None, None].expand(-1, -1, directions, -1), call)
    sequences = _along(u[:, :, None].expand(-1, -1, directions, -1), call)  # b k l d
    A, state = call.A, call.initial_state
    if groups > 1:
        A = A.unflatten(1, (groups, -1)).flatten(0, 1)  # k*g d/g n
        state = None if state is None else state.unflatten(2, (groups, -1)).flatten(1, 2)  # b k*g d/g n
    y, last = scan(_by_group(sequences, groups), _by_group(delta, groups), A, B, C, state)
    if groups > 1:
        y = y.unflatten(1, (directions, groups)).transpose(2, 3).flatten(3)  # b k l d
        last = last.unflatten(1, (directions, groups)).flatten(2, 3)  # b k d n
    return _summed(y, call) + call.D * u, last


def coefficients(u: Tensor, call: ScanCall) -> Tensor:  # b l d -> b l k r+2n
    """The low-rank step, B and C of all directions: the projection is pointwise, so one product serves them all."""
    weight = cast(Tensor, call.x_proj_weight)
    return F.linear(u, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


def _by_group(x: Tensor, groups: int) -> Tensor:  # b k l g*c -> b k*g l c
    return x if groups == 1 else x.unflatten(-1, (groups, -1)).transpose(2, 3).flatten(1, 2)


def _along(x: Tensor, call: ScanCall) -> Tensor:  # b l k c -> b k l c
    if call.orders is not None:
        return flatten_walks(x, call.orders)
    return x.transpose(1, 2) if x.shape[2] == 1 else flatten_directions(x.unflatten(1, (call.height, call.width)))


def _summed(y: Tensor, call: ScanCall) -> Tensor:  # b k l d -> b l d
    if call.orders is not None:
        return sum_walks(y, call.orders)
    return y[:, 0] if y.shape[1] == 1 else sum_directions(y, call.height, call.width).flatten(1, 2)
