"""The base class of the KAN layers: parameters, knots, the penalty on the splines, and access to single edges."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice, check_int, check_interval, check_number, check_tensor
from kan_mamba_layers.layers.kan.activation import make_activation
from kan_mamba_layers.layers.kan.edges import (
    all_edges,
    check_edge,
    check_edges,
    input_feature,
    largest_edges,
    map_edges,
    mean_quadrature,
)
from kan_mamba_layers.layers.kan.grid import inner_knots, new_knots, uniform_knots
from kan_mamba_layers.layers.kan.plot import MAX_PANELS, Curve, draw, sample_points
from kan_mamba_layers.layers.kan.refit import fit, refine
from kan_mamba_layers.layers.kan.state import check_local, check_whole, keep_exact, take_size
from kan_mamba_layers.layers.kan.weight import EdgeWeight, edge_weight
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops.bspline import Extrapolation, bspline_basis
from kan_mamba_layers.ops.kan_linear.call import activate
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype
from kan_mamba_layers.ops.spacing import forget, uniform_if_known
from kan_mamba_layers.ops.subclasses import rows_of

if TYPE_CHECKING:
    from kan_mamba_layers.layers.kan.plot import AnyFigure

GridMode = Literal["uniform", "adaptive"]


class SplineLayer(Layer):
    """Edges from ``i`` features to ``o`` outputs, each an activation plus a learned B-spline.

    A subclass implements ``_features_last`` and ``forward``. An edge is named by its index in ``base_weight``:
    ``(o, i)`` in :class:`KANLinear`, and ``(o, i, row, column)`` in :class:`KANConv2d`, where ``i`` counts the channels
    that output ``o`` sees.

    Args:
        edges: shape of ``base_weight``, ``(o, i)`` or, with groups and a kernel, ``(o, i/groups, height, width)``.
        features: number of input features, each with its own knots. All other arguments: see :class:`KANLinear`.
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
        base_activation: Callable[..., Any],
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
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be True or False, got {bias!r}; pass other options by name, e.g. grid_size=5")
        check_int("grid_size", grid_size, 1)
        check_int("spline_order", spline_order, 1)
        check_interval("grid_range", grid_range)
        check_number("scale_noise", scale_noise, 0.0)
        check_number("scale_base", scale_base, 0.0)
        check_number("scale_spline", scale_spline, 0.0)
        check_choice("grid_mode", grid_mode, ("uniform", "adaptive"))
        check_number("grid_eps", grid_eps, 0.0, 1.0)
        check_choice("extrapolation", extrapolation, ("zero", "clamp", "linear"))
        self.spline_order = spline_order
        self.grid_range = (float(grid_range[0]), float(grid_range[1]))
        self.base_activation = make_activation(base_activation, device, dtype)
        self.scale_noise = scale_noise
        self.scale_base = scale_base
        self.scale_spline = scale_spline
        self.grid_mode: GridMode = grid_mode
        self.grid_eps = grid_eps
        self.extrapolation: Extrapolation = extrapolation

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self._parameters["weight"] = None  # where torch.nn.utils expects the name
        self.base_weight = parameter(*edges)
        self.spline_weight = parameter(*edges, grid_size + spline_order)
        self.spline_scaler = parameter(*edges) if enable_standalone_scale_spline else None
        self.bias = parameter(edges[0]) if bias else None
        knots = grid_size + 2 * spline_order + 1
        self.register_buffer("grid", torch.empty(features, knots, device=device, dtype=compute_dtype(self.base_weight)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reinitialise: uniform base weights and scalers, and splines through small noise at uniform knots."""
        check_local("base_weight", self.base_weight)
        self.grid.copy_(new_knots(self.grid_range, self.grid_size, self.spline_order, self.grid.dtype))
        bound = 1 / math.sqrt(self.base_weight[0].numel())
        self.base_weight.uniform_(-bound, bound).mul_(self.scale_base)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        knots = uniform_knots(-1.0, 1.0, self.grid_size, self.spline_order)[None]  # 1 g+2s+1
        inside = inner_knots(knots, self.spline_order).T  # g+1 1
        interpolate = torch.linalg.pinv(bspline_basis(inside, knots, self.spline_order, uniform=True)[:, 0])  # g+s g+1
        weight = self.spline_weight
        shape = (*weight.shape[:-1], self.grid_size + 1)
        noise = torch.rand(shape, device=weight.device, dtype=torch.float32) - 0.5  # o i ... g+1
        weight.copy_(noise * (self.scale_noise / self.grid_size) @ interpolate.to(noise).T)
        if self.spline_scaler is not None:
            self.spline_scaler.uniform_(-bound, bound).mul_(self.scale_spline)
        else:
            weight.mul_(self.scale_spline)

    @property
    def grid_size(self) -> int:
        """The number of intervals of the present grid."""
        return self.grid.shape[1] - 2 * self.spline_order - 1

    @property
    def has_uniform_grid(self) -> bool:
        """Whether the present knots are equally spaced, which selects a faster formula; False while they are hidden."""
        return bool(uniform_if_known(self.grid))

    @property
    def weight(self) -> EdgeWeight:
        """The shape, dtype and device of ``base_weight``, for code that asks for those of ``nn.Linear.weight``."""
        return edge_weight(self.base_weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise TypeError("a KAN layer has no weight to set; set its base_weight and spline_weight")
        super().__setattr__(name, value)

    def b_splines(self, x: Tensor) -> Tensor:  # ... i -> ... i g+s
        """Return the B-spline bases of ``x`` on this layer's grid, extrapolated as the layer does."""
        return self._bases(self._features_last(x), self.grid)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the knots to the data and refit the splines to the present function by least squares.

        Knots and coefficients are written in place, so an optimiser built before goes on with them. Several processes
        with replicas, as under DistributedDataParallel, update one and broadcast:
        ``for t in layer.state_dict().values(): torch.distributed.broadcast(t, 0)``, then
        ``layer.grid.detach().add_(0)``, since a collective does not count as a write.

        Args:
            x: samples of the layer's input, in any shape that ``forward`` takes.
            margin: added on either side of each feature's range, in units of ``x``. For features whose range is not
                much larger than 0.01, pass less, or 0.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: ``x`` is empty, not finite, too large for the dtype of ``grid`` or of a wrong shape, or
                ``margin`` is negative.
            RuntimeError: ``spline_weight`` is pruned or parametrised by ``torch.nn.utils``, or sharded.

        Numerics:
            A least-squares fit in float64 over the samples and equally spaced points. A ridge of 1e-5 times the mean
            diagonal keeps coefficients without data small; two corrections remove its bias from the others. The fit
            keeps the function on the data as far as the new knots can express it, and knots that stay keep their
            coefficients. Scalers and base weights are unchanged. Intervals are at least 16 steps of ``grid``'s dtype
            wide, those of ``grid_mode="adaptive"`` at least 4; a constant feature gets a range of 0.5 % of its value on
            either side if ``margin`` is 0.
        """
        check_number("margin", margin, 0.0)
        fit(self, self._features_last(rows_of(x)).detach().as_subclass(Tensor).reshape(-1, len(self.grid)), margin)

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend_grid(self, new_grid_size: int) -> None:
        """Refine the grid of every feature to ``new_grid_size`` intervals over the same range.

        If ``new_grid_size`` is a multiple of ``grid_size``, the function inside the range is kept up to rounding,
        otherwise in the least-squares sense. Outside the range it is kept as well, except with
        ``extrapolation="zero"``: there the splines vanish within ``spline_order`` of the new, narrower intervals.
        ``spline_weight`` becomes a new, larger parameter with the attributes and hooks of the old one: build the
        optimiser after this call. A module that shared the old one keeps it, so share the new one again. A state dict
        from after this call can be loaded into a layer as it was built.

        Args:
            new_grid_size: number of intervals, at least ``grid_size``.

        Raises:
            TypeError: ``new_grid_size`` is not an integer.
            ValueError: ``new_grid_size`` is less than ``grid_size``.
            RuntimeError: ``spline_weight`` is pruned or parametrised by ``torch.nn.utils``, or sharded.
        """
        check_int("new_grid_size", new_grid_size, self.grid_size)
        refine(self, new_grid_size)

    def regularization_loss(self, regularize_activation: float = 1.0, regularize_entropy: float = 1.0) -> Tensor:
        r"""Return a penalty, a scalar, that favours few and small splines.

        With :math:`a_{oi}` the mean absolute spline coefficient of an edge and :math:`p = a / \sum a`, the penalty is
        :math:`\lambda_1 \sum a + \lambda_2 \sum -p \log p`. It is finite even if edges are zero, and float32 at least.
        Unlike :meth:`edge_sizes` it sees the coefficients alone, neither ``base_weight`` nor ``spline_scaler``.

        Args:
            regularize_activation: weight :math:`\lambda_1`.
            regularize_entropy: weight :math:`\lambda_2`.
        """
        size = self.spline_weight.abs().mean(-1, dtype=compute_dtype(self.spline_weight))  # o i ...
        total = size.sum()
        share = size / total.clamp_min(torch.finfo(size.dtype).tiny)
        # An edge at zero must not add an infinite gradient.
        entropy = torch.special.entr(torch.where(share > 0, share, 1)).sum()
        return regularize_activation * total + regularize_entropy * entropy

    def edge_function(self, x: Tensor, edge: Sequence[int] | None = None) -> Tensor:
        r"""Evaluate one learned edge function, or all of them.

        .. math::
            \varphi_{oi}(x) = w^\mathrm{base}_{oi}\, \beta(x) + \gamma_{oi} \sum_j w^\mathrm{spline}_{oij} B_{ij}(x)

        Args:
            x: points of any shape, the same for every edge.
            edge: index of an edge in ``base_weight``, such as ``(o, i)``; None for all edges.

        Returns:
            Values of ``x``'s shape, followed by the shape of ``base_weight`` for all edges; in float32 at least, and
            differentiable with respect to ``x`` and the weights.

        Raises:
            TypeError: ``x`` is not a floating-point tensor, or ``edge`` not a sequence of integers.
            ValueError: there is no such edge.

        Example:
            >>> import torch
            >>> from kan_mamba_layers import KANLinear
            >>> layer, points = KANLinear(3, 2), torch.linspace(-1, 1, 50)
            >>> layer.edge_function(points, (1, 0)).shape, layer.edge_function(points).shape
            (torch.Size([50]), torch.Size([50, 2, 3]))
        """
        check_tensor("x", x)
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.base_weight.dtype), torch.float32)
        with autocast_off(x):
            factors = self._factors().to(dtype)  # o i ... 1+g+s
            if edge is None:
                points = x.to(dtype).reshape(-1, 1).expand(-1, len(self.grid))  # m i
                values = map_edges(self._terms(points, self.grid).transpose(0, 1), factors)  # o i ... m
                return values.movedim(-1, 0).reshape(*x.shape, *self.base_weight.shape)
            index = check_edge("edge", edge, self.base_weight.shape)
            feature = input_feature(index, self.base_weight.shape, len(self.grid))
            terms = self._terms(x.to(dtype)[..., None], self.grid[feature : feature + 1])  # ... 1 1+g+s
            return terms[..., 0, :] @ factors[index]

    @torch.no_grad()
    def edge_sizes(self) -> Tensor:  # o i ...
        r"""Return the root mean square of every edge function over the interval :math:`[a, b]` of its grid.

        .. math::
            \mathrm{size}_{oi} = \sqrt{\frac{1}{b - a} \int_a^b \varphi_{oi}(x)^2 \, dx}

        The unit is that of the output: an edge typically adds this much to ``y_o`` if ``x_i`` is uniform on the grid.
        Base part and scaler count, unlike in :meth:`regularization_loss`; values outside the grid do not.

        Returns:
            Sizes of the shape of ``base_weight``, in float32 at least.

        Numerics:
            Gauss-Legendre quadrature with 8 points per interval, exact for splines of degree up to 7.
        """
        points, weights = mean_quadrature(inner_knots(self.grid, self.spline_order))  # m i, m i
        terms = self._terms(points, self.grid) * weights.sqrt()[..., None]  # m i 1+g+s
        # |terms f| = |R f| for the factors f of an edge, and R is small: it has 1+g+s rows instead of m.
        root = torch.linalg.qr(terms.double().transpose(0, 1), mode="r").R  # i 1+g+s 1+g+s
        return map_edges(root, self._factors().double()).norm(dim=-1).to(self.grid.dtype)

    @torch.no_grad()
    def prune_edges(self, threshold: float) -> Tensor:  # o i ...
        """Set every edge whose size is at most ``threshold`` to exactly zero, base and spline.

        Training revives pruned edges, since their gradients are not zero. Two masks of ``torch.nn.utils.prune`` keep
        them at zero, as in the example. The forward pass applies them: after an optimiser's step or ``load_state_dict``
        call the layer before its other methods. ``prune.remove`` makes the masks permanent; call it before the next
        :meth:`prune_edges`, :meth:`update_grid` or :meth:`extend_grid`.

        Args:
            threshold: a size as in :meth:`edge_sizes`, for example ``0.01 * layer.edge_sizes().max().item()``. With 0
                no weight changes, and the mask shows which edges are already zero.

        Returns:
            Mask of the shape of ``base_weight``: True for the edges that are kept.

        Raises:
            TypeError: ``threshold`` is not a number.
            ValueError: ``threshold`` is negative or not finite.
            RuntimeError: a weight is pruned or parametrised by ``torch.nn.utils``.

        Example:
            >>> import torch
            >>> from torch.nn.utils import prune
            >>> from kan_mamba_layers import KANLinear
            >>> layer = KANLinear(8, 4)
            >>> kept = layer.prune_edges(0.05)
            >>> _ = prune.custom_from_mask(layer, "base_weight", kept)
            >>> _ = prune.custom_from_mask(layer, "spline_weight", kept[..., None].expand_as(layer.spline_weight))
            >>> layer(torch.randn(16, 8)).sum().backward()  # continue training; at the end:
            >>> for name in ("base_weight", "spline_weight"):
            ...     _ = prune.remove(layer, name)
            >>> bool((layer.edge_sizes()[~kept] == 0).all())
            True
        """
        check_number("threshold", threshold, 0.0)
        check_whole(self, "base_weight", "spline_weight")
        kept = ~(self.edge_sizes() <= threshold)  # keep NaN edges visible
        self.base_weight.masked_fill_(~kept, 0)
        self.spline_weight.masked_fill_(~kept[..., None], 0)
        return kept

    @torch.no_grad()
    def plot(self, edges: Sequence[Sequence[int]] | None = None, figure: "AnyFigure | None" = None) -> "AnyFigure":
        """Draw learned edge functions, one panel each, on a common vertical scale.

        The interval of the grid is shaded and its knots are ticked. The curves continue a little beyond it, as the
        layer extrapolates. A thin line shows the base part alone.

        Args:
            edges: indices of at most 36 edges in ``base_weight``, such as ``[(0, 0), (0, 1)]`` for ``(o, i)``. Default:
                all edges or, if there are more than 36, the largest ones in order of size.
            figure: an empty figure or subfigure to draw into, with ``layout="constrained"``; a new one by default.

        Returns:
            The ``matplotlib.figure.Figure``, not shown yet: ``layer.plot().savefig("edges.png")``. Its ``axes`` are the
            panels in order, so ``axes[0].set_title("age")`` names the first.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: ``edges`` is not a sequence of indices, or ``figure`` no figure.
            ValueError: ``edges`` is empty or too long, or there is no such edge.
        """
        shape = self.base_weight.shape
        if edges is not None:
            chosen, per_row = check_edges(edges, shape, MAX_PANELS), None
        elif shape.numel() <= MAX_PANELS:
            chosen, per_row = all_edges(shape), shape[1:].numel()  # one row per output
        else:
            chosen, per_row = largest_edges(self.edge_sizes(), MAX_PANELS), None
        same_grid = bool((self.grid == self.grid[0]).all())
        return draw([self._sample_edge(edge) for edge in chosen], per_row, figure, same_grid=same_grid)

    def _sample_edge(self, edge: tuple[int, ...]) -> Curve:
        feature = input_feature(edge, self.base_weight.shape, len(self.grid))
        tap = f" {list(edge[2:])}" if len(edge) > 2 else ""
        knots = inner_knots(self.grid[feature : feature + 1], self.spline_order)[0]  # g+1
        x = sample_points(knots)
        value = self.edge_function(x, edge)
        base = self.base_weight[edge].to(x.dtype) * activate(x, self.base_activation)
        return Curve(f"{feature} → {edge[0]}{tap}", knots, x, base, value)

    def _features_last(self, x: Tensor) -> Tensor:  # -> ... i
        """Check the shape of an input and move its features to the last dimension."""
        raise NotImplementedError

    def _bases(self, x: Tensor, grid: Tensor) -> Tensor:  # ... i -> ... i g+s
        uniform = self.has_uniform_grid
        return bspline_basis(x, grid, self.spline_order, extrapolation=self.extrapolation, uniform=uniform)

    def _terms(self, x: Tensor, grid: Tensor) -> Tensor:  # ... i -> ... i 1+g+s
        """The terms of every edge function: the activation and the bases, in float32 at least."""
        wide = x.to(compute_dtype(x))  # half precision is too coarse for the bases
        return torch.cat([activate(wide, self.base_activation)[..., None], self._bases(wide, grid)], -1)

    def _factors(self) -> Tensor:  # o i ... 1+g+s
        """The factor of each term on each edge."""
        check_local("base_weight", self.base_weight)
        scaler = self.spline_scaler
        splines = self.spline_weight if scaler is None else self.spline_weight * scaler[..., None]  # o i ... g+s
        return torch.cat([self.base_weight[..., None], splines], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SplineLayer":
        exact = self.grid.detach()
        forget(self.grid)
        super()._apply(fn, recurse)
        keep_exact(self, exact)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        missing, unexpected, errors = lists
        take_size(self, state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        keep_exact(self, self.grid.detach().float())  # others may have been assigned
