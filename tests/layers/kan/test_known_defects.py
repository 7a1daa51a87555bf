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

from helpers import assert_close, basis_oracle, largest, relative_l2, says, to_array
from kan_mamba_layers import KANConv2d, KANLinear, bspline_basis, kan_linear
from kan_mamba_layers.layers.kan import SplineLayer


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


class TestKnots:
    """Knots whose gradient is wanted, that are far from zero, or too close for their dtype."""

    @pytest.mark.parametrize("cls", [KANLinear, KANConv2d])
    def test_gradient_of_equally_spaced_knots(self, cls: type[SplineLayer]) -> None:
        """The formula for equal spacing reads the outer knots alone: elsewhere inner ones would get no gradient."""
        layer = cls(2, 3, *([2] if cls is KANConv2d else []), dtype=torch.float64)
        torch.nn.init.normal_(layer.spline_weight)
        shape = (7, 2) if cls is KANLinear else (1, 2, 4, 5)
        x = torch.rand(shape, dtype=torch.float64) * 1.8 - 0.9

        def total(grid: Tensor) -> Tensor:
            return torch.func.functional_call(layer, {"grid": grid}, (x,)).square().sum()

        assert layer.has_uniform_grid
        grid = layer.grid.clone().requires_grad_()
        (found,) = torch.autograd.grad(total(grid), grid)
        # Steps of 5e-4 of the spacing: after less than 1e-4 the knots still count as equally spaced.
        step = 2e-4 * torch.eye(grid.numel(), dtype=torch.float64).view(-1, *grid.shape)
        with torch.no_grad():
            wanted = torch.stack([(total(grid + d) - total(grid - d)) / 4e-4 for d in step]).view(grid.shape)
        assert_close("gradient", found, wanted, 2e-6)
        assert_close("torch.func", torch.func.grad(total)(layer.grid), wanted, 2e-6)
        tangent = torch.rand_like(grid)
        (_, derivative) = torch.func.jvp(total, (layer.grid,), (tangent,))
        assert_close("jvp", derivative, (wanted * tangent).sum(), 2e-6)

    @pytest.mark.parametrize("nu", [0, 1])
    def test_gradient_where_equal_spacing_is_promised(self, nu: int) -> None:
        grid = torch.linspace(-2.2, 2.2, 12, dtype=torch.float64).expand(2, -1).clone()
        x = torch.rand(5, 2, dtype=torch.float64)
        bases = [
            lambda knots, uniform=uniform: bspline_basis(x, knots, 3, uniform=uniform, nu=nu).square().sum()
            for uniform in (True, False)
        ]
        assert_close("gradient", *(torch.func.grad(basis)(grid) for basis in bases), 1e-13)
        many, moved = torch.stack([grid, grid + 0.01]), torch.rand(2, *grid.shape, dtype=torch.float64)
        for transform in (
            lambda f: torch.func.grad(lambda knots: torch.vmap(f)(knots).sum())(many),
            lambda f: torch.func.jvp(torch.vmap(f), (many,), (moved,))[1],
        ):
            assert_close("with vmap", *map(transform, bases), 1e-13)

    @pytest.mark.parametrize(("place", "width"), [(300.0, 0.01), (1e5, 2.0), (2000.0, 1.0)])
    def test_far_from_zero(self, place: float, width: float) -> None:
        """Knots round to steps of their dtype there; whether they are even is not to be asked in that dtype."""
        for seed in range(5):
            torch.manual_seed(seed)
            layer = KANLinear(1, 1, scale_base=0.0, extrapolation="clamp")
            x = place + width * torch.rand(500, 1)
            layer.update_grid(x, margin=0.0)
            torch.nn.init.normal_(layer.spline_weight)
            torch.nn.init.ones_(layer.spline_scaler)
            bases = basis_oracle(to_array(x), to_array(layer.grid), 3)[:, 0]
            wanted = torch.from_numpy(bases @ to_array(layer.spline_weight)[0, 0])
            inside = (x >= layer.grid[0, 3]) & (x < layer.grid[0, -4])
            assert (layer(x)[:, 0].double() - wanted)[inside[:, 0]].abs().max() <= 5e-6

    def test_that_their_dtype_cannot_tell_apart(self) -> None:
        layer = KANLinear(1, 1)
        layer.update_grid(1e5 + torch.rand(200, 1), margin=0.0)
        before = copy.deepcopy(layer.state_dict())
        for count in (200, 1000):
            with pytest.raises(ValueError, match=says(f"new_grid_size={count}", "float32", "fewer intervals")):
                layer.extend_grid(count)
        assert all(torch.equal(layer.state_dict()[name], x) for name, x in before.items())
        for grid_range in ((1e6, 1e6 + 0.1), (-3e38, 3e38)):
            with pytest.raises(ValueError, match=says("grid_range=", "float32", "normalise")):
                KANLinear(1, 1, grid_range=grid_range)
        assert KANLinear(1, 1, grid_range=(1e6, 1e6 + 0.1), dtype=torch.float64).has_uniform_grid

    @pytest.mark.parametrize("learned", ["buffer", "parameter"])
    def test_that_are_learned(self, learned: str) -> None:
        layer = KANLinear(2, 3)
        if learned == "buffer":
            layer.grid.requires_grad_()
        else:
            knots = torch.nn.Parameter(layer.grid)
            del layer.grid
            layer.grid = knots
        x = torch.rand(9, 2) - 0.5
        before = layer(x)
        layer.extend_grid(10)
        assert layer.grid.requires_grad and isinstance(layer.grid, torch.nn.Parameter) == (learned == "parameter")
        assert_close("function", layer(x), before, 1e-6)
        other = KANLinear(2, 3)
        other.load_state_dict(layer.state_dict())
        layer.load_state_dict(KANLinear(2, 3).state_dict())
        assert layer.grid_size == 5 and layer.grid.requires_grad
        assert layer.half().grid.dtype == torch.float32 and layer(x.half()).isfinite().all()
        assert layer.grid.requires_grad and layer.grid.is_leaf
        layer.load_state_dict({k: v.half() for k, v in layer.state_dict().items()}, assign=True)
        assert layer.grid.dtype == torch.float32 and layer(x.half()).isfinite().all()

    @pytest.mark.parametrize("learned", ["buffer", "parameter"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_that_are_learned_go_on_in_another_dtype(self, learned: str, dtype: torch.dtype) -> None:
        layer, x = KANLinear(2, 3), torch.rand(9, 2) - 0.5
        layer.grid.requires_grad_()
        if learned == "parameter":
            layer.grid = torch.nn.Parameter(layer._buffers.pop("grid"))
        layer(x).sum().backward()
        layer.to(dtype)
        optimizer = torch.optim.AdamW([layer.grid], foreach=False)
        for _ in range(2):
            optimizer.step()
            layer(x.to(dtype)).sum().backward()
            assert layer.grid.grad.dtype == layer.grid.dtype == torch.promote_types(dtype, torch.float32)

    def test_in_half_precision_from_inference_mode(self) -> None:
        layer = KANLinear(2, 3)
        with torch.inference_mode():
            layer.bfloat16()
        with torch.no_grad():
            assert layer(torch.rand(4, 2).bfloat16()).isfinite().all()


class TestPlacesWhereLinearLayersWork:
    def test_channels_last(self) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), KANConv2d(8, 4, 3), torch.nn.Conv2d(4, 4, 3))
        x = torch.randn(2, 3, 12, 9)
        before = model(x)
        model.to(memory_format=torch.channels_last)
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
        assert_close("out", model(x.to(memory_format=torch.channels_last)), before, 1e-6)
        assert {p.dtype for p in model.double().parameters()} == {torch.float64}
        assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}

    def test_swapping_tensors(self) -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer, other = KANLinear(3, 2), KANLinear(3, 2)
            x = torch.randn(4, 3)
            layer(x)
            layer.load_state_dict(other.state_dict())
            assert torch.equal(layer(x), other(x))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def test_jagged_samples(self) -> None:
        parts = [1 + torch.rand(20, 1), 1 + torch.rand(50, 1)]
        layers = [KANLinear(1, 1) for _ in range(2)]
        for layer, x in zip(
            layers, (torch.nested.nested_tensor(parts, layout=torch.jagged), torch.cat(parts)), strict=True
        ):
            layer.update_grid(x)
        assert torch.equal(layers[0].grid, layers[1].grid)
        values, ends = torch.tensor([[1.0], [100.0], [2.0], [100.0]]), torch.tensor([0, 2, 4])
        holes = torch.nested.nested_tensor_from_jagged(values, ends, torch.tensor([1, 1]))
        layer = KANLinear(1, 1)
        layer.update_grid(holes)
        assert layer.grid.max() < 5, "values beyond the lengths are no samples"
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        weights = (layers[0].base_weight, layers[0].spline_weight, None, layers[0].grid)
        names = ("base_weight", "spline_weight", "spline_scaler", "grid")
        by_name = kan_linear(x=nested, **dict(zip(names, weights, strict=True)))
        assert torch.equal(by_name.values(), kan_linear(nested, *weights).values())

    def test_an_activation_with_a_hidden_signature(self) -> None:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.square()

            @staticmethod
            def backward(ctx, grad):
                return grad

        x = torch.randn(4, 3)
        hidden, plain = KANLinear(3, 2, base_activation=Square.apply), KANLinear(3, 2, base_activation=torch.square)
        plain.load_state_dict(hidden.state_dict())
        assert_close("out", hidden(x), plain(x), 1e-6)
        assert isinstance(KANLinear(3, 2, base_activation=lambda *_: torch.nn.SiLU()).base_activation, torch.nn.SiLU)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_takes_the_same_dtypes(backend: str) -> None:
    layer, x = KANLinear(3, 2, bias=True, backend=backend), torch.randn(4, 3)
    for name in ("spline_weight", "spline_scaler", "bias"):
        wrong = {name: getattr(layer, name).double()}
        with pytest.raises(ValueError, match=says("float32", f"{name} is torch.float64", "convert one")):
            torch.func.functional_call(layer, wrong, (x,))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.func.functional_call(layer, wrong, (x,)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64
