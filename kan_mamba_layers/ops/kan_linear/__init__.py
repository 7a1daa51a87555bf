"""The KAN linear map: a learned spline on every edge."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_choice, check_same_device, check_shape, check_tensor
from kan_mamba_layers.ops.backend import Backend, check_backend, select
from kan_mamba_layers.ops.bspline import EXTRAPOLATIONS, Extrapolation, check_features
from kan_mamba_layers.ops.kan_linear import reference
from kan_mamba_layers.ops.kan_linear.call import KANCall, activate, is_silu
from kan_mamba_layers.ops.kan_linear.fused import fused_kan_linear
from kan_mamba_layers.ops.precision import autocast_is_on, check_dtype, compute_dtype
from kan_mamba_layers.ops.spacing import uniform_if_known
from kan_mamba_layers.ops.subclasses import accepts_subclasses

__all__ = ["kan_linear"]


@accepts_subclasses(jagged=True)
def kan_linear(
    x: Tensor,  # ... i
    base_weight: Tensor,  # o i
    spline_weight: Tensor,  # o i g+s
    spline_scaler: Tensor | None,  # o i
    grid: Tensor,  # i g+2s+1
    *,
    bias: Tensor | None = None,  # o
    base_activation: Callable[[Tensor], Tensor] = F.silu,
    extrapolation: Extrapolation = "zero",
    uniform: bool | None = False,
    backend: Backend = "auto",
) -> Tensor:  # ... o
    r"""Apply a KAN layer: a learned function on every edge, summed at every output.

    .. math::
        y_o = b_o + \sum_i w^\mathrm{base}_{oi}\, \beta(x_i)
            + \sum_i \gamma_{oi} \sum_j w^\mathrm{spline}_{oij} B_j(x_i)

    Args:
        x: input, shape ``(..., i)``.
        base_weight: weights of the activation, shape ``(o, i)``.
        spline_weight: spline coefficients, shape ``(o, i, g + s)``.
        spline_scaler: a factor for each edge's spline, shape ``(o, i)``, or None for 1.
        grid: knots, shape ``(i, g + 2 s + 1)``; the degree ``s`` follows from the shapes.
        bias: shape ``(o,)``.
        base_activation: the elementwise function :math:`\beta`.
        extrapolation: the spline outside the interval :math:`[t_s, t_{g+s}]` of the grid. ``"zero"``: its bases fade to
            zero within ``s`` intervals, as in other KAN libraries; ``"clamp"``: it keeps its end value; ``"linear"``:
            it continues along its end tangent.
        uniform: True promises equally spaced knots; see :func:`bspline_basis`. None decides by their values, also where
            a compiled or exported graph runs: on a CPU at every call, on an accelerator whenever ``grid`` is another
            tensor or PyTorch has counted a write to it.
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` (a few rows at a time), ``"cpu"`` or ``"triton"``, which
            runs degrees 1 to 5. Only ``"reference"`` has derivatives with respect to ``grid`` and in forward mode.
            See :func:`resolve`.

    Returns:
        Output of shape ``(..., o)`` in ``x``'s dtype, under autocast in autocast's.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape does not fit, a weight has another dtype than ``x`` without autocast, tensors are on several
            devices, or an option is unknown.

    Numerics:
        Bases and activation are computed in float32 (float64 for float64 input) and rounded at most once, for the
        product, which accumulates in float32 at least. All backends but ``"reference"`` save only their arguments for
        the backward pass. They too have derivatives of any order: those of a gradient are computed as ``"reference"``
        does, with its time and memory.

    Example:
        >>> import torch
        >>> grid = torch.linspace(-2.2, 2.2, 12).expand(4, -1)
        >>> y = kan_linear(torch.randn(2, 7, 4), torch.randn(6, 4), torch.randn(6, 4, 8), None, grid, uniform=True)
        >>> y.shape
        torch.Size([2, 7, 6])

    References:
        Liu et al., KAN, arXiv 2404.19756, equations 2.10 and 2.11.
    """
    check_shape("spline_weight", spline_weight, ("any", "any", "any"), "o, i, g+s")
    out_features, in_features, bases = spline_weight.shape
    check_shape("base_weight", base_weight, (out_features, in_features), "o, i")
    check_shape("grid", grid, (in_features, "any"), "i, g+2s+1")
    spline_order = grid.shape[1] - 1 - bases
    if not 1 <= spline_order < bases:
        raise ValueError(
            f"grid with {grid.shape[1]} knots does not fit spline_weight with {bases} bases: a spline of degree s >= 1 "
            "on g >= 1 intervals has g + s bases and g + 2s + 1 knots; build both from the same g and s"
        )
    if spline_scaler is not None:
        check_shape("spline_scaler", spline_scaler, (out_features, in_features), "o, i")
    if bias is not None:
        check_shape("bias", bias, (out_features,), "o")
    weights = {"base_weight": base_weight, "spline_weight": spline_weight, "spline_scaler": spline_scaler, "bias": bias}
    check_backend("kan_linear", backend)
    check_choice("extrapolation", extrapolation, EXTRAPOLATIONS)
    check_tensor("x", x)
    check_features("x", x, in_features)
    check_same_device("x", x, **weights, grid=grid)
    autocast = autocast_is_on(x)
    if not autocast:  # it converts weights of any dtype
        for name, weight in weights.items():
            check_dtype("x", x, name, weight)
    chosen = select("kan_linear", backend, x, spline_weight=spline_weight, grid=grid)
    uniform = uniform_if_known(grid) if uniform is None else uniform
    scaled = spline_weight if spline_scaler is None else spline_weight * spline_scaler.unsqueeze(-1)
    casts = autocast and x.dtype != torch.float64  # as for PyTorch's own products
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    base_weight, scaled = base_weight.to(dtype), scaled.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if chosen == "reference":
        return reference.kan_linear(x, base_weight, scaled, grid, bias, base_activation, extrapolation, bool(uniform))
    wide = compute_dtype(x)
    rows = x.reshape(-1, in_features)  # rows i
    call = KANCall(
        x=rows,
        activated=None if is_silu(base_activation) else activate(rows.to(wide), base_activation).to(rows.dtype),
        base_weight=base_weight,
        spline_weight=scaled,
        grid=grid.to(wide),
        bias=bias,
        extrapolation=extrapolation,
        uniform=uniform,
    )
    (y,) = fused_kan_linear(call, chosen)  # rows o
    return y.reshape(*x.shape[:-1], out_features)
