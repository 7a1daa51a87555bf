"""What layers of learned splines share: their parameters, their knots and the penalty on their size."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice, check_int, check_number
from kan_mamba_layers.layers import _grid
from kan_mamba_layers.ops import bspline_basis
from kan_mamba_layers.ops.kan_linear import Extrapolation

GridMode = Literal["uniform", "adaptive"]

# Samples that a refit takes at a time; their bases are float64 and many times as large.
_REFIT_ROWS = 4096


class SplineLayer(nn.Module):
    """Edges from ``i`` features to ``o`` outputs, each an activation plus a learned B-spline.

    A subclass says where the features of its input are, in ``_features_last``, and adds the edges, in ``forward``.

    Args:
        edges: shape of the edges, ``(o, i)`` or, with groups and places of a kernel, ``(o, i/groups, ...)``.
        features: number of input features, each with knots of its own.
        bias: see :class:`KANLinear`, as all that follow.
        grid_size: number of intervals.
        spline_order: degree of the splines.
        grid_range: interval on which the splines are complete.
        base_activation: class of the elementwise module.
        scale_noise: range of the initial splines' noise.
        scale_base: multiplies the initial base weights.
        scale_spline: multiplies the initial splines.
        enable_standalone_scale_spline: whether each edge has a factor of its own.
        grid_mode: what :meth:`update_grid` makes of data.
        grid_eps: share of equal spacing in ``"adaptive"`` mode.
        extrapolation: the splines outside the grid's interval.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    grid: Tensor

    def __init__(
        self,
        edges: tuple[int, ...],
        features: int,
        *,
        bias: bool,
        grid_size: int,
        spline_order: int,
        grid_range: tuple[float, float],
        base_activation: Callable[[], nn.Module],
        scale_noise: float,
        scale_base: float,
        scale_spline: float,
        enable_standalone_scale_spline: bool,
        grid_mode: GridMode,
        grid_eps: float,
        extrapolation: Extrapolation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
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

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.base_weight = parameter(*edges)
        self.spline_weight = parameter(*edges, grid_size + spline_order)
        self.spline_scaler = parameter(*edges) if enable_standalone_scale_spline else None
        self.bias = parameter(edges[0]) if bias else None
        exact = torch.promote_types(self.base_weight.dtype, torch.float32)
        knots = grid_size + 2 * spline_order + 1
        self.register_buffer("grid", torch.empty(features, knots, device=device, dtype=exact))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: uniform base weights and scalers, and splines through small noise at even knots."""
        self.grid.copy_(_grid.uniform(*self.grid_range, self.grid_size, self.spline_order))
        self.has_uniform_grid = True
        bound = 1 / math.sqrt(self.base_weight[0].numel())
        self.base_weight.uniform_(-bound, bound).mul_(self.scale_base)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        knots = _grid.uniform(-1.0, 1.0, self.grid_size, self.spline_order)[None]  # in units of the interval: 1 m
        inside = knots[:, self.spline_order : -self.spline_order].T  # g+1 1
        interpolate = torch.linalg.pinv(bspline_basis(inside, knots, self.spline_order, uniform=True)[:, 0])  # g+s g+1
        weight = self.spline_weight
        noise = torch.rand(*weight.shape[:-1], self.grid_size + 1, device=weight.device) - 0.5  # o i ... g+1
        noise *= self.scale_noise / self.grid_size
        weight.copy_(noise @ interpolate.to(noise).T)
        if self.spline_scaler is not None:
            self.spline_scaler.uniform_(-bound, bound).mul_(self.scale_spline)
        else:
            weight.mul_(self.scale_spline)

    def b_splines(self, x: Tensor) -> Tensor:  # ... i -> ... i g+s
        """Return the B-spline bases of ``x`` on this layer's grid, extrapolated as the layer does."""
        return self._bases(self._features_last(x), self.grid)

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots to where the data is and refit the splines, so that the function stays what it was.

        Args:
            x: samples of the layer's input, in the shape that the layer takes.
            margin: added on either side of each feature's range, in units of ``x``.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: ``x`` is empty or not finite, its shape is not that of an input, or ``margin`` is negative.
            RuntimeError: ``spline_weight`` is pruned or parametrised by ``torch.nn.utils``.

        Numerics:
            The refit is a least-squares fit in float64 over the samples and equally spaced points, with a ridge of 1e-5
            of the mean diagonal, which keeps coefficients without data small. It keeps the function on the data as far
            as the new knots can express it; scalers and base weights stay untouched.
        """
        check_number("margin", margin, 0.0)
        samples = self._features_last(x).detach().reshape(-1, len(self.grid)).double()  # m i
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
        ``grid_size``, otherwise in the least-squares sense. Beyond the range it is then kept too, except with
        ``extrapolation="zero"``: there the splines run out within ``spline_order`` of the new, narrower intervals.
        ``spline_weight`` becomes a new, larger parameter: build the optimiser after this call.

        Args:
            new_grid_size: number of intervals, at least ``grid_size``.

        Raises:
            TypeError: ``new_grid_size`` is not an integer.
            ValueError: ``new_grid_size`` is less than ``grid_size``.
            RuntimeError: ``spline_weight`` is pruned or parametrised by ``torch.nn.utils``.
        """
        check_int("new_grid_size", new_grid_size, self.grid_size)
        grid = _grid.refine(self.grid.double(), self.spline_order, new_grid_size)  # i m
        inside = grid[:, self.spline_order : -self.spline_order]  # i g+1
        even = torch.arange(8, dtype=torch.float64, device=grid.device) / 8
        points = inside[:, :-1, None] + even * inside.diff(dim=1)[..., None]  # i g 8
        points = torch.cat([points.flatten(1), inside[:, -1:]], 1).T  # m i
        self._refit(grid, points, ridge=0.0)
        self.grid_size = new_grid_size

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
        size = self.spline_weight.abs().mean(-1)  # o i ...
        total = size.sum()
        share = size / total.clamp_min(torch.finfo(size.dtype).tiny)
        # An edge at zero adds nothing, and must not add an infinite gradient either.
        entropy = torch.special.entr(torch.where(share > 0, share, 1)).sum()
        return regularize_activation * total + regularize_entropy * entropy

    def _features_last(self, x: Tensor) -> Tensor:  # -> ... i
        """Check the shape of an input and move its features to the last dimension."""
        raise NotImplementedError

    def _bases(self, x: Tensor, grid: Tensor) -> Tensor:  # ... i -> ... i g+s
        return bspline_basis(
            x, grid, self.spline_order, extrapolation=self.extrapolation, uniform=self.has_uniform_grid
        )

    def _terms(self, x: Tensor, grid: Tensor) -> Tensor:  # ... i -> ... i 1+g+s
        """The functions that each edge adds up: the activation and the bases, in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is too coarse for the bases
        return torch.cat([self.base_activation(wide)[..., None], self._bases(wide, grid)], -1)

    def _factors(self) -> Tensor:  # o i ... 1+g+s
        """The factors of these terms on each edge."""
        splines = (
            self.spline_weight if self.spline_scaler is None else self.spline_weight * self.spline_scaler[..., None]
        )
        return torch.cat([self.base_weight[..., None], splines], -1)

    def _refit(self, grid: Tensor, points: Tensor, ridge: float) -> None:
        """Take ``grid`` for the knots and the coefficients that come closest to the present splines at ``points``."""
        self._check_parameters("spline_weight")
        grid = grid.to(self.grid.dtype)  # what is stored is what must be fitted
        uniform = _grid.is_uniform(grid)

        def bases(block: Tensor) -> tuple[Tensor, Tensor]:  # m i -> m i c, m i c'
            old = self._bases(block, self.grid.double())
            return old, bspline_basis(block, grid.double(), self.spline_order, uniform=uniform)

        transfer = _grid.transfer(map(bases, points.split(_REFIT_ROWS)), ridge)  # i c' c
        weight = map_edges(transfer, self.spline_weight.double())
        if weight.shape == self.spline_weight.shape:
            self.spline_weight.copy_(weight)  # in place, so that an optimiser keeps training it
        else:
            self.spline_weight = nn.Parameter(weight.to(self.spline_weight.dtype), self.spline_weight.requires_grad)
        self.grid = grid
        self.has_uniform_grid = uniform

    def _check_parameters(self, *names: str) -> None:
        """Each is a parameter, and not a tensor that ``torch.nn.utils`` makes anew from others in every forward."""
        for name in names:
            if name not in self._parameters:
                raise RuntimeError(
                    f"{name} is pruned or parametrised, so what is written to it would be lost; first call "
                    f"torch.nn.utils.prune.remove(layer, {name!r}) or parametrize.remove_parametrizations"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SplineLayer":
        exact = self.grid
        super()._apply(fn, recurse)
        if self.grid.dtype.itemsize < torch.float32.itemsize:  # rounded knots would change the function
            self.grid = exact.to(self.grid.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.grid.is_meta:
            self.has_uniform_grid = _grid.is_uniform(self.grid)


def map_edges(matrices: Tensor, weight: Tensor) -> Tensor:  # i n c, o i ... c -> o i ... n
    """Multiply the coefficients of each edge by the matrix of its feature; outputs see features in groups."""
    o, i, *places, c = weight.shape
    groups = len(matrices) // i
    grouped = weight.reshape(groups, o // groups, i, -1, c)
    mapped = torch.einsum("ginc,goikc->goikn", matrices.unflatten(0, (groups, i)), grouped)
    return mapped.reshape(o, i, *places, -1)


def _check_range(grid_range: Any) -> tuple[float, float]:
    if not isinstance(grid_range, (tuple, list)) or len(grid_range) != 2:
        raise TypeError(f"grid_range must be a pair of numbers, got {grid_range!r}; pass e.g. (-1.0, 1.0)")
    low, high = grid_range
    check_number("grid_range[0]", low)
    check_number("grid_range[1]", high)
    if low >= high:
        raise ValueError(f"grid_range must ascend, got {grid_range!r}; pass e.g. (-1.0, 1.0)")
    return float(low), float(high)
