"""Which calls of each op a backend cannot run, by the shapes and gradients of the arguments.

Every function returns the reason, or an empty string if it finds none. It judges by the arguments that it is given.
"""

from math import lcm, prod

import torch
from torch import Tensor

from kan_mamba_layers._check import check_shape
from kan_mamba_layers.ops.bspline import is_differentiated

# Limits of the Triton kernels.
ADDRESSES = 2**31 - 1  # in one image or sequence: addresses are computed in 32 bits
STATES = 1024
SPLINE_ORDER = 5
BLOCKS = 65_535  # in the second dimension of a launch: groups, or blocks of 16 features or 16 outputs at least


def count_groups(B: Tensor, C: Tensor, channels: int) -> int:
    """The coarsest grouping of channels that serves both ``B`` and ``C`` of ``selective_scan``."""
    return lcm(*(max(1, channels) if x.ndim == 2 else 1 if x.ndim == 3 else x.shape[1] for x in (B, C)))


def against_selective_scan(
    backend: str,
    u: Tensor,  # b d l
    A: Tensor | None = None,  # d n
    B: Tensor | None = None,  # d n | b n l | b g n l
    C: Tensor | None = None,  # d n | b n l | b g n l
    **others: Tensor | None,
) -> str:
    """Why ``backend`` cannot run this call of ``selective_scan``."""
    if backend != "triton" or A is None:
        return ""
    check_shape("A", A, ("any", "any"), "d, n")
    states = A.shape[1]
    if B is None or C is None:
        return against_states("A", states)
    check_shape("u", u, ("any", "any", "any"), "b, d, l")
    _, channels, length = u.shape
    groups = count_groups(B, C, channels)
    if groups > BLOCKS:
        return f"B and C have {groups} groups of channels, and it computes up to {BLOCKS}"
    values = max(channels, groups * 2 * states)
    return against_states("A", states) or against_addresses("u", length, channels, values)


def against_cross_selective_scan(
    backend: str,
    x: Tensor,  # b *grid d
    dt_proj_weight: Tensor | None = None,  # k d r
    A_log: Tensor | None = None,  # k*d n
    **others: Tensor | None,
) -> str:
    """Why ``backend`` cannot run this call of ``cross_selective_scan``."""
    if backend != "triton" or A_log is None:
        return ""
    check_shape("A_log", A_log, ("any", "any"), "k*d, n")
    states = A_log.shape[1]
    if dt_proj_weight is None:
        return against_states("A_log", states)
    check_shape("dt_proj_weight", dt_proj_weight, ("any", "any", "any"), "k, d, r")
    if x.ndim < 3:
        raise ValueError(f"x must have shape (b, *grid, d), got {tuple(x.shape)}; give it positions and channels")
    _, *grid, channels = x.shape
    directions, _, rank = dt_proj_weight.shape
    values = directions * max(channels, rank + 2 * states)
    return against_states("A_log", states) or against_addresses("x", prod(grid), channels, values)


def against_kan_linear(
    backend: str,
    x: Tensor,  # ... i
    spline_weight: Tensor | None = None,  # o i g+s
    grid: Tensor | None = None,  # i g+2s+1
    **others: Tensor | None,
) -> str:
    """Why ``backend`` cannot run this call of ``kan_linear``."""
    if backend == "reference" or grid is None:
        return ""
    if torch.is_grad_enabled() and is_differentiated(grid):
        return "grid requires a gradient, which only backend='reference' computes"
    if backend == "triton" and spline_weight is not None:
        check_shape("grid", grid, ("any", "any"), "i, g+2s+1")
        check_shape("spline_weight", spline_weight, ("any", "any", "any"), "o, i, g+s")
        order = grid.shape[1] - 1 - spline_weight.shape[2]
        if order > SPLINE_ORDER:
            return f"grid and spline_weight have spline order {order}, and it computes orders 1 to {SPLINE_ORDER}"
        outputs, features, _ = spline_weight.shape
        if max(outputs, features) > 16 * BLOCKS:
            return f"spline_weight has {outputs} outputs of {features} features, and it computes up to {16 * BLOCKS}"
    return ""


def against_states(name: str, states: int) -> str:
    """Why the Triton kernels of the scans cannot run that many states."""
    return "" if states <= STATES else f"{name} has {states} states, and it computes up to {STATES}"


def against_addresses(name: str, positions: int, channels: int, values: int) -> str:
    """Why the Triton kernels of the scans cannot run that many positions, with ``values`` in the widest tensor each."""
    addresses = positions * values
    if addresses <= ADDRESSES:
        return ""
    return (
        f"{name} has {positions} positions of {channels} channels, so one image needs {addresses} addresses, "
        "more than its 2**31 - 1"
    )
