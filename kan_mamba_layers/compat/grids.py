"""Stand-in for the compiled extension ``v2dmamba_scan`` of 2DMamba: a recurrence over the rows and then the columns.

``h[i, j] = exp(delta[i, j] A) h[i-1, j] + r[i, j]`` with ``r[i, j] = exp(delta[i, j] A) r[i, j-1] + delta[i, j] B[i, j]
u[i, j]``, and ``y[i, j] = C[i, j] h[i, j] + D u[i, j]``. The pixels lie row by row in ``l``. Of the states ``x`` only
the last one, ``x[:, :, -1, 1::2]``, is filled.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.compat.extensions import every_state, gradients, pack, widen, with_gate


@torch.no_grad()
def grid_fwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    delta_softplus: bool,
    height: int,
    width: int,
    out_float: bool = True,
) -> list[Tensor]:
    """Stand in for ``v2dmamba_scan.fwd``: ``[out, x]``, and the gated ``out_z`` if ``z`` is given."""
    out, state = _grid_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, height, width)
    results = [out] if z is None else [out, out * F.silu(z.to(out.dtype))]
    out, *gated = (v if out_float else v.to(u.dtype) for v in results)
    return [out, pack(state), *gated]


def grid_bwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    dout: Tensor,  # b d l
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
    height: int,
    width: int,
) -> list[Tensor | None]:
    """Stand in for ``v2dmamba_scan.bwd``, with the results of ``selective_scan_cuda.bwd``."""
    run = partial(_grid_scan, delta_softplus=delta_softplus, height=height, width=width)
    out_z, grads = gradients(run, (u, delta, A, B, C, D, z, delta_bias), dout)
    return with_gate(grads, dz, out_z if recompute_out_z else None)


def _grid_scan(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    delta_softplus: bool,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # b d l, b d n
    if height * width != u.shape[-1]:
        raise ValueError(f"height {height} times width {width} must be the length of u, got {u.shape[-1]}")
    u = widen(u)
    delta = widen(delta) if delta_bias is None else widen(delta) + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta

    def rows(x: Tensor) -> Tensor:  # b ... l -> b*h ... w
        return x.unflatten(-1, (height, width)).movedim(-2, 1).flatten(0, 1)

    along, _ = every_state(rows(u), rows(delta), A, rows(B), None, False)  # b*h d n w
    entries = along.unflatten(0, (-1, height)).unbind(1)  # of b d n w
    steps = delta.unflatten(-1, (height, width)).unbind(2)  # of b d w
    state, columns = torch.zeros_like(entries[0]), []
    for step, entry in zip(steps, entries, strict=True):
        state = torch.exp(step[:, :, None] * A[..., None]) * state + entry  # b d n w
        columns.append(state)
    found = torch.stack(columns, 3).flatten(3)  # b d n l
    y = (found * widen(C).repeat_interleave(u.shape[1] // C.shape[1], 1)).sum(2)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z.to(y.dtype)), state[..., -1]
