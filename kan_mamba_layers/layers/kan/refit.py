"""Move splines to new knots: the least-squares map from the coefficients of old bases to those of new ones.

Between neighbouring knots of either kind, old and new bases are polynomials of degree ``s``. So the normal equations
need of the samples only their Chebyshev moments in each of these cells, ``sum_m T_r(u_m)`` for ``r <= 2s``, because
``2 T_p T_q = T_{p+q} + T_{|p-q|}``; no basis is ever evaluated at a sample.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kan_mamba_layers.layers.kan.edges import map_edges
from kan_mamba_layers.layers.kan.grid import fit_knots, inner_knots, refine_knots
from kan_mamba_layers.layers.kan.state import Splines, check_whole, write
from kan_mamba_layers.ops.bspline import Extrapolation, bspline_basis
from kan_mamba_layers.ops.spacing import is_uniform

_BLOCK = 1 << 20  # values in float64 that are worked on at a time
# Solutions of a ridge regression on the residual, added up: where data decide, the ridge leaves no bias.
_SOLUTIONS = 3


class Knots(NamedTuple):
    """Knots in float64, and how bases on them are evaluated."""

    grid: Tensor  # i g+2s+1
    uniform: bool
    extrapolation: Extrapolation


def fit(layer: Splines, samples: Tensor, margin: float) -> None:  # m i
    """Move the knots of every feature to the range of its samples, or to their quantiles."""
    if len(samples) == 0 or not samples.isfinite().all():
        raise ValueError(
            "x must hold at least one sample and only finite values, got (samples, features) = "
            f"{tuple(samples.shape)}; clean it first"
        )
    eps, dtype = 1.0 if layer.grid_mode == "uniform" else layer.grid_eps, layer.grid.dtype
    grid = fit_knots(samples, layer.grid_size, layer.spline_order, margin, eps, dtype)  # i g+2s+1
    if not (2 * grid.abs().amax(1) + (grid[:, -1] - grid[:, 0]) < torch.finfo(dtype).max).all():
        low, high = samples.min().item(), samples.max().item()
        raise ValueError(
            f"x must be small enough for knots in {dtype}, and so must margin, got {low} to {high} and "
            f"margin={margin}; normalise x, or pass a smaller margin"
        )
    inside = inner_knots(grid, layer.spline_order)  # i g+1
    shares = torch.linspace(0, 1, 4 * layer.grid_size + 1, dtype=grid.dtype, device=grid.device)[:, None]
    even = inside[:, 0] + shares * (inside[:, -1] - inside[:, 0])  # 4g+1 i
    _refit(layer, grid, [samples, even], ridge=1e-5, cause="x", fix="check it for outliers")


def refine(layer: Splines, grid_size: int) -> None:
    """Divide the range of every feature into more intervals."""
    grid = refine_knots(layer.grid.double(), layer.spline_order, grid_size)  # i g+2s+1
    if not (grid.to(layer.grid.dtype).diff(dim=1) > 0).all():
        raise ValueError(
            f"new_grid_size={grid_size} needs knots closer to each other than {layer.grid.dtype} can tell apart; take "
            "fewer intervals, or normalise the input"
        )
    inside = inner_knots(grid, layer.spline_order)  # i g+1
    shares = torch.arange(8, dtype=grid.dtype, device=grid.device) / 8
    points = inside[:, :-1, None] + shares * inside.diff(dim=1)[..., None]  # i g 8
    points = torch.cat([points.flatten(1), inside[:, -1:]], 1).T  # m i
    fix = "convert the layer, e.g. layer.float()"
    _refit(layer, grid, [points], ridge=0.0, cause=f"new_grid_size={grid_size}", fix=fix)


def _refit(layer: Splines, grid: Tensor, samples: Sequence[Tensor], *, ridge: float, cause: str, fix: str) -> None:
    """Move to the knots ``grid``, with the coefficients closest to the present splines at the samples.

    Features whose knots stay keep their coefficients, bit for bit. An error for coefficients that become too large
    names ``cause`` and ``fix``.
    """
    check_whole(layer, "spline_weight")
    weight, before = layer.spline_weight, layer.grid
    grid = grid.to(before.dtype)  # fit on the knots as they will be stored
    moved = torch.ones(len(grid), dtype=torch.bool, device=grid.device)  # i
    if grid.shape == before.shape:
        moved = (grid != before).any(1)
    if not moved.any():
        return
    old = Knots(before.double(), is_uniform(before), layer.extrapolation)
    new = Knots(grid.double(), is_uniform(grid), "zero")
    matrices = _transfer(samples, old, new, layer.spline_order, ridge)  # i g'+s g+s
    if not moved.all():
        matrices[~moved] = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    fitted = map_edges(matrices, weight)  # o i ... g'+s
    if not fitted.isfinite().all() and weight.isfinite().all():
        raise ValueError(f"{cause} leads to coefficients that are too large for {weight.dtype}; {fix}")
    write(layer, grid, fitted)


def _transfer(
    samples: Sequence[Tensor],  # each m i
    old: Knots,
    new: Knots,
    spline_order: int,
    ridge: float,
) -> Tensor:  # i g'+s g+s
    """The map of coefficients that keeps the splines at the samples, with ``ridge`` times the mean diagonal.

    All samples must lie in the interval of the new knots.
    """
    cells = _cells(old.grid, new.grid, spline_order)  # i n+1
    bases = old.grid.shape[1] + new.grid.shape[1] - 2 * spline_order - 2
    columns = max(1, _BLOCK // max(cells.shape[1] * (spline_order + 1) * bases, max(map(len, samples))))
    maps = []
    for first in range(0, len(cells), columns):
        part = slice(first, first + columns)
        moments = [_moments(some[:, part], cells[part], 2 * spline_order) for some in samples]  # each r i n
        polynomials = [_polynomials(knots, part, cells[part], spline_order) for knots in (new, old)]  # i n p g+s
        gram, mixed = _normal_equations(torch.stack(moments).sum(0), *polynomials)
        maps.append(_solve(gram, mixed, ridge))
    return torch.cat(maps)


def _cells(old: Tensor, new: Tensor, spline_order: int) -> Tensor:  # i g+2s+1, i g'+2s+1 -> i n+1
    """The ends of the cells: all knots inside the interval of the new ones."""
    low, high = new[:, spline_order, None], new[:, -spline_order - 1, None]
    return torch.cat([old, new], 1).clamp(low, high).sort(1).values


def _moments(samples: Tensor, cells: Tensor, degree: int) -> Tensor:  # m i, i n+1 -> r i n
    """The sum of ``T_r`` over the samples of each cell, whose coordinate ``u`` runs from -1 to 1."""
    moments = cells.new_zeros(degree + 1, len(cells), cells.shape[1] - 1)
    for some in samples.split(max(1, _BLOCK // len(cells))):
        x = some.T.to(cells.dtype).contiguous()  # i m
        cell = torch.searchsorted(cells, x, right=True).sub_(1).clamp_(0, cells.shape[1] - 2)
        left, right = cells.gather(1, cell), cells.gather(1, cell + 1)
        u = (2 * (x - left) / (right - left).clamp_min(torch.finfo(x.dtype).tiny) - 1).clamp_(-1, 1)
        before, chebyshev = u, torch.ones_like(u)  # T_-1 = T_1 = u, T_0 = 1
        for moment in moments:
            moment.scatter_add_(1, cell, chebyshev)
            before, chebyshev = chebyshev, 2 * u * chebyshev - before
    return moments


def _polynomials(knots: Knots, part: slice, cells: Tensor, spline_order: int) -> Tensor:  # i n+1 -> i n p g+s
    """Chebyshev coefficients of every basis in every cell, from its values at the Chebyshev points."""
    terms = spline_order + 1
    angles = math.pi * (torch.arange(terms, dtype=cells.dtype, device=cells.device) + 0.5) / terms
    left, right = cells[:, :-1, None], cells[:, 1:, None]
    points = left + (right - left) * (1 + angles.cos()) / 2  # i n p
    at = points.flatten(1).T  # n*p i
    extrapolation, uniform = knots.extrapolation, knots.uniform
    values = bspline_basis(at, knots.grid[part], spline_order, extrapolation=extrapolation, uniform=uniform)
    order = torch.arange(terms, dtype=cells.dtype, device=cells.device)[:, None]
    coefficients = torch.cos(order * angles) * torch.where(order > 0, 2, 1) / terms  # p p
    return coefficients @ values.transpose(0, 1).unflatten(1, (-1, terms))


def _normal_equations(moments: Tensor, new: Tensor, old: Tensor) -> Iterator[Tensor]:
    """The sums over the samples of products of new bases, i g'+s g'+s, and of new and old ones, i g'+s g+s."""
    order = torch.arange(new.shape[2], device=new.device)
    sums, differences = order[:, None] + order, (order[:, None] - order).abs()  # p p
    products = ((moments[sums] + moments[differences]) / 2).permute(2, 3, 0, 1)  # i n p p
    for other in (new, old):
        yield new.flatten(1, 2).mT @ (products @ other).flatten(1, 2)


def _solve(gram: Tensor, mixed: Tensor, ridge: float) -> Tensor:  # i g'+s g'+s, i g'+s g+s -> i g'+s g+s
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factors = torch.linalg.lu_factor(gram + ridge * scale * identity)
    solution = torch.zeros_like(mixed)
    for _ in range(_SOLUTIONS):
        solution += torch.linalg.lu_solve(*factors, mixed - gram @ solution)
    return solution
