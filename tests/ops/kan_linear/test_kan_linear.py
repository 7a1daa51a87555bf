"""kan_linear against the formula in NumPy and SciPy; extrapolation, input forms and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from helpers import LAYOUTS, assert_budget, assert_close, basis_oracle, gradients, kan_oracle, largest, says, to_array
from kan_mamba_layers import bspline_basis, kan_linear, resolve
from kan_mamba_layers.ops import backend as choice
from ops.kan_linear.calls import KNOTS_THAT_COINCIDE, kan, kan_inputs

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("reference", "chunked", "cpu")
EXTRAPOLATIONS = ("zero", "clamp", "linear")
WIDE = torch.float64
make_inputs = partial(kan_inputs, bias=False, dtype=WIDE)


def oracle(inputs: dict[str, Tensor], extrapolation: str = "zero") -> np.ndarray:
    arrays = {"spline_scaler": None, **{k: to_array(v) for k, v in inputs.items()}}
    return kan_oracle(**arrays, extrapolation=extrapolation)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    return {
        "rows": draw(st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 1, 4), (0, 3)])),
        "i": draw(st.integers(1, 4)),
        "o": draw(st.integers(1, 4)),
        "g": draw(st.integers(1, 8)),
        "s": draw(st.integers(1, 5)),
        "uniform": draw(st.booleans()),
        "scaler": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        "spread": draw(st.sampled_from([0.5, 1.0, 3.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


class TestAgainstTheFormula:
    @given(cases(), st.sampled_from(EXTRAPOLATIONS))
    def test_output_and_every_gradient(self, case: dict, extrapolation: str) -> None:
        inputs, dtype = make_inputs(**case), case["dtype"]
        grid = inputs.pop("grid")
        expected = oracle({**inputs, "grid": grid}, extrapolation)

        def run(knots: Tensor, backend: str = "reference") -> Callable[..., Tensor]:
            return kan(backend, knots, extrapolation, case["uniform"])

        double = {k: v.double() for k, v in inputs.items()}
        positive = {k: v if k == "x" else v.abs() for k, v in double.items()}
        terms, grad_terms = gradients(run(grid.double()), positive, absolute=True)
        _, true_grads = gradients(run(grid.double()), double)
        # The bound covers rounding of the positions among the knots (slope of the bases times number of knots), of the
        # bases and of the products. Linear extrapolation multiplies slopes by distances.
        slope = (case["g"] + 2 * case["s"]) * case["s"]
        reach = slope * (1 + largest(inputs["x"]) if extrapolation == "linear" else 1)
        weight = largest(positive["spline_weight"]) * (largest(positive["spline_scaler"]) if case["scaler"] else 1)
        # The CPU backend compiles once per degree and dtype, which is slow: only float64 runs all degrees.
        compiled = dtype == WIDE or case["s"] == 3
        for backend in BACKENDS if compiled else BACKENDS[:2]:
            out, grads = gradients(run(grid, backend), inputs)
            assert out.dtype == dtype and out.shape == expected.shape
            size, exact = largest(terms) + reach * weight, torch.as_tensor(expected)
            assert_budget(f"{backend} out", out, exact, expected, dtype, bands=8, terms=size)
            for name, grad in grads.items():
                assert grad.dtype == inputs[name].dtype
                size, exact = largest(grad_terms[name]), true_grads[name]
                if name == "x":
                    size += slope * weight
                elif name.startswith("spline"):
                    size *= 1 + reach / 8
                assert_budget(f"{backend} d{name}", grad, exact, exact, dtype, bands=16, terms=size)

    def test_without_scaler_is_a_scaler_of_one(self) -> None:
        x = make_inputs(scaler=False)
        ones = torch.ones(4, 3, dtype=WIDE)
        assert_close("out", kan_linear(**x, spline_scaler=None), kan_linear(**x, spline_scaler=ones), 1e-14)

    def test_zero_spline_is_a_linear_layer_of_the_activation(self) -> None:
        x = make_inputs(bias=True)
        x["spline_weight"].zero_()
        expected = F.linear(F.silu(x["x"]), x["base_weight"], x["bias"])
        assert_close("out", kan_linear(**x), expected, 1e-14)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("activation", [torch.tanh, F.gelu, F.relu, torch.nn.Identity()])
    def test_other_base_activations(self, activation, backend: str) -> None:
        x = make_inputs()
        spline = kan_linear(**x, base_activation=torch.zeros_like, backend=backend)
        expected = spline + F.linear(activation(x["x"]), x["base_weight"])
        assert_close("out", kan_linear(**x, base_activation=activation, backend=backend), expected, 1e-13)

    def test_coefficients_of_a_straight_line_reproduce_it(self) -> None:
        """Greville abscissae as coefficients give x itself inside the grid."""
        x = make_inputs(i=1, o=1, scaler=False)
        knots = x["grid"][0]
        x["spline_weight"] = torch.stack([knots[c + 1 : c + 4].mean() for c in range(8)]).view(1, 1, 8)
        x["base_weight"].zero_()
        x["x"] = torch.linspace(-1, 1, 50, dtype=WIDE)[:, None]
        assert_close("out", kan_linear(**x, spline_scaler=None), x["x"], 1e-13)

    def test_uniform_changes_the_computation_not_the_result(self) -> None:
        x = make_inputs((50,), spread=2.0)
        for extrapolation in EXTRAPOLATIONS:
            slow = kan_linear(**x, extrapolation=extrapolation)
            assert_close(extrapolation, kan_linear(**x, extrapolation=extrapolation, uniform=True), slow, 1e-13)


def single_edge(order: int, uniform: bool) -> tuple[dict[str, Tensor], float, float]:
    """A single edge without its base part, and the ends of its interval."""
    x = make_inputs(i=1, o=1, s=order, uniform=uniform, scaler=False)
    x["base_weight"].zero_()
    return x, x["grid"][0, order].item(), x["grid"][0, -order - 1].item()


def run_edge(x: dict[str, Tensor], at: Tensor, extrapolation: str, uniform: bool, backend: str) -> Tensor:
    others = {k: v for k, v in x.items() if k not in ("x", "grid")}
    return kan(backend, x["grid"], extrapolation, uniform)(x=at[:, None], **others)[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
class TestExtrapolation:
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_equals_the_oracle(self, order: int, uniform: bool, backend: str, extrapolation: str) -> None:
        x, low, high = single_edge(order, uniform)
        at = torch.cat([torch.linspace(low - 3, high + 3, 301, dtype=WIDE), torch.tensor([low, high], dtype=WIDE)])
        expected = oracle({**x, "x": at[:, None]}, extrapolation)[:, 0]
        assert_close("out", run_edge(x, at, extrapolation, uniform, backend), expected, 1e-11)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_agree_inside(self, order: int, uniform: bool, backend: str, extrapolation: str) -> None:
        x, low, high = single_edge(order, uniform)
        inside = torch.linspace(low, high, 101, dtype=WIDE)
        assert_close(
            "out",
            run_edge(x, inside, extrapolation, uniform, backend),
            run_edge(x, inside, "zero", uniform, backend),
            1e-12,
        )

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_continuous_at_the_ends(self, order: int, uniform: bool, backend: str, extrapolation: str) -> None:
        x, low, high = single_edge(order, uniform)
        for end in (low, high):
            around = torch.tensor([end - 1e-9, end, end + 1e-9], dtype=WIDE)
            values = run_edge(x, around, extrapolation, uniform, backend)
            assert (values - values[1]).abs().max() <= 1e-6

    def test_clamp_is_flat_outside(self, order: int, uniform: bool, backend: str) -> None:
        x, low, high = single_edge(order, uniform)
        at = torch.tensor([low - 5, low - 0.1, low, high, high + 0.1, high + 5], dtype=WIDE)
        values = run_edge(x, at, "clamp", uniform, backend)
        assert_close("below", values[:3], values[2].expand(3), 1e-13)
        assert_close("above", values[3:], values[3].expand(3), 1e-13)

    def test_linear_goes_on_along_the_tangent_inside(self, order: int, uniform: bool, backend: str) -> None:
        x, low, high = single_edge(order, uniform)
        step = 1e-7
        for end, sign in ((low, 1), (high, -1)):
            at = torch.tensor([end + sign * step, end, end - sign * step, end - sign * 4], dtype=WIDE)
            values = run_edge(x, at, "linear", uniform, backend)
            inner, outer, far = values[0] - values[1], values[1] - values[2], (values[1] - values[3]) / 4 * step
            assert_close("slope", outer / step, inner / step, 1e-4)
            assert_close("straight", far / step, outer / step, 1e-6)

    @pytest.mark.parametrize("outside", [0.3, 1.0, 50.0])
    def test_gradient_outside(self, order: int, uniform: bool, backend: str, outside: float) -> None:
        x, low, high = single_edge(order, uniform)
        at = torch.tensor([low - outside, high + outside], dtype=WIDE, requires_grad=True)
        (flat,) = torch.autograd.grad(run_edge(x, at, "clamp", uniform, backend).sum(), at)
        assert (flat == 0).all()
        (slope,) = torch.autograd.grad(run_edge(x, at, "linear", uniform, backend).sum(), at)
        ends = np.array([[np.nextafter(low, high)], [np.nextafter(high, low)]])
        bases = basis_oracle(ends, to_array(x["grid"]), order, derivative=1)[:, 0]
        assert_close("slope", slope, bases @ to_array(x["spline_weight"])[0, 0], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_gradient_exactly_at_the_ends_of_linear_extrapolation(order: int, uniform: bool, backend: str) -> None:
    """The function is differentiable here, and inputs clamped to the range of the grid land on these points."""
    x, low, high = single_edge(order, uniform)
    at = torch.tensor([low, high], dtype=WIDE, requires_grad=True)
    (slope,) = torch.autograd.grad(run_edge(x, at, "linear", uniform, backend).sum(), at)
    ends = np.array([[np.nextafter(low, high)], [np.nextafter(high, low)]])
    bases = basis_oracle(ends, to_array(x["grid"]), order, derivative=1)[:, 0]
    assert_close("slope", slope, bases @ to_array(x["spline_weight"])[0, 0], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extrapolation", ["clamp", "linear"])
@pytest.mark.parametrize(("order", "knots"), KNOTS_THAT_COINCIDE)
def test_the_upper_end_where_knots_coincide(order: int, knots: list[float], extrapolation: str, backend: str) -> None:
    """At the end and beyond, the function goes on from the last cell that has a width: SciPy's values just inside."""
    low, high = knots[order], knots[-order - 1]
    x = torch.tensor([low, low + 0.2, high - 0.2, high, high + 0.7], dtype=WIDE)[:, None].requires_grad_()
    grid = torch.tensor([knots], dtype=WIDE)
    weight = torch.randn(1, 1, len(knots) - 1 - order, dtype=WIDE)
    y = kan_linear(x, x.new_zeros(1, 1), weight, None, grid, extrapolation=extrapolation, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), x)
    inside = np.minimum(to_array(x), np.nextafter(high, low))
    values, slopes = (basis_oracle(inside, to_array(grid), order, nu)[:, 0] @ to_array(weight)[0, 0] for nu in (0, 1))
    beyond = np.maximum(to_array(x)[:, 0] - high, 0)
    assert_close("y", y[:, 0], values + beyond * slopes * (extrapolation == "linear"), 1e-9)
    expected = np.where((beyond > 0) & (extrapolation == "clamp"), 0, slopes)
    assert_close("slope", slope[:, 0], expected, 1e-9)


class TestForms:
    @pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 3, 4), (0, 5)])
    def test_any_leading_dimensions(self, batch: tuple[int, ...]) -> None:
        x = make_inputs(batch)
        out = kan_linear(**x)
        assert out.shape == (*batch, 4)
        flat = kan_linear(**{**x, "x": x["x"].reshape(-1, 3)})
        assert_close("out", out.reshape(-1, 4), flat, 1e-14)

    def test_gradients_of_an_empty_batch_are_zero(self) -> None:
        x = {k: v.requires_grad_(k != "grid") for k, v in make_inputs((0,)).items()}
        kan_linear(**x).sum().backward()
        assert (x["spline_weight"].grad == 0).all() and (x["base_weight"].grad == 0).all()

    def test_bases_are_those_of_bspline_basis(self) -> None:
        x = make_inputs(scaler=False)
        x["base_weight"].zero_()
        bases = bspline_basis(x["x"], x["grid"], 3)
        assert_close(
            "out", kan_linear(**x, spline_scaler=None), torch.einsum("bic,oic->bo", bases, x["spline_weight"]), 1e-13
        )

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_autocast_returns_its_dtype_and_keeps_the_bases_exact(self, extrapolation: str) -> None:
        x = make_inputs((64,), 8, 8, dtype=torch.float32)
        options = {"extrapolation": extrapolation, "uniform": True}
        with torch.autocast("cpu", torch.bfloat16):
            out, grads = gradients(lambda **v: kan_linear(**v, **options), x)
        assert out.dtype == torch.bfloat16
        assert_close("out", out, oracle(x, extrapolation), 1e-2)
        assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads.values())

    def test_resolve(self) -> None:
        pytest.importorskip("numba")
        x = make_inputs()
        assert resolve("kan_linear", "auto", x["x"]) == "cpu"
        assert torch.equal(kan_linear(**x), kan_linear(**x, backend="cpu"))


class TestChoice:
    def test_fastest_that_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.zeros(2, 3)
        monkeypatch.setitem(choice._HAS, "numba", True)
        assert resolve("kan_linear", "auto", x) == "cpu"
        assert resolve("kan_linear", "auto", x.to("meta")) == "chunked"
        assert [resolve("kan_linear", b, x) for b in ("cpu", "chunked", "reference")] == ["cpu", "chunked", "reference"]
        monkeypatch.setitem(choice._HAS, "numba", False)
        assert resolve("kan_linear", "auto", x) == "chunked"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert resolve("kan_linear", "auto", x) == "reference", "a compiler fuses it"
        monkeypatch.setitem(choice._HAS, "numba", True)
        assert resolve("kan_linear", "auto", x) == "cpu"
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert {resolve("kan_linear", b, x) for b in ("auto", "cpu", "triton")} == {"reference"}

    def test_a_named_backend_runs_or_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = kan_inputs()
        with pytest.raises(ValueError, match=says("backend='cpu'", "'meta'", "backend='auto'")):
            kan_linear(**{k: v.to("meta") for k, v in inputs.items()}, backend="cpu")
        monkeypatch.setitem(choice._HAS, "numba", False)
        with pytest.raises(ValueError, match=says("backend='cpu'", "needs Numba", r"pip install numba")):
            kan_linear(**inputs, backend="cpu")
        monkeypatch.setitem(choice._HAS, "triton", False)
        with pytest.raises(ValueError, match=says("backend='triton'", "needs Triton", "backend='auto'")):
            kan_linear(**inputs, backend="triton")
        monkeypatch.setitem(choice._HAS, "triton", True)
        with pytest.raises(ValueError, match=says("backend='triton'", "float64", "backend='auto'")):
            kan_linear(**{k: v.double() for k, v in inputs.items()}, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_silu_that_was_changed_is_called(backend: str) -> None:
    """By a `forward` of its own, as tools for tracing and offloading give it, or by a hook on all modules."""
    inputs = make_inputs((4,), scaler=False) | {"spline_scaler": None, "backend": backend}
    expected = kan_linear(**inputs, base_activation=torch.zeros_like)
    changed = torch.nn.SiLU()
    changed.forward = torch.zeros_like
    assert_close("forward", kan_linear(**inputs, base_activation=changed), expected, 1e-12)
    hook = register_module_forward_hook(lambda module, _, y: y * 0)
    try:
        assert_close("hook", kan_linear(**inputs, base_activation=torch.nn.SiLU()), expected, 1e-12)
    finally:
        hook.remove()


@pytest.mark.parametrize("register", [register_module_full_backward_hook, register_module_full_backward_pre_hook])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_silu_is_called_for_global_hooks_on_the_backward_pass(register: Callable[..., Any], backend: str) -> None:
    called: list[object] = []
    hook = register(lambda module, *_: called.append(module))
    try:
        inputs, activation = make_inputs((4,), scaler=False), torch.nn.SiLU()
        inputs["x"].requires_grad_()
        kan_linear(**inputs, spline_scaler=None, base_activation=activation, backend=backend).sum().backward()
    finally:
        hook.remove()
    assert called == [activation]


class TestDerivatives:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("order", [2, 3, 5])
    def test_gradcheck(self, order: int, uniform: bool, extrapolation: str, backend: str) -> None:
        x = make_inputs((5,), 2, 2, 3, order, uniform=uniform, bias=True)
        grid = x.pop("grid")
        x["x"] = torch.tensor([[-2.9, 0.13], [-0.61, 0.37], [0.77, -1.4], [2.5, -0.2], [0.05, 1.61]], dtype=WIDE)
        leaves = [v.requires_grad_() for v in x.values()]

        def function(*values: Tensor) -> Tensor:
            named = dict(zip(x, values, strict=True))
            return kan_linear(**named, grid=grid, extrapolation=extrapolation, uniform=uniform, backend=backend)

        assert torch.autograd.gradcheck(function, leaves)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("uniform", [True, False])
    def test_gradgradcheck(self, uniform: bool, extrapolation: str, backend: str) -> None:
        x = make_inputs((2,), 2, 1, 2, 3, uniform=uniform)
        grid = x.pop("grid")
        x["x"] = torch.tensor([[-1.9, 0.13], [0.61, 1.77]], dtype=WIDE)
        present = {k: v.requires_grad_() for k, v in x.items()}

        def function(*values: Tensor) -> Tensor:
            named = dict(zip(present, values, strict=True))
            options = {"extrapolation": extrapolation, "uniform": uniform, "backend": backend}
            return kan_linear(**named, grid=grid, **options)

        assert torch.autograd.gradgradcheck(function, tuple(present.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uniform", [True, False])
class TestAtKnots:
    @pytest.mark.parametrize("order", [1, 2, 3, 5])
    def test_derivatives_of_every_order(self, order: int, uniform: bool, backend: str) -> None:
        """A step at a knot belongs to the right of it, as in SciPy."""
        x, _, _ = single_edge(order, uniform)
        spline = BSpline(to_array(x["grid"])[0], to_array(x["spline_weight"])[0, 0], order)
        knots = x["grid"][0, order:-order]
        at = torch.cat([knots[:-1], knots[:-1] + knots.diff() / 2]).requires_grad_()
        value = run_edge(x, at, "zero", uniform, backend)
        for nu in range(1, order + 1):
            (value,) = torch.autograd.grad(value.sum(), at, create_graph=True)
            assert_close(f"order {nu}", value, spline.derivative(nu)(to_array(at)), 1e-10)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 7.0), (-0.3, 0.77)])
    def test_slopes_of_lines(self, ends: tuple[float, float], extrapolation: str, uniform: bool, backend: str) -> None:
        """Degree 1, with knots that are rounded; the ends of an extrapolated grid belong to its inside."""
        shares = torch.linspace(-0.1, 1.1, 13, dtype=WIDE)
        if not uniform:
            shares = shares + 0.03 * torch.arange(13.0).sin()
        knots = ends[0] + (ends[1] - ends[0]) * shares
        values = F.pad(torch.arange(11, dtype=WIDE).cos(), (1, 1))  # at the knots
        slopes = values.diff() / knots.diff()
        if extrapolation == "zero":
            expected = F.pad(slopes, (0, 1))
        else:
            beyond = float(extrapolation == "linear")
            expected = torch.cat([beyond * slopes[1:2], slopes[1:-1], slopes[-2:-1], beyond * slopes[-2:-1]])
        x = knots[:, None].clone().requires_grad_()
        weights = torch.zeros(1, 1, dtype=WIDE), values[None, None, 1:-1]
        y = kan_linear(x, *weights, None, knots[None], extrapolation=extrapolation, uniform=uniform, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert_close("slopes", grad[:, 0], expected, 1e-12)

    def test_far_values_leave_the_base_part(self, uniform: bool, backend: str) -> None:
        inputs = kan_inputs(i=1, o=2, bias=False, uniform=uniform)
        x = inputs["x"] = torch.tensor([[1e20], [1e38], [-1e38]]).requires_grad_()
        y = kan_linear(**inputs, uniform=uniform, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert_close("y", y, F.silu(x) @ inputs["base_weight"].T, 1e-6)
        assert_close("dx", grad[:, 0], torch.tensor([1.0, 1.0, 0.0]) * inputs["base_weight"].sum(), 1e-6)
