"""KANLinear's knots: fitting them to data and refining them must keep the function."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kan_layers import EXTRAPOLATIONS, HALF, MODES, best_fit_error, spline_only, with_large_splines

from helpers import assert_close, relative_l2
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
