"""SS2D: shapes, keys, gradients, and its formula rebuilt from its parts."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close, cross_scan_oracle, gradients, to_array
from kan_mamba_layers import SS2D


def rebuilt(layer: SS2D, x: torch.Tensor) -> torch.Tensor:
    """The layer from its parameters and the NumPy scan, in float64."""
    u, *z = layer.in_proj(x).split(layer.d_inner, -1)
    u = F.silu(layer.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    weights = (layer.x_proj_weight, layer.dt_projs_weight, layer.dt_projs_bias, layer.A_logs, layer.Ds)
    y = torch.from_numpy(cross_scan_oracle(to_array(u), *(to_array(w) for w in weights)))
    if norm := dict(layer.out_norm.named_parameters()):
        y = F.layer_norm(y, (layer.d_inner,), norm["weight"], norm["bias"])
    return layer.out_proj(y * F.silu(z[0]) if z else y)


class TestForward:
    @pytest.mark.parametrize("backend", ["reference", "chunked", "cpu", "auto"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"d_state": 1, "expand": 1},
            {"d_state": 3, "dt_rank": 5},
            {"d_conv": 5, "conv_bias": False, "bias": True},
            {"d_conv": 1},
            {"gate": False, "conv_bias": False, "d_state": 1, "expand": 1},
            {"norm": False},
        ],
        ids=str,
    )
    def test_equals_its_parts(self, options: dict, backend: str) -> None:
        layer = SS2D(6, backend=backend, **options).double()
        x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
        assert_close("out", layer(x), rebuilt(layer, x), 1e-11)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (7, 5), (16, 16), (31, 33)])
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_any_size(self, batch: int, height: int, width: int) -> None:
        layer = SS2D(4, d_state=2)
        out = layer(torch.randn(batch, height, width, 4))
        assert out.shape == (batch, height, width, 4) and out.isfinite().all()

    def test_backends_agree_in_outputs_and_every_gradient(self) -> None:
        results = {}
        layer = SS2D(8, d_state=4)
        for backend in ("reference", "chunked", "cpu"):
            layer.backend = backend
            names = [k for k, _ in layer.named_parameters()]
            inputs = {k.replace(".", "__"): v for k, v in layer.named_parameters()}

            def function(x: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
                state = dict(zip(names, values.values(), strict=True))  # noqa: B023
                return torch.func.functional_call(layer, state, (x,))

            torch.manual_seed(0)
            results[backend] = gradients(function, {"x": torch.randn(2, 9, 11, 8), **inputs})
        expected, expected_grads = results.pop("reference")
        for backend, (out, grads) in results.items():
            assert_close(f"{backend} out", out, expected, 1e-5)
            for name, grad in grads.items():
                assert grad.abs().max() > 0, name
                assert_close(f"{backend} d{name}", grad, expected_grads[name], 1e-4)

    @pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
    def test_gradcheck(self, backend: str) -> None:
        layer = SS2D(2, d_state=2, backend=backend).double()
        x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))

    def test_non_contiguous_input(self) -> None:
        layer, x = SS2D(4), torch.randn(2, 4, 6, 5)  # b c h w
        assert_close("out", layer(x.permute(0, 2, 3, 1)), layer(x.permute(0, 2, 3, 1).contiguous()), 1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        layer = SS2D(8, d_state=4)
        x = torch.randn(2, 6, 7, 8)
        expected = layer(x)
        out = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert_close("out", out, expected, 0.03)

    def test_autocast(self) -> None:
        layer, x = SS2D(8, d_state=4), torch.randn(2, 6, 7, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
            out.float().square().sum().backward()
        assert_close("out", out, layer(x), 0.03)
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_dropout_acts_in_training_only(self) -> None:
        layer, x = SS2D(4, dropout=0.5), torch.randn(1, 8, 8, 4)
        assert (layer(x) == 0).float().mean() > 0.2
        layer.eval()
        assert (layer(x) == 0).sum() == 0


class TestParameters:
    def test_keys_and_shapes(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in SS2D(32, d_state=8).state_dict().items()}
        assert shapes == {
            "in_proj.weight": (128, 32),
            "conv2d.weight": (64, 1, 3, 3),
            "conv2d.bias": (64,),
            "x_proj_weight": (4, 2 + 16, 64),
            "dt_projs_weight": (4, 64, 2),
            "dt_projs_bias": (4, 64),
            "A_logs": (256, 8),
            "Ds": (256,),
            "out_norm.weight": (64,),
            "out_norm.bias": (64,),
            "out_proj.weight": (32, 64),
        }

    def test_biases_are_options(self) -> None:
        keys = set(SS2D(4, bias=True, conv_bias=False).state_dict())
        assert {"in_proj.bias", "out_proj.bias"} <= keys and "conv2d.bias" not in keys

    def test_without_a_gate_the_input_projection_is_half_as_wide(self) -> None:
        gated, plain = ({k: v.shape for k, v in SS2D(4, gate=gate).state_dict().items()} for gate in (True, False))
        assert plain.pop("in_proj.weight") == (8, 4) and gated.pop("in_proj.weight") == (16, 4)
        assert plain == gated

    def test_without_a_norm_it_has_no_weights_of_one(self) -> None:
        keys = [set(SS2D(4, norm=norm).state_dict()) for norm in (True, False)]
        assert keys[0] - keys[1] == {"out_norm.weight", "out_norm.bias"} and keys[1] < keys[0]

    def test_initial_dynamics(self) -> None:
        layer = SS2D(16, d_state=4, dt_rank=4, dt_min=0.002, dt_max=0.05)
        step = F.softplus(layer.dt_projs_bias.detach())
        assert 0.0019 < step.min() < 0.005 and 0.02 < step.max() < 0.0501
        expected = torch.arange(1.0, 5).log().expand(4 * 32, 4)
        assert_close("A_logs", layer.A_logs, expected, 1e-6)
        assert (layer.Ds == 1).all()
        for weight, bound in ((layer.x_proj_weight, 32**-0.5), (layer.dt_projs_weight, 4**-0.5)):
            assert -bound <= weight.min() < -0.9 * bound and 0.9 * bound < weight.max() <= bound

    def test_the_floor_bounds_the_initial_step(self) -> None:
        layer = SS2D(16, dt_min=1e-6, dt_max=1e-5, dt_init_floor=0.01)
        assert_close("step", F.softplus(layer.dt_projs_bias.detach()), torch.full((4, 32), 0.01), 1e-4)

    @pytest.mark.parametrize("width", [49, 100])
    def test_every_width_can_be_had_by_its_factor(self, width: int) -> None:
        """Although n / width * width is less than n for some."""
        found = [SS2D(width, expand=n / width, device="meta").d_inner for n in range(1, 2 * width)]
        assert found == list(range(1, 2 * width))
        assert SS2D(5, expand=1.5).d_inner == 7 and SS2D(100, expand=0.29).d_inner == 29

    def test_automatic_rank_rounds_up(self) -> None:
        for d_model in (1, 16, 17, 100):
            assert SS2D(d_model, d_state=1).dt_projs_weight.shape[2] == math.ceil(d_model / 16)

    def test_dynamics_are_marked_for_optimizers(self) -> None:
        marked = {k for k, p in SS2D(4).named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == {"A_logs", "Ds", "dt_projs_bias"}

    def test_round_trips(self) -> None:
        layer, x = SS2D(4), torch.randn(1, 5, 6, 4)
        expected = layer(x)
        other = SS2D(4)
        other.load_state_dict(layer.state_dict(), strict=True)
        for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), expected)

    def test_meta_device_and_dtype(self) -> None:
        layer = SS2D(4, device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
        assert layer(torch.empty(2, 5, 6, 4, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 6, 4)
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert all(p.isfinite().all() for p in layer.parameters())

    def test_a_part_of_somebody_elses_model(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.mix = nn.LayerNorm(8), SS2D(8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.mix(self.norm(x))

        model = nn.Sequential(Block(), Block())
        x = torch.randn(2, 6, 6, 8)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(30):
            loss = (model(x) - x.flip(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
