"""The fused KAN map under torch.compile, torch.export and ONNX: one graph, any number of rows."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import assert_close, gradients
from kan_mamba_layers import kan_linear
from kan_mamba_layers.ops import backend as choice
from ops.kan_linear.calls import ALL, case, fused, kan, kan_inputs

pytest.importorskip("numba")


needs_compiler = pytest.mark.skipif(not (which("c++") or which("g++") or which("clang++")), reason="no C++ compiler")


class TestCompile:
    @pytest.mark.parametrize("backend", ALL)
    @pytest.mark.parametrize("extrapolation", ["zero", "linear"])
    def test_one_graph_serves_every_batch(self, backend: str, extrapolation: str) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        grid = kan_inputs()["grid"]
        function = kan(backend, grid, extrapolation=extrapolation, uniform=extrapolation == "zero")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for rows in (20, 3, 157):
            inputs = {k: v.requires_grad_() for k, v in kan_inputs(rows).items() if k != "grid"}
            torch._dynamo.mark_dynamic(inputs["x"], 0)
            out, expected = compiled(**inputs), function(**inputs)
            assert_close("out", out, expected, 1e-6)
            leaves = list(inputs.values())
            grads, wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
            for name, grad, other in zip(inputs, grads, wanted, strict=True):
                assert_close(f"d{name}", grad, other, 1e-5)
        assert counter.frame_count == 1

    @needs_compiler
    def test_inductor(self) -> None:
        torch._dynamo.reset()
        function, inputs = case("cpu", base_activation=torch.tanh)
        out, grads = gradients(torch.compile(function, fullgraph=True), inputs)
        expected, expected_grads = gradients(function, inputs)
        assert_close("out", out, expected, 1e-6)
        for name, grad in grads.items():
            assert_close(f"d{name}", grad, expected_grads[name], 1e-5)

    @fused
    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
    def test_where_no_gradient_is_wanted(self, backend: str, mode: str) -> None:
        torch._dynamo.reset()
        function, inputs = case(backend)
        inputs = {k: v.requires_grad_() for k, v in inputs.items()}
        with getattr(torch, mode)():
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs)
            assert not out.requires_grad
            assert_close("out", out, function(**inputs), 1e-6)

    @fused
    def test_under_autocast(self, backend: str) -> None:
        torch._dynamo.reset()
        function, inputs = case(backend)
        with torch.autocast("cpu", torch.bfloat16):
            out, grads = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
            expected, expected_grads = gradients(function, inputs)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
        for name, grad in grads.items():
            assert_close(f"d{name}", grad, expected_grads[name], 1e-2 if name == "bias" else 1e-5)

    @fused
    def test_a_compiled_gradient_is_not_differentiated_to_zeros(self, backend: str) -> None:
        torch._dynamo.reset()
        function, inputs = case(backend)
        inputs = {k: v.requires_grad_() for k, v in inputs.items()}
        out = torch.compile(function, backend="aot_eager", fullgraph=True)(**inputs)

        def second_derivative() -> None:
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["x"], create_graph=True)
            torch.autograd.grad(grad.square().sum(), inputs["x"])

        with pytest.raises(RuntimeError, match="double backward"):
            second_derivative()

    def test_without_numba_a_compiler_gets_the_formula(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(choice._HAS, "numba", False)
        torch._dynamo.reset()
        graphs: list[str] = []

        def keep(module: torch.fx.GraphModule, example: object) -> Callable[..., object]:
            graphs.append(str(module.graph))
            return module.forward

        function, inputs = case("auto")
        out = torch.compile(function, fullgraph=True, backend=keep)(**inputs)
        assert "linear" in graphs[0] and "kan_mamba_layers.kan_linear" not in graphs[0]
        assert_close("out", out, function(**inputs), 1e-5)


class Map(nn.Module):
    """The KAN map as a module that owns its weights."""

    def __init__(self, backend: str, **options: object) -> None:
        super().__init__()
        self.options = {"backend": backend, **options}
        self.weights = nn.ParameterDict({k: v for k, v in kan_inputs().items() if k not in ("x", "grid")})
        self.register_buffer("grid", kan_inputs()["grid"])

    def forward(self, x: Tensor) -> Tensor:
        return kan_linear(x, **{k: v for k, v in self.weights.items()}, grid=self.grid, **self.options)  # noqa: C416


class TestExport:
    @pytest.mark.parametrize("backend", ALL)
    @pytest.mark.parametrize("strict", [False, True])
    def test_any_batch(self, backend: str, strict: bool) -> None:
        module = Map(backend, uniform=True)
        shapes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("l")}}
        program = torch.export.export(module, (torch.randn(4, 6, 3),), dynamic_shapes=shapes, strict=strict)
        code = program.graph_module.print_readable(print_output=False)
        assert ("ops.kan_mamba_layers.kan_linear.default" in code) == (backend != "reference")
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file).module()
        for shape in [(1, 1, 3), (5, 40, 3)]:
            x = torch.randn(shape)
            assert_close("out", again(x), module(x), 1e-6)

    def test_onnx_takes_the_formula(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        module, path = Map("auto", uniform=True, extrapolation="linear").eval(), tmp_path / "map.onnx"
        shapes = {"x": {0: torch.export.Dim("b")}}
        torch.onnx.export(module, (torch.randn(4, 3),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        model = onnx.load(path)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}, "operators that every runtime has"
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for rows in (1, 33):
            x = 1.5 * torch.randn(rows, 3)
            (out,) = session.run(None, {model.graph.input[0].name: x.numpy()})
            assert_close("out", torch.from_numpy(out), module(x), 1e-5)
