"""Defects that were found by running other implementations: one test, or one class of tests, for each of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from kan_layers import (
    BACKENDS,
    EXTRAPOLATIONS,
    HALF,
    LAYERS,
    MODES,
    best_fit_error,
    gradcheck,
    on_nonuniform_knots,
    spline_only,
    with_large_splines,
)
from torch import Tensor

from helpers import assert_close, basis_oracle, largest, relative_l2, to_array
from kan_mamba_layers import KANLinear


@pytest.mark.parametrize("mode", MODES)
class TestUpdateGridKeepsTheFunction:
    """Elsewhere `update_grid` writes the scaled curve into the unscaled weights: the spline part changes by 95 %."""

    @pytest.mark.parametrize("features", [(8, 6), (64, 64), (1, 1)])
    def test_of_a_fresh_layer_with_scalers(self, mode: str, features: tuple[int, int]) -> None:
        layer = KANLinear(*features, grid_mode=mode)
        x = torch.rand(512, features[0]) * 1.9 - 0.95
        target, before, spline = copy.deepcopy(layer), layer(x), spline_only(layer, x)
        layer.update_grid(x)
        assert relative_l2(layer(x), before) <= 0.03
        # The noise of fresh splines has kinks at the old knots; quantile knots follow them less well than uniform ones.
        allowed = 0.03 if mode == "uniform" else 1.05 * best_fit_error(target, layer, x) + 1e-3
        assert relative_l2(spline_only(layer, x), spline) <= allowed

    @pytest.mark.parametrize("scaler", [True, False])
    @pytest.mark.parametrize("spread", [0.3, 0.6, 0.95])
    def test_of_large_splines_on_data_inside_the_range(self, mode: str, scaler: bool, spread: float) -> None:
        layer = with_large_splines(mode, enable_standalone_scale_spline=scaler)
        x = spread * (2 * torch.rand(1024, 8) - 1)
        before = spline_only(layer, x)
        layer.update_grid(x)
        assert relative_l2(spline_only(layer, x), before) <= 0.03

    def test_between_the_samples_too(self, mode: str) -> None:
        """Refitting on few samples alone leaves the function free between them; elsewhere it changes by 60 %."""
        layer = with_large_splines(mode)
        x = torch.rand(64, 8).sub(0.5).mul(1.8)
        target = copy.deepcopy(layer)
        layer.update_grid(x)
        between = torch.rand(1000, 8).sub(0.5).mul(1.7)
        inside = ((between > x.amin(0)) & (between < x.amax(0))).all(1)
        assert relative_l2(spline_only(layer, between[inside]), spline_only(target, between[inside])) <= 0.1


@pytest.mark.parametrize("mode", MODES)
class TestUpdateGridOnDifficultSamples:
    """Elsewhere: weights of 235 from half zeros, of 68 from six samples, and an internal assertion of the solver."""

    @staticmethod
    def check(layer: KANLinear, x: Tensor, growth: float = 5.0) -> None:
        """On the samples and everywhere between them the function is nearly the best on the new knots."""
        target, largest_before = copy.deepcopy(layer), largest(layer.spline_weight)
        layer.update_grid(x)
        assert layer.grid.isfinite().all() and (layer.grid.diff(dim=1) > 0).all()
        assert largest(layer.spline_weight) <= growth * largest_before, "no blow-up where there is no data"
        low, high = layer.grid[:, 3], layer.grid[:, -4]
        for points in (x, low + (high - low) * torch.rand(1000, 8)):
            allowed = max(0.03, 1.5 * best_fit_error(target, layer, points))
            assert relative_l2(spline_only(layer, points), spline_only(target, points)) <= allowed

    def test_half_of_64_samples_tie(self, mode: str) -> None:
        x = torch.relu(torch.randn(64, 8))
        assert 0.4 < (x == 0).float().mean() < 0.6
        self.check(with_large_splines(mode), x)

    def test_six_samples(self, mode: str) -> None:
        self.check(with_large_splines(mode), torch.rand(6, 8) - 0.5)

    @pytest.mark.parametrize("data", ["half zeros", "two values", "constant", "half constant", "one sample"])
    def test_ties_without_any_equal_spacing(self, mode: str, data: str) -> None:
        x = {
            "half zeros": torch.relu(torch.randn(64, 8)),
            "two values": torch.relu(torch.randn(512, 8)).clamp(max=0.9),
            "constant": torch.full((50, 8), 0.25),
            "half constant": torch.cat([torch.rand(50, 4) - 0.5, torch.zeros(50, 4)], 1),
            "one sample": torch.rand(1, 8) - 0.5,
        }[data]
        # Between tied quantiles, splines with hardly any support on the grid may have larger coefficients.
        self.check(with_large_splines(mode, grid_eps=0.0), x, growth=50.0)


@pytest.mark.parametrize("mode", MODES)
def test_update_grid_takes_any_leading_dimensions(mode: str) -> None:
    """Elsewhere only two dimensions are accepted."""
    flat = with_large_splines(mode)
    deep = copy.deepcopy(flat)
    x = torch.randn(4, 5, 6, 8)
    flat.update_grid(x.reshape(-1, 8))
    deep.update_grid(x)
    assert torch.equal(flat.grid, deep.grid) and torch.equal(flat.spline_weight, deep.spline_weight)


class TestHalfPrecisionModules:
    """Elsewhere both methods raise: the solver that they call has no half precision."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", HALF)
    def test_update_grid(self, mode: str, dtype: torch.dtype) -> None:
        layer = with_large_splines(mode).to(dtype)
        x = (torch.rand(512, 8) * 1.8 - 0.9).to(dtype)
        before = spline_only(layer, x)
        layer.update_grid(x)
        assert layer.spline_weight.dtype == dtype and layer.grid.dtype == torch.float32
        assert relative_l2(spline_only(layer, x), before) <= 0.03

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
    def test_reset_parameters(self, dtype: torch.dtype) -> None:
        layer = KANLinear(8, 6, bias=True, dtype=dtype)
        layer.reset_parameters()
        for name, p in layer.named_parameters():
            assert p.dtype == dtype and p.isfinite().all() and p.std() > 0, name
        assert layer.grid.dtype == torch.promote_types(dtype, torch.float32)


class TestScalesAreMultipliers:
    """Elsewhere a larger scale makes smaller weights."""

    @pytest.mark.parametrize("name", ["scale_base", "scale_spline"])
    def test_of_weights_and_scalers(self, name: str) -> None:
        part = {"scale_base": "base_weight", "scale_spline": "spline_scaler"}[name]
        sizes = []
        for scale in (0.1, 1.0, 10.0):
            torch.manual_seed(0)
            sizes.append(getattr(KANLinear(64, 64, **{name: scale}), part).std().item())
        np.testing.assert_allclose(np.array(sizes) / sizes[1], [0.1, 1, 10], rtol=1e-5)

    def test_of_splines_without_scalers(self) -> None:
        options = {"enable_standalone_scale_spline": False}
        torch.manual_seed(0)
        one = KANLinear(64, 64, **options)
        torch.manual_seed(0)
        ten = KANLinear(64, 64, scale_spline=10.0, **options)
        assert_close("weights", ten.spline_weight.detach(), 10 * one.spline_weight.detach(), 1e-6)


@pytest.mark.parametrize("zeros", ["one edge", "all edges"])
def test_regularization_loss_is_finite_where_edges_are_zero(zeros: str) -> None:
    """Elsewhere one edge at zero makes the penalty and its gradient NaN."""
    layer = KANLinear(4, 3)
    with torch.no_grad():
        (layer.spline_weight if zeros == "all edges" else layer.spline_weight[1, 2]).zero_()
    loss = layer.regularization_loss()
    loss.backward()
    assert loss.isfinite() and layer.spline_weight.grad.isfinite().all()


class TestNonuniformKnots:
    """One implementation kept a single knot spacing after an adaptive update, and erred by 1.9."""

    def test_bases_are_those_of_cox_and_de_boor(self) -> None:
        layer, x = on_nonuniform_knots(features=(3, 2)), torch.randn(200, 3)
        assert_close("bases", layer.b_splines(x), basis_oracle(to_array(x), to_array(layer.grid), 3), 2e-6)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_output_is_made_of_them(self, backend: str) -> None:
        layer, x = on_nonuniform_knots(features=(3, 2), backend=backend), torch.randn(200, 3)
        bases = basis_oracle(to_array(x), to_array(layer.grid), 3)
        weight = to_array(layer.spline_weight) * to_array(layer.spline_scaler)[..., None]
        with torch.no_grad():
            layer.base_weight.zero_()
        assert_close("out", layer(x), np.einsum("bic,oic->bo", bases, weight), 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
@pytest.mark.parametrize("knots", LAYERS)
def test_gradients_equal_finite_differences(knots: str, extrapolation: str, backend: str) -> None:
    """One implementation halves the gradient of x; another drops samples that share a basis and errs by 3."""
    options = {"bias": True, "extrapolation": extrapolation, "backend": backend, "grid_size": 3}
    layer = LAYERS[knots](features=(3, 2), **options).double()
    # Sixteen samples of three features: several in each interval, some outside, none near a knot.
    grid = layer.grid
    share = torch.rand(16, 3, dtype=torch.float64) * 1.2 - 0.1
    x = grid[:, 0] + share * (grid[:, -1] - grid[:, 0])
    x = torch.where(((x[..., None] - grid).abs() < 1e-4).any(-1), x + 2e-4, x).requires_grad_()
    assert gradcheck(layer, x)
