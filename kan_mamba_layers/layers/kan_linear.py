"""KANLinear: a linear layer whose edges are learned B-spline functions."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice, check_int, check_number, check_tensor
from kan_mamba_layers.layers import _grid
from kan_mamba_layers.ops import bspline_basis, kan_linear
from kan_mamba_layers.ops.backend import Backend, check_backend
from kan_mamba_layers.ops.kan_linear import Extrapolation

GridMode = Literal["uniform", "adaptive"]

# Samples that a refit takes at a time; their bases are float64 and many times as large.
_REFIT_ROWS = 4096


class KANLinear(nn.Module):
    r"""A drop-in for ``nn.Linear`` whose every edge is an activation plus a learned B-spline.

    .. math::
        y_o = \sum_i w^\mathrm{base}_{oi}\, \sigma(x_i) + \sum_i s_{oi} \sum_j w^\mathrm{spline}_{oij} B_{ij}(x_i) + b_o

    Args:
        in_features: size of the input's last dimension, ``i``.
        out_features: size of the output's last dimension, ``o``.
        bias: whether to add a learned bias.
        grid_size: number of intervals ``g >= 1`` inside ``grid_range``.
        spline_order: degree ``s >= 1`` of the splines; 3 for cubics.
        grid_range: interval on which the splines are complete. Normalise the input to it, or widen it.
        base_activation: class of the elementwise module :math:`\sigma`.
        scale_noise: range of the initial splines' noise, at scale 1 and before the scaler.
        scale_base: multiplies the initial base weights, which are uniform in :math:`\pm 1/\sqrt{i}`.
        scale_spline: multiplies the initial splines.
        enable_standalone_scale_spline: whether each edge has a factor ``spline_scaler`` of its own.
        grid_mode: what :meth:`update_grid` makes of data. ``"uniform"`` fits each feature's range with equally spaced
            knots, ``"adaptive"`` follows the quantiles.
        grid_eps: share of equal spacing mixed into the quantiles in ``"adaptive"`` mode, in ``[0, 1]``.
        extrapolation: the splines outside the grid's interval: ``"zero"``, ``"clamp"`` or ``"linear"``.
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

    grid: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        base_activation: Callable[[], nn.Module] = nn.SiLU,
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
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("grid_size", grid_size, 1)
        check_int("spline_order", spline_order, 1)
        low, high = _check_range(grid_range)
        for name, scale in (("scale_noise", scale_noise), ("scale_base", scale_base), ("scale_spline", scale_spline)):
            check_number(name, scale, 0.0)
        if isinstance(base_activation, nn.Module):
            raise TypeError(f"base_activation must be a class, got the module {base_activation!r}; pass e.g. nn.SiLU")
        check_choice("grid_mode", grid_mode, ("uniform", "adaptive"))
        check_number("grid_eps", grid_eps, 0.0, 1.0)
        check_choice("extrapolation", extrapolation, ("zero", "clamp", "linear"))
        check_backend("kan_linear", backend)
        self.in_features = in_features
        self.out_features = out_features
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.grid_range = (low, high)
        self.base_activation = base_activation()
        self.scale_noise = scale_noise
        self.scale_base = scale_base
        self.scale_spline = scale_spline
        self.grid_mode: GridMode = grid_mode
        self.grid_eps = grid_eps
        self.extrapolation: Extrapolation = extrapolation
        self.backend: Backend = backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.base_weight = parameter(out_features, in_features)
        self.spline_weight = parameter(out_features, in_features, grid_size + spline_order)
        self.spline_scaler = parameter(out_features, in_features) if enable_standalone_scale_spline else None
        self.bias = parameter(out_features) if bias else None
        exact = torch.promote_types(self.base_weight.dtype, torch.float32)
        knots = grid_size + 2 * spline_order + 1
        self.register_buffer("grid", torch.empty(in_features, knots, device=device, dtype=exact))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: uniform base weights and scalers, and splines through small noise at even knots."""
        self.grid.copy_(_grid.uniform(*self.grid_range, self.grid_size, self.spline_order))
        self.has_uniform_grid = True
        bound = 1 / math.sqrt(self.in_features)
        self.base_weight.uniform_(-bound, bound).mul_(self.scale_base)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        knots = _grid.uniform(-1.0, 1.0, self.grid_size, self.spline_order)[None]  # in units of the interval: 1 m
        inside = knots[:, self.spline_order : -self.spline_order].T  # g+1 1
        interpolate = torch.linalg.pinv(bspline_basis(inside, knots, self.spline_order, uniform=True)[:, 0])  # g+s g+1
        weight = self.spline_weight
        noise = torch.rand(*weight.shape[:2], self.grid_size + 1, device=weight.device) - 0.5  # o i g+1
        noise *= self.scale_noise / self.grid_size
        weight.copy_(noise @ interpolate.to(noise).T)
        if self.spline_scaler is not None:
            self.spline_scaler.uniform_(-bound, bound).mul_(self.scale_spline)
        else:
            weight.mul_(self.scale_spline)

    def forward(self, x: Tensor) -> Tensor:  # ... i -> ... o
        return kan_linear(
            x,
            self.base_weight,
            self.spline_weight,
            self.spline_scaler,
            self.grid,
            bias=self.bias,
            base_activation=self.base_activation,
            extrapolation=self.extrapolation,
            uniform=self.has_uniform_grid,
            backend=self.backend,
        )

    def b_splines(self, x: Tensor) -> Tensor:  # ... i -> ... i g+s
        """Return the B-spline bases of ``x`` on this layer's grid, extrapolated as the layer does."""
        return bspline_basis(
            x, self.grid, self.spline_order, extrapolation=self.extrapolation, uniform=self.has_uniform_grid
        )

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots to where the data is and refit the splines, so that the function stays what it was.

        Args:
            x: samples of the layer's input, shape ``(..., in_features)``.
            margin: added on either side of each feature's range, in units of ``x``.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: ``x`` is empty or not finite, its last dimension is not ``in_features``, or ``margin`` is
                negative.

        Numerics:
            The refit is a least-squares fit in float64 over the samples and equally spaced points, with a ridge of 1e-5
            of the mean diagonal, which keeps coefficients without data small. It keeps the function on the data as far
            as the new knots can express it; scalers and base weights stay untouched.
        """
        check_tensor("x", x)
        check_number("margin", margin, 0.0)
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have {self.in_features} features in its last dimension, got shape {tuple(x.shape)}; reshape it"
            )
        samples = x.detach().reshape(-1, self.in_features).double()  # m i
        if len(samples) == 0 or not samples.isfinite().all():
            raise ValueError(
                f"x must hold at least one sample and only finite values, got shape {tuple(x.shape)}; clean it first"
            )
        eps = 1.0 if self.grid_mode == "uniform" else self.grid_eps
        grid = _grid.fit(samples, self.grid_size, self.spline_order, margin, eps)  # i m
        low, high = grid[:, self.spline_order], grid[:, -self.spline_order - 1]
        even = torch.linspace(0, 1, 4 * self.grid_size + 1, dtype=torch.float64, device=x.device)[:, None]
        self._refit(grid, torch.cat([samples, low + even * (high - low)]), ridge=1e-5)

    @torch.no_grad()
    def extend_grid(self, new_grid_size: int) -> None:
        """Refine every interval structure to ``new_grid_size`` intervals over the same range.

        The function inside the range is kept exactly (to rounding) when ``new_grid_size`` is a multiple of
        ``grid_size``, otherwise in the least-squares sense. Beyond the range the splines run out within
        ``spline_order`` of the new, narrower intervals. ``spline_weight`` becomes a new, larger parameter: build the
        optimiser after this call.

        Args:
            new_grid_size: number of intervals, at least ``grid_size``.

        Raises:
            TypeError: ``new_grid_size`` is not an integer.
            ValueError: ``new_grid_size`` is less than ``grid_size``.
        """
        check_int("new_grid_size", new_grid_size, self.grid_size)
        grid = _grid.refine(self.grid.double(), self.spline_order, new_grid_size)  # i m
        inside = grid[:, self.spline_order : -self.spline_order]  # i g+1
        even = torch.arange(8, dtype=torch.float64, device=grid.device) / 8
        points = inside[:, :-1, None] + even * inside.diff(dim=1)[..., None]  # i g 8
        points = torch.cat([points.flatten(1), inside[:, -1:]], 1).T  # m i
        self._refit(grid, points, ridge=0.0)
        self.grid_size = new_grid_size

    def _refit(self, grid: Tensor, points: Tensor, ridge: float) -> None:
        """Take ``grid`` for the knots and the coefficients that come closest to the present splines at ``points``."""
        grid = grid.to(self.grid.dtype)  # what is stored is what must be fitted
        uniform = _grid.is_uniform(grid)

        def bases(block: Tensor) -> tuple[Tensor, Tensor]:  # m i -> m i c, m i c'
            old = bspline_basis(
                block,
                self.grid.double(),
                self.spline_order,
                extrapolation=self.extrapolation,
                uniform=self.has_uniform_grid,
            )
            return old, bspline_basis(block, grid.double(), self.spline_order, uniform=uniform)

        transfer = _grid.transfer(map(bases, points.split(_REFIT_ROWS)), ridge)  # i c' c
        weight = torch.einsum("inc,oic->oin", transfer, self.spline_weight.double())
        if weight.shape == self.spline_weight.shape:
            self.spline_weight.copy_(weight)  # in place, so that an optimiser keeps training it
        else:
            self.spline_weight = nn.Parameter(weight.to(self.spline_weight.dtype), self.spline_weight.requires_grad)
        self.grid = grid
        self.has_uniform_grid = uniform

    def regularization_loss(self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0) -> Tensor:
        r"""Return a penalty that favours few and small splines.

        With :math:`a_{oi}` the mean absolute spline coefficient of an edge and :math:`p = a / \sum a`, the penalty is
        :math:`\lambda_1 \sum a + \lambda_2 \sum -p \log p`; it is finite also where edges are zero.

        Args:
            regularize_activation: weight :math:`\lambda_1`.
            regularize_entropy: weight :math:`\lambda_2`.

        Returns:
            A scalar.
        """
        size = self.spline_weight.abs().mean(-1)  # o i
        total = size.sum()
        share = size / total.clamp_min(torch.finfo(size.dtype).tiny)
        # An edge at zero adds nothing, and must not add an infinite gradient either.
        entropy = torch.special.entr(torch.where(share > 0, share, 1)).sum()
        return regularize_activation * total + regularize_entropy * entropy

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, extrapolation={self.extrapolation!r}, backend={self.backend!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KANLinear":
        exact = self.grid
        super()._apply(fn, recurse)
        if self.grid.dtype.itemsize < torch.float32.itemsize:  # rounded knots would change the function
            self.grid = exact.to(self.grid.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.grid.is_meta:
            self.has_uniform_grid = _grid.is_uniform(self.grid)


def _check_range(grid_range: Any) -> tuple[float, float]:
    if not isinstance(grid_range, (tuple, list)) or len(grid_range) != 2:
        raise TypeError(f"grid_range must be a pair of numbers, got {grid_range!r}; pass e.g. (-1.0, 1.0)")
    low, high = grid_range
    check_number("grid_range[0]", low)
    check_number("grid_range[1]", high)
    if low >= high:
        raise ValueError(f"grid_range must ascend, got {grid_range!r}; pass e.g. (-1.0, 1.0)")
    return float(low), float(high)
