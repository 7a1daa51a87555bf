"""KANConv2d: against sums of KANLinear maps, and in the hands of PyTorch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kan_layers import EXTRAPOLATIONS, HALF, OnnxModel, convolution, exported, gradcheck, penalty_oracle
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import (
    assert_budget,
    assert_close,
    basis_oracle,
    gradients,
    largest,
    nan_filled_empty,
    relative_l2,
    to_array,
)
from kan_mamba_layers import KANConv2d, KANLinear, kan_linear


def tap(layer: KANConv2d, pixels: Tensor, row: int, column: int) -> Tensor:  # b h w c -> b h w o
    """What one tap of the kernel adds: a KAN layer of each pixel, by groups."""
    outs = []
    for n, (inputs, grid) in enumerate(
        zip(pixels.chunk(layer.groups, -1), layer.grid.chunk(layer.groups), strict=True)
    ):
        o = slice(n * layer.out_channels // layer.groups, (n + 1) * layer.out_channels // layer.groups)
        scaler = None if layer.spline_scaler is None else layer.spline_scaler[o, :, row, column].double()
        base, spline = layer.base_weight[o, :, row, column].double(), layer.spline_weight[o, :, row, column].double()
        options = {"base_activation": layer.base_activation, "extrapolation": layer.extrapolation}
        outs.append(kan_linear(inputs, base, spline, scaler, grid.double(), backend="reference", **options))
    return torch.cat(outs, -1)


def oracle(layer: KANConv2d, x: Tensor, padding: tuple[int, int]) -> Tensor:
    """The sum over the taps of the kernel in float64; a tap outside of the image adds nothing."""
    pixels = x.double().movedim(1, -1)
    b, h, w, _ = pixels.shape
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height = (h + 2 * padding[0] - dh * (kh - 1) - 1) // sh + 1
    width = (w + 2 * padding[1] - dw * (kw - 1) - 1) // sw + 1
    out = torch.zeros(b, height, width, layer.out_channels, dtype=torch.float64)
    for row in range(kh):
        for column in range(kw):
            term = tap(layer, pixels, row, column)
            for i in range(height):
                for j in range(width):
                    y, x_ = i * sh + row * dh - padding[0], j * sw + column * dw - padding[1]
                    if 0 <= y < h and 0 <= x_ < w:
                        out[:, i, j] += term[:, y, x_]
    return (out if layer.bias is None else out + layer.bias.double()).movedim(-1, 1)


class TestForward:
    @pytest.mark.parametrize(
        ("options", "padding"),
        [
            ({}, (0, 0)),
            ({"padding": 1}, (1, 1)),
            ({"padding": (2, 0), "stride": 2}, (2, 0)),
            ({"padding": "same"}, (1, 1)),
            ({"padding": "same", "dilation": 2}, (2, 2)),
            ({"padding": "valid"}, (0, 0)),
            ({"stride": (1, 3), "padding": 3}, (3, 3)),
            ({"dilation": (2, 1), "padding": (1, 1)}, (1, 1)),
            ({"groups": 2, "padding": 1, "bias": True}, (1, 1)),
            ({"groups": 4, "stride": 2, "enable_standalone_scale_spline": False}, (0, 0)),
            ({"grid_size": 3, "spline_order": 2, "grid_range": (-2, 0.5), "base_activation": nn.Tanh}, (0, 0)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [(7, 9), (5, 6)])
    def test_is_the_sum_of_its_taps(self, size: tuple[int, int], options: dict, padding: tuple[int, int]) -> None:
        layer = convolution(4, 8, 3, **options).double()
        x = 1.5 * torch.randn(2, 4, *size, dtype=torch.float64)
        out = layer(x)
        assert out.is_contiguous()
        assert_close("out", out, oracle(layer, x, padding), 1e-6)  # the knots are float32
        plain = nn.Conv2d(4, 8, 3, **{k: options[k] for k in ("stride", "padding", "dilation") if k in options})
        assert out.shape == plain(x.float()).shape

    @pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (5, 2), (7, 9)])
    def test_kernels(self, kernel: tuple[int, int]) -> None:
        layer, x = convolution(3, 2, kernel).double(), torch.randn(2, 3, 7, 9, dtype=torch.float64)
        assert_close("out", layer(x), oracle(layer, x, (0, 0)), 1e-6)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("knots", ["uniform", "nonuniform"])
    def test_equals_unfold_and_kan_linear(self, knots: str, extrapolation: str) -> None:
        """Without padding every output pixel is a KAN layer of its patch."""
        layer = convolution(3, 4, (3, 2), stride=2, knots=knots, extrapolation=extrapolation).double()
        x = 3 * torch.randn(2, 3, 8, 9, dtype=torch.float64)
        patches = F.unfold(x, (3, 2), stride=2).transpose(1, 2)  # b pixels (c 3 2)
        expected = kan_linear(
            patches,
            layer.base_weight.flatten(1),
            layer.spline_weight.flatten(1, 3),
            layer.spline_scaler.flatten(1),
            layer.grid.repeat_interleave(6, 0),
            extrapolation=extrapolation,
            backend="reference",
        )
        assert_close("out", layer(x).flatten(2).transpose(1, 2), expected, 1e-6 if knots == "uniform" else 1e-12)

    def test_one_by_one_is_kan_linear(self) -> None:
        torch.manual_seed(3)
        linear = KANLinear(5, 7, bias=True)
        torch.manual_seed(3)
        layer, x = KANConv2d(5, 7, 1, bias=True), torch.randn(2, 5, 6, 4)
        for name, value in linear.state_dict().items():
            assert_close(name, layer.state_dict()[name].reshape(value.shape), value, 1e-6)
        assert_close("out", layer(x), linear(x.movedim(1, -1)).movedim(-1, 1), 2e-6)
        samples = torch.randn(3, 5, 8, 8)
        layer.update_grid(samples)
        linear.update_grid(samples.movedim(1, -1))
        assert_close("out", layer(x), linear(x.movedim(1, -1)).movedim(-1, 1), 1e-5)

    def test_beyond_the_image_nothing_is_added(self) -> None:
        """Padding the pixels instead would add the functions of zero."""
        layer, x = convolution(1, 1, 3, padding=2), torch.randn(1, 1, 1, 1)
        values = layer.edge_function(x.flatten())[0, 0, 0]  # 3 3
        assert_close("out", layer(x)[0, 0], values.flip(0, 1), 1e-6)
        assert largest(layer.edge_function(torch.zeros(1))) > 0.01

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches(self, batch: int) -> None:
        layer, x = convolution(4, 6, 3, padding=1, bias=True), torch.randn(batch, 4, 6, 5, requires_grad=True)
        out = layer(x)
        assert out.shape == (batch, 6, 6, 5)
        out.sum().backward()
        assert x.grad.shape == x.shape and layer.spline_weight.grad.isfinite().all()

    def test_one_image_without_batch(self) -> None:
        layer, x = convolution(4, 6, 3), torch.randn(4, 6, 5)
        assert_close("out", layer(x), layer(x[None])[0], 1e-6)
        assert layer.b_splines(x).shape == (4, 6, 5, 8)

    def test_channels_last_input(self) -> None:
        layer, x = convolution(4, 6, 3), torch.randn(2, 4, 6, 5)
        assert_close("out", layer(x.contiguous(memory_format=torch.channels_last)), layer(x), 1e-6)
        assert_close("out", layer(x.transpose(2, 3)), layer(x.transpose(2, 3).contiguous()), 1e-6)

    def test_b_splines_equal_scipy(self) -> None:
        layer, x = convolution(3, 2, 3, knots="nonuniform"), torch.randn(2, 3, 6, 5)
        expected = basis_oracle(to_array(x.movedim(1, -1)), to_array(layer.grid), 3)  # b h w c g+s
        assert_close("bases", layer.b_splines(x), np.moveaxis(expected, 3, 1), 2e-6)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_gradcheck(self, extrapolation: str) -> None:
        layer = convolution(2, 2, 2, padding=1, groups=2, grid_size=3, bias=True, extrapolation=extrapolation).double()
        x = (2.5 * torch.randn(1, 2, 3, 2, dtype=torch.float64)).requires_grad_()
        assert gradcheck(layer, x)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        layer = convolution(4, 6, 3, padding=1, bias=True).to(dtype)
        assert layer.grid.dtype == torch.float32, "rounded knots change the function"
        x = torch.randn(2, 4, 7, 6).to(dtype).requires_grad_()
        out = layer(x)
        assert out.dtype == dtype
        expected = oracle(layer, x, (1, 1))
        bands = 2 if dtype.itemsize == 2 else 16
        assert_budget("out", out, expected, expected, dtype, bands=bands)
        out.sum().backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize("dtype", HALF)
    def test_autocast_returns_its_dtype(self, dtype: torch.dtype) -> None:
        layer, x = convolution(4, 6, 3, padding=1, bias=True), torch.randn(2, 4, 7, 6)
        for given in (x, x.to(dtype)):
            with torch.autocast("cpu", dtype):
                out = layer(given)
            assert out.dtype == dtype
            expected = oracle(layer, given, (1, 1))
            assert_budget("out", out, expected, expected, dtype, bands=2)
        out.sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


class TestGrid:
    @pytest.mark.parametrize("mode", ["uniform", "adaptive"])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_update_grid_follows_each_channel_and_keeps_the_function(self, mode: str, groups: int) -> None:
        layer = convolution(4, 6, 3, groups=groups, grid_mode=mode)
        with torch.no_grad():
            layer.base_weight.zero_()
        x = torch.rand(4, 4, 12, 12) * torch.tensor([0.3, 0.5, 0.7, 0.9])[:, None, None]
        before = layer(x)
        layer.update_grid(x)
        assert relative_l2(layer(x), before) <= 0.03
        ends = layer.grid[:, [3, -4]]
        assert_close("ends", ends, torch.stack([x.amin((0, 2, 3)) - 0.01, x.amax((0, 2, 3)) + 0.01], 1), 1e-3)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_extend_grid_is_exact_when_nested(self, groups: int) -> None:
        layer, x = convolution(4, 6, 3, groups=groups), torch.rand(2, 4, 9, 9) * 2 - 1
        before = layer(x)
        layer.extend_grid(10)
        assert layer.spline_weight.shape == (6, 4 // groups, 3, 3, 13) and layer.grid_size == 10
        assert relative_l2(layer(x), before) <= 1e-6

    def test_regularization_loss(self) -> None:
        layer = convolution(2, 3, 2)
        expected = penalty_oracle(layer, 0.7, 0.3)
        np.testing.assert_allclose(layer.regularization_loss(0.7, 0.3).item(), expected, rtol=1e-5)
        assert layer.regularization_loss() == layer.regularization_loss(1.0, 1.0)


class TestState:
    def test_keys_and_shapes(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in KANConv2d(4, 6, (3, 2), groups=2, bias=True).state_dict().items()}
        assert shapes == {
            "grid": (4, 12),
            "base_weight": (6, 2, 3, 2),
            "spline_weight": (6, 2, 3, 2, 8),
            "spline_scaler": (6, 2, 3, 2),
            "bias": (6,),
        }

    def test_initial_values_have_the_bound_of_a_convolution(self) -> None:
        layer, plain = KANConv2d(16, 32, 3, groups=2, bias=True), nn.Conv2d(16, 32, 3, groups=2)
        bound = (8 * 9) ** -0.5
        assert largest(plain.weight) <= bound * (1 + 1e-6)
        for p in (layer.base_weight, layer.spline_scaler):
            assert 0.98 * bound <= largest(p) <= bound
        assert 0.8 * bound <= largest(layer.bias) <= bound

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies(self, duplicate) -> None:
        layer, x = convolution(4, 6, 3, knots="nonuniform"), torch.randn(2, 4, 7, 6)
        assert torch.equal(duplicate(layer)(x), layer(x))

    def test_meta_device(self) -> None:
        layer = KANConv2d(4, 6, 3, device="meta")
        assert layer(torch.empty(2, 4, 7, 6, device="meta")).shape == (2, 6, 5, 4)
        with nan_filled_empty():
            layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert layer(torch.randn(2, 4, 7, 6)).isfinite().all()

    def test_repr_names_the_sizes(self) -> None:
        text = repr(KANConv2d(4, 6, 3, stride=2, padding=1, groups=2))
        assert all(part in text for part in ("KANConv2d", "4, 6", "(3, 3)", "(2, 2)", "(1, 1)", "groups=2"))


@pytest.mark.parametrize("knots", ["uniform", "nonuniform"])
class TestEcosystem:
    def test_one_graph_serves_every_size(self, knots: str) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        layer = convolution(4, 6, 3, stride=2, padding=1, bias=True, knots=knots, extrapolation="linear")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for b, h, w in [(2, 9, 8), (3, 5, 17), (5, 31, 6)]:
            inputs = {"x": torch.randn(b, 4, h, w)}
            for dimension in (0, 2, 3):
                torch._dynamo.mark_dynamic(inputs["x"], dimension)
            out, grads = gradients(compiled, inputs)
            expected, expected_grads = gradients(layer, inputs)
            assert_close("out", out, expected, 1e-6)
            assert_close("dx", grads["x"], expected_grads["x"], 1e-5)
        assert counter.frame_count <= 2

    def test_export_for_any_size(self, knots: str) -> None:
        layer = convolution(4, 6, 3, padding=1, bias=True, knots=knots)
        sizes = {n: torch.export.Dim(name) for n, name in ((0, "b"), (2, "h"), (3, "w"))}
        module = exported(layer, torch.randn(2, 4, 9, 8), sizes, strict=False)
        for b, h, w in [(1, 5, 7), (4, 20, 3)]:
            x = torch.randn(b, 4, h, w)
            assert_close("out", module(x), layer(x), 1e-6)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_onnx(self, knots: str, extrapolation: str, tmp_path: Path) -> None:
        layer = convolution(4, 6, 3, padding=1, groups=2, bias=True, knots=knots, extrapolation=extrapolation).eval()
        sizes = {n: torch.export.Dim(name) for n, name in ((0, "b"), (2, "h"), (3, "w"))}
        model = OnnxModel(layer, torch.randn(2, 4, 9, 8), sizes, tmp_path)
        for b, h, w in [(2, 9, 8), (1, 5, 7)]:
            x = torch.randn(b, 4, h, w)
            assert_close("out", model(x), layer(x), 1e-5)
