"""bspline_basis against SciPy and through the properties of B-splines."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import LAYOUTS, Array, assert_close, basis_oracle, max_error, strided, to_array
from kan_mamba_layers import bspline_basis

pytestmark = pytest.mark.usefixtures("poisoned_empty")

ORDERS = (1, 2, 3, 4, 5)


def uniform_grid(order: int, size: int = 5, low: float = -1.0, high: float = 1.0, features: int = 1) -> Tensor:
    step = (high - low) / size
    knots = low + step * torch.arange(-order, size + order + 1, dtype=torch.float64)
    return knots.expand(features, -1).contiguous()


def uneven_grid(order: int, size: int = 5, features: int = 3, seed: int = 0, ratio: float = 300.0) -> Tensor:
    """Strictly rising knots whose spacings differ by up to `ratio`."""
    spacing = torch.rand(features, size + 2 * order + 1, generator=torch.Generator().manual_seed(seed)).double()
    return -1 + (ratio ** (spacing - 1)).cumsum(1) * 0.3


def points(grid: Tensor) -> Tensor:
    """For every feature: all knots, the floats next to them, and a dense sweep from far below to far above."""
    knots = grid.numpy()
    low, high = knots[:, :1], knots[:, -1:]
    sweep = low - 1 + (high - low + 2) * np.linspace(0, 1, 2001)
    near = [knots, np.nextafter(knots, -np.inf), np.nextafter(knots, np.inf)]
    return torch.from_numpy(np.concatenate([*near, sweep], axis=1).T.copy())  # points i


@pytest.mark.parametrize("order", ORDERS)
class TestAgainstScipy:
    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize(("size", "low", "high"), [(5, -1, 1), (1, 0, 1), (8, -2, 2), (20, -3, 0.7)])
    def test_uniform_knots(self, order: int, uniform: bool, size: int, low: float, high: float) -> None:
        grid = uniform_grid(order, size, low, high)
        x = points(grid)
        bases = bspline_basis(x, grid, order, uniform=uniform)
        assert bases.shape == (*x.shape, size + order)
        assert max_error(bases, basis_oracle(x.numpy(), grid.numpy(), order)) <= 1e-12

    @pytest.mark.parametrize("ratio", [3.0, 300.0])
    def test_uneven_knots(self, order: int, ratio: float) -> None:
        grid = uneven_grid(order, ratio=ratio)
        x = points(grid)
        bases = bspline_basis(x, grid, order)
        assert max_error(bases, basis_oracle(x.numpy(), grid.numpy(), order)) <= 1e-12

    def test_features_with_different_uniform_grids(self, order: int) -> None:
        grid = torch.cat([uniform_grid(order, 4, low, high) for low, high in [(-1, 1), (0, 5), (-9, -8.5)]])
        x = points(grid)
        expected = basis_oracle(x.numpy(), grid.numpy(), order)
        assert max_error(bspline_basis(x, grid, order, uniform=True), expected) <= 1e-12
        assert max_error(bspline_basis(x, grid, order), expected) <= 1e-12

    @pytest.mark.parametrize("uniform", [True, False])
    def test_derivative(self, order: int, uniform: bool) -> None:
        grid = uniform_grid(order)
        # Below order 3 the derivative jumps or has a kink at the knots, so the points lie between them.
        x = points(grid) if order > 2 else torch.linspace(-3.001, 3.0027, 997, dtype=torch.float64)[:, None]
        jacobian = torch.autograd.functional.jacobian(
            lambda v: bspline_basis(v, grid, order, uniform=uniform).sum(0), x
        )  # i c points i
        expected = basis_oracle(x.numpy(), grid.numpy(), order, derivative=1)  # points i c
        assert max_error(jacobian[0, :, :, 0].T[:, None], expected) <= 1e-11

    @pytest.mark.parametrize("uniform", [True, False])
    def test_float32(self, order: int, uniform: bool) -> None:
        grid = uniform_grid(order).float()
        x = points(grid.double()).float()
        expected = basis_oracle(x.double().numpy(), grid.double().numpy(), order)
        assert max_error(bspline_basis(x, grid, order, uniform=uniform), expected) <= 1.5e-6

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("uniform", [True, False])
    def test_half_precision_rounds_once(self, order: int, uniform: bool, dtype: torch.dtype) -> None:
        grid = uniform_grid(order).float()
        x = torch.linspace(-3, 3, 1001)[:, None].to(dtype)
        bases = bspline_basis(x, grid, order, uniform=uniform)
        assert bases.dtype == dtype
        expected = basis_oracle(x.double().numpy(), grid.double().numpy(), order)
        assert max_error(bases, expected) <= 0.5 * torch.finfo(dtype).eps + 2e-6


@st.composite
def random_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, bool]:
    order, size, features = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    uniform = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    if uniform:
        low = draw(st.floats(-10, 10))
        grid = uniform_grid(order, size, low, low + draw(st.floats(0.1, 10)), features)
    else:
        grid = uneven_grid(order, size, features, seed)
    batch = draw(st.sampled_from([(), (0,), (7,), (2, 3), (2, 1, 3)]))
    unit = torch.rand(*batch, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = grid[:, 0] + (grid[:, -1] - grid[:, 0]) * (1.4 * unit - 0.2)
    layout = draw(st.sampled_from(LAYOUTS))
    return strided(x, layout) if batch else x, grid, order, uniform


class TestProperties:
    @given(random_cases())
    def test_equals_scipy_and_keeps_the_laws(self, case: tuple[Tensor, Tensor, int, bool]) -> None:
        x, grid, order, uniform = case
        bases = bspline_basis(x, grid, order, uniform=uniform)
        assert bases.shape == (*x.shape, grid.shape[1] - order - 1)
        assert max_error(bases, basis_oracle(x.numpy(), grid.numpy(), order)) <= 1e-12
        assert (bases >= -1e-13).all(), "non-negativity"
        inside = (x >= grid[:, order]) & (x <= grid[:, -order - 1])
        assert ((bases.sum(-1) - 1).abs()[inside] <= 1e-12).all(), "partition of unity"
        assert (((bases > 1e-9).sum(-1)) <= order + 1).all(), "local support"
        outside = (x < grid[:, 0]) | (x > grid[:, -1])
        assert (bases[outside] == 0).all(), "zero outside all knots"

    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("order", ORDERS)
    def test_ends_and_beyond(self, order: int, uniform: bool) -> None:
        grid = uniform_grid(order)
        first, last = grid[0, 0].item(), grid[0, -1].item()
        far = torch.tensor([[first - 1e-9], [last + 1e-9], [-1e6], [1e6], [-1e30], [1e30]], dtype=torch.float64)
        assert (bspline_basis(far, grid, order, uniform=uniform) == 0).all()
        ends = torch.tensor([[-1.0], [1.0], [np.nextafter(1.0, 2)], [np.nextafter(-1.0, -2)]], dtype=torch.float64)
        sums = bspline_basis(ends, grid, order, uniform=uniform).sum(-1)
        assert ((sums - 1).abs() <= 1e-12).all()

    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("order", ORDERS)
    def test_far_values_are_finite_and_flat(self, order: int, uniform: bool) -> None:
        grid = (uniform_grid if uniform else uneven_grid)(order, features=1).float()
        far = torch.tensor([1e20, 1e38, float("inf")])
        x = torch.cat([far, -far])[:, None].requires_grad_()
        for nu, extrapolation in product(range(order + 1), ("zero", "clamp")):
            bases = bspline_basis(x, grid, order, extrapolation=extrapolation, uniform=uniform, nu=nu)
            (slope,) = torch.autograd.grad(bases.sum(), x)
            assert bases.isfinite().all() and (slope == 0).all()
            assert bases.any() == (extrapolation == "clamp" and nu == 0)

    @pytest.mark.parametrize("uniform", [True, False])
    def test_nan_is_not_swallowed(self, uniform: bool) -> None:
        x, grid = torch.tensor([[float("nan")]]), uniform_grid(3).float()
        assert all(bspline_basis(x, grid, 3, uniform=uniform, nu=nu).isnan().all() for nu in range(5))

    @pytest.mark.parametrize("order", ORDERS)
    def test_coincident_knots(self, order: int) -> None:
        """A clamped grid: 0/0 counts as 0 and the bases sum to 1."""
        grid = torch.cat([torch.zeros(order), torch.linspace(0, 1, 6), torch.ones(order)]).double()[None]
        x = torch.linspace(0, 0.999, 500, dtype=torch.float64)[:, None]
        bases = bspline_basis(x, grid, order)
        assert max_error(bases.sum(-1), torch.ones(500, 1)) <= 1e-12
        outside = torch.tensor([[-1.0], [-1e-9], [1.0], [2.0]], dtype=torch.float64)
        assert not any(bspline_basis(outside, grid, order, nu=nu).any() for nu in range(order + 1))

    @pytest.mark.parametrize("uniform", [True, False])
    def test_grid_dtype_does_not_decide(self, uniform: bool) -> None:
        x = torch.rand(9, 1)
        assert bspline_basis(x, uniform_grid(3), 3, uniform=uniform).dtype == torch.float32
        assert bspline_basis(x.double(), uniform_grid(3).float(), 3, uniform=uniform).dtype == torch.float64


def from_right(at: Array, knots: Array, order: int, nu: int) -> Array:  # m, k -> m c
    """Derivatives of the bases; a step at a knot belongs to the right of it, as in SciPy but for an element's end."""
    if nu > order:
        return np.zeros((len(at), len(knots) - order - 1))
    bases = basis_oracle(at[:, None], knots[None], order, nu)[:, 0]
    return np.where(at[:, None] == knots[order + 1 :], 0.0, bases)


def from_left(at: Array, knots: Array, order: int, nu: int) -> Array:  # m, k -> m c
    return (-1) ** nu * from_right(-at, -knots[::-1], order, nu)[:, ::-1]


def derivatives(at: Array, knots: Array, order: int, nu: int, extrapolation: str) -> Array:  # m, k -> m c
    """Those of order `nu >= 1`; with an extrapolation the interval of the grid is closed."""
    if extrapolation == "zero":
        return from_right(at, knots, order, nu)
    low, high = knots[order], knots[-order - 1]
    tangent = float(extrapolation == "linear" and nu == 1)
    below, above = (
        tangent * side(np.array([end]), knots, order, 1) for side, end in ((from_right, low), (from_left, high))
    )
    inside = np.where(at[:, None] == high, from_left(at, knots, order, nu), from_right(at, knots, order, nu))
    return np.where(at[:, None] < low, below, np.where(at[:, None] > high, above, inside))


@pytest.mark.parametrize("extrapolation", ["zero", "clamp", "linear"])
@pytest.mark.parametrize("uniform", [True, False])
class TestAtKnots:
    @pytest.mark.parametrize("order", ORDERS)
    def test_derivatives_of_every_order(self, order: int, uniform: bool, extrapolation: str) -> None:
        """At knots, midpoints, and outside: by `nu`, by autograd, and by both one after the other."""
        grid = (uniform_grid if uniform else uneven_grid)(order, features=1)
        knots = to_array(grid)[0]
        at = np.concatenate([knots, (knots[1:] + knots[:-1]) / 2, knots[[0, -1]] + [-0.3, 0.3]])
        x = torch.from_numpy(at)[:, None].requires_grad_()
        options = {"extrapolation": extrapolation, "uniform": uniform}
        pick = torch.arange(1.0, len(knots) - order, dtype=torch.float64).cos()  # c
        value = (bspline_basis(x, grid, order, **options) @ pick).sum()
        lower = value
        for nu in range(1, order + 2):
            expected = derivatives(at, knots, order, nu, extrapolation)
            bases = bspline_basis(x, grid, order, nu=nu, **options)
            assert_close(f"nu={nu}", bases[:, 0], expected, 1e-11)
            for name, start in (("autograd", value), ("autograd of nu", lower)) if nu <= order else ():
                (slope,) = torch.autograd.grad(start, x, create_graph=True)
                assert_close(f"{name} {nu}", slope[:, 0], expected @ to_array(pick), 1e-11)
                value = slope.sum() if name == "autograd" else value
            lower = (bases @ pick).sum()


class TestDerivatives:
    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("order", ORDERS)
    def test_gradcheck(self, order: int, uniform: bool) -> None:
        grid = uniform_grid(order, features=2) if uniform else uneven_grid(order, features=2, ratio=4.0)
        share = torch.tensor([[-0.1, 0.13], [0.31, 0.47], [0.72, 1.1]], dtype=torch.float64)  # no point on a knot
        x = (grid[:, 0] + (grid[:, -1] - grid[:, 0]) * share).requires_grad_()
        assert torch.autograd.gradcheck(lambda v: bspline_basis(v, grid, order, uniform=uniform), (x,))

    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("order", [3, 4, 5])
    def test_gradgradcheck(self, order: int, uniform: bool) -> None:
        grid = uniform_grid(order, features=2) if uniform else uneven_grid(order, features=2, ratio=4.0)
        share = torch.tensor([[0.13, 0.31], [0.47, 0.72]], dtype=torch.float64)
        x = (grid[:, 0] + (grid[:, -1] - grid[:, 0]) * share).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda v: bspline_basis(v, grid, order, uniform=uniform), (x,))
