"""KANLinear in the hands of PyTorch: autocast, compilation, export, ONNX, copies and functional calls."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kan_layers import EXTRAPOLATIONS, HALF, LAYERS, OnnxModel, exported, layer_oracle, with_large_splines
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import assert_budget, assert_close, gradients, largest
from kan_mamba_layers import KANLinear

pytestmark = pytest.mark.parametrize("knots", LAYERS)


def run(layer: KANLinear, autocast: torch.dtype | None = None) -> Callable[..., Tensor]:
    """The layer as a function of its input and its parameters."""

    def function(x: Tensor, **parameters: Tensor) -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return torch.func.functional_call(layer, parameters, (x,))

    return function


@pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_returns_its_dtype_within_the_budget(knots: str, extrapolation: str, dtype: torch.dtype) -> None:
    layer = LAYERS[knots](features=(32, 16), extrapolation=extrapolation, bias=True)
    plain, double = copy.deepcopy(layer), copy.deepcopy(layer).double()
    plain.backend = double.backend = "reference"
    inputs = {"x": torch.randn(100, 32), **dict(layer.named_parameters())}
    out, grads = gradients(run(layer, dtype), inputs)
    plain_out, plain_grads = gradients(run(plain, dtype), inputs)
    _, true_grads = gradients(run(double), {k: v.double() for k, v in inputs.items()})
    assert out.dtype == dtype
    assert_budget("out", out, plain_out, layer_oracle(layer, inputs["x"]), dtype)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert_budget(f"d{name}", grad.to(dtype), plain_grads[name].to(dtype), true_grads[name], dtype)


class TestCompile:
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_one_graph_serves_every_batch(self, knots: str, extrapolation: str) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        layer = LAYERS[knots](bias=True, extrapolation=extrapolation)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for rows in (20, 3, 57):
            x = torch.randn(rows, 8, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 0)
            out, expected = compiled(x), layer(x.detach())
            assert_close("out", out, expected, 1e-6)
            leaves = [x, *layer.parameters()]
            grads = torch.autograd.grad(out.square().sum(), leaves)
            expected_grads = torch.autograd.grad(layer(x).square().sum(), leaves)
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                assert_close("gradient", grad, expected_grad, 1e-5)
        assert counter.frame_count == 1

    def test_under_autocast(self, knots: str) -> None:
        torch._dynamo.reset()
        layer, x = LAYERS[knots](), torch.randn(20, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
            expected = layer(x)
        assert out.dtype == torch.bfloat16
        assert_close("out", out, expected, torch.finfo(torch.bfloat16).eps)


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_any_batch(self, knots: str, strict: bool) -> None:
        layer = LAYERS[knots](bias=True)
        b, l = torch.export.Dim("b"), torch.export.Dim("l")
        module = exported(layer, torch.randn(4, 6, 8), {0: b, 1: l}, strict=strict)
        for shape in [(1, 1, 8), (3, 50, 8)]:
            x = torch.randn(shape)
            assert_close("out", module(x), layer(x), 1e-6)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_onnx(self, knots: str, extrapolation: str, tmp_path: Path) -> None:
        layer = LAYERS[knots](bias=True, extrapolation=extrapolation).eval()
        model = OnnxModel(layer, torch.randn(4, 8), {0: torch.export.Dim("b")}, tmp_path)
        for rows in (4, 1, 33):
            x = torch.randn(rows, 8)
            assert_close("out", model(x), layer(x), 1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(knots: str, duplicate: Callable[[KANLinear], KANLinear]) -> None:
    layer, x = LAYERS[knots](), torch.randn(20, 8)
    other, expected = duplicate(layer), layer(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.base_weight.zero_()
    assert torch.equal(layer(x), expected)


def test_state_dict_through_a_file(knots: str) -> None:
    layer, other, x = LAYERS[knots](bias=True), KANLinear(8, 6, bias=True), torch.randn(20, 8)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), layer(x))


def test_functional_call_and_its_gradient(knots: str) -> None:
    layer, other, x = LAYERS[knots](bias=True), with_large_splines(bias=True), torch.randn(20, 8)
    values = {k: v.detach() for k, v in layer.state_dict().items()}
    assert torch.equal(torch.func.functional_call(other, values, (x,)), layer(x))
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert largest(parameter.grad) > 0
        assert_close(name, grads[name], parameter.grad, 1e-6)
