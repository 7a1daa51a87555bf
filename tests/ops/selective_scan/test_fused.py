"""The fused scan as a PyTorch operator: its registration, its gradients, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from helpers import FORWARD_MODE, assert_close, strided
from kan_mamba_layers import cross_selective_scan, selective_scan, walks
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.fused import fused_scan
from ops.selective_scan.calls import (
    FUSED,
    Call,
    Inputs,
    full_line_inputs,
    fused_line,
    image_inputs,
    line_inputs,
    on_images,
    on_lines,
    on_lines_with_state,
    operator_inputs,
)

pytest.importorskip("numba")

OPS = torch.ops.kan_mamba_layers
NAMES = ScanCall._fields[:9]
ALL = [True] * 9 + [False] * 2
BOTH = (torch.float32, torch.float64)


Form = tuple[Inputs, tuple]  # tensors; height, width, softplus, orders, mask


def image_form() -> Form:
    """Four directions over an image; the backend computes the coefficients."""
    return operator_inputs(2, 5 * 8, 6, 3, 2, directions=4, coeffs=False), (5, 8, True, None, None)


def line_form(l: int = 37, groups: int = 1, initial: bool = False) -> Form:
    """One direction along a sequence, with given coefficients and steps."""
    return operator_inputs(2, l, 6, 3, groups=groups, initial=initial), (1, l, True, None, None)


FORMS = {
    "image": image_form,
    "line": line_form,
    "groups": lambda: line_form(groups=2),
    "initial": lambda: line_form(groups=2, initial=True),
    "short": lambda: line_form(l=3, initial=True),
}


def prepared(form: str, dtype: torch.dtype, layout: str, requires_grad: bool) -> tuple[list[Tensor | None], tuple]:
    """The operator's tensors in order, and the sizes."""
    tensors, sizes = FORMS[form]()
    tensors = {k: strided(v.to(dtype), layout) if v.numel() else v.to(dtype) for k, v in tensors.items()}
    return [tensors[k].requires_grad_(requires_grad) if k in tensors else None for k in NAMES], sizes


class TestRegistration:
    # The operators have no gradient formula, the function around them has; PyTorch warns about it.
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
        wanted = [*(x is not None for x in inputs), False, False]
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


# Ways to differentiate a gradient again.
AGAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "backward": lambda y, x: (y.backward(inputs=[x]), x.grad)[1],
    "grad": lambda y, x: torch.autograd.grad(y, x)[0],
    "allow_unused": lambda y, x: torch.autograd.grad(y, x, allow_unused=True)[0],
}


def masked_walk(backend: str, **inputs: Tensor) -> Tensor:
    mask = torch.tensor([[True, False, True, True], [False, True, True, True], [True] * 4])
    return cross_selective_scan(**inputs, walks=walks.snake(3, 4), mask=mask.expand(2, 3, 4), backend=backend)


# Functions of a backend and of tensors, and the tensors.
HIGHER: dict[str, tuple[Call, Callable[[], Inputs]]] = {
    "image": (lambda backend, **x: on_images(backend)(**x), partial(image_inputs, dtype=torch.float64)),
    "masked walk": (masked_walk, partial(image_inputs, dtype=torch.float64)),
    "line": (
        lambda backend, **x: on_lines_with_state(backend)(**x),
        partial(full_line_inputs, dtype=torch.float64),
    ),
    "groups": (
        lambda backend, **x: on_lines(backend)(**x),
        partial(line_inputs, B="bgnl", initial=True, dtype=torch.float64),
    ),
}


class TestGradients:
    @pytest.mark.parametrize("softplus", [False, True])
    @pytest.mark.parametrize("frozen", [(), ("initial_state",), ("u", "delta")], ids=str)
    def test_gradcheck_with_a_state_before_and_after(self, frozen: tuple[str, ...], softplus: bool) -> None:
        inputs = fused_line(1, 4, 5, 2, dtype=torch.float64)
        inputs = {k: v.requires_grad_(k not in frozen) for k, v in inputs.items()}
        options = {"delta_softplus": softplus, "return_last_state": True, "backend": "cpu"}
        assert torch.autograd.gradcheck(
            lambda *x: selective_scan(**dict(zip(inputs, x, strict=True)), **options), tuple(inputs.values())
        )

    @pytest.mark.parametrize("through", ["y", "last", "both"])
    def test_every_input_against_the_reference(self, through: str) -> None:
        inputs = fused_line(2, 6, 70, 4, dtype=torch.float64)

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
            # The last state does not depend on C, D and z.
            grads = torch.autograd.grad((weight * out).sum(), list(leaves.values()), allow_unused=through == "last")
            results[backend] = {"out": out, **dict(zip(leaves, grads, strict=True))}
        for name, expected in results["reference"].items():
            actual = results["cpu"][name]
            if expected is None:
                assert actual is None or not actual.any(), name
            else:
                assert_close(name, actual, expected, 1e-12)

    @pytest.mark.parametrize("form", HIGHER)
    def test_higher_derivatives_are_those_of_the_reference(self, form: str) -> None:
        """By every input and every pair and triple of them."""
        function, make = HIGHER[form]
        results = []
        for backend in ("cpu", "reference"):
            inputs = {k: v.requires_grad_() for k, v in make().items()}
            found, grads = [], [function(backend, **inputs)]
            for _ in range(3):
                grads = torch.autograd.grad(sum(x.square().sum() for x in grads), inputs.values(), create_graph=True)
                found += [x.detach() for x in grads]
            results.append(found)
        for n, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert_close(f"gradient {n}", actual, expected, 1e-12)

    @pytest.mark.parametrize("how", AGAIN)
    def test_a_second_derivative_is_there_however_it_is_asked_for(self, how: str) -> None:
        inputs = {k: v.requires_grad_() for k, v in image_inputs(dtype=torch.float64).items()}
        (grad,) = torch.autograd.grad(on_images("cpu")(**inputs).square().sum(), inputs["x"], create_graph=True)
        (slow,) = torch.autograd.grad(on_images("reference")(**inputs).square().sum(), inputs["x"], create_graph=True)
        (expected,) = torch.autograd.grad(slow.sum(), inputs["A_log"])
        assert_close("second derivative", AGAIN[how](grad.sum(), inputs["A_log"]), expected, 1e-13)

    @pytest.mark.parametrize("backend", ["cpu", "chunked"])
    @pytest.mark.parametrize("transform", FORWARD_MODE)
    def test_forward_mode_is_refused_with_a_way_out(self, backend: str, transform: str) -> None:
        inputs = fused_line(length=5)
        with pytest.raises(RuntimeError, match=r"forward-mode.*backend='reference'"):
            FORWARD_MODE[transform](
                lambda u: selective_scan(**inputs | {"u": u}, backend=backend).square().sum(), inputs["u"]
            )

    @pytest.mark.parametrize("backend", ["cpu", "chunked"])
    def test_functional_gradient(self, backend: str) -> None:
        inputs = fused_line(length=5, dtype=torch.float64)

        def loss(u: Tensor, backend: str = backend) -> Tensor:
            return selective_scan(**inputs | {"u": u}, backend=backend).square().sum()

        expected = torch.func.grad(lambda u: loss(u, "reference"))(inputs["u"])
        assert_close("gradient", torch.func.grad(loss)(inputs["u"]), expected, 1e-12)

    @pytest.mark.parametrize("name", FUSED)
    @pytest.mark.parametrize("backward_inside", [False, True])
    def test_autocast_does_not_reach_inside(self, name: str, backward_inside: bool) -> None:
        function, make = FUSED[name]
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
