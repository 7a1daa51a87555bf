"""EMA: shapes, the published formula with adaptive pooling, and the invariances of its means."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from helpers import assert_close
from kan_mamba_layers import EMA


def published(layer: EMA, x: torch.Tensor, factor: int) -> torch.Tensor:
    """The published formula, step by step with adaptive average pooling and matrix products of flattened maps."""
    b, c, h, w = x.shape
    groups = x.reshape(b * factor, -1, h, w)
    rows = F.adaptive_avg_pool2d(groups, (h, 1))
    columns = F.adaptive_avg_pool2d(groups, (1, w)).transpose(2, 3)
    rows, columns = layer.conv1x1(torch.cat([rows, columns], 2)).split([h, w], 2)
    x1 = layer.gn(groups * rows.sigmoid() * columns.transpose(2, 3).sigmoid())
    x2 = layer.conv3x3(groups)
    shares = [F.adaptive_avg_pool2d(v, 1).flatten(1).softmax(-1)[:, None] for v in (x1, x2)]  # b*f 1 c/f
    weights = shares[0] @ x2.flatten(2) + shares[1] @ x1.flatten(2)
    return (groups * weights.reshape(-1, 1, h, w).sigmoid()).reshape(b, c, h, w)


class TestForward:
    @pytest.mark.parametrize(("channels", "factor"), [(8, 8), (16, 8), (16, 1), (12, 4), (32, 4)])
    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (6, 1), (7, 5), (16, 16)])
    def test_equals_the_published_formula(self, channels: int, factor: int, height: int, width: int) -> None:
        layer = EMA(channels, factor).double()
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        x = torch.randn(2, channels, height, width, dtype=torch.float64)
        assert_close("out", layer(x), published(layer, x, factor), 1e-12)

    def test_a_single_pixel(self) -> None:
        layer, x = EMA(4, 1).eval(), torch.randn(2, 4, 1, 1)
        assert torch.equal(layer(x[:1]), layer(x)[:1])

    def test_mean_equals_adaptive_pooling_in_float32(self) -> None:
        layer, x = EMA(16), torch.randn(2, 16, 40, 30)
        assert_close("out", layer(x), published(layer, x, 8), 2e-6)

    def test_gradient_reaches_every_parameter(self) -> None:
        layer, x = EMA(16, 4), torch.randn(2, 16, 9, 7, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0
        for name, p in layer.named_parameters():
            assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name

    def test_gradcheck(self) -> None:
        layer = EMA(4, 2).double()
        x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))

    def test_groups_share_weights(self) -> None:
        """Exchanging whole groups of channels exchanges them in the output."""
        layer, x = EMA(12, 3), torch.randn(2, 12, 5, 6)
        order = torch.arange(12).view(3, 4)[[2, 0, 1]].flatten()
        assert_close("out", layer(x[:, order]), layer(x)[:, order], 1e-6)

    def test_transposed_weights_on_a_transposed_image(self) -> None:
        layer, x = EMA(8, 2), torch.randn(2, 8, 5, 7)
        turned = copy.deepcopy(layer)
        with torch.no_grad():
            turned.conv3x3.weight.copy_(layer.conv3x3.weight.transpose(2, 3))
        assert_close("out", turned(x.transpose(2, 3)).transpose(2, 3), layer(x), 1e-5)

    def test_output_is_the_input_times_a_gate(self) -> None:
        x = torch.randn(2, 16, 5, 6)
        gate = EMA(16)(x) / x
        assert (gate > 0).all() and (gate < 1).all()
        assert torch.allclose(gate.view(2, 8, 2, 5, 6)[:, :, :1], gate.view(2, 8, 2, 5, 6), rtol=1e-3)

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches(self, batch: int) -> None:
        layer, x = EMA(8), torch.randn(3, 8, 5, 6)
        out = layer(x[:batch])
        assert out.shape == (batch, 8, 5, 6)
        assert_close("out", out, layer(x)[:batch], 1e-6)

    def test_channels_last_and_slices(self) -> None:
        layer, x = EMA(8), torch.randn(2, 8, 6, 10)
        expected = layer(x)
        assert_close("channels last", layer(x.to(memory_format=torch.channels_last)), expected, 1e-6)
        wide = torch.randn(2, 8, 6, 20)
        assert_close("slice", layer(wide[..., ::2]), layer(wide[..., ::2].contiguous()), 1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        layer, x = EMA(16), torch.randn(2, 16, 9, 7)
        out = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert_close("out", out, layer(x), 0.03)


class TestParameters:
    def test_keys_and_shapes(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in EMA(32, 4).state_dict().items()}
        assert shapes == {
            "gn.weight": (8,),
            "gn.bias": (8,),
            "conv1x1.weight": (8, 8, 1, 1),
            "conv1x1.bias": (8,),
            "conv3x3.weight": (8, 8, 3, 3),
            "conv3x3.bias": (8,),
        }

    def test_factor_must_divide(self) -> None:
        with pytest.raises(ValueError, match=r"channels.*20.*factor.*8"):
            EMA(20)
        EMA(20, factor=5)

    def test_round_trips(self) -> None:
        layer, x = EMA(16), torch.randn(1, 16, 5, 6)
        other = EMA(16)
        other.load_state_dict(layer.state_dict(), strict=True)
        for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))

    def test_meta_device_and_dtype(self) -> None:
        layer = EMA(16, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
        assert layer(torch.empty(1, 16, 4, 4, device="meta", dtype=torch.float64)).shape == (1, 16, 4, 4)
