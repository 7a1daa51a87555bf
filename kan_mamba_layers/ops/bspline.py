"""B-spline bases: the recursion for any knots, the symmetric closed form for equally spaced ones."""

import math

import torch
from torch import Tensor


def cox_de_boor(
    x: Tensor, grid: Tensor, spline_order: int, last: int | None = None
) -> Tensor:  # ... i, i m -> ... i m-1-s
    """Bases of degree ``spline_order`` on the knots ``grid`` by the Cox-de Boor recursion; 0/0 counts as 0.

    Cells are open on the right. With ``last``, nothing lies beyond the end of that cell, which then belongs to it.
    """
    x = x[..., None]
    cells = (x >= grid[:, :-1]) & (x < grid[:, 1:])  # ... i m-1
    if last is not None:
        cells = torch.cat([cells[..., :last], x >= grid[:, last : last + 1], cells[..., last + 1 :] & False], -1)
    bases = cells.to(x.dtype)
    for p in range(1, spline_order + 1):
        rising = (x - grid[:, : -p - 1]) * reciprocal(grid[:, p:-1] - grid[:, : -p - 1])
        falling = (grid[:, p + 1 :] - x) * reciprocal(grid[:, p + 1 :] - grid[:, 1:-p])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def closed_form(x: Tensor, grid: Tensor, spline_order: int) -> Tensor:  # ... i, i m -> ... i m-1-s
    """The same bases for equally spaced knots, as a sum of truncated powers that are symmetric about each centre.

    With ``a`` the distance from the centre of the basis in units of the knot spacing and ``s`` the degree,

        B(a) = 1/s! sum_j (-1)^j binomial(s+1, j) relu((s+1)/2 - j - a)^s,    0 <= j < (s+1)/2.

    The one-sided sum over all knots is shorter to write, but its terms cancel: it loses three digits for cubics.
    """
    s = spline_order
    intervals = grid.shape[-1] - 1
    spacing = (grid[:, -1] - grid[:, 0]) / intervals  # i
    position = (x - grid[:, 0]) / spacing  # ... i
    centres = torch.arange(intervals - s, dtype=x.dtype, device=x.device) + (s + 1) / 2
    distance = (position[..., None] - centres).abs()  # ... i g+s
    bases = torch.zeros_like(distance)
    for j in range(math.ceil((s + 1) / 2)):
        weight = (-1) ** j * math.comb(s + 1, j) / math.factorial(s)
        bases = bases + weight * torch.relu((s + 1) / 2 - j - distance) ** s
    return bases


def cox_de_boor_slope(x: Tensor, grid: Tensor, spline_order: int) -> Tensor:  # ... i, i m -> ... i m-1-s
    """Derivatives of the bases with respect to ``x``."""
    p = spline_order
    lower = cox_de_boor(x, grid, p - 1)  # ... i m-p
    weighted = p * lower * reciprocal(grid[:, p:] - grid[:, :-p])
    return weighted[..., :-1] - weighted[..., 1:]


def end_slopes(grid: Tensor, spline_order: int) -> Tensor:  # i m -> 2 i m-1-s
    """Derivatives of the bases at both ends of the interval."""
    low, high = grid[:, spline_order], grid[:, -spline_order - 1]
    # Intervals are open on the right: there the slope from inside is that of the mirrored knots at their left end.
    above = -cox_de_boor_slope(-high, -grid.flip(1), spline_order).flip(1)
    return torch.stack([cox_de_boor_slope(low, grid, spline_order), above])


def reciprocal(width: Tensor) -> Tensor:
    """``1 / width``, and 0 for knots that coincide."""
    return torch.where(width > 0, width, 1).reciprocal() * (width > 0)
