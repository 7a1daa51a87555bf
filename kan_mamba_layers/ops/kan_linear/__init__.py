"""B-spline bases and the KAN linear map made of them."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_choice, check_int, check_shape, check_tensor
from kan_mamba_layers.ops.autocast import autocast_is_on
from kan_mamba_layers.ops.backend import Backend, resolve
from kan_mamba_layers.ops.kan_linear import reference
from kan_mamba_layers.ops.kan_linear.library import fused_kan_linear

__all__ = ["Extrapolation", "bspline_basis", "kan_linear"]

Extrapolation = Literal["zero", "clamp", "linear"]
_EXTRAPOLATIONS = ("zero", "clamp", "linear")


def bspline_basis(
    x: Tensor,  # ... i
    grid: Tensor,  # i g+2s+1
    spline_order: int,
    *,
    extrapolation: Extrapolation = "zero",
    uniform: bool = False,
) -> Tensor:  # ... i g+s
    r"""Evaluate all B-spline bases of each feature.

    With the knots :math:`t_0 \le \dots \le t_{g+2s}` of a feature, :math:`B_{j,0}` is 1 on :math:`[t_j, t_{j+1})` and

    .. math::
        B_{j,p}(x) = \frac{x - t_j}{t_{j+p} - t_j} B_{j,p-1}(x)
                   + \frac{t_{j+p+1} - x}{t_{j+p+1} - t_{j+1}} B_{j+1,p-1}(x), \qquad p = 1 \dots s .

    The bases are non-negative, sum to 1 on :math:`[t_s, t_{g+s}]`, and vanish outside :math:`[t_0, t_{g+2s}]`.

    Args:
        x: features, shape ``(..., i)``.
        grid: knots in ascending order, one row per feature, shape ``(i, g + 2 s + 1)``: ``g`` intervals and ``s`` more
            on either side.
        spline_order: degree ``s >= 1``; 3 for cubics.
        extrapolation: the bases outside :math:`[t_s, t_{g+s}]`; see :func:`kan_linear`.
        uniform: promises that the knots of each row are equally spaced, which allows the faster closed form.

    Returns:
        Bases of shape ``(..., i, g + s)`` in ``x``'s dtype.

    Raises:
        TypeError: ``x`` or ``grid`` is not a floating-point tensor, or ``spline_order`` not an integer.
        ValueError: a shape does not fit, or ``spline_order`` is less than 1, or ``extrapolation`` is unknown.

    Numerics:
        Computed in float32 (float64 for float64 input) and rounded once at the end. Against exact values the recursion
        errs by at most 2e-7 and the closed form by 1.1e-6 in float32, for degrees 1 to 5 on 5 intervals.

    Example:
        >>> import torch
        >>> grid = torch.linspace(-2.2, 2.2, 12).expand(3, -1)  # 5 intervals on [-1, 1], cubic
        >>> bases = bspline_basis(torch.tensor([-1.0, 0.1, 1.0]), grid, 3, uniform=True)
        >>> bases.shape, bool(torch.allclose(bases.sum(-1), torch.ones(3)))
        (torch.Size([3, 8]), True)

    References:
        de Boor, A Practical Guide to Splines, chapter IX, (14); Liu et al., KAN, arXiv 2404.19756, section 2.2.
    """
    check_int("spline_order", spline_order, 1)
    check_choice("extrapolation", extrapolation, _EXTRAPOLATIONS)
    check_tensor("x", x)
    _check_features("x", x, _check_grid(grid, spline_order))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return reference.basis(wide, grid.to(wide.dtype), spline_order, uniform, extrapolation).to(x.dtype)


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
    uniform: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # ... o
    r"""Apply a KAN layer: a learned function on every edge, summed at every output.

    .. math::
        y_o = \sum_i w^\mathrm{base}_{oi}\, \sigma(x_i) + \sum_i s_{oi} \sum_j w^\mathrm{spline}_{oij} B_j(x_i) + b_o

    Args:
        x: input, shape ``(..., i)``.
        base_weight: weights of the activation, shape ``(o, i)``.
        spline_weight: spline coefficients, shape ``(o, i, g + s)``.
        spline_scaler: a factor for each edge's spline, shape ``(o, i)``, or None for 1.
        grid: knots, shape ``(i, g + 2 s + 1)``; the degree ``s`` follows from the shapes.
        bias: shape ``(o,)``.
        base_activation: the elementwise function :math:`\sigma`.
        extrapolation: the spline outside the interval :math:`[t_s, t_{g+s}]` of the grid. ``"zero"``: its bases run out
            within ``s`` knots, as in other KAN libraries; ``"clamp"``: it keeps its end value; ``"linear"``: it goes on
            along its end tangent.
        uniform: promises equally spaced knots; see :func:`bspline_basis`.
        backend: ``"auto"``, or ``"reference"``, which has derivatives of any order; ``"chunked"`` (a few rows at a
            time), ``"cpu"`` and ``"triton"`` can be differentiated once, and not by ``grid``. ``"triton"`` runs spline
            orders 1 to 5. See :func:`resolve`.

    Returns:
        Output of shape ``(..., o)`` in ``x``'s dtype, under autocast in autocast's.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape does not fit, or an option is unknown.

    Numerics:
        Bases and activation are computed in float32 (float64 for float64 input) and rounded at most once, for the
        product, which adds up in float32 at least. All backends but ``"reference"`` save nothing but their arguments
        for the backward pass.

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
    check_choice("extrapolation", extrapolation, _EXTRAPOLATIONS)
    check_tensor("x", x)
    _check_features("x", x, in_features)
    if x.dtype != base_weight.dtype and not autocast_is_on(x):
        raise ValueError(f"x is {x.dtype} but base_weight is {base_weight.dtype}; convert one, or use torch.autocast")
    engine = resolve("kan_linear", backend, x, spline_weight=spline_weight, grid=grid)
    scaled = spline_weight if spline_scaler is None else spline_weight * spline_scaler[..., None]
    if engine == "reference":
        return reference.kan_linear(x, base_weight, scaled, grid, bias, base_activation, extrapolation, uniform)
    return _fused(x, base_weight, scaled, grid, bias, base_activation, extrapolation, uniform, engine)


def _fused(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    grid: Tensor,
    bias: Tensor | None,
    base_activation: Callable[[Tensor], Tensor],
    extrapolation: str,
    uniform: bool,
    engine: str,
) -> Tensor:
    """In an engine: rows instead of leading dimensions, and under autocast its dtype."""
    casts = autocast_is_on(x) and x.dtype != torch.float64  # as for PyTorch's own products
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    rows = x.reshape(-1, x.shape[-1])  # rows i
    activated = None
    if not reference.is_silu(base_activation):
        wide = rows.to(torch.promote_types(x.dtype, torch.float32))
        activated = reference.activate(wide, base_activation).to(rows.dtype)
    grid = grid.to(torch.promote_types(x.dtype, torch.float32))
    parameters = (base_weight.to(dtype), spline_weight.to(dtype), grid, None if bias is None else bias.to(dtype))
    y = fused_kan_linear(rows, activated, *parameters, extrapolation, uniform, engine)  # rows o
    return y.reshape(*x.shape[:-1], y.shape[1])


def _check_grid(grid: Tensor, spline_order: int) -> int:
    check_shape("grid", grid, ("any", "any"), "i, g+2s+1")
    if grid.shape[1] < 2 * spline_order + 2:
        raise ValueError(
            f"grid has {grid.shape[1]} knots, too few for spline_order={spline_order}; it needs g + 2*spline_order + 1 "
            "for g >= 1 intervals"
        )
    return grid.shape[0]


def _check_features(name: str, x: Tensor, in_features: int) -> None:
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"{name} must have {in_features} features in its last dimension, got shape {tuple(x.shape)}; "
            "reshape it or build the layer for its size"
        )
