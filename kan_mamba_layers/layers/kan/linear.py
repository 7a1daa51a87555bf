"""KANLinear: a linear layer whose edges are learned B-spline functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_int, check_tensor
from kan_mamba_layers.layers.arguments import options_for
from kan_mamba_layers.layers.kan.base import GridMode, SplineLayer
from kan_mamba_layers.ops import kan_linear
from kan_mamba_layers.ops.backend import Backend, check_backend
from kan_mamba_layers.ops.bspline import Extrapolation, check_features


class KANLinear(SplineLayer):
    r"""A drop-in for ``nn.Linear`` in which every edge is an activation plus a learned B-spline.

    .. math::
        y_o = b_o + \sum_i w^\mathrm{base}_{oi}\, \beta(x_i)
            + \sum_i \gamma_{oi} \sum_j w^\mathrm{spline}_{oij} B_{ij}(x_i)

    Args:
        in_features: size of the input's last dimension, ``i``.
        out_features: size of the output's last dimension, ``o``.
        bias: whether to add a learned bias; False by default, unlike ``nn.Linear``.
        grid_size: number of intervals ``g >= 1`` inside ``grid_range``.
        spline_order: degree ``s >= 1`` of the splines; 3 for cubics.
        grid_range: interval on which the splines are complete. Normalise the input to it, or widen it.
        base_activation: the elementwise function :math:`\beta`: the class of a module, or anything else that makes one
            when called without arguments, or a function such as ``torch.tanh``. A module's weights get ``device`` and
            ``dtype`` and are trained.
        scale_noise: ``grid_size`` times the range of the noise that the initial splines pass through at the knots,
            before ``scale_spline`` and the scaler.
        scale_base: multiplies the initial base weights, which are uniform in :math:`\pm 1/\sqrt{i}`.
        scale_spline: multiplies the initial splines.
        enable_standalone_scale_spline: whether each edge has its own factor ``spline_scaler``.
        grid_mode: how :meth:`update_grid` places the knots: ``"uniform"`` spaces them equally over each feature's
            range, ``"adaptive"`` follows its quantiles.
        grid_eps: share of equal spacing mixed into the quantiles in ``"adaptive"`` mode, in ``[0, 1]``.
        extrapolation: how the splines continue outside the grid: ``"zero"``, ``"clamp"`` or ``"linear"``.
        backend: implementation of :func:`~kan_mamba_layers.ops.kan_linear`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input ``(..., i)``, output ``(..., o)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the input's last dimension is not ``in_features``.

    Numerics:
        Bases are computed in float32 at least. The buffer ``grid`` stays float32 in half-precision modules, since
        rounded knots would change the function.

    Example:
        >>> import torch
        >>> layer = KANLinear(16, 8)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 8])

    References:
        Liu et al., KAN, arXiv 2404.19756. Parameters are named as in efficient-kan, whose checkpoints load strictly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        base_activation: Callable[..., Any] = nn.SiLU,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        enable_standalone_scale_spline: bool = True,
        grid_mode: GridMode = "uniform",
        grid_eps: float = 0.02,
        extrapolation: Extrapolation = "zero",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_backend("kan_linear", backend)
        super().__init__((out_features, in_features), in_features, **options_for(SplineLayer, locals()))
        self.in_features = in_features
        self.out_features = out_features
        self.backend: Backend = backend

    def forward(self, x: Tensor) -> Tensor:  # ... i -> ... o
        """Sum the edge functions at every output: ``(..., in_features)`` to ``(..., out_features)``."""
        return kan_linear(
            x,
            self.base_weight,
            self.spline_weight,
            self.spline_scaler,
            self.grid,
            bias=self.bias,
            base_activation=self.base_activation,
            extrapolation=self.extrapolation,
            uniform=None,
            backend=self.backend,
        )

    def _features_last(self, x: Tensor) -> Tensor:  # ... i
        check_tensor("x", x)
        check_features("x", x, self.in_features)
        return x

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, extrapolation={self.extrapolation!r}, backend={self.backend!r}"
        )
