"""Stand-ins for ``mamba_ssm.ops.triton.layernorm_gated``: normalisation of groups of channels, with a gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_divisible
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype


def layernorm_fn(
    x: Tensor,  # ... c
    weight: Tensor,  # c
    bias: Tensor | None,  # c
    z: Tensor | None = None,  # ... c
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Return ``norm(x) * silu(z)``, or ``norm(x * silu(z))`` without ``norm_before_gate``, in float32 at least.

    The statistics are those of ``group_size`` neighbouring channels, by default of all.
    """
    size, dtype = group_size or x.shape[-1], compute_dtype(x)
    check_divisible("the channels of x", x.shape[-1], "group_size", size)
    with autocast_off(x):
        wide = x.to(dtype)
        gate = None if z is None else F.silu(z.to(dtype))
        if gate is not None and not norm_before_gate:
            wide = wide * gate
        groups = wide.unflatten(-1, (-1, size))  # ... groups size
        normalize = F.rms_norm if is_rms_norm else F.layer_norm
        y = normalize(groups, (size,), eps=eps).flatten(-2) * weight.to(dtype)
        y = y if bias is None else y + bias.to(dtype)
        if gate is not None and norm_before_gate:
            y = y * gate
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,  # ... c
    weight: Tensor,  # c
    bias: Tensor | None,  # c
    z: Tensor | None = None,  # ... c
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`layernorm_fn` with the root of the mean square alone."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class LayerNorm(nn.Module):
    """Stand in for ``LayerNorm`` of that module, whose ``forward`` takes a gate."""

    _is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self._is_rms_norm else nn.Parameter(torch.empty_like(self.weight))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to 1 and the bias to 0."""
        nn.init.ones_(self.weight)
        if isinstance(self.bias, Tensor):
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:  # ... c
        options = (self.eps, self.group_size, self.norm_before_gate, self._is_rms_norm)
        return layernorm_fn(x, self.weight, self.bias, z, *options)  # type: ignore[arg-type]


class RMSNorm(LayerNorm):
    """Stand in for ``RMSNorm`` of that module, which has no bias."""

    _is_rms_norm = True
