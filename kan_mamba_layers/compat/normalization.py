"""Stand-ins for ``mamba_ssm.ops.triton.layer_norm`` and its predecessor ``layernorm``, in plain PyTorch.

The sum of ``x`` and ``residual`` and its statistics are computed in float32 at least. With ``prenorm=True`` the sum is
returned too, in the dtype of ``residual``; where none is given, in float32 if ``residual_in_fp32``, else in ``x``'s.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers.ops.precision import autocast_off, compute_dtype

Normalized = Tensor | tuple[Tensor | None, ...]


def layer_norm_fn(
    x: Tensor,  # ... c
    weight: Tensor,  # c
    bias: Tensor | None,  # c
    residual: Tensor | None = None,  # ... c
    x1: Tensor | None = None,  # ... c
    weight1: Tensor | None = None,  # c
    bias1: Tensor | None = None,  # c
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,  # ...
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Normalized:
    """Normalise ``dropout(rowscale * x) + dropout(x1) + residual``, with a second weight if ``weight1`` is given.

    Returns the normalised values, those of the second weight, the sum (if ``prenorm``), and the two dropout masks (if
    ``return_dropout_mask``), True where a value was kept.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale cannot be combined with x1; scale x before the call")
    dtype = compute_dtype(x)
    with autocast_off(x):
        scaled = x.to(dtype) if rowscale is None else x.to(dtype) * rowscale.to(dtype)[..., None]
        total, kept = _drop(scaled, dropout_p)
        kept1 = None
        if x1 is not None:
            more, kept1 = _drop(x1.to(dtype), dropout_p)
            total = total + more
        if residual is not None:
            total = total + residual.to(dtype)
        results: list[Tensor | None] = [_normalize(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
        if weight1 is not None:
            results.append(_normalize(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        own = dtype if residual_in_fp32 else x.dtype
        results.append(total.to(own if residual is None else residual.dtype))
    if return_dropout_mask:
        results += [kept, kept1]
    return tuple(results) if len(results) > 1 else results[0]  # type: ignore[return-value]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Normalized:
    """:func:`layer_norm_fn` without subtracting the mean."""
    inputs = (x, weight, bias, residual, x1, weight1, bias1)
    options = (eps, dropout_p, rowscale, prenorm, residual_in_fp32)
    return layer_norm_fn(*inputs, *options, is_rms_norm=True, return_dropout_mask=return_dropout_mask)


def layer_norm_fwd(
    x: Tensor,  # ... c
    weight: Tensor,  # c
    bias: Tensor | None,  # c
    eps: float,
    residual: Tensor | None = None,  # ... c
    *,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
) -> tuple[Normalized]:
    """Stand in for ``_layer_norm_fwd``, which ``mamba_ssm`` calls for the first of its results, the normalised values.

    ``residual_dtype`` is ignored: it concerns a result that is not returned.
    """
    return (layer_norm_fn(x, weight, bias, residual, eps=eps, is_rms_norm=is_rms_norm),)


def layernorm_layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Normalized:
    """Stand in for the function of the module ``layernorm``, whose arguments are in another order."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )


def layernorm_rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normalized:
    """Stand in for the function of the module ``layernorm``, whose arguments are in another order."""
    return layernorm_layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


class RMSNorm(nn.Module):
    """Stand in for ``RMSNorm``: root-mean-square normalisation with a weight, after an optional residual addition.

    Version 1 has no ``dropout_p``: a device or None in its place is ``device``, and what follows it ``dtype``.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: Any = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dropout_p is None or isinstance(dropout_p, str | torch.device):
            dropout_p, device, dtype = 0.0, dropout_p, device if dtype is None else dtype
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Normalized:
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=dropout_p,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if p == 0:
        return x, None
    kept = torch.rand_like(x) >= p
    scaled = x / (1 - p) if p < 1 else x
    return scaled.masked_fill(~kept, 0), kept  # not a product, in which infinity times 0 is NaN


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias
