r"""Stand-ins for ``mamba_ssm.ops.triton.ssd_combined``: the scan of Mamba-2, in plain PyTorch.

Its recurrence has one rate per head, :math:`h_t = e^{\delta_t A} h_{t-1} + \delta_t x_t B_t^\top`, so the outputs of a
chunk are products of matrices (Dao and Gu, arXiv 2405.21060, section 6):

.. math::
    y_i = \sum_{j \le i} e^{a_{j+1} + \dots + a_i}\, (C_i^\top B_j)\, \delta_j x_j
        + e^{a_1 + \dots + a_i}\, h C_i , \qquad a_t = \delta_t A ,

with :math:`h` the state that enters the chunk. These states are such sums too, over the chunks before, so that there
is no loop; their memory grows with the square of the number of chunks, which have 64 positions. All of it runs in
float32 at least.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_divisible, check_shape
from kan_mamba_layers.compat.convolution import causal_conv1d_fn
from kan_mamba_layers.compat.gated_norm import rmsnorm_fn
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype

_CHUNK = 64
_NO_LIMIT = (0.0, math.inf)

Scanned = Tensor | tuple[Tensor, ...]


def mamba_chunk_scan_combined(
    x: Tensor,  # b l h p
    dt: Tensor,  # b l h
    A: Tensor,  # h
    B: Tensor,  # b l g n
    C: Tensor,  # b l g n
    chunk_size: int,
    D: Tensor | None = None,  # h | h p
    z: Tensor | None = None,  # b l h p
    dt_bias: Tensor | None = None,  # h
    initial_states: Tensor | None = None,  # b h p n
    seq_idx: Tensor | None = None,  # b l
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Scanned:  # b l h p
    """Scan sequences; ``h / g`` neighbouring heads share ``B`` and ``C``, and ``z`` is a gate.

    ``seq_idx`` numbers the sequences packed into a row: no state passes from one to the next. With
    ``return_final_states`` the last states (b h p n) are returned too. ``chunk_size`` and ``state_dtype`` tune the
    original and have no effect. The states of sequences of several lengths (``return_varlen_states``) are not returned,
    and ``cu_seqlens``, which as in the original counts for these alone, is not read.
    """
    if return_varlen_states:
        raise NotImplementedError("return_varlen_states=True has no stand-in; scan the sequences one by one")
    check_shape("x", x, ("any",) * 4, "b, l, h, p")
    batch, length, heads, width = x.shape
    if length < 1:
        raise ValueError(f"x must have at least one position, got shape {tuple(x.shape)}; pass l >= 1")
    groups, states = B.shape[2:] if B.ndim == 4 else (1, 1)
    for name, value, shape, letters in (
        ("dt", dt, (batch, length, heads), "b, l, h"),
        ("A", A, (heads,), "h"),
        ("B", B, (batch, length, "any", "any"), "b, l, g, n"),
        ("C", C, (batch, length, groups, states), "b, l, g, n"),
        ("z", z, (batch, length, heads, width), "b, l, h, p"),
        ("dt_bias", dt_bias, (heads,), "h"),
        ("initial_states", initial_states, (batch, heads, width, states), "b, h, p, n"),
    ):
        if value is not None:
            check_shape(name, value, shape, letters)
    check_divisible("the heads of x", heads, "the groups of B", groups)
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must have shape (b, l) = {(batch, length)}, got {tuple(seq_idx.shape)}; reshape it")
    if D is not None:
        check_shape("D", D, (heads, width)[: D.ndim], "h, p" if D.ndim == 2 else "h")
    dtype = compute_dtype(x)
    with autocast_off(x):
        wide, dt, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
        step = dt if dt_bias is None else dt + dt_bias.to(dtype)
        step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)  # b l h
        state = None if initial_states is None else initial_states.to(dtype)
        y, last = _scan(wide * step[..., None], step * A, B, C, state, seq_idx)
        if D is not None:
            y = y + (D.to(dtype) if D.ndim == 2 else D.to(dtype)[:, None]) * wide
        y = y if z is None else y * F.silu(z.to(dtype))
    y = y.to(x.dtype)
    return (y, last) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,  # b l 2m+2d+2gn+h
    conv1d_weight: Tensor,  # d+2gn w
    conv1d_bias: Tensor | None,  # d+2gn
    dt_bias: Tensor,  # h
    A: Tensor,  # h
    D: Tensor,  # h | h p
    chunk_size: int,
    initial_states: Tensor | None = None,  # b h p n
    seq_idx: Tensor | None = None,  # b l
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,  # d
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,  # o m+d
    outproj_bias: Tensor | None = None,  # o
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Scanned:  # b l o
    """Split the result of an input projection, convolve, scan, gate, normalise and project.

    Its parts are a gated layer of ``m`` channels without a scan (first the gate), the gate ``z``, what is convolved
    (``x``, ``B`` and ``C``), and the step sizes.
    """
    if D.ndim == 1 and headdim is None:
        raise ValueError("D has one value per head, so headdim is not known; pass headdim")
    heads, width = len(D), headdim if D.ndim == 1 else D.shape[1]
    inner, convolved = heads * width, len(conv1d_weight)  # type: ignore[operator]
    plain = (zxbcdt.shape[-1] - inner - convolved - heads) // 2
    gate, skipped, z, xBC, dt = zxbcdt.split([plain, plain, inner, convolved, heads], -1)
    xBC = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT  # type: ignore[union-attr]
    x, B, C = xBC.split([inner, (convolved - inner) // 2, (convolved - inner) // 2], -1)
    options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit, "seq_idx": seq_idx}
    x, B, C = x.unflatten(-1, (heads, -1)), *(v.unflatten(-1, (ngroups, -1)) for v in (B, C))
    if rmsnorm_weight is None:
        options["z"] = z.unflatten(-1, (heads, -1))
    y, last = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, initial_states=initial_states, return_final_states=True, **options
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if plain:
        y = torch.cat([F.silu(gate) * skipped, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y


def _scan(
    inputs: Tensor,  # b l h p: x times its step sizes
    rates: Tensor,  # b l h: the logarithm of what is left of the state after a step
    B: Tensor,  # b l g n
    C: Tensor,  # b l g n
    state: Tensor | None,  # b h p n
    seq_idx: Tensor | None,  # b l
) -> tuple[Tensor, Tensor]:  # b l h p, b h p n
    length, groups = inputs.shape[1], B.shape[2]
    chunks = (length + _CHUNK - 1) // _CHUNK
    padding = chunks * _CHUNK - length  # steps of size 0, which change nothing
    inputs, rates, B, C = (_chunked(v, padding) for v in (inputs, rates, B, C))  # b c q ...
    inputs, rates = inputs.unflatten(3, (groups, -1)), rates.unflatten(3, (groups, -1))  # b c q g r p, b c q g r
    shape = (*inputs[:, 0, 0].shape, B.shape[-1])  # b g r p n
    state = inputs.new_zeros(shape) if state is None else state.reshape(shape)
    decay, entering = _decays(rates), rates.cumsum(2).exp()  # b c i j g r, b c i g r
    between = _decays(F.pad(rates.sum(2), (0, 0, 0, 0, 1, 0))[:, None])[:, 0]  # b c+1 c+1 g r: from chunk to chunk
    if seq_idx is not None:
        number = _numbers(seq_idx, padding)  # b c q
        ends = torch.cat([number[:, :1, 0], number[:, :, -1]], 1)  # b c+1: whose state enters each chunk
        decay = decay * _equal(number[:, :, :, None], number[:, :, None])
        entering = entering * _equal(number, ends[:, :-1, None])
        between = between * _equal(ends[:, :, None], ends[:, None])
    scores = torch.einsum("bcign,bcjgn->bcijg", C, B)
    y = torch.einsum("bcijgr,bcjgrp->bcigrp", scores[..., None] * decay, inputs)
    made = torch.einsum("bcjgn,bcjgrp->bcgrpn", B, decay[:, :, -1, ..., None] * inputs)
    states = torch.einsum("bcjgr,bjgrpn->bcgrpn", between, torch.cat([state[:, None], made], 1))  # b c+1 g r p n
    y = y + entering[..., None] * torch.einsum("bcign,bcgrpn->bcigrp", C, states[:, :-1])
    return y.flatten(3, 4).flatten(1, 2)[:, :length], states[:, -1].flatten(1, 2)


def _decays(rates: Tensor) -> Tensor:  # b c q g r -> b c i j g r
    """What is left at position ``i`` of what entered at ``j <= i``.

    Each sum of rates is added up for itself: a difference of two longer sums would lose its digits.
    """
    size = rates.shape[2]
    later = torch.ones(size, size, dtype=torch.bool, device=rates.device).tril(-1)[:, :, None, None]  # i j 1 1
    sums = rates[:, :, :, None].expand(-1, -1, -1, size, -1, -1).masked_fill(~later, 0).cumsum(2)
    return sums.masked_fill(later.transpose(0, 1), -math.inf).exp()


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b)[..., None, None]


def _chunked(x: Tensor, padding: int) -> Tensor:  # b l ... -> b c q ...
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)).unflatten(1, (-1, _CHUNK))


def _numbers(seq_idx: Tensor, padding: int) -> Tensor:  # b l -> b c q
    """The number of the sequence of each position; the padding belongs to the last."""
    return torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, _CHUNK))
