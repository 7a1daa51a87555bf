"""The KAN linear map as one matrix product: the definition and the oracle of the other backends."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.bspline import basis
from kan_mamba_layers.ops.kan_linear.call import activate
from kan_mamba_layers.ops.precision import compute_dtype


def kan_linear(
    x: Tensor,  # ... i
    base_weight: Tensor,  # o i
    spline_weight: Tensor,  # o i g+s
    grid: Tensor,  # i g+2s+1
    bias: Tensor | None,
    base_activation: Callable[[Tensor], Tensor],
    extrapolation: str,
    uniform: bool,
) -> Tensor:  # ... o
    """``y_o = sum_i base_oi act(x_i) + sum_ij spline_oij B_j(x_i) + bias_o`` as one product."""
    spline_order = grid.shape[-1] - 1 - spline_weight.shape[-1]
    wide = x.to(compute_dtype(x))  # half precision is too coarse for the bases
    bases = basis(wide, grid.to(wide.dtype), spline_order, uniform, extrapolation)  # ... i g+s
    features = torch.cat([activate(wide, base_activation)[..., None], bases], -1).to(base_weight.dtype)  # ... i 1+g+s
    weight = torch.cat([base_weight[..., None], spline_weight], -1)  # o i 1+g+s
    return F.linear(features.flatten(-2), weight.flatten(1), bias)
