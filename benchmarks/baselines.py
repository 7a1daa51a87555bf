"""The selective scan as textbooks have it: step by step, and as a parallel scan. Both hold all states at once.

The four directions are explicit copies of the map, as in VMamba's first version and in the many repositories that
descend from it; peers are called through the same functions, with the memory layout that they are made for.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def scan_by_steps(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """All decays and entries first, then one step of the recurrence after the other.

    `u`, `delta` are `b k*d l`, `A` is `k*d n`, `B`, `C` are `b k n l`, `D`, `bias` are `k*d`; the result is `b k*d l`.
    """
    channels = u.shape[1] // B.shape[1]
    B, C = (x.repeat_interleave(channels, 1) for x in (B, C))  # b k*d n l
    delta = F.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entry = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    state = torch.zeros_like(entry[:, :, 0])  # b k*d n
    outputs = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + entry[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[..., t]))
    return torch.stack(outputs, 2) + D[:, None] * u


def recurrence(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b n l | b g n l
    C: Tensor,  # d n | b n l | b g n l
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # y: b d l, last state: b d n
    """The same with all arguments of `selective_scan`: a gate, no D or bias, B and C in every form, a last state."""

    def steps(x: Tensor) -> tuple[Tensor, ...]:  # of b d n
        if x.ndim == 2:
            return (x.expand(len(u), -1, -1),) * u.shape[2]
        groups = x[:, None] if x.ndim == 3 else x
        return groups.repeat_interleave(u.shape[1] // groups.shape[1], 1).unbind(-1)

    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, y = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(-1), delta.unbind(-1), steps(B), steps(C), strict=True):
        state = (delta_t[..., None] * A).exp() * state + (delta_t * u_t)[..., None] * B_t
        y.append((state * C_t).sum(-1))
    out = torch.stack(y, -1) if D is None else torch.stack(y, -1) + D[:, None] * u
    return out if z is None else out * F.silu(z), state


def scan_in_parallel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """A parallel prefix scan over the length, channels last.

    `u`, `delta` are `b l k d`, `A` is `k d n`, `B`, `C` are `b l k n`, `D`, `bias` are `k d`; the result is `b l k d`.
    """
    delta = F.softplus(delta + bias)
    decay = torch.exp(delta[..., None] * A)  # b l k d n
    entry = (delta * u)[..., None] * B[..., None, :]
    states = ParallelScan.apply(decay, entry)
    return (states @ C[..., None])[..., 0] + D * u


class ParallelScan(torch.autograd.Function):
    """`h_t = a_t h_{t-1} + x_t` along dimension 1, in two sweeps over a binary tree."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        states = x.clone()
        _sweep(a.clone(), states)
        ctx.save_for_backward(a, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, states = ctx.saved_tensors
        after = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)  # a_{t+1}
        adjoint = grad.flip(1)
        _sweep(after.flip(1), adjoint)
        adjoint = adjoint.flip(1)
        grad_a = torch.zeros_like(a)
        torch.mul(adjoint[:, 1:], states[:, :-1], out=grad_a[:, 1:])
        return grad_a, adjoint


def _sweep(a: Tensor, x: Tensor) -> None:
    """Scan `x` in place, and use `a` up: join neighbours, scan the pairs, and fill the places between them."""
    length = x.shape[1]
    if length == 1:
        return
    first = slice(0, length - length % 2, 2)
    x[:, 1::2].addcmul_(a[:, 1::2], x[:, first])
    a[:, 1::2].mul_(a[:, first])
    _sweep(a[:, 1::2], x[:, 1::2])
    x[:, 2::2].addcmul_(a[:, 2::2], x[:, 1 : length - 1 : 2])


def sequence_channels_first(
    scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """One direction over `u`, `delta`, `z` of `b d l` and `B`, `C` of `b n l`, with the gate of Mamba's block."""
    return scan(u, delta, A, B[:, None], C[:, None], D, delta_bias) * F.silu(z)


def sequence_channels_last(
    scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The same over `b l d` and `b l n`."""
    u, delta, B, C = (x[:, :, None] for x in (u, delta, B, C))  # b l 1 d, b l 1 n
    return scan(u, delta, A[None], B, C, D[None], delta_bias[None])[:, :, 0] * F.silu(z)


def cross_scan_channels_first(
    scan: Scan,
    x: Tensor,  # b d h w
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:  # b h w d
    """Four copies of the map as sequences `b 4 d l`, one scan of `4 d` channels, and the sum in image order."""
    batch, channels, height, width = x.shape
    rank, states = dt_proj_weight.shape[2], A_log.shape[1]
    there = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1).to(torch.promote_types(x.dtype, torch.float32))
    sequences = torch.cat([there, there.flip(-1)], 1)  # b 4 d l
    maps = torch.einsum("bkdl,kcd->bkcl", sequences, x_proj_weight)
    low, B, C = maps.split([rank, states, states], 2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, dt_proj_weight)
    y = scan(
        sequences.flatten(1, 2),
        delta.flatten(1, 2).contiguous(),
        -torch.exp(A_log),
        B.contiguous(),
        C.contiguous(),
        D,
        dt_proj_bias.flatten(),
    ).unflatten(1, (4, channels))  # b 4 d l
    y = y[:, :2] + y[:, 2:].flip(-1)  # b 2 d l
    y = y[:, 0] + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)  # b d l
    return y.transpose(1, 2).reshape(batch, height, width, channels).to(x.dtype)


def cross_scan_channels_last(
    scan: Scan,
    x: Tensor,  # b h w d
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:  # b h w d
    """The same with sequences `b l 4 d`."""
    height, width = x.shape[1:3]
    rank, states = dt_proj_weight.shape[2], A_log.shape[1]
    there = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], 2).to(
        torch.promote_types(x.dtype, torch.float32)
    )
    sequences = torch.cat([there, there.flip(1)], 2)  # b l 4 d
    maps = torch.einsum("blkd,kcd->blkc", sequences, x_proj_weight)
    low, B, C = maps.split([rank, states, states], -1)
    delta = torch.einsum("blkr,kdr->blkd", low, dt_proj_weight)
    A = -torch.exp(A_log).unflatten(0, (4, -1))  # k d n
    y = scan(sequences, delta, A, B, C, D.unflatten(0, (4, -1)), dt_proj_bias)  # b l 4 d
    y = y[:, :, :2] + y[:, :, 2:].flip(1)  # b l 2 d
    rows, columns = y[:, :, 0].unflatten(1, (height, width)), y[:, :, 1].unflatten(1, (width, height))
    return (rows + columns.transpose(1, 2)).to(x.dtype)
