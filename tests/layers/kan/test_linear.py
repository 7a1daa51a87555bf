"""KANLinear: its formula, initial values, penalty and state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kan_layers import EXTRAPOLATIONS, HALF, layer_oracle, penalty_oracle, with_large_splines
from torch import Tensor, nn

from helpers import assert_close, nan_filled_empty, to_array
from kan_mamba_layers import KANLinear


class TestForward:
    @pytest.mark.parametrize("options", [{}, {"bias": True}, {"enable_standalone_scale_spline": False}], ids=str)
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("order", [1, 2, 3, 5])
    def test_formula(self, options: dict, extrapolation: str, order: int) -> None:
        layer = KANLinear(
            5, 4, grid_size=6, spline_order=order, grid_range=(-2, 1.5), extrapolation=extrapolation, **options
        )
        layer = layer.double()
        x = 2 * torch.randn(40, 5, dtype=torch.float64)
        assert_close("out", layer(x), layer_oracle(layer, x), 1e-6)  # the knots are float32

    @pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3), (2, 3, 4), (0, 2)])
    def test_any_leading_dimensions(self, batch: tuple[int, ...]) -> None:
        layer, x = KANLinear(5, 4), torch.randn(*batch, 5)
        out = layer(x)
        assert out.shape == (*batch, 4)
        assert_close("out", out.reshape(-1, 4), layer(x.reshape(-1, 5)), 1e-6)
        assert layer.b_splines(x).shape == (*batch, 5, 8)

    def test_non_contiguous_input(self) -> None:
        layer, x = KANLinear(5, 4), torch.randn(5, 7)
        assert torch.equal(layer(x.T), layer(x.T.contiguous()))

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        layer = with_large_splines().to(dtype)
        assert layer.grid.dtype == torch.float32, "rounded knots change the function"
        x = torch.randn(50, 8).to(dtype)
        out = layer(x)
        assert out.dtype == dtype
        assert_close("out", out, layer_oracle(layer, x), 2 * torch.finfo(dtype).eps)
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

    def test_float64_under_autocast(self) -> None:
        """Which leaves it alone, as it does PyTorch's own products: the weights become what the input is."""
        layer, x = KANLinear(4, 3), torch.randn(20, 4, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close("out", layer(x), layer_oracle(layer, x), 1e-6)
            assert layer.double()(x.float()).dtype == torch.bfloat16


class TestInitialValues:
    def test_noise_scales_the_splines_alone(self) -> None:
        assert KANLinear(8, 8, scale_noise=0.0).spline_weight.abs().max() == 0
        quiet, loud = KANLinear(64, 64, scale_noise=0.1), KANLinear(64, 64, scale_noise=1.0)
        ratio = (loud.spline_weight.std() / quiet.spline_weight.std()).item()
        assert 9 < ratio < 11

    def test_seeded(self) -> None:
        first, second = [], []
        for weights in (first, second):
            torch.manual_seed(3)
            weights.extend(KANLinear(4, 5, bias=True).parameters())
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_grid_spans_the_range_in_equal_steps(self) -> None:
        grid = KANLinear(2, 2, grid_size=4, spline_order=2, grid_range=(-3, 5)).grid
        np.testing.assert_allclose(to_array(grid), np.tile(np.arange(-7.0, 10, 2), (2, 1)), rtol=1e-6)


class TestRegularization:
    def test_value(self) -> None:
        layer = KANLinear(3, 2)
        expected = penalty_oracle(layer, 0.7, 0.3)
        np.testing.assert_allclose(layer.regularization_loss(0.7, 0.3).item(), expected, rtol=1e-5)

    def test_half_precision_does_not_overflow(self) -> None:
        """With equal edges of size 1/2 it is o*i/2 + log(o*i)."""
        layer = KANLinear(512, 512, dtype=torch.float16)
        torch.nn.init.constant_(layer.spline_weight, 0.5)
        loss = layer.regularization_loss()
        assert loss.dtype == torch.float32
        np.testing.assert_allclose(loss.item(), 2**17 + 18 * np.log(2), rtol=1e-6)

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
        assert_close("out", uniform(x), layer_oracle(uniform, x), 1e-5)

    def test_repr_names_the_sizes(self) -> None:
        text = repr(KANLinear(3, 2, grid_size=7))
        assert all(part in text for part in ("KANLinear", "3", "2", "7"))
