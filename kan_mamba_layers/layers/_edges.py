"""Looking at single edges of a layer of learned splines: their values, sizes and pictures, and taking some away."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kan_mamba_layers._check import check_int, check_number, check_tensor
from kan_mamba_layers.layers import _plot
from kan_mamba_layers.layers._splines import SplineLayer, map_edges
from kan_mamba_layers.ops._autocast import autocast_off

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Points of Gauss-Legendre quadrature in each interval: exact for squares of splines up to degree 7.
_QUADRATURE = 8


class EdgeLayer(SplineLayer):
    """A :class:`SplineLayer` whose edges can be evaluated, measured, drawn and pruned one by one.

    An edge is named by its index in ``base_weight``: ``(o, i)`` in :class:`KANLinear`, and ``(o, i, row, column)`` in
    :class:`KANConv2d`, where ``i`` counts the channels that output ``o`` sees.
    """

    def edge_function(self, x: Tensor, edge: Sequence[int] | None = None) -> Tensor:
        r"""Return the values of one learned edge function, or of all, at given points.

        .. math::
            \varphi_{oi}(x) = w^\mathrm{base}_{oi}\, \sigma(x) + s_{oi} \sum_j w^\mathrm{spline}_{oij} B_{ij}(x)

        Args:
            x: points, any shape; the same for every edge.
            edge: index of an edge in ``base_weight``, such as ``(o, i)``; None for all edges.

        Returns:
            Values of ``x``'s shape, for all edges followed by the shape of ``base_weight``; in float32 at least. They
            can be differentiated with respect to ``x`` and to the weights.

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
            index = self._edge_index("edge", edge)
            feature = self._edge_feature(index)
            terms = self._terms(x.to(dtype)[..., None], self.grid[feature : feature + 1])  # ... 1 1+g+s
            return terms[..., 0, :] @ factors[index]

    @torch.no_grad()
    def edge_sizes(self) -> Tensor:  # o i ...
        r"""Return the root mean square of every edge function over the interval :math:`[a, b]` of its grid.

        .. math::
            \mathrm{size}_{oi} = \sqrt{\frac{1}{b - a} \int_a^b \varphi_{oi}(x)^2 \, dx}

        Its unit is that of the output: so much an edge adds to ``y_o``, typically, if ``x_i`` is spread evenly over the
        grid. The base part counts; what lies outside the grid does not.

        Returns:
            Sizes of the shape of ``base_weight``, in float32 at least.

        Numerics:
            Gauss-Legendre quadrature with 8 points in each interval, exact for splines of degree up to 7.
        """
        inside = self.grid[:, self.spline_order : -self.spline_order]  # i g+1
        nodes, shares = (torch.from_numpy(v / 2).to(inside) for v in np.polynomial.legendre.leggauss(_QUADRATURE))
        width = inside.diff(dim=1)[..., None]  # i g 1
        points = inside[:, :-1, None] + width * (nodes + 0.5)  # i g p
        mass = width * shares / width.sum(1, keepdim=True)  # i g p
        terms = self._terms(points.flatten(1).T, self.grid) * mass.flatten(1).T.sqrt()[..., None]  # m i 1+g+s
        # |terms w| = |R w|, and R is smaller: only the features have it, not the edges.
        root = torch.linalg.qr(terms.double().transpose(0, 1), mode="r").R  # i n 1+g+s
        return map_edges(root, self._factors().double()).norm(dim=-1).to(self.grid.dtype)

    @torch.no_grad()
    def prune_edges(self, threshold: float) -> Tensor:  # o i ...
        """Set every edge whose size is at most ``threshold`` to exactly zero, base and spline.

        Training revives edges, since their gradients are not zero. Two masks of ``torch.nn.utils.prune`` keep them at
        zero, as the example shows; ``prune.remove`` makes that permanent, and is needed before the next
        :meth:`prune_edges`, :meth:`update_grid` or :meth:`extend_grid`.

        Args:
            threshold: in units of the output, as :meth:`edge_sizes`. A share of the largest edge is
                ``0.01 * layer.edge_sizes().max().item()``; 0 takes none but names those that are zero already.

        Returns:
            Mask of the shape of ``base_weight``: True for edges kept.

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
            >>> layer(torch.randn(16, 8)).sum().backward()  # train on, and at the end:
            >>> for name in ("base_weight", "spline_weight"):
            ...     _ = prune.remove(layer, name)
            >>> bool((layer.edge_sizes()[~kept] == 0).all())
            True
        """
        check_number("threshold", threshold, 0.0)
        self._check_parameters("base_weight", "spline_weight")
        kept = ~(self.edge_sizes() <= threshold)  # what is not a number is not hidden
        self.base_weight.masked_fill_(~kept, 0)
        self.spline_weight.masked_fill_(~kept[..., None], 0)
        return kept

    def plot(self, edges: Sequence[Sequence[int]] | None = None) -> "Figure":
        """Draw learned edge functions, one panel each, on a common vertical scale.

        The interval of the grid is shaded and its knots are ticked; the curves go on a little beyond it, as the layer
        extrapolates. A thin line is the base part alone.

        Args:
            edges: indices of at most 36 edges in ``base_weight``, such as ``[(0, 0), (0, 1)]`` for ``(o, i)``. Default:
                all edges or, of more than 36, those of the largest size, which come in that order.

        Returns:
            A ``matplotlib.figure.Figure``, which nobody has shown: ``layer.plot().savefig("edges.png")``.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: ``edges`` is not a sequence of indices.
            ValueError: ``edges`` is empty or too long, or there is no such edge.
        """
        if edges is None:
            return _plot.figure(self, None)
        if not isinstance(edges, (tuple, list)):
            raise TypeError(f"edges must be a sequence of edges, got {edges!r}; pass e.g. [(0, 0), (0, 1)]")
        if not 1 <= len(edges) <= _plot.MAX_PANELS:
            raise ValueError(
                f"edges must hold 1 to {_plot.MAX_PANELS} edges, got {len(edges)}; draw them in several figures"
            )
        return _plot.figure(self, [self._edge_index(f"edges[{n}]", edge) for n, edge in enumerate(edges)])

    def _edge_feature(self, edge: tuple[int, ...]) -> int:
        """The input feature of an edge; outputs see features in groups."""
        o, i = self.base_weight.shape[:2]
        groups = len(self.grid) // i
        return edge[0] // (o // groups) * i + edge[1]

    def _edge_index(self, name: str, edge: Sequence[int]) -> tuple[int, ...]:
        shape = tuple(self.base_weight.shape)
        if not isinstance(edge, (tuple, list)):
            raise TypeError(f"{name} must be a sequence of integers, got {edge!r}; pass an index in base_weight")
        if len(edge) != len(shape):
            raise ValueError(
                f"{name} must have {len(shape)} entries, as base_weight has dimensions {shape}, got {edge!r}; pass an "
                "index in base_weight"
            )
        for n, index in enumerate(edge):
            check_int(f"{name}[{n}]", index, 0)
            if index >= shape[n]:
                raise ValueError(
                    f"{name}[{n}] must be less than {shape[n]}, got {index}; base_weight has shape {shape}"
                )
        return tuple(edge)
