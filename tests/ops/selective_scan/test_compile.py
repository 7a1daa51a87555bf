"""The fused scan under torch.compile, torch.export and ONNX: one graph, any size."""

from __future__ import annotations

import io
from collections.abc import Callable
from shutil import which

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import assert_close, gradients
from kan_mamba_layers import SS2D, cross_selective_scan, selective_scan
from ops.selective_scan.calls import FUSED, fused_image, fused_line, on_images

pytest.importorskip("numba")

needs_compiler = pytest.mark.skipif(not (which("c++") or which("g++") or which("clang++")), reason="no C++ compiler")


class TestCompile:
    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
    @pytest.mark.parametrize("name", FUSED)
    def test_where_no_gradient_is_wanted(self, name: str, mode: str) -> None:
        torch._dynamo.reset()
        function, make = FUSED[name]
        inputs = {k: v.requires_grad_(mode != "enable_grad") for k, v in make().items()}
        with getattr(torch, mode)():
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs)
            assert not out.requires_grad
            assert_close("out", out, function(**inputs), 1e-6)

    @pytest.mark.parametrize("name", FUSED)
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
    def test_equals_eager(self, name: str, backend: str) -> None:
        torch._dynamo.reset()
        function, make = FUSED[name]
        inputs = make()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        out, grads = gradients(compiled, inputs)
        expected, expected_grads = gradients(function, inputs)
        assert_close("out", out, expected, 1e-6)
        for key, grad in grads.items():
            assert_close(f"d{key}", grad, expected_grads[key], 1e-5)

    @pytest.mark.parametrize("name", ["selective_scan", "cross_selective_scan", "SS2D"])
    def test_one_dynamic_graph_serves_every_size(self, name: str) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        layer = SS2D(6, d_state=3)
        function = {"SS2D": layer, **{k: v[0] for k, v in FUSED.items()}}[name]
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for b, h, w in [(2, 5, 8), (3, 9, 7), (4, 40, 3), (5, 4, 4), (7, 20, 21)]:  # 16 to 420 pixels
            if name == "SS2D":
                x = torch.randn(b, h, w, 6, requires_grad=True)
                out, expected = compiled(x), layer(x)
                (grad,), (expected_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
            else:
                inputs = fused_image(b, h, w) if name == "cross_selective_scan" else fused_line(b, length=h * w)
                first = next(iter(inputs))
                (out, grads), (expected, expected_grads) = (gradients(f, inputs) for f in (compiled, function))
                grad, expected_grad = grads[first], expected_grads[first]
            assert_close("out", out, expected, 1e-6)
            assert_close("gradient", grad, expected_grad, 1e-5)
        assert counter.frame_count <= 3, "the first size, the first other size, and once more at most"

    def test_a_compiled_gradient_is_not_differentiated_to_zeros(self) -> None:
        torch._dynamo.reset()
        inputs = {k: v.requires_grad_() for k, v in fused_image().items()}
        out = torch.compile(on_images("auto"), backend="aot_eager", fullgraph=True)(**inputs)

        def second_derivative() -> None:
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["x"], create_graph=True)
            torch.autograd.grad(grad.square().sum(), inputs["x"])

        with pytest.raises(RuntimeError, match="double backward"):
            second_derivative()


class Image(torch.nn.Module):
    def forward(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        return cross_selective_scan(x, *weights, backend="cpu")


class Line(torch.nn.Module):
    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(u, delta, A, B, C, backend="cpu")


class TestExport:
    @staticmethod
    def round_trip(program: torch.export.ExportedProgram) -> Callable[..., Tensor]:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file).module()

    @pytest.mark.parametrize("strict", [False, True])
    def test_images_of_any_size(self, strict: bool) -> None:
        """Including less than one chunk of 32 pixels, although the example is longer."""
        b, h, w = (torch.export.Dim(name, min=1) for name in "bhw")
        x, *weights = fused_image().values()
        shapes = {"x": {0: b, 1: h, 2: w}, "weights": [None] * 5}
        program = torch.export.export(Image(), (x, weights), dynamic_shapes=shapes, strict=strict)
        assert "kan_mamba_layers.selective_scan" in program.graph_module.print_readable(print_output=False)
        module = self.round_trip(program)
        for b, h, w in [(1, 1, 1), (3, 2, 3), (2, 31, 1), (1, 4, 8), (2, 11, 3), (1, 20, 30)]:
            x = torch.randn(b, h, w, 6)
            assert torch.equal(module(x, weights), Image()(x, weights)), (b, h, w)

    def test_sequences_of_any_length(self) -> None:
        b, l = torch.export.Dim("b", min=1), torch.export.Dim("l", min=1)
        inputs = {k: v for k, v in fused_line(positive=True).items() if k in ("u", "delta", "A", "B", "C")}
        dynamic = {k: None if k == "A" else {0: b, v.ndim - 1: l} for k, v in inputs.items()}
        module = self.round_trip(torch.export.export(Line(), (), inputs, dynamic_shapes=dynamic))
        for b, l in [(1, 1), (3, 31), (2, 32), (1, 33), (4, 200)]:
            inputs = {k: v for k, v in fused_line(b, length=l, positive=True).items() if k in inputs}
            assert torch.equal(module(**inputs), Line()(**inputs)), (b, l)

    def test_layer_and_its_weights(self) -> None:
        layer = SS2D(6, d_state=3).eval()
        shapes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}}
        module = self.round_trip(torch.export.export(layer, (torch.randn(2, 7, 9, 6),), dynamic_shapes=shapes))
        for shape in [(3, 3, 4, 6), (5, 12, 10, 6)]:
            x = torch.randn(shape)
            assert_close("out", module(x), layer(x), 1e-6)
