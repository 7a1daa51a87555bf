"""The fused scan as a PyTorch operator: its registration, compilation, export, cost, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from helpers import assert_close, fresh_process, gradients, strided
from kan_mamba_layers import SS2D, cross_selective_scan, selective_scan
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.fused import fused_scan
from ops.selective_scan.calls import Call, Inputs, full_line_inputs, image_inputs, on_images, on_lines, operator_inputs

pytest.importorskip("numba")

OPS = torch.ops.kan_mamba_layers
NAMES = ScanCall._fields[:9]
ALL = [True] * 9
BOTH = (torch.float32, torch.float64)


Form = tuple[Inputs, tuple[int, int, bool]]  # tensors, and height, width and whether there is softplus


def image_form() -> Form:
    """Four directions over an image, whose coefficients the backend makes."""
    return operator_inputs(2, 5 * 8, 6, 3, 2, directions=4, coeffs=False), (5, 8, True)


def line_form(l: int = 37, groups: int = 1, initial: bool = False) -> Form:
    """One direction along a sequence, with given coefficients and steps."""
    return operator_inputs(2, l, 6, 3, groups=groups, initial=initial), (1, l, True)


FORMS = {
    "image": image_form,
    "line": line_form,
    "groups": lambda: line_form(groups=2),
    "initial": lambda: line_form(groups=2, initial=True),
    "short": lambda: line_form(l=3, initial=True),
}


def prepared(form: str, dtype: torch.dtype, layout: str, requires_grad: bool) -> tuple[list[Tensor | None], tuple]:
    """Every tensor of the operator in its order, and the sizes."""
    tensors, sizes = FORMS[form]()
    tensors = {k: strided(v.to(dtype), layout) if v.numel() else v.to(dtype) for k, v in tensors.items()}
    return [tensors[k].requires_grad_(requires_grad) if k in tensors else None for k in NAMES], sizes


def line(b: int = 2, d: int = 4, length: int = 37, n: int = 3, **options: object) -> Inputs:
    return full_line_inputs(b, d, length, n, **{"B": "bnl", "C": "bgnl", "groups": 2, **options})


def image(b: int = 2, h: int = 5, w: int = 8) -> Inputs:
    return image_inputs(b, h, w, 6, 2, 3)


class TestRegistration:
    # The operators carry no gradient; the function around them does, and PyTorch says so.
    @pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
    @pytest.mark.parametrize("dtype", BOTH, ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "sliced"])
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("form", ["image", "line", "groups", "initial"])
    def test_opcheck(self, form: str, requires_grad: bool, layout: str, dtype: torch.dtype) -> None:
        inputs, sizes = prepared(form, dtype, layout, requires_grad)
        torch.library.opcheck(OPS.selective_scan.default, (*inputs, *sizes, True, "cpu"))
        without_states = (*inputs, *sizes, False, "cpu")
        torch.library.opcheck(OPS.selective_scan.default, without_states, test_utils=("test_schema", "test_faketensor"))
        with torch.no_grad():
            y, last, saved = OPS.selective_scan(*inputs, *sizes, True, "cpu")
        grads = [strided(torch.randn_like(x), layout).requires_grad_(requires_grad) for x in (y, last)]
        wanted = [x is not None for x in inputs]
        arguments = (*inputs, *sizes, saved, *grads, wanted, "cpu")
        torch.library.opcheck(OPS.selective_scan_backward.default, arguments)

    @pytest.mark.parametrize("form", FORMS)
    def test_states_are_saved_only_for_a_gradient(self, form: str) -> None:
        inputs, sizes = prepared(form, torch.float32, "contiguous", False)
        sizes_of_saved = [OPS.selective_scan(*inputs, *sizes, save, "cpu")[2].numel() for save in (False, True)]
        assert sizes_of_saved[0] == 0 < sizes_of_saved[1]

    @pytest.mark.parametrize("form", FORMS)
    def test_layout_does_not_matter(self, form: str) -> None:
        inputs, sizes = prepared(form, torch.float32, "contiguous", False)
        y, _, saved = OPS.selective_scan(*inputs, *sizes, True, "cpu")
        grads = (torch.randn_like(y), torch.randn(2, len(inputs[6]), *inputs[6].shape[1:]))
        expected = (y, *OPS.selective_scan_backward(*inputs, *sizes, saved, *grads, ALL, "cpu"))
        for layout in ("sliced", "transposed"):
            other = [strided(x, layout) if x is not None and x.numel() else x for x in inputs]
            y, _, saved = OPS.selective_scan(*other, *sizes, True, "cpu")
            other_grads = (strided(x, layout) for x in grads)
            results = (y, *OPS.selective_scan_backward(*other, *sizes, saved, *other_grads, ALL, "cpu"))
            for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
                assert_close(f"{layout}, result {i}", result, wanted, 1e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_inputs_are_left_as_they_are(self, form: str) -> None:
        inputs, sizes = prepared(form, torch.float32, "contiguous", True)
        before = [None if x is None else x.detach().clone() for x in inputs]
        y, last = fused_scan(ScanCall(*inputs, *sizes), "cpu")
        (y.sum() + last.sum()).backward()
        assert all(x is None or torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


needs_compiler = pytest.mark.skipif(not (which("c++") or which("g++") or which("clang++")), reason="no C++ compiler")
COMPILED: dict[str, tuple[Call, Callable[[], Inputs]]] = {
    "selective_scan": (on_lines("auto", delta_softplus=True), line),
    "cross_selective_scan": (on_images("auto"), image),
}


class TestCompile:
    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
    @pytest.mark.parametrize("name", COMPILED)
    def test_where_no_gradient_is_wanted(self, name: str, mode: str) -> None:
        torch._dynamo.reset()
        function, make = COMPILED[name]
        inputs = {k: v.requires_grad_(mode != "enable_grad") for k, v in make().items()}
        with getattr(torch, mode)():
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs)
            assert not out.requires_grad
            assert_close("out", out, function(**inputs), 1e-6)

    @pytest.mark.parametrize("name", COMPILED)
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
    def test_equals_eager(self, name: str, backend: str) -> None:
        torch._dynamo.reset()
        function, make = COMPILED[name]
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
        function = {"SS2D": layer, **{k: v[0] for k, v in COMPILED.items()}}[name]
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for b, h, w in [(2, 5, 8), (3, 9, 7), (4, 40, 3), (5, 4, 4), (7, 20, 21)]:  # 16 to 420 pixels
            if name == "SS2D":
                x = torch.randn(b, h, w, 6, requires_grad=True)
                out, expected = compiled(x), layer(x)
                (grad,), (expected_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
            else:
                inputs = image(b, h, w) if name == "cross_selective_scan" else line(b, length=h * w)
                first = next(iter(inputs))
                (out, grads), (expected, expected_grads) = (gradients(f, inputs) for f in (compiled, function))
                grad, expected_grad = grads[first], expected_grads[first]
            assert_close("out", out, expected, 1e-6)
            assert_close("gradient", grad, expected_grad, 1e-5)
        assert counter.frame_count <= 3, "the first size, the first other size, and once more at most"

    def test_a_compiled_gradient_is_not_differentiated_to_zeros(self) -> None:
        torch._dynamo.reset()
        inputs = {k: v.requires_grad_() for k, v in image().items()}
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
        """Also below one chunk of 32 pixels, from an example that is longer."""
        b, h, w = (torch.export.Dim(name, min=1) for name in "bhw")
        x, *weights = image().values()
        shapes = {"x": {0: b, 1: h, 2: w}, "weights": [None] * 5}
        program = torch.export.export(Image(), (x, weights), dynamic_shapes=shapes, strict=strict)
        assert "kan_mamba_layers.selective_scan" in program.graph_module.print_readable(print_output=False)
        module = self.round_trip(program)
        for b, h, w in [(1, 1, 1), (3, 2, 3), (2, 31, 1), (1, 4, 8), (2, 11, 3), (1, 20, 30)]:
            x = torch.randn(b, h, w, 6)
            assert torch.equal(module(x, weights), Image()(x, weights)), (b, h, w)

    def test_sequences_of_any_length(self) -> None:
        b, l = torch.export.Dim("b", min=1), torch.export.Dim("l", min=1)
        inputs = {k: v for k, v in line(positive=True).items() if k in ("u", "delta", "A", "B", "C")}
        dynamic = {k: None if k == "A" else {0: b, v.ndim - 1: l} for k, v in inputs.items()}
        module = self.round_trip(torch.export.export(Line(), (), inputs, dynamic_shapes=dynamic))
        for b, l in [(1, 1), (3, 31), (2, 32), (1, 33), (4, 200)]:
            inputs = {k: v for k, v in line(b, length=l, positive=True).items() if k in inputs}
            assert torch.equal(module(**inputs), Line()(**inputs)), (b, l)

    def test_layer_and_its_weights(self) -> None:
        layer = SS2D(6, d_state=3).eval()
        shapes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}}
        module = self.round_trip(torch.export.export(layer, (torch.randn(2, 7, 9, 6),), dynamic_shapes=shapes))
        for shape in [(3, 3, 4, 6), (5, 12, 10, 6)]:
            x = torch.randn(shape)
            assert_close("out", module(x), layer(x), 1e-6)

    def test_onnx_takes_the_chunked_form(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        reference = pytest.importorskip("onnx.reference")
        layer, x = SS2D(4, d_state=2, backend="auto").eval(), torch.randn(1, 3, 4, 4)
        torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
        model = onnx.load(tmp_path / "layer.onnx")
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        session = reference.ReferenceEvaluator(model)
        (out,) = session.run(None, {model.graph.input[0].name: x.numpy()})
        assert_close("out", torch.from_numpy(out), layer(x), 1e-5)


# How a gradient may be differentiated once more.
AGAIN: dict[str, Callable[[Tensor, Tensor], object]] = {
    "backward": lambda y, x: y.backward(inputs=[x], retain_graph=True),
    "grad": lambda y, x: torch.autograd.grad(y, x, retain_graph=True),
    "allow_unused": lambda y, x: torch.autograd.grad(y, x, retain_graph=True, allow_unused=True),
}


class TestGradients:
    @pytest.mark.parametrize("softplus", [False, True])
    @pytest.mark.parametrize("frozen", [(), ("initial_state",), ("u", "delta")], ids=str)
    def test_gradcheck_with_a_state_before_and_after(self, frozen: tuple[str, ...], softplus: bool) -> None:
        inputs = line(1, 4, 5, 2, dtype=torch.float64)
        inputs = {k: v.requires_grad_(k not in frozen) for k, v in inputs.items()}
        options = {"delta_softplus": softplus, "return_last_state": True, "backend": "cpu"}
        assert torch.autograd.gradcheck(
            lambda *x: selective_scan(**dict(zip(inputs, x, strict=True)), **options), tuple(inputs.values())
        )

    @pytest.mark.parametrize("through", ["y", "last", "both"])
    def test_every_input_against_the_reference(self, through: str) -> None:
        inputs = line(2, 6, 70, 4, dtype=torch.float64)

        def run(backend: str) -> Call:
            def function(**x: Tensor) -> Tensor:
                y, last = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
                return {"y": y, "last": last, "both": torch.cat([y, last], -1)}[through]

            return function

        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        results = {}
        for backend in ("cpu", "reference"):
            out = run(backend)(**leaves)
            weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
            # The last state depends neither on C nor on D and z.
            grads = torch.autograd.grad((weight * out).sum(), list(leaves.values()), allow_unused=through == "last")
            results[backend] = {"out": out, **dict(zip(leaves, grads, strict=True))}
        for name, expected in results["reference"].items():
            actual = results["cpu"][name]
            if expected is None:
                assert actual is None or not actual.any(), name
            else:
                assert_close(name, actual, expected, 1e-12)

    @pytest.mark.parametrize("op", COMPILED)
    @pytest.mark.parametrize("how", AGAIN)
    def test_second_derivatives_are_refused(self, op: str, how: str) -> None:
        """For every pair of inputs: never zeros, never None."""
        function, make = COMPILED[op]
        inputs = {k: v.requires_grad_() for k, v in make().items()}
        for leaf in (v for k, v in inputs.items() if k != "z"):  # the gate's gradient is a scan, not its derivative
            (grad,) = torch.autograd.grad(function(**inputs).square().sum(), leaf, create_graph=True)
            for target in inputs.values():
                with pytest.raises(RuntimeError, match="backend='chunked'"):
                    AGAIN[how](grad.sum(), target)

    def test_the_gates_gradient_can_be_differentiated(self) -> None:
        inputs = {k: v.requires_grad_() for k, v in line(dtype=torch.float64).items()}
        results = []
        for backend in ("cpu", "reference"):
            out = selective_scan(**inputs, delta_softplus=True, backend=backend)
            (grad,) = torch.autograd.grad(out.sum(), inputs["z"], create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), list(inputs.values())))
        for name, actual, expected in zip(inputs, *results, strict=True):
            assert_close(name, actual, expected, 1e-12)

    def test_vmap_is_refused_with_a_way_out(self) -> None:
        inputs = line(positive=True, bias=False)
        many = torch.randn(3, *inputs["u"].shape)
        with pytest.raises(RuntimeError, match=r"(?s)vmap.*batch.*backend='reference'"):
            torch.vmap(lambda u: selective_scan(**{**inputs, "u": u}, backend="cpu"))(many)
        mapped = torch.vmap(lambda u: selective_scan(**{**inputs, "u": u}, backend="reference"))(many)
        assert_close("out", mapped[1], selective_scan(**{**inputs, "u": many[1]}), 1e-5)

    @pytest.mark.parametrize("name", COMPILED)
    @pytest.mark.parametrize("backward_inside", [False, True])
    def test_autocast_does_not_reach_inside(self, name: str, backward_inside: bool) -> None:
        function, make = COMPILED[name]
        leaves = {k: v.requires_grad_() for k, v in make().items()}
        out = function(**leaves)
        expected = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        with torch.autocast("cpu", torch.bfloat16):
            inside = function(**leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            grads = torch.autograd.grad(inside.square().sum(), list(leaves.values()))
        assert torch.equal(inside, out)
        for key, grad, wanted in zip(leaves, grads, expected, strict=True):
            assert torch.equal(grad, wanted), key


class TestCost:
    def test_operations(self) -> None:
        b, h, w, d, n, r = 2, 5, 8, 6, 3, 2
        inputs = {k: v.requires_grad_() for k, v in image_inputs(b, h, w, d, r, n).items()}
        counter = FlopCounterMode(display=False)
        with counter:
            out = cross_selective_scan(**inputs, backend="cpu")
            forward = counter.get_total_flops()
            out.sum().backward()
        expected = b * h * w * 4 * (9 * d * n + 2 * r * d + 2 * d * (r + 2 * n))
        assert forward == expected and counter.get_total_flops() == 4 * expected

    def test_operations_of_a_sequence(self) -> None:
        b, d, l, n = 2, 4, 37, 3
        with FlopCounterMode(display=False) as counter:
            selective_scan(**line(b, d, l, n), backend="cpu")
        assert counter.get_total_flops() == 9 * b * d * l * n

    @pytest.mark.parametrize("first", ["kan_mamba_layers", "torch.utils.flop_counter"])
    def test_either_may_be_imported_first(self, first: str) -> None:
        second = {"kan_mamba_layers": "torch.utils.flop_counter"}.get(first, "kan_mamba_layers")
        printed = fresh_process(
            f"import torch, {first}, {second}, importlib, sys\n"
            "from kan_mamba_layers import selective_scan\n"
            "u, A, B = torch.rand(1, 2, 5), -torch.rand(2, 3), torch.rand(1, 3, 5)\n"
            "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
            "    selective_scan(u, u, A, B, B, backend='cpu')\n"
            "print(counter.get_total_flops(), sum('kan_mamba_layers' in type(f).__module__ for f in sys.meta_path))\n"
        )
        assert printed == f"{9 * 2 * 5 * 3} 0", "the count, and no finder left behind"

    def test_importing_brings_neither_engine_nor_counter(self) -> None:
        names = ("triton", "numba", "llvmlite", "torch.utils.flop_counter")
        assert fresh_process(f"import sys, kan_mamba_layers\nprint([n for n in {names} if n in sys.modules])") == "[]"
