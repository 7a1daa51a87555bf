"""The knots of KAN layers: make them, fit them to data, and refine them."""

import numpy as np
import torch
from torch import Tensor

# Each interval gets at least about this share of the mean width, so that ties do not make knots coincide.
_MIN_SHARE = 1e-3
# The mean interval has at least as many steps of the knots' dtype, and the smallest one a quarter of them.
_MIN_STEPS = 16
# Half-width of the range of a constant feature without a margin, relative to its value.
_CONSTANT_RADIUS = 5e-3
_BLOCK = 1 << 22  # values that are sorted at a time


def uniform_knots(low: float, high: float, grid_size: int, spline_order: int) -> Tensor:  # -> g+2s+1
    """Equally spaced knots on ``[low, high]`` and ``spline_order`` more on either side, in float64."""
    # On the CPU also where another device is the default one.
    steps = torch.arange(-spline_order, grid_size + spline_order + 1, dtype=torch.float64, device="cpu")
    return low + steps * ((high - low) / grid_size)


def new_knots(
    grid_range: tuple[float, float], grid_size: int, spline_order: int, dtype: torch.dtype
) -> Tensor:  # -> g+2s+1
    """The knots of a new layer, which must be finite and differ in ``dtype``."""
    low, high = grid_range
    # Checked in NumPy, since tensors may have no values where a layer is made.
    steps = np.arange(-spline_order, grid_size + spline_order + 1)
    with np.errstate(over="ignore"):
        knots = (low + steps * ((high - low) / grid_size)).astype(np.float64 if dtype == torch.float64 else np.float32)
    if not (np.isfinite(knots).all() and (np.diff(knots) > 0).all()):
        raise ValueError(
            f"grid_range={grid_range} has knots that {dtype} cannot hold or tell apart with {grid_size} intervals; "
            "normalise the input and take a range of its size, such as (-1.0, 1.0)"
        )
    return uniform_knots(low, high, grid_size, spline_order)


def inner_knots(grid: Tensor, spline_order: int) -> Tensor:  # i g+2s+1 -> i g+1
    """The knots of the interval on which the splines are complete."""
    return grid[:, spline_order:-spline_order]


def fit_knots(
    samples: Tensor, grid_size: int, spline_order: int, margin: float, eps: float, dtype: torch.dtype
) -> Tensor:  # m i -> i g+2s+1
    """Knots in float64 for data: ``eps`` times equal spacing over each feature's range plus ``1 - eps`` its quantiles.

    They are far enough apart to differ in ``dtype``.
    """
    low, high = samples.amin(0).double(), samples.amax(0).double()  # i
    centre, spread = low / 2 + high / 2, high / 2 - low / 2
    size = torch.maximum(low.abs(), high.abs()) + margin
    limits = torch.finfo(dtype)
    least = _MIN_STEPS * (limits.eps * size).clamp_min(4 * limits.tiny)  # i; its reciprocal is finite
    radius = spread + margin
    radius = torch.where(radius > 0, radius, _CONSTANT_RADIUS * torch.where(size > 0, size, 1))
    radius = torch.maximum(radius, grid_size * least / 2)
    low, high = centre - radius, centre + radius
    shares = torch.linspace(0, 1, grid_size + 1, dtype=low.dtype, device=low.device)  # g+1
    uniform = low[:, None] + shares * (high - low)[:, None]  # i g+1
    if eps == 1.0:
        return _extend(uniform, spline_order)
    index = (shares * (len(samples) - 1)).round().long()
    columns = samples.split(max(1, _BLOCK // len(samples)), 1)
    quantiles = torch.cat([some.T.contiguous().sort(1).values[:, index].double() for some in columns])  # i g+1
    quantiles[:, 0], quantiles[:, -1] = low, high
    return _extend(_separate(eps * uniform + (1 - eps) * quantiles, least / 4), spline_order)


def refine_knots(grid: Tensor, spline_order: int, grid_size: int) -> Tensor:  # i g+2s+1 -> i g'+2s+1
    """Knots with ``grid_size`` intervals on the same range, spaced like the old ones."""
    inside = inner_knots(grid, spline_order)  # i g+1
    intervals = inside.shape[1] - 1
    position = torch.linspace(0, intervals, grid_size + 1, dtype=grid.dtype, device=grid.device)  # g'+1
    left = position.floor().clamp(max=intervals - 1).long()
    start = inside[:, left]  # i g'+1
    return _extend(start + (position - left) * (inside[:, left + 1] - start), spline_order)


def _extend(inside: Tensor, spline_order: int) -> Tensor:  # i g+1 -> i g+2s+1
    """Add ``spline_order`` knots on either side, at the mean spacing of the intervals."""
    spacing = (inside[:, -1:] - inside[:, :1]) / (inside.shape[1] - 1)  # i 1
    steps = torch.arange(1, spline_order + 1, dtype=inside.dtype, device=inside.device)
    return torch.cat([inside[:, :1] - steps.flip(0) * spacing, inside, inside[:, -1:] + steps * spacing], 1)


def _separate(inside: Tensor, least: Tensor) -> Tensor:  # i g+1, i
    """Widen intervals that ties have closed, and keep both ends."""
    width = inside.diff(dim=1)  # i g
    total = inside[:, -1:] - inside[:, :1]  # i 1
    width = width.clamp_min(0) + torch.maximum(_MIN_SHARE * total / width.shape[1], least[:, None])
    width = width * (total / width.sum(1, keepdim=True))
    return torch.cat([inside[:, :1], inside[:, :1] + width.cumsum(1)], 1)
