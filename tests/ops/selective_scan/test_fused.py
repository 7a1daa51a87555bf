"""The fused scan as a PyTorch operator: its registration, its gradients, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import FORWARD_MODE, assert_close, strided
from kan_mamba_layers import selective_scan
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.fused import fused_scan
from ops.selective_scan.calls import FUSED, Call, Inputs, fused_line, operator_inputs

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
AGAIN: dict[str, Callable[[Tensor, Tensor], object]] = {
    "backward": lambda y, x: y.backward(inputs=[x], retain_graph=True),
    "grad": lambda y, x: torch.autograd.grad(y, x, retain_graph=True),
    "allow_unused": lambda y, x: torch.autograd.grad(y, x, retain_graph=True, allow_unused=True),
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

    @pytest.mark.parametrize("op", FUSED)
    @pytest.mark.parametrize("how", AGAIN)
    def test_second_derivatives_are_refused(self, op: str, how: str) -> None:
        """For every pair of inputs there is an error, never zeros or None."""
        function, make = FUSED[op]
        inputs = {k: v.requires_grad_() for k, v in make().items()}
        for leaf in (v for k, v in inputs.items() if k != "z"):  # the gate's gradient is a scan, not its derivative
            (grad,) = torch.autograd.grad(function(**inputs).square().sum(), leaf, create_graph=True)
            for target in inputs.values():
                with pytest.raises(RuntimeError, match="backend='chunked'"):
                    AGAIN[how](grad.sum(), target)

    def test_the_gates_gradient_can_be_differentiated(self) -> None:
        inputs = {k: v.requires_grad_() for k, v in fused_line(dtype=torch.float64).items()}
        results = []
        for backend in ("cpu", "reference"):
            out = selective_scan(**inputs, delta_softplus=True, backend=backend)
            (grad,) = torch.autograd.grad(out.sum(), inputs["z"], create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), list(inputs.values())))
        for name, actual, expected in zip(inputs, *results, strict=True):
            assert_close(name, actual, expected, 1e-12)

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
