"""Stand-ins for the compiled extensions ``selective_scan_cuda`` and ``..._core``, ``..._oflex``, ``..._oflex_rh``.

Autograd does not see into an extension: ``fwd`` builds no graph, and ``bwd`` receives the inputs again and builds its
own. Of the states ``x`` that ``fwd`` hands to ``bwd``, callers read only the last one.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.compat.functions import scan
from kan_mamba_layers.compat.targets import put
from kan_mamba_layers.ops.precision import compute_dtype


@torch.no_grad()
def oflex_fwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d' l, d' divides d
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    delta_bias: Tensor | None,  # d'
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = False,
) -> list[Tensor]:
    """Stand in for ``fwd`` of ``selective_scan_cuda_oflex`` and ``selective_scan_cuda_core``: ``[out, x]``."""
    out, state = _oflex_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [out if out_float else out.to(u.dtype), pack(state)]


def oflex_bwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d' l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    delta_bias: Tensor | None,  # d'
    dout: Tensor,  # b d l
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """Stand in for ``bwd`` of the same two: ``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``, None for absent inputs."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    return gradients(partial(_oflex_scan, delta_softplus=delta_softplus), inputs, dout)[1]


@torch.no_grad()
def mamba_fwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b g n l
    C: Tensor,  # d n | b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    delta_softplus: bool,
) -> list[Tensor]:
    """Stand in for ``selective_scan_cuda.fwd``: ``[out, x]``, and the gated ``out_z`` if ``z`` is given."""
    out, state = scan(widen(u), delta, A, B, C, D, None, delta_bias, delta_softplus)
    gated = [] if z is None else [(out * F.silu(z.to(out.dtype))).to(u.dtype)]
    return [out.to(u.dtype), pack(state), *gated]


def mamba_bwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b g n l
    C: Tensor,  # d n | b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    dout: Tensor,  # b d l
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """Stand in for ``selective_scan_cuda.bwd``: seven gradients, then ``dz`` if ``z`` is given, ``out_z`` on request.

    As in the original, the gradient of ``z`` is written into ``dz`` if the caller passes one.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    run = partial(scan, delta_softplus=delta_softplus)
    out_z, grads = gradients(lambda u, *rest: run(widen(u), *rest), inputs, dout)
    return with_gate(grads, dz, out_z.to(u.dtype) if recompute_out_z else None)


def with_gate(grads: list[Tensor | None], dz: Tensor | None, out_z: Tensor | None) -> list[Tensor | None]:
    """The gradients with that of ``z``, if there is one, at the end and in ``dz``, and ``out_z`` behind it if given."""
    grad_z = grads.pop(6)
    if grad_z is None:
        return grads
    grads.append(put("dz", grad_z, dz, "b, d, l"))
    return grads if out_z is None else [*grads, out_z]


@torch.no_grad()
def states_fwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    D: Tensor | None,
    delta_bias: Tensor | None,  # d
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = False,
) -> list[Tensor]:
    """Stand in for ``selective_scan_cuda_oflex_rh.fwd``: the states (b d n l) and ``x``; ``D`` is unused."""
    states, last = every_state(u, delta, A, B, delta_bias, delta_softplus)
    return [states if out_float else states.to(u.dtype), pack(last)]


def states_bwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    D: Tensor | None,
    delta_bias: Tensor | None,  # d
    dout: Tensor,  # b d n l
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """Stand in for ``selective_scan_cuda_oflex_rh.bwd``: ``[du, ddelta, dA, dB, dD, ddelta_bias]``, ``dD`` being 0."""
    run = partial(every_state, delta_softplus=delta_softplus)
    grads = gradients(run, (u, delta, A, B, delta_bias), dout)[1]
    return [*grads[:4], None if D is None else torch.zeros_like(D), grads[4]]


def every_state(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    delta_bias: Tensor | None,  # d
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # b d n l, b d n
    """Every state as a channel of its own, whose output is its state: B and C have g n groups, and C is 1."""
    groups, states = B.shape[1], B.shape[2]

    def per_state(x: Tensor, dim: int) -> Tensor:  # d -> g n d/g, flat
        x = x.unflatten(dim, (groups, -1)).unsqueeze(dim + 1)
        sizes = [-1] * x.ndim
        sizes[dim + 1] = states
        return x.expand(sizes).flatten(dim, dim + 2)

    rates = A.unflatten(0, (groups, -1)).mT.flatten()[:, None]  # g*n*d/g 1
    entries = B.flatten(1, 2)[:, :, None]  # b g*n 1 l
    bias = None if delta_bias is None else per_state(delta_bias, 0)
    steps, ones = per_state(delta, 1), torch.ones_like(entries)
    y, last = scan(per_state(widen(u), 1), steps, rates, entries, ones, None, None, bias, delta_softplus)
    y = y.unflatten(1, (groups, states, -1)).transpose(2, 3).flatten(1, 2)  # b d n l
    last = last[..., 0].unflatten(1, (groups, states, -1)).transpose(2, 3).flatten(1, 2)  # b d n
    return y.contiguous(), last.contiguous()


def _oflex_scan(
    u: Tensor,
    delta: Tensor,  # b d' l
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,  # d'
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The scan where neighbouring channels share a row of ``delta``."""
    times = u.shape[1] // delta.shape[1]
    delta = delta.repeat_interleave(times, 1)  # b d l
    bias = None if delta_bias is None else delta_bias.repeat_interleave(times)  # d
    return scan(widen(u), delta, A, B, C, D, None, bias, delta_softplus)


def gradients(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The output of a scan and the gradient with respect to every input that is not None."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        out, _ = run(*leaves)
        given = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], grad.to(out.dtype)))
    return out.detach(), [None if x is None else next(given).contiguous() for x in leaves]


def pack(state: Tensor) -> Tensor:  # b d n -> b d 1 2n
    """Put the last state where callers look for it: ``x[:, :, -1, 1::2]``."""
    return torch.stack((torch.zeros_like(state), state), -1).flatten(-2)[:, :, None]


def widen(u: Tensor) -> Tensor:
    """In float32 at least."""
    return u.to(compute_dtype(u))
