"""The fused KAN map as a PyTorch operator: its registration, its gradients, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers import FORWARD_MODE, assert_budget, assert_close, gradients, says, strided
from kan_mamba_layers import kan_linear
from kan_mamba_layers.ops.kan_linear.call import Wanted
from kan_mamba_layers.ops.kan_linear.fused import load
from ops.kan_linear.calls import case, fused, kan, kan_inputs

pytest.importorskip("numba")

OPS = torch.ops.kan_mamba_layers
EXTRAPOLATIONS = ("zero", "clamp", "linear")
FLAGS = [(True, True), (True, False), (False, True), (False, False)]
# The operators have no gradient formula, the function around them has; PyTorch warns about it.
no_kernel = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")


def operands(dtype: torch.dtype, layout: str, activated: bool, weights: torch.dtype | None = None) -> list:
    """The operator's tensors in order, without the bias."""
    inputs = kan_inputs(dtype=dtype)
    inputs["activated"] = torch.tanh(inputs["x"]) if activated else None
    for name in ("base_weight", "spline_weight"):
        inputs[name] = inputs[name].to(weights or dtype)
    order = ("x", "activated", "base_weight", "spline_weight", "grid")
    return [None if inputs[name] is None else strided(inputs[name], layout) for name in order]


class TestRegistration:
    @no_kernel
    @fused
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "sliced"])
    @pytest.mark.parametrize("activated", [False, True])
    def test_opcheck(self, backend: str, dtype: torch.dtype, layout: str, activated: bool) -> None:
        tensors = operands(dtype, layout, activated)
        needed = [x if x is None or k == 4 else x.requires_grad_(layout == "sliced") for k, x in enumerate(tensors)]
        bias = torch.randn(4, dtype=dtype) if activated else None
        torch.library.opcheck(OPS.kan_linear.default, (*needed, bias, "zero", True, True, backend))
        grad_y = strided(torch.randn(20, 4, dtype=dtype), layout)
        wanted = [x is not None and k < 4 for k, x in enumerate((*needed, bias))]
        arguments = (*needed, bias, "linear", activated, grad_y, wanted, backend)
        torch.library.opcheck(OPS.kan_linear_backward.default, arguments, atol=1e-5, rtol=1e-5)

    @fused
    @pytest.mark.parametrize("wanted", FLAGS, ids=str)
    @pytest.mark.parametrize("activated", [False, True])
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
    def test_what_is_not_wanted_is_empty(
        self, backend: str, wanted: tuple[bool, bool], activated: bool, weights: torch.dtype
    ) -> None:
        """Also when autocast gives the weights another dtype than x."""
        x, active, base, splines, grid = operands(torch.float32, "contiguous", activated, weights)
        flags = [wanted[0], wanted[0] and activated, wanted[1], wanted[1], False, False]
        grad_y = torch.randn(20, 4).to(weights)
        arguments = (x, active, base, splines, grid, None, "zero", False, grad_y, flags, backend)
        torch.library.opcheck(OPS.kan_linear_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert [r.numel() > 0 for r in OPS.kan_linear_backward(*arguments)] == flags

    @fused
    @pytest.mark.parametrize("layout", ["sliced", "transposed"])
    def test_layout_does_not_matter(self, backend: str, layout: str) -> None:
        tensors = operands(torch.float32, "contiguous", True)
        grad_y = torch.randn(20, 4)
        other = [strided(x, layout) for x in tensors]
        y, again = (OPS.kan_linear(*x, None, "linear", False, True, backend) for x in (tensors, other))
        assert torch.equal(y, again) and again.is_contiguous()
        rest, wanted = (None, "linear", False), [True] * 4 + [False] * 2
        grads = OPS.kan_linear_backward(*tensors, *rest, grad_y, wanted, backend)
        again = OPS.kan_linear_backward(*other, *rest, strided(grad_y, layout), wanted, backend)
        assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(grads, again, strict=True))

    @fused
    @pytest.mark.parametrize("activation", [F.silu, torch.tanh])
    def test_inputs_are_left_as_they_are(self, backend: str, activation: Callable[[Tensor], Tensor]) -> None:
        inputs = kan_inputs()
        before = {k: v.clone() for k, v in inputs.items()}
        grid = inputs.pop("grid")
        gradients(kan(backend, grid, base_activation=activation), inputs)
        assert all(torch.equal(v, before[k]) for k, v in inputs.items()) and torch.equal(grid, before["grid"])

    @fused
    @pytest.mark.parametrize(("i", "o"), [(0, 3), (3, 0)])
    def test_no_features_or_no_outputs(self, backend: str, i: int, o: int) -> None:
        inputs = kan_inputs(5, i, o)
        grid = inputs.pop("grid")
        out, grads = gradients(kan(backend, grid), inputs)
        expected, expected_grads = gradients(kan("reference", grid), inputs)
        assert torch.equal(out, expected)
        assert all(torch.equal(grad, expected_grads[k]) for k, grad in grads.items())


class Seen(list):
    """Per call of the backend: whether gradients of x and of the weights are wanted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        module = load(backend)
        backward = module.backward

        def spy(*arguments: object) -> object:
            self.append(Wanted.of(arguments[-1]))
            return backward(*arguments)

        monkeypatch.setattr(module, "backward", spy)


class TestGradients:
    @fused
    def test_frozen_inputs_cost_nothing(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        seen, grid = Seen(monkeypatch, backend), kan_inputs()["grid"]
        weights = ("base_weight", "spline_weight", "spline_scaler")
        for frozen in ((), ("x",), weights, ("x", *weights), ("x", *weights, "bias")):
            inputs = {k: v.requires_grad_(k not in frozen) for k, v in kan_inputs().items() if k != "grid"}
            out = kan(backend, grid)(**inputs)
            assert out.requires_grad == (len(frozen) < 5)
            if out.requires_grad:
                out.sum().backward()
            assert all((v.grad is None) == (k in frozen) for k, v in inputs.items())
        assert seen == [(True, True), (False, True), (True, False), (False, False)]

    @fused
    def test_no_gradient_of_the_output(self, backend: str) -> None:
        class Stop(torch.autograd.Function):
            """Has no gradient, unlike one that is zero."""

            @staticmethod
            def forward(ctx: object, y: Tensor) -> Tensor:
                return y.clone()

            @staticmethod
            def backward(ctx: object, grad: Tensor) -> None:
                return None

        inputs = {k: v.requires_grad_(k != "grid") for k, v in kan_inputs().items()}
        Stop.apply(kan_linear(**inputs, backend=backend)).sum().backward()
        assert all(x.grad is None or not x.grad.any() for x in inputs.values())

    @fused
    def test_only_the_spline_or_only_the_base_is_learned(self, backend: str) -> None:
        inputs = kan_inputs()
        expected = gradients(kan("reference", inputs["grid"]), {k: v for k, v in inputs.items() if k != "grid"})[1]
        weight = torch.randint(-8, 9, (20, 4), generator=torch.Generator().manual_seed(0)) / 8
        for name in ("base_weight", "spline_weight", "spline_scaler"):
            leaf = inputs[name].clone().requires_grad_()
            kan_linear(**{**inputs, name: leaf}, backend=backend).backward(weight)
            assert_close(name, leaf.grad, expected[name], 1e-5)

    @fused
    def test_an_activation_with_weights_of_its_own(self, backend: str) -> None:
        inputs, results = kan_inputs(), []
        for name in (backend, "reference"):
            activation = nn.PReLU()
            kan_linear(**inputs, base_activation=activation, backend=name).sum().backward()
            results.append(activation.weight.grad)
        assert_close("slope", *results, 1e-5)

    @fused
    def test_an_activation_in_place_does_not_change_the_splines(self, backend: str) -> None:
        inputs = kan_inputs()
        expected = kan_linear(**inputs, base_activation=F.relu, backend="reference")
        out = kan_linear(**{**inputs, "x": inputs["x"].clone()}, base_activation=nn.ReLU(inplace=True), backend=backend)
        assert_close("out", out, expected, 1e-6)

    @fused
    def test_only_arguments_are_saved(self, backend: str) -> None:
        """And the product of spline weights and scaler; saving the bases of every row would add 8 MiB."""
        inputs = {k: v.requires_grad_(k != "grid") for k, v in kan_inputs(4096, 64, 64).items()}
        given = {v.untyped_storage().data_ptr() for v in inputs.values()}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in given:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = kan_linear(**inputs, uniform=True, backend=backend)
        assert sum(saved.values()) <= 2 * inputs["spline_weight"].nbytes
        out.sum().backward()
        assert inputs["x"].grad is not None

    @fused
    @pytest.mark.parametrize("activation", [F.silu, torch.tanh])
    def test_higher_derivatives_are_those_of_the_reference(
        self, backend: str, activation: Callable[[Tensor], Tensor]
    ) -> None:
        """By every input and every pair and triple of them."""
        results = []
        for name in (backend, "reference"):
            function, inputs = case(name, torch.float64, base_activation=activation)
            leaves = [v.requires_grad_() for v in inputs.values()]
            found, grads = [], [function(**inputs)]
            for _ in range(3):
                grads = torch.autograd.grad(sum(x.square().sum() for x in grads), leaves, create_graph=True)
                found += [x.detach() for x in grads]
            results.append(found)
        for n, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert_close(f"gradient {n}", actual, expected, 1e-11)

    @fused
    def test_a_gradient_is_made_by_the_formula_only_to_be_differentiated(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = Seen(monkeypatch, backend)
        function, inputs = case(backend)
        y, x = function(**inputs | {"x": inputs["x"].requires_grad_()}), inputs["x"]
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert torch.equal(grad, torch.autograd.grad(y.sum(), x)[0]) and seen == [(True, False)] * 2

    @fused
    def test_lines_have_second_derivatives_of_zero(self, backend: str) -> None:
        inputs = kan_inputs(s=1, dtype=torch.float64)
        x = inputs["x"].requires_grad_()
        y = kan_linear(**inputs, base_activation=torch.zeros_like, backend=backend)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
        assert slope.any() and not second.any()

    @fused
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_second_derivatives_under_autocast(self, backend: str, dtype: torch.dtype) -> None:
        results = []
        for enabled in (True, False):
            function, inputs = case(backend)
            x = inputs["x"].requires_grad_()
            with torch.autocast("cpu", dtype, enabled=enabled):
                (slope,) = torch.autograd.grad(function(**inputs).float().sum(), x, create_graph=True)
                results.append(torch.autograd.grad(slope.sum(), x)[0])
        assert results[0].dtype == torch.float32
        assert_close("second derivative", *results, 2e-2)

    @fused
    def test_second_derivatives_where_saved_tensors_are_packed(self, backend: str) -> None:
        """As checkpoints do, under which torch.func does not run."""

        def laplacian(x: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(function(**inputs | {"x": x}).sum(), x, create_graph=True)
            return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]

        function, inputs = case(backend, torch.float64)
        x = inputs["x"].requires_grad_()
        expected = torch.autograd.grad(laplacian(x).square().sum(), x)
        actual = torch.autograd.grad(checkpoint(laplacian, x, use_reentrant=False).square().sum(), x)
        assert_close("gradient", actual[0], expected[0], 1e-13)

    @fused
    def test_functional_gradient_of_a_gradient(self, backend: str) -> None:
        """The inner one by weights that the outer one does not follow."""
        results = []
        for name in (backend, "reference"):
            function, inputs = case(name, torch.float64)

            def slope(x: Tensor, function: Callable[..., Tensor] = function, inputs: dict = inputs) -> Tensor:
                grads = torch.func.grad(lambda w: function(**inputs | {"x": x, "base_weight": w}).pow(3).sum())
                return grads(inputs["base_weight"]).square().sum()

            results.append(torch.func.grad(slope)(inputs["x"]))
        assert_close("gradient", *results, 1e-12)

    @fused
    @pytest.mark.parametrize("transform", FORWARD_MODE)
    def test_forward_mode_is_refused_with_a_way_out(self, backend: str, transform: str) -> None:
        function, inputs = case(backend)
        with pytest.raises(RuntimeError, match=r"(?s)forward-mode.*backend='reference'"):
            FORWARD_MODE[transform](lambda x: function(**inputs | {"x": x}).square().sum(), inputs["x"])

    @fused
    def test_the_gradient_of_the_bias_can_be_differentiated(self, backend: str) -> None:
        results = []
        inputs = {k: v.requires_grad_(k != "grid") for k, v in kan_inputs(dtype=torch.float64).items()}
        leaves = [v for v in inputs.values() if v.requires_grad]
        for name in (backend, "reference"):
            out = kan_linear(**inputs, backend=name)
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["bias"], create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), leaves))
        for name, actual, expected in zip(inputs, *results, strict=False):
            assert_close(name, actual, expected, 1e-11)

    def test_the_reference_can_be_differentiated_again_also_by_the_grid(self) -> None:
        knots = torch.tensor([[-2.3, -1.5, -0.9, -0.2, 0.3, 0.9, 1.6, 2.2]], dtype=torch.float64)
        x = torch.tensor([[-0.61], [0.13], [0.77]], dtype=torch.float64)
        weights = torch.randn(2, 1, dtype=torch.float64), torch.randn(2, 1, 4, dtype=torch.float64)
        leaves = [v.requires_grad_() for v in (x, *weights, knots)]

        def function(x: Tensor, base: Tensor, splines: Tensor, grid: Tensor) -> Tensor:
            return kan_linear(x, base, splines, None, grid, extrapolation="linear", backend="reference")

        assert torch.autograd.gradgradcheck(function, leaves)

    @fused
    def test_functional_gradient(self, backend: str) -> None:
        function, inputs = case(backend)
        grads = torch.func.grad(lambda x: function(**x).square().sum())(inputs)
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        function(**leaves).square().sum().backward()
        assert all(torch.equal(grad, leaves[k].grad) for k, grad in grads.items())

    @fused
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("activation", [F.silu, F.gelu])
    @pytest.mark.parametrize("backward_inside", [False, True])
    def test_autocast(
        self, backend: str, dtype: torch.dtype, activation: Callable[[Tensor], Tensor], backward_inside: bool
    ) -> None:
        inputs = kan_inputs(100, 32, 16)
        grid = inputs.pop("grid")
        weight = torch.randn(100, 16)
        results = {}
        for name, precision in ((backend, dtype), ("reference", dtype), ("exact", torch.float64)):
            exact = name == "exact"
            leaves = {k: (v.double() if exact else v.clone()).requires_grad_() for k, v in inputs.items()}
            with torch.autocast("cpu", dtype, enabled=not exact):
                out = kan("reference" if exact else name, grid.double() if exact else grid, base_activation=activation)(
                    **leaves
                )
            assert out.dtype == precision
            with torch.autocast("cpu", dtype, enabled=backward_inside and not exact):
                grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
            results[name] = {"out": out, **dict(zip(leaves, grads, strict=True))}
        for name, actual in results[backend].items():
            assert actual.dtype == (dtype if name == "out" else torch.float32)
            plain, true = results["reference"][name], results["exact"][name]
            assert_budget(name, actual.to(dtype), plain.to(dtype), true, dtype)

    @fused
    def test_the_grid_has_a_gradient_in_the_reference_only(self, backend: str) -> None:
        inputs = kan_inputs()
        inputs["grid"].requires_grad_()
        with pytest.raises(ValueError, match=says("grid", f"backend='{backend}'", "backend='reference'")):
            kan_linear(**inputs, backend=backend)
        (grad,) = torch.autograd.grad(kan_linear(**inputs).sum(), inputs["grid"])
        (expected,) = torch.autograd.grad(kan_linear(**inputs, backend="reference").sum(), inputs["grid"])
        assert grad.any() and torch.equal(grad, expected)
