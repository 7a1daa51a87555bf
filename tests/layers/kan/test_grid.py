"""KANLinear's knots: fitting them to data and refining them must keep the function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kan_layers import EXTRAPOLATIONS, HALF, MODES, best_fit_error, spline_only, with_large_splines
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_close, basis_oracle, relative_l2, to_array
from kan_mamba_layers import KANConv2d, KANLinear


@pytest.mark.parametrize("mode", MODES)
class TestUpdateGrid:
    def test_keeps_what_extrapolation_adds(self, mode: str) -> None:
        """A spline that is a straight line goes on beyond its grid, and any knots can express that."""
        layer = KANLinear(8, 6, grid_mode=mode, extrapolation="linear")
        with torch.no_grad():
            layer.spline_weight.copy_(
                layer.grid.unfold(1, 3, 1)[:, 1:-1].mean(-1)
            )  # its coefficients are knot averages
        x = 5 * torch.randn(512, 8)
        before = spline_only(layer, x)
        assert relative_l2(before, x.double() @ layer.spline_scaler.double().T) <= 1e-5
        layer.update_grid(x)
        assert relative_l2(spline_only(layer, x), before) <= 1e-3

    @pytest.mark.parametrize("data", ["uniform", "normal", "skewed"])
    def test_comes_close_to_the_best_fit_on_the_new_knots(self, mode: str, data: str) -> None:
        layer = with_large_splines(mode)
        x = {
            "uniform": 3 * (2 * torch.rand(1024, 8) - 1),
            "normal": torch.randn(1024, 8) / 2,
            "skewed": torch.rand(1024, 8) ** 4 * 2 - 1,
        }[data]
        target, before = copy.deepcopy(layer), spline_only(layer, x)
        layer.update_grid(x)
        error = relative_l2(spline_only(layer, x), before)
        assert error <= 1.05 * best_fit_error(target, layer, x) + 1e-3

    def test_moves_the_knots_to_the_data(self, mode: str) -> None:
        layer = KANLinear(2, 2, grid_mode=mode)
        x = torch.stack([torch.linspace(3, 7, 101), torch.linspace(-0.2, -0.1, 101)], 1)
        layer.update_grid(x, margin=0.01)
        low, high = layer.grid[:, 3], layer.grid[:, -4]
        assert_close("low", low, torch.tensor([2.99, -0.21]), 1e-3)
        assert_close("high", high, torch.tensor([7.01, -0.09]), 1e-3)
        assert (layer.grid.diff(dim=1) > 0).all()

    def test_spacing(self, mode: str) -> None:
        layer = KANLinear(2, 2, grid_mode=mode)
        layer.update_grid(torch.randn(2000, 2) ** 3)
        spacing = layer.grid[:, 3:-3].diff(dim=1)
        ratio = (spacing.amax(1) / spacing.amin(1)).min()
        assert ratio < 1.001 if mode == "uniform" else ratio > 5

    def test_scaler_and_base_stay(self, mode: str) -> None:
        layer = KANLinear(8, 6, grid_mode=mode)
        scaler, base = layer.spline_scaler.clone(), layer.base_weight.clone()
        layer.update_grid(torch.randn(100, 8))
        assert torch.equal(layer.spline_scaler, scaler) and torch.equal(layer.base_weight, base)

    def test_an_optimizer_goes_on_training_the_same_parameters(self, mode: str) -> None:
        layer = KANLinear(8, 6, grid_mode=mode)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        x = torch.rand(100, 8) - 0.5
        layer.update_grid(x)
        before = layer.spline_weight.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.spline_weight.detach(), before)

    def test_under_autocast_and_on_a_graph(self, mode: str) -> None:
        layer = with_large_splines(mode)
        x = (torch.rand(256, 8) * 1.8 - 0.9).requires_grad_()
        before = spline_only(layer, x.detach())
        with torch.autocast("cpu", torch.bfloat16):
            layer.update_grid(2 * x - x)
        assert x.grad is None and layer.spline_weight.requires_grad
        assert relative_l2(spline_only(layer, x.detach()), before) <= 0.03

    def test_state_dict_round_trip_after_an_update(self, mode: str) -> None:
        layer, other = with_large_splines(mode), KANLinear(8, 6, grid_mode=mode)
        layer.update_grid(torch.randn(300, 8) ** 3)
        other.load_state_dict(layer.state_dict(), strict=True)
        x = torch.randn(50, 8)
        assert torch.equal(layer(x), other(x))

    def test_twice(self, mode: str) -> None:
        layer = with_large_splines(mode)
        x = torch.rand(1024, 8) * 1.8 - 0.9
        before = spline_only(layer, x)
        layer.update_grid(x)
        layer.update_grid(x)
        assert relative_l2(spline_only(layer, x), before) <= 0.03


class TestExtendGrid:
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("sizes", [(5, 10, 20), (5, 20), (3, 9)])
    @pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("mode", MODES)
    def test_nested_refinement_is_exact(
        self, mode: str, order: int, sizes: tuple[int, ...], extrapolation: str
    ) -> None:
        layer = with_large_splines(mode, spline_order=order, grid_size=sizes[0], extrapolation=extrapolation)
        if mode == "adaptive":
            layer.update_grid(torch.rand(1000, 8) * 2 - 1)
        low, high = layer.grid[:, order], layer.grid[:, -order - 1]
        x = low + (high - low) * (2 * torch.rand(1000, 8) - 0.5)
        if extrapolation == "zero":  # beyond the range, the finer bases run out earlier
            x = x.clamp(low, high)
        before = spline_only(layer, x)
        for size in sizes[1:]:
            layer.extend_grid(size)
            assert relative_l2(spline_only(layer, x), before) <= 1e-6
        assert layer.grid_size == sizes[-1] == layer.spline_weight.shape[-1] - order
        assert layer.grid.shape == (8, sizes[-1] + 2 * order + 1)

    @pytest.mark.parametrize("order", [1, 3, 5])
    def test_the_float32_layer_itself_is_as_exact(self, order: int) -> None:
        layer, x = with_large_splines(spline_order=order), torch.rand(1000, 8) * 2 - 1
        before = layer(x)
        layer.extend_grid(20)
        assert relative_l2(layer(x), before) <= 1e-6

    def test_other_sizes_come_close(self) -> None:
        layer = with_large_splines()
        x = torch.rand(1000, 8) * 2 - 1
        before = spline_only(layer, x)
        layer.extend_grid(8)
        assert relative_l2(spline_only(layer, x), before) <= 0.03

    def test_the_extended_layer_trains_and_reloads(self) -> None:
        layer = with_large_splines(bias=True)
        layer.extend_grid(10)
        x = torch.randn(20, 8)
        layer(x).square().sum().backward()
        assert layer.spline_weight.grad.abs().max() > 0
        other = KANLinear(8, 6, grid_size=10, bias=True)
        other.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(layer(x), other(x))

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        layer = with_large_splines().to(dtype)
        x = (torch.rand(500, 8) * 2 - 1).to(dtype)
        before = spline_only(layer, x)
        layer.extend_grid(10)
        assert layer.spline_weight.dtype == dtype
        assert relative_l2(spline_only(layer, x), before) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("build", "shape"),
    [(lambda: KANLinear(4, 3), (30, 4)), (lambda: KANConv2d(3, 2, 3), (2, 3, 8, 9))],
    ids=["linear", "conv"],
)
def test_parameters_stay_contiguous(build: Callable[[], KANLinear | KANConv2d], shape: tuple[int, ...]) -> None:
    """Whatever moves the grid: flat copies, L-BFGS and safetensors refuse parameters in another order of memory."""
    layer, x = build(), torch.randn(shape)
    for change in (
        lambda: layer.update_grid(x),
        lambda: layer.extend_grid(10),
        lambda: layer.extend_grid(13),
        lambda: layer.prune_edges(0.01),
    ):
        change()
        assert all(value.is_contiguous() for value in layer.state_dict().values())
    flat = torch.nn.utils.parameters_to_vector(layer.parameters())
    assert flat.numel() == sum(p.numel() for p in layer.parameters())
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=2)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        error = layer(x).square().mean()
        error.backward()
        return error

    before = loss().item()
    optimiser.step(loss)
    assert loss().item() < before


def columns(size: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Features whose range is small, or small beside their values."""
    u = torch.rand(size, 1, dtype=dtype)
    return {
        "micrometres in metres": 1e-4 * u,
        "tiny": 1e-30 * u,
        "pressure in pascal": 101275 + 100 * u,
        "seconds since 1970": 1.7e9 + 86400 * u,
        "negative": -5e6 - u,
        "large": 1e30 * u,
    }


@pytest.mark.parametrize("mode", MODES)
class TestTheScaleOfTheData:
    @pytest.mark.parametrize("name", columns(1))
    def test_the_knots_fit_any_scale(self, mode: str, name: str) -> None:
        """The best spline on the knots is as good as that for data in [0, 1]."""
        u, x = torch.rand(1000, 1, dtype=torch.float64), None
        torch.manual_seed(1)
        x = columns(1000)[name]
        torch.manual_seed(1)
        u = torch.rand(1000, 1, dtype=torch.float64)
        layer = KANLinear(1, 1, grid_size=20, grid_mode=mode, dtype=torch.float64)
        layer.update_grid(x, margin=0.0)
        ends = layer.grid[0, [3, -4]]
        assert_close("ends", ends - x.min(), torch.stack([x.min(), x.max()]) - x.min(), 1e-6)
        bases = basis_oracle(to_array(x), to_array(layer.grid), 3)[:, 0]
        target = np.sin(2 * np.pi * to_array(u)[:, 0])
        error = np.abs(bases @ np.linalg.lstsq(bases, target, rcond=None)[0] - target)
        assert error.max() < 1e-3
        assert layer(x).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [0.0, 1e-40, 0.25, -3e7])
    def test_a_constant_feature(self, mode: str, value: float, dtype: torch.dtype) -> None:
        layer, x = KANLinear(2, 2, grid_mode=mode, dtype=dtype), torch.full((20, 2), value, dtype=dtype)
        layer.update_grid(x, margin=0.0)
        assert (layer.grid.diff(dim=1) > 0).all()
        assert layer(x).isfinite().all() and layer(x + 1).isfinite().all()

    def test_of_zero_the_range_is_fixed(self, mode: str) -> None:
        layer = KANLinear(1, 1, grid_mode=mode, dtype=torch.float64)
        layer.update_grid(torch.zeros(20, 1, dtype=torch.float64), margin=0.0)
        assert_close("ends", layer.grid[0, [3, -4]], np.array([-0.005, 0.005]), 1e-12)

    def test_float32_resolves_the_intervals(self, mode: str) -> None:
        """Data a few steps wide get intervals of several steps, of which none vanishes."""
        layer, x = KANLinear(1, 1, grid_mode=mode, grid_eps=0.0), torch.rand(50, 1).mul(8).round() + 2**23
        layer.update_grid(x, margin=0.0)
        assert (layer.grid.diff(dim=1) >= 2).all() and layer(x).isfinite().all()

    def test_without_spread_in_float64_the_largest_values_still_work(self, mode: str) -> None:
        layer, x = KANLinear(2, 2, grid_mode=mode, dtype=torch.float64), 1e300 * torch.randn(50, 2).double()
        layer.update_grid(x)
        assert all(v.isfinite().all() for v in layer.state_dict().values()) and layer(x).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_data_again_change_nothing(mode: str, dtype: torch.dtype) -> None:
    layer, x = with_large_splines(mode, dtype=dtype), torch.randn(200, 8, dtype=dtype)
    layer.update_grid(x)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    for _ in range(5):
        layer.update_grid(x)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_knots_that_move_by_rounding_do_not_wear_the_function_down(mode: str) -> None:
    """A ridge that pulls to zero takes a share of the function at every call."""
    layer, x = with_large_splines(mode, dtype=torch.float64), torch.rand(200, 8, dtype=torch.float64)
    layer.update_grid(x)
    before = spline_only(layer, x)
    for step in range(50):
        layer.update_grid(x, margin=0.01 + 1e-12 * (step % 2))
    assert relative_l2(spline_only(layer, x), before) <= 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
def test_the_fit_is_that_of_least_squares(order: int, extrapolation: str) -> None:
    """Against the bases of SciPy at every sample, solved by singular values."""
    layer = with_large_splines("adaptive", (2, 3), spline_order=order, dtype=torch.float64, extrapolation=extrapolation)
    target, x = copy.deepcopy(layer), 0.9 * torch.randn(400, 2, dtype=torch.float64)
    x = x.clamp(-1, 1) if extrapolation == "zero" else x
    layer.update_grid(x)
    even = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None]
    low, high = layer.grid[:, order], layer.grid[:, -order - 1]
    points = torch.cat([x, low + even * (high - low)])
    for i in range(2):
        column = to_array(points)[:, i : i + 1]
        bases = basis_oracle(column, to_array(layer.grid)[i : i + 1], order)[:, 0]
        values = to_array(target.b_splines(points))[:, i] @ to_array(target.spline_weight)[:, i].T
        best = bases @ np.linalg.lstsq(bases, values, rcond=None)[0]
        assert_close(f"feature {i}", bases @ to_array(layer.spline_weight)[:, i].T, best, 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [8192, 1 << 21])
def test_the_memory_of_an_update_is_bounded(mode: str, rows: int) -> None:
    """Nothing that it makes is much larger than the data, where all bases would be 16 times as large."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, operator: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            out = operator(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes())
            return out

    x = torch.rand(rows, (1 << 21) // rows)
    layer = KANLinear(x.shape[1], 2, grid_mode=mode)
    with Largest() as largest:
        layer.update_grid(x)
    assert largest.size <= 4 * x.untyped_storage().nbytes()


def test_writes_in_place_so_that_replicas_and_averages_keep_their_tensors() -> None:
    layer, x = KANLinear(8, 6, grid_mode="adaptive"), torch.randn(100, 8)
    held = layer.state_dict()
    layer.update_grid(x)
    assert all(v.data_ptr() == held[k].data_ptr() for k, v in layer.state_dict().items())
