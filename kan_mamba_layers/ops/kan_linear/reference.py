"""The KAN linear map as one matrix product: the definition and the oracle of the other backends."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.bspline import closed_form, cox_de_boor, end_slopes


def basis(x: Tensor, grid: Tensor, spline_order: int, uniform: bool, extrapolation: str) -> Tensor:  # ... i g+s
    """Bases of ``x``; outside the interval of the grid they go to zero, stay, or go on along their tangent."""
    if extrapolation == "zero":
        return closed_form(x, grid, spline_order) if uniform else cox_de_boor(x, grid, spline_order)
    low, high = grid[:, spline_order], grid[:, -spline_order - 1]
    held = torch.clamp(x, low, high)
    last = grid.shape[1] - spline_order - 2
    bases = closed_form(held, grid, spline_order) if uniform else cox_de_boor(held, grid, spline_order, last)
    if extrapolation == "linear":
        below, above = end_slopes(grid, spline_order)  # i g+s
        bases = bases - torch.relu(low - x)[..., None] * below + torch.relu(x - high)[..., None] * above
    return bases


def is_silu(base_activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether it is the function that the engines compute themselves."""
    return base_activation is F.silu or type(base_activation) is torch.nn.SiLU


def activate(x: Tensor, base_activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an activation to a copy: it may work in place."""
    return F.silu(x) if is_silu(base_activation) else base_activation(x.clone())


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
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is too coarse for the bases
    bases = basis(wide, grid.to(wide.dtype), spline_order, uniform, extrapolation)  # ... i g+s
    features = torch.cat([activate(wide, base_activation)[..., None], bases], -1).to(x.dtype)  # ... i 1+g+s
    weight = torch.cat([base_weight[..., None], spline_weight], -1)  # o i 1+g+s
    return F.linear(features.flatten(-2), weight.flatten(1), bias)
