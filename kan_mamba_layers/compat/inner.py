"""Stand-ins for the functions of ``mamba_ssm`` that run a Mamba block between its input and output projections.

``xz`` is the result of the input projection: the input of the convolution, then the gate. ``B`` and ``C`` are made from
the convolved input where they are None.
"""

from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_shape
from kan_mamba_layers.compat.convolution import causal_conv1d_fn
from kan_mamba_layers.compat.functions import scan


class Scanned(NamedTuple):
    """The inputs of a scan other than ``A``, ``D`` and the bias of the steps."""

    x: Tensor  # b d l
    delta: Tensor  # b d l
    B: Tensor  # d n | b n l | b g n l
    C: Tensor  # d n | b n l | b g n l
    z: Tensor  # b d l

    def run(
        self, A: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, *, backwards: bool = False
    ) -> Tensor:  # b d l
        """The scan, from the end to the beginning if ``backwards``."""
        x, delta, B, C, z = (v.flip(-1) if backwards and v.ndim > 2 else v for v in self)
        y, _ = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return y.flip(-1) if backwards else y


def mamba_inner_fn(
    xz: Tensor,  # b 2d l
    conv1d_weight: Tensor,  # d 1 w
    conv1d_bias: Tensor | None,  # d
    x_proj_weight: Tensor,  # r+2n d
    delta_proj_weight: Tensor,  # d r
    out_proj_weight: Tensor,  # c d
    out_proj_bias: Tensor | None,  # c
    A: Tensor,  # d n
    B: Tensor | None = None,  # d n | b n l | b g n l
    C: Tensor | None = None,  # d n | b n l | b g n l
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    B_proj_bias: Tensor | None = None,  # n
    C_proj_bias: Tensor | None = None,  # n
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,  # n
    c_rms_weight: Tensor | None = None,  # n
    dt_rms_weight: Tensor | None = None,  # d
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # b l c
    """Convolution, scan, gate and output projection; ``checkpoint_lvl`` tunes the original and has no effect."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    x, delta, b, c, z = _scanned(xz, *weights, A, B, C, B_proj_bias, C_proj_bias)
    if b_rms_weight is not None:
        b = _rms_norm(b, b_rms_weight, b_c_dt_rms_eps)
    if c_rms_weight is not None:
        c = _rms_norm(c, c_rms_weight, b_c_dt_rms_eps)
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    y = Scanned(x, delta, b, c, z).run(A, D, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,  # b 2d l
    conv1d_weight: Tensor,  # d 1 w
    conv1d_bias: Tensor | None,  # d
    x_proj_weight: Tensor,  # r+2n d
    delta_proj_weight: Tensor,  # d r
    A: Tensor,  # d n
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    B_proj_bias: Tensor | None = None,  # n
    C_proj_bias: Tensor | None = None,  # n
    delta_softplus: bool = True,
) -> Tensor:  # b d l
    """The same without the output projection, as in Vim."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    scanned = _scanned(xz, *weights, A, B, C, B_proj_bias, C_proj_bias)
    return scanned.run(A, D, delta_bias, delta_softplus)


def bimamba_inner_fn(
    xz: Tensor,  # b 2d l
    conv1d_weight: Tensor,  # d 1 w
    conv1d_bias: Tensor | None,  # d
    x_proj_weight: Tensor,  # r+2n d
    delta_proj_weight: Tensor,  # d r
    out_proj_weight: Tensor,  # c d
    out_proj_bias: Tensor | None,  # c
    A: Tensor,  # d n
    A_b: Tensor,  # d n
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    B_proj_bias: Tensor | None = None,  # n
    C_proj_bias: Tensor | None = None,  # n
    delta_softplus: bool = True,
) -> Tensor:  # b l c
    """Vim's first form: one convolution, then a scan forwards with ``A`` and one backwards with ``A_b``."""
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight)
    scanned = _scanned(xz, *weights, A, B, C, B_proj_bias, C_proj_bias)
    y = scanned.run(A, D, delta_bias, delta_softplus)
    y = y + scanned.run(A_b, D, delta_bias, delta_softplus, backwards=True)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def _scanned(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> Scanned:
    channels, width = conv1d_weight.shape[0], conv1d_weight.shape[-1]
    check_shape("xz", xz, ("any", 2 * channels, "any"), "b, 2d, l")
    x, z = xz.chunk(2, 1)  # b d l, b d l
    x = cast(Tensor, causal_conv1d_fn(x, conv1d_weight.reshape(channels, width), conv1d_bias, activation="silu"))
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    projected = F.linear(x.mT, x_proj_weight)  # b l r+2n; B and C are not in it where they are given
    delta = F.linear(projected[..., :rank], delta_proj_weight).mT  # b d l
    if B is None:
        B = _add(projected[..., rank : rank + states], B_proj_bias).mT  # b n l
    if C is None:
        C = _add(projected[..., projected.shape[-1] - states :], C_proj_bias).mT  # b n l
    return Scanned(x, delta, B, C, z)


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # b n l
    """Over the channels or states of every position."""
    return F.rms_norm(x.mT, weight.shape, weight, eps).mT
