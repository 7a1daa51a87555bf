"""The knots of KAN layers: make them, fit them to data, refine them, and transfer splines to new knots."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Each interval gets at least about this share of the mean width, so that ties do not make knots coincide.
_MIN_SHARE = 1e-3
# Smallest half-width of a feature's range, relative to its magnitude.
_MIN_RADIUS = 5e-3


def uniform_knots(low: float, high: float, grid_size: int, spline_order: int) -> Tensor:  # -> g+2s+1
    """Equally spaced knots on ``[low, high]`` and ``spline_order`` more on either side, in float64."""
    steps = torch.arange(-spline_order, grid_size + spline_order + 1, dtype=torch.float64)
    return low + steps * ((high - low) / grid_size)


def inner_knots(grid: Tensor, spline_order: int) -> Tensor:  # i g+2s+1 -> i g+1
    """The knots of the interval on which the splines are complete."""
    return grid[:, spline_order:-spline_order]


def fit_knots(
    samples: Tensor, grid_size: int, spline_order: int, margin: float, eps: float
) -> Tensor:  # m i -> i g+2s+1
    """Knots for data: ``eps`` times equal spacing over each feature's range plus ``1 - eps`` times its quantiles."""
    low, high = samples.amin(0), samples.amax(0)  # i
    centre = (low + high) / 2
    # A constant feature still needs an interval wide enough for float32.
    radius = torch.maximum((high - low) / 2 + margin, _MIN_RADIUS * centre.abs().clamp_min(1))
    low, high = centre - radius, centre + radius
    shares = torch.linspace(0, 1, grid_size + 1, dtype=samples.dtype, device=samples.device)  # g+1
    uniform = low[:, None] + shares * (high - low)[:, None]  # i g+1
    if eps == 1.0:
        return _extend(uniform, spline_order)
    ordered = samples.sort(0).values
    index = (shares * (len(samples) - 1)).round().long()
    quantiles = ordered[index].T.clone()  # i g+1
    quantiles[:, 0], quantiles[:, -1] = low, high
    return _extend(_separate(eps * uniform + (1 - eps) * quantiles), spline_order)


def refine_knots(grid: Tensor, spline_order: int, grid_size: int) -> Tensor:  # i g+2s+1 -> i g'+2s+1
    """Knots with ``grid_size`` intervals on the same range, spaced like the old ones."""
    inside = inner_knots(grid, spline_order)  # i g+1
    intervals = inside.shape[1] - 1
    position = torch.linspace(0, intervals, grid_size + 1, dtype=grid.dtype, device=grid.device)  # g'+1
    left = position.floor().clamp(max=intervals - 1).long()
    start = inside[:, left]  # i g'+1
    return _extend(start + (position - left) * (inside[:, left + 1] - start), spline_order)


def is_uniform(grid: Tensor) -> bool:
    """Whether the knots of every feature are equally spaced, up to the rounding of float32."""
    spacing = grid.double().diff(dim=1)
    mean = spacing.mean(1, keepdim=True)
    rounding = 4 * torch.finfo(torch.float32).eps * grid.abs().amax(1, keepdim=True)
    return bool(((spacing - mean).abs() <= 1e-4 * mean.abs() + rounding).all())


def transfer(blocks: Iterable[tuple[Tensor, Tensor]], ridge: float) -> Tensor:  # m i g+s, m i g'+s -> i g'+s g+s
    """The map from coefficients of the old bases to those of the new, by least squares over blocks of points."""
    products = [torch.einsum("mia,mib->iab", new, torch.cat([new, old], -1)) for old, new in blocks]  # i g'+s g'+g+2s
    gram, mixed = torch.stack(products).sum(0).tensor_split([products[0].shape[1]], -1)  # i g'+s g'+s, i g'+s g+s
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * scale * identity, mixed)


def _extend(inside: Tensor, spline_order: int) -> Tensor:  # i g+1 -> i g+2s+1
    """Add ``spline_order`` knots on either side, at the mean spacing of the intervals."""
    spacing = (inside[:, -1:] - inside[:, :1]) / (inside.shape[1] - 1)  # i 1
    steps = torch.arange(1, spline_order + 1, dtype=inside.dtype, device=inside.device)
    return torch.cat([inside[:, :1] - steps.flip(0) * spacing, inside, inside[:, -1:] + steps * spacing], 1)


def _separate(inside: Tensor) -> Tensor:  # i g+1
    """Widen intervals that ties have closed, and keep both ends."""
    width = inside.diff(dim=1)  # i g
    total = inside[:, -1:] - inside[:, :1]  # i 1
    width = width.clamp_min(0) + _MIN_SHARE * total / width.shape[1]
    width = width * (total / width.sum(1, keepdim=True))
    return torch.cat([inside[:, :1], inside[:, :1] + width.cumsum(1)], 1)
