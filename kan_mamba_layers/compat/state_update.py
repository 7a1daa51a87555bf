"""Stand-in for ``mamba_ssm.ops.triton.selective_state_update``: one step of the scan, for generation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_shape
from kan_mamba_layers.compat.caches import read_rows, without_padding, write_rows
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype


def selective_state_update(
    state: Tensor,  # b d n | b h d n
    x: Tensor,  # b d | b h d
    dt: Tensor,  # b d | b h d
    A: Tensor,  # d n | h d n
    B: Tensor,  # b n | b g n
    C: Tensor,  # b n | b g n
    D: Tensor | None = None,  # d | h d
    z: Tensor | None = None,  # b d | b h d
    dt_bias: Tensor | None = None,  # d | h d
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,  # b
) -> Tensor:  # b d | b h d
    """Take one step from ``state``, which is updated in place.

    ``state`` (b h d n) has ``h`` heads, of which ``h / g`` neighbours share ``B`` and ``C``. An argument without the
    axis of the heads or groups has one of them. ``state_batch_indices`` picks the rows of ``state``; a negative index
    marks padding, whose output is 0.
    """
    many = state.ndim == 4
    x, dt, B, C = (v[:, None] if v.ndim == 2 else v for v in (x, dt, B, C))
    z = z[:, None] if z is not None and z.ndim == 2 else z
    A = A[None] if A.ndim == 2 else A
    D, dt_bias = (v[None] if v is not None and v.ndim == 1 else v for v in (D, dt_bias))
    old = state if many else state[:, None]  # b h d n
    old = read_rows(old, state_batch_indices)
    check_shape("state", old, (x.shape[0], "any", "any", "any"), "b, [h,] d, n")
    batch, heads, channels, states = old.shape
    groups = B.shape[1]
    for name, value, shape, letters in (
        ("x", x, (batch, heads, channels), "b, [h,] d"),
        ("dt", dt, (batch, heads, channels), "b, [h,] d"),
        ("A", A, (heads, channels, states), "[h,] d, n"),
        ("B", B, (batch, groups, states), "b, [g,] n"),
        ("C", C, (batch, groups, states), "b, [g,] n"),
        ("D", D, (heads, channels), "[h,] d"),
        ("z", z, (batch, heads, channels), "b, [h,] d"),
        ("dt_bias", dt_bias, (heads, channels), "[h,] d"),
    ):
        if value is not None:
            check_shape(name, value, shape, letters)
    if groups < 1 or heads % groups:
        raise ValueError(f"B and C have {groups} groups, which do not divide the {heads} heads of state; use a divisor")
    dtype, inputs = compute_dtype(x), x
    with autocast_off(x):
        x, dt, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
        B, C = (v.repeat_interleave(heads // groups, 1) for v in (B, C))  # b h n
        step = dt if dt_bias is None else dt + dt_bias.to(dtype)  # b h d
        step = F.softplus(step) if dt_softplus else step
        new = torch.exp(step[..., None] * A) * old.to(dtype) + (step * x)[..., None] * B[:, :, None]  # b h d n
        y = (new * C[:, :, None]).sum(-1)  # b h d
        y = y if D is None else y + D.to(dtype) * x
        y = y if z is None else y * F.silu(z.to(dtype))
    write_rows(state, state_batch_indices, new if many else new[:, 0])
    y = without_padding(y, state_batch_indices)
    return (y if many else y[:, 0]).to(inputs.dtype)
