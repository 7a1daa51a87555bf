"""KANLinear, KANLayer and KANBlock: among others, every defect that was found in other implementations."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, basis_oracle, kan_oracle, nan_filled_empty, to_array
from kan_mamba_layers import KANBlock, KANLayer, KANLinear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def oracle(layer: KANLinear, x: Tensor) -> np.ndarray:
    state = {k: to_array(v) for k, v in layer.state_dict().items()}
    state.setdefault("spline_scaler", None)
    return kan_oracle(to_array(x), **state, extrapolation=layer.extrapolation)


def with_large_splines(mode: str = "uniform", features: tuple[int, int] = (8, 6), **options) -> KANLinear:
    """A layer whose splines are of the size that training gives them, not the small initial noise."""
    layer = KANLinear(*features, grid_mode=mode, **options)
    with torch.no_grad():
        layer.spline_weight.normal_()
    return layer


class TestForward:
    @pytest.mark.parametrize("options", [{}, {"bias": True}, {"enable_standalone_scale_spline": False}], ids=str)
    @pytest.mark.parametrize("extrapolation", ["zero", "clamp", "linear"])
    @pytest.mark.parametrize("order", [1, 2, 3, 5])
    def test_formula(self, options: dict, extrapolation: str, order: int) -> None:
        layer = KANLinear(
            5, 4, grid_size=6, spline_order=order, grid_range=(-2, 1.5), extrapolation=extrapolation, **options
        )
        layer = layer.double()
        x = 2 * torch.randn(40, 5, dtype=torch.float64)
        assert_close("out", layer(x), oracle(layer, x), 1e-6)  # the knots are float32

    @pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3), (2, 3, 4), (0, 2)])
    def test_any_leading_dimensions(self, batch: tuple[int, ...]) -> None:
        layer, x = KANLinear(5, 4), torch.randn(*batch, 5)
        out = layer(x)
        assert out.shape == (*batch, 4)
        assert_close("out", out.reshape(-1, 4), layer(x.reshape(-1, 5)), 1e-6)
        assert layer.b_splines(x).shape == (*batch, 5, 8)

    def test_gradients_equal_finite_differences(self) -> None:
        """One implementation returned half of the input's gradient, another a wrong one for weights and input."""
        layer = with_large_splines(features=(3, 2), bias=True).double()
        x = torch.tensor([[-0.93, 0.11, 2.0], [0.31, -1.7, 0.55]], dtype=torch.float64, requires_grad=True)
        names = [k for k, _ in layer.named_parameters()]

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        assert torch.autograd.gradcheck(function, (x, *values))

    def test_non_contiguous_input(self) -> None:
        layer, x = KANLinear(5, 4), torch.randn(5, 7)
        assert torch.equal(layer(x.T), layer(x.T.contiguous()))

    def test_b_splines_equal_scipy_also_on_uneven_knots(self) -> None:
        """One implementation kept a single knot spacing after an adaptive update and erred by 1.9."""
        layer = KANLinear(3, 2, grid_mode="adaptive")
        layer.update_grid(torch.randn(500, 3) ** 3)
        assert np.ptp(np.diff(to_array(layer.grid), axis=1)) > 0.1, "the knots are meant to be uneven here"
        x = torch.randn(200, 3)
        assert_close("bases", layer.b_splines(x), basis_oracle(to_array(x), to_array(layer.grid), 3), 2e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        layer = with_large_splines().to(dtype)
        assert layer.grid.dtype == torch.float32, "rounded knots change the function"
        x = torch.randn(50, 8).to(dtype)
        out = layer(x)
        assert out.dtype == dtype
        assert_close("out", out, oracle(layer, x), 2 * torch.finfo(dtype).eps)
        out.sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in layer.parameters())

    def test_grid_survives_a_round_trip_through_half(self) -> None:
        layer = KANLinear(3, 2)
        grid = layer.grid.clone()
        assert torch.equal(layer.half().bfloat16().float().grid, grid)
        assert torch.equal(KANLinear(3, 2, dtype=torch.bfloat16).grid, grid)

    def test_nested_module_keeps_the_grid_too(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), KANLinear(3, 2)).half()
        assert model[1].grid.dtype == torch.float32 and model[1].base_weight.dtype == torch.float16

    def test_autocast(self) -> None:
        layer, x = with_large_splines(), torch.randn(50, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        assert_close("out", out, oracle(layer, x), 1e-2)


class TestInitialValues:
    @pytest.mark.parametrize("name", ["scale_base", "scale_spline"])
    def test_scales_are_multipliers(self, name: str) -> None:
        """Elsewhere a larger scale makes smaller weights."""
        part = {"scale_base": "base_weight", "scale_spline": "spline_scaler"}[name]
        sizes = []
        for scale in (0.1, 1.0, 10.0):
            torch.manual_seed(0)
            sizes.append(getattr(KANLinear(64, 64, **{name: scale}), part).std().item())
        np.testing.assert_allclose(np.array(sizes) / sizes[1], [0.1, 1, 10], rtol=1e-5)

    def test_scale_spline_without_scalers(self) -> None:
        options = {"enable_standalone_scale_spline": False}
        torch.manual_seed(0)
        one = KANLinear(64, 64, **options)
        torch.manual_seed(0)
        ten = KANLinear(64, 64, scale_spline=10.0, **options)
        assert_close("weights", ten.spline_weight.detach(), 10 * one.spline_weight.detach(), 1e-6)

    def test_noise_scales_the_splines_alone(self) -> None:
        assert KANLinear(8, 8, scale_noise=0.0).spline_weight.abs().max() == 0
        quiet, loud = KANLinear(64, 64, scale_noise=0.1), KANLinear(64, 64, scale_noise=1.0)
        ratio = (loud.spline_weight.std() / quiet.spline_weight.std()).item()
        assert 9 < ratio < 11

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        layer = KANLinear(8, 6, bias=True, dtype=dtype)
        layer.reset_parameters()
        for name, p in layer.named_parameters():
            assert p.dtype == dtype and p.isfinite().all() and p.std() > 0, name
        assert layer.grid.dtype == torch.promote_types(dtype, torch.float32)

    def test_seeded(self) -> None:
        first, second = [], []
        for weights in (first, second):
            torch.manual_seed(3)
            weights.extend(KANLinear(4, 5, bias=True).parameters())
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_grid_spans_the_range_in_even_steps(self) -> None:
        grid = KANLinear(2, 2, grid_size=4, spline_order=2, grid_range=(-3, 5)).grid
        np.testing.assert_allclose(to_array(grid), np.tile(np.arange(-7.0, 10, 2), (2, 1)), rtol=1e-6)


class TestRegularization:
    def test_value(self) -> None:
        layer = KANLinear(3, 2)
        size = to_array(layer.spline_weight.abs()).mean(-1)
        share = size / size.sum()
        expected = 0.7 * size.sum() - 0.3 * (share * np.log(share)).sum()
        np.testing.assert_allclose(layer.regularization_loss(0.7, 0.3).item(), expected, rtol=1e-5)

    @pytest.mark.parametrize("zeros", ["one edge", "all edges"])
    def test_zero_edges_give_no_nan(self, zeros: str) -> None:
        layer = KANLinear(4, 3)
        with torch.no_grad():
            (layer.spline_weight if zeros == "all edges" else layer.spline_weight[1, 2]).zero_()
        loss = layer.regularization_loss()
        loss.backward()
        assert loss.isfinite() and layer.spline_weight.grad.isfinite().all()

    def test_gradient_is_that_of_the_formula(self) -> None:
        layer = KANLinear(3, 2).double()
        assert torch.autograd.gradcheck(
            lambda w: torch.func.functional_call(_Regularizer(layer), {"layer.spline_weight": w}, ()),
            (layer.spline_weight.detach().clone().requires_grad_(),),
        )


class _Regularizer(nn.Module):
    def __init__(self, layer: KANLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.regularization_loss()


class TestState:
    def test_keys_and_shapes(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in KANLinear(3, 2, bias=True).state_dict().items()}
        assert shapes == {
            "grid": (3, 12),
            "base_weight": (2, 3),
            "spline_weight": (2, 3, 8),
            "spline_scaler": (2, 3),
            "bias": (2,),
        }
        assert set(KANLinear(3, 2, enable_standalone_scale_spline=False).state_dict()) == {
            "grid",
            "base_weight",
            "spline_weight",
        }

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_are_equal_and_independent(self, duplicate) -> None:
        layer = with_large_splines("adaptive")
        layer.update_grid(torch.randn(300, 8) ** 3)
        x = torch.randn(20, 8)
        other = duplicate(layer)
        expected = layer(x)
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.base_weight.zero_()
        assert torch.equal(layer(x), expected)

    def test_meta_device(self) -> None:
        layer = KANLinear(8, 6, bias=True, device="meta")
        assert all(v.is_meta for v in layer.state_dict().values())
        assert layer(torch.empty(5, 8, device="meta")).shape == (5, 6)
        trained = with_large_splines(bias=True)
        layer.load_state_dict(trained.state_dict(), assign=True)
        x = torch.randn(20, 8)
        assert torch.equal(layer(x), trained(x))

    def test_a_layer_from_the_meta_device_is_complete_after_reset(self) -> None:
        layer = KANLinear(8, 6, device="meta")
        with nan_filled_empty():
            layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert torch.equal(layer.grid, KANLinear(8, 6).grid)
        assert layer(torch.randn(5, 8)).isfinite().all()

    def test_a_uniform_layer_reads_the_checkpoint_of_an_adaptive_one(self) -> None:
        adaptive, uniform = with_large_splines("adaptive"), KANLinear(8, 6)
        adaptive.update_grid(torch.randn(300, 8) ** 3)
        uniform.load_state_dict(adaptive.state_dict())
        x = torch.randn(20, 8)
        assert_close("out", uniform(x), oracle(uniform, x), 1e-5)

    def test_repr_names_the_sizes(self) -> None:
        text = repr(KANLinear(3, 2, grid_size=7))
        assert all(part in text for part in ("KANLinear", "3", "2", "7"))


class TestKANLayerAndBlock:
    @pytest.mark.parametrize("use_kan", [True, False])
    @pytest.mark.parametrize(("height", "width"), [(6, 4), (1, 1), (1, 7), (5, 1)])
    def test_shapes_and_gradients(self, height: int, width: int, use_kan: bool) -> None:
        block = KANBlock(8, use_kan=use_kan)
        x = torch.randn(3, height * width, 8, requires_grad=True)
        out = block(x, height, width)
        assert out.shape == x.shape
        out.square().sum().backward()
        assert x.grad.isfinite().all()
        for name, p in block.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name

    def test_widths(self) -> None:
        layer = KANLayer(8, 12, 5)
        assert layer(torch.randn(2, 12, 8), 3, 4).shape == (2, 12, 5)
        assert KANLayer(8)(torch.randn(2, 12, 8), 3, 4).shape == (2, 12, 8)

    def test_layer_is_its_parts(self) -> None:
        layer, x = KANLayer(6).eval(), torch.randn(2, 20, 6)
        expected = x
        for m in (1, 2, 3):
            expected = getattr(layer, f"fc{m}")(expected)
            image = expected.transpose(1, 2).reshape(2, 6, 5, 4)
            part = getattr(layer, f"dwconv_{m}")
            expected = torch.relu(part.bn(part.dwconv(image))).flatten(2).transpose(1, 2)
        assert torch.equal(layer(x, 5, 4), expected)

    def test_block_is_a_residual_around_the_norm(self) -> None:
        block, x = KANBlock(6).eval(), torch.randn(2, 20, 6)
        assert torch.equal(block(x, 5, 4), x + block.layer(block.norm2(x), 5, 4))

    def test_height_and_width_are_not_exchanged(self) -> None:
        block, x = KANBlock(6).eval(), torch.randn(1, 20, 6)
        assert not torch.allclose(block(x, 5, 4), block(x, 4, 5))

    def test_keys(self) -> None:
        keys = set(KANBlock(4).state_dict())
        assert {"norm2.weight", "layer.fc1.grid", "layer.fc3.spline_scaler", "layer.dwconv_2.bn.running_var"} <= keys
        assert len(keys) == 2 + 3 * 4 + 3 * 7

    def test_drop_path(self) -> None:
        block, x = KANBlock(6, drop_path=0.5), torch.randn(64, 20, 6)
        kept = (block(x, 5, 4) != x).flatten(1).any(1)
        assert 10 < kept.sum() < 54, "some samples skip the branch, some do not"
        block.eval()
        assert (block(x, 5, 4) != x).flatten(1).any(1).all()

    def test_options_reach_the_linears(self) -> None:
        layer = KANLayer(4, grid_size=7, spline_order=2, dtype=torch.float64)
        for fc in (layer.fc1, layer.fc2, layer.fc3):
            assert (fc.grid_size, fc.spline_order, fc.base_weight.dtype) == (7, 2, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        block = KANBlock(8).to(dtype)
        out = block(torch.randn(2, 20, 8).to(dtype), 5, 4)
        assert out.dtype == dtype and out.isfinite().all()

    def test_meta_device(self) -> None:
        block = KANBlock(8, device="meta")
        assert block(torch.empty(2, 20, 8, device="meta"), 5, 4).shape == (2, 20, 8)
