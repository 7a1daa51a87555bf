"""selective_scan against a loop in float64 NumPy, through identities, and under stress."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import LAYOUTS, assert_budget, assert_close, fresh_process, gradients, largest, max_error, release
from kan_mamba_layers import resolve, selective_scan
from kan_mamba_layers.ops.selective_scan import looped, reference
from ops.selective_scan.calls import line_inputs, line_oracle, on_lines

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("reference", "chunked", "cpu")
make_inputs = partial(line_inputs, dtype=torch.float64)
TWICE_DIFFERENTIABLE = ("reference", "chunked")
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@st.composite
def cases(draw: st.DrawFn) -> dict:
    groups = draw(st.sampled_from([1, 2, 3]))
    softplus = draw(st.booleans())
    return {
        "b": draw(st.integers(0, 3)),
        "d": groups * draw(st.integers(1, 3)),
        "length": draw(st.one_of(st.integers(1, 12), st.sampled_from([16, 17, 31, 33, 64, 100]))),
        "n": draw(st.integers(1, 5)),
        "B": draw(st.sampled_from(["dn", "bnl", "bgnl"])),
        "C": draw(st.sampled_from(["dn", "bnl", "bgnl"])),
        "groups": groups,
        "skip": draw(st.booleans()),
        "gate": draw(st.booleans()),
        "bias": softplus and draw(st.booleans()),
        "initial": draw(st.booleans()),
        "positive": not softplus,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 2**31)),
    }


class TestAgainstTheOracle:
    @given(cases())
    @example({"b": 1, "d": 1, "length": 1, "n": 1, "groups": 1, "dtype": torch.float32})
    @example({"b": 0, "d": 2, "length": 3, "n": 2, "groups": 1, "dtype": torch.float32})
    def test_outputs_last_state_and_every_gradient(self, case: dict) -> None:
        inputs = make_inputs(**case)
        dtype, softplus = case["dtype"], not case.get("positive", True)
        wide = torch.promote_types(dtype, torch.float32)
        double = {k: v.double() for k, v in inputs.items()}
        expected, expected_state = line_oracle(inputs, softplus)

        run = partial(on_lines, delta_softplus=softplus)
        # The size of the summed terms, from the same problem with absolute values: under cancellation, rounding errors
        # are relative to the terms.
        absolute = {k: v if k in ("A", "delta", "delta_bias") else v.abs() for k, v in double.items()}
        terms, state_terms = (largest(x) for x in line_oracle(absolute, softplus))
        _, grad_terms = gradients(run("reference"), absolute, absolute=True)

        _, true_grads = gradients(run("reference"), double)
        reference, reference_grads = gradients(run("reference"), inputs)
        _, reference_state = selective_scan(
            **inputs, delta_softplus=softplus, return_last_state=True, backend="reference"
        )
        for backend in BACKENDS:
            bands = 2 if backend == "cpu" else 1  # its exponentials round differently from the reference's
            out, grads = gradients(run(backend), inputs)
            assert out.dtype == dtype and out.shape == inputs["u"].shape
            assert_budget(f"{backend} out", out, reference, expected, dtype, bands=bands, terms=terms)
            for name, grad in grads.items():
                assert grad.dtype == inputs[name].dtype
                size = largest(grad_terms[name])
                compare = (grad, reference_grads[name], true_grads[name], grad.dtype)
                assert_budget(f"{backend} d{name}", *compare, bands=4, terms=size)
            _, state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, backend=backend)
            assert state.dtype == wide
            states = (state, reference_state, expected_state)
            assert_budget(f"{backend} state", *states, wide, bands=bands, terms=state_terms)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_long_sequence(self, backend: str) -> None:
        inputs = make_inputs(1, 2, 1000, 2)
        expected, state = line_oracle(inputs)
        out, last = selective_scan(**inputs, return_last_state=True, backend=backend)
        assert_close("out", out, expected, 1e-12)
        assert_close("state", last, state, 1e-12)

    def test_several_segments_of_the_chunked_scan(self) -> None:
        """The state is so wide that the chunked backend cuts the sequence into many segments, the last one ragged."""
        inputs = make_inputs(4, 64, 75, 256, skip=False, dtype=torch.float32)
        out, grads = gradients(on_lines("chunked"), inputs)
        expected, expected_grads = gradients(on_lines("reference"), inputs)
        assert_close("out", out, expected, 2e-6)
        for name, grad in grads.items():
            assert_close(name, grad, expected_grads[name], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
class TestIdentities:
    def run(self, backend: str, inputs: dict[str, Tensor], **changes: Tensor | None) -> Tensor:
        return selective_scan(**{**inputs, **changes}, backend=backend)

    @settings(max_examples=40)
    @given(seed=st.integers(0, 2**31), length=st.integers(1, 40))
    def test_linear_in_u(self, backend: str, seed: int, length: int) -> None:
        x = make_inputs(length=length, gate=True, seed=seed)
        v = torch.randn_like(x["u"])
        mixed = self.run(backend, x, u=2 * x["u"] - 3 * v)
        assert_close("out", mixed, 2 * self.run(backend, x) - 3 * self.run(backend, x, u=v), 1e-12)

    def test_the_skip_adds_D_u(self, backend: str) -> None:
        x = make_inputs()
        plain = self.run(backend, x, D=None)
        assert_close("out", self.run(backend, x), plain + x["D"][:, None] * x["u"], 1e-14)

    def test_the_gate_multiplies_by_silu(self, backend: str) -> None:
        x = make_inputs(gate=True)
        gate = x["z"] * torch.sigmoid(x["z"])
        assert_close("out", self.run(backend, x), self.run(backend, x, z=None) * gate, 1e-14)

    def test_bias_and_softplus_are_applied_to_delta(self, backend: str) -> None:
        x = make_inputs(bias=True, positive=False)
        out = selective_scan(**x, delta_softplus=True, backend=backend)
        delta = torch.log1p(torch.exp(x["delta"] + x["delta_bias"][:, None]))
        assert_close("out", out, self.run(backend, x, delta=delta, delta_bias=None), 1e-13)

    @settings(max_examples=40)
    @given(seed=st.integers(0, 2**31), cut=st.integers(1, 23))
    def test_splitting_a_sequence(self, backend: str, seed: int, cut: int) -> None:
        """The tail of a scan is the scan of the tail from the state at the cut; from zero, that state decays."""
        x = make_inputs(1, 3, 24, 2, skip=False, seed=seed)
        head = {k: v[..., :cut] if k in ("u", "delta", "B", "C") else v for k, v in x.items()}
        tail = {k: v[..., cut:] if k in ("u", "delta", "B", "C") else v for k, v in x.items()}
        whole, last = selective_scan(**x, return_last_state=True, backend=backend)
        first, state = selective_scan(**head, return_last_state=True, backend=backend)
        second, fresh = selective_scan(**tail, return_last_state=True, backend=backend)
        decay = torch.exp(tail["delta"].cumsum(-1)[:, :, None] * x["A"][..., None])  # b d n l
        carried = decay * state[..., None]
        assert_close("head", first, whole[..., :cut], 1e-12)
        assert_close("tail", second + (carried * tail["C"][:, None]).sum(2), whole[..., cut:], 1e-12)
        assert_close("state", fresh + carried[..., -1], last, 1e-12)
        tail["initial_state"] = state
        continued, end = selective_scan(**tail, return_last_state=True, backend=backend)
        assert_close("continued tail", continued, whole[..., cut:], 1e-12)
        assert_close("continued state", end, last, 1e-12)

    def test_causal(self, backend: str) -> None:
        x = make_inputs(length=20)
        changed = x["u"].clone()
        changed[..., 11:] += 1
        out, other = self.run(backend, x), self.run(backend, x, u=changed)
        assert torch.equal(out[..., :11], other[..., :11])
        assert (out[..., 11:] != other[..., 11:]).any()

    def test_a_row_of_the_batch_does_not_see_the_others(self, backend: str) -> None:
        x = make_inputs(3, length=20)
        alone = {k: v[1:2] if v.ndim == 3 else v for k, v in x.items()}
        assert_close("out", self.run(backend, alone), self.run(backend, x)[1:2], 1e-14)

    @pytest.mark.parametrize("name", ["B", "C"])
    def test_layouts_of_B_and_C_agree(self, backend: str, name: str) -> None:
        x = make_inputs(B="dn", C="dn", skip=False)
        constant = torch.randn(3, dtype=torch.float64)
        as_dn = self.run(backend, x, **{name: constant.expand(4, 3)})
        as_bnl = self.run(backend, x, **{name: constant[:, None].expand(2, 3, 7)})
        as_bgnl = self.run(backend, x, **{name: constant[:, None].expand(2, 2, 3, 7)})
        assert_close("b n l", as_bnl, as_dn, 1e-14)
        assert_close("b g n l", as_bgnl, as_dn, 1e-14)

    def test_groups_of_B_and_C_that_do_not_divide_each_other(self, backend: str) -> None:
        x = make_inputs(2, 6, 5, 2)
        x["B"], x["C"] = torch.randn(2, 2, 2, 5).double(), torch.randn(2, 3, 2, 5).double()
        assert_close("out", self.run(backend, x), line_oracle(x)[0], 1e-13)

    def test_zero_step_keeps_the_state(self, backend: str) -> None:
        x = make_inputs(skip=False)
        x["delta"][..., 3:] = 0
        _, last = selective_scan(**x, return_last_state=True, backend=backend)
        short = {k: v[..., :3] if k in ("u", "delta", "B", "C") else v for k, v in x.items()}
        _, at_three = selective_scan(**short, return_last_state=True, backend=backend)
        assert_close("state", last, at_three, 1e-14)


class TestDerivatives:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gate": True, "bias": True, "positive": False},
            {"B": "dn", "C": "bgnl", "skip": False},
            {"B": "bgnl", "C": "dn", "length": 10, "gate": True},
            {"C": "bgnl", "initial": True, "length": 35, "d": 4},
        ],
        ids=str,
    )
    def test_gradcheck(self, backend: str, options: dict) -> None:
        inputs = make_inputs(**{"b": 1, "d": 2, "length": 5, "n": 2, **options})
        present = {k: v.requires_grad_() for k, v in inputs.items()}

        def function(*values: Tensor) -> tuple[Tensor, Tensor]:
            softplus = not options.get("positive", True)
            named = dict(zip(present, values, strict=True))
            return selective_scan(**named, delta_softplus=softplus, return_last_state=True, backend=backend)

        assert torch.autograd.gradcheck(function, tuple(present.values()))

    @pytest.mark.parametrize("backend", TWICE_DIFFERENTIABLE)
    def test_gradgradcheck(self, backend: str) -> None:
        inputs = make_inputs(1, 2, 5, 2, gate=True, bias=True, initial=True, positive=False)
        values = tuple(v.requires_grad_() for v in inputs.values())

        def function(*values: Tensor) -> Tensor:
            return selective_scan(**dict(zip(inputs, values, strict=True)), delta_softplus=True, backend=backend)

        assert torch.autograd.gradgradcheck(function, values)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_last_state_alone_has_gradients(self, backend: str) -> None:
        inputs = make_inputs(length=9, initial=True)
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        _, state = selective_scan(**leaves, return_last_state=True, backend=backend)
        state.square().sum().backward()
        for name in ("u", "delta", "A", "B", "initial_state"):
            assert leaves[name].grad.abs().max() > 0, name


class TestNumerics:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("length", [64, 1024])
    def test_the_ordinary_initial_A_of_16(self, backend: str, length: int) -> None:
        """exp(cumsum) * cumsum(... * exp(-cumsum)) is NaN here."""
        x = make_inputs(1, 2, length, 16, skip=False, dtype=torch.float32)
        x["A"] = -torch.arange(1.0, 17).expand(2, 16).contiguous()
        x["delta"] = torch.full_like(x["delta"], 0.3)
        out, grads = gradients(on_lines(backend), x)
        expected, _ = line_oracle(x)
        assert_close("out", out, expected, 1e-6)
        for name, grad in grads.items():
            assert grad.isfinite().all(), name

    def test_stress(self) -> None:
        """A from -64 to -1e-4, steps from 1e-6 to 10, inputs of 1e4, 16384 steps, against the recurrence in float64."""
        draw = torch.Generator().manual_seed(3)
        length, d, n = 16384, 3, 4
        x = {
            "u": 1e4 * torch.randn(1, d, length, generator=draw),
            "delta": torch.exp(torch.empty(1, d, length).uniform_(np.log(1e-6), np.log(10), generator=draw)),
            "A": -torch.logspace(np.log10(1e-4), np.log10(64), d * n).view(d, n),
            "B": torch.randn(1, n, length, generator=draw),
            "C": torch.randn(1, n, length, generator=draw),
        }
        double = {k: v.double() for k, v in x.items()}
        expected, expected_grads = gradients(on_lines("reference"), double)
        for backend in ("chunked", "cpu"):  # in one test, since the recurrence takes most of the time
            out, grads = gradients(on_lines(backend), x)
            assert_close(f"{backend} out", out, expected, 1e-5)
            for name, grad in grads.items():
                assert_close(f"{backend} d{name}", grad, expected_grads[name], 1e-4)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("value", [0.0, 1e-42, 1.0, 1e4], ids=["zero", "denormal", "one", "large"])
    def test_constant_input(self, backend: str, value: float) -> None:
        x = make_inputs(1, 2, 50, 2, dtype=torch.float32)
        x["u"] = torch.full_like(x["u"], value)
        out, grads = gradients(on_lines(backend), x)
        expected, _ = line_oracle(x)
        assert max_error(out, expected) <= (1e-5 if value != 1e-42 else 1e-2) * largest(expected)
        assert all(grad.isfinite().all() for grad in grads.values())

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_autocast_does_not_reach_inside(self, backend: str) -> None:
        x = make_inputs(length=50, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = selective_scan(**x, backend=backend)
        assert torch.equal(inside, selective_scan(**x, backend=backend))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_same_bits_again(self, backend: str) -> None:
        x = make_inputs(2, 8, 200, 4, initial=True, dtype=torch.float32)
        first, second = (gradients(on_lines(backend), x) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_growing_states_that_begin_late(direction: str) -> None:
    """Decays of whole chunks are infinite where the state is still zero, or where its gradient is."""
    length, late = 4096, 4070
    u, ones = torch.zeros(1, 2, length), torch.ones(1, 1, length)
    u[:, :, late:] = 1
    u.requires_grad_()
    results = []
    for backend in ("chunked", "reference"):
        y = selective_scan(u, torch.full_like(u, 1.5), torch.ones(2, 1), ones, ones, backend=backend)
        if direction == "backwards":  # the gradient of the first outputs by the inputs
            (y,) = torch.autograd.grad(y[:, :, : length - late].sum(), u)
        results.append(y.detach())
    assert results[1].isfinite().all() and results[1].abs().max() > 1e10
    assert_close("chunked", *results, 1e-4)


@pytest.mark.skipif(release("torch") < (2, 6), reason="needs PyTorch's operator of a loop")
def test_growing_states_that_begin_late_in_exported_loops() -> None:
    u, ones = torch.zeros(1, 1, 4096, 2), torch.ones(1, 1, 4096, 1)  # b k l d
    u[:, :, 4070:] = 1
    inputs = u, torch.full_like(u, 1.5), torch.ones(1, 2, 1), ones, ones
    (y, last), (expected, expected_last) = looped.scan(*inputs), reference.scan(*inputs)
    assert expected.isfinite().all()
    assert_close("y", y, expected, 1e-4)
    assert_close("last", last, expected_last, 1e-4)


@pytest.mark.skipif(release("torch") < (2, 6), reason="needs PyTorch's operator of a loop")
def test_gradients_through_states_of_zero_in_exported_loops() -> None:
    """Of an input that begins late, and of a state to begin with that is zero."""
    u, ones = torch.zeros(1, 1, 150, 2), torch.ones(1, 1, 150, 1)  # b k l d
    u[:, :, 64:] = 1
    state, found = torch.zeros(1, 1, 2, 1), []
    for scan in (looped.scan, reference.scan):
        leaves = [x.clone().requires_grad_() for x in (u, state)]
        y, _ = scan(leaves[0], torch.full_like(u, 0.01), -torch.ones(1, 2, 1), ones, ones, leaves[1])
        found.append(torch.autograd.grad(y[:, :, -1].sum(), leaves))
    for grad, expected in zip(*found, strict=True):
        assert (expected != 0).all()
        assert_close("gradient", grad, expected, 1e-5)


class TestBackends:
    @pytest.mark.parametrize(
        ("B", "C", "expected"),
        [("bnl", "bnl", "cpu"), ("bgnl", "bnl", "cpu"), ("dn", "bnl", "chunked"), ("bgnl", "dn", "chunked")],
    )
    def test_auto_is_the_cpu_backend_except_for_constant_coefficients(self, B: str, C: str, expected: str) -> None:
        pytest.importorskip("numba")
        x = make_inputs(2, 4, 70, 3, B=B, C=C, dtype=torch.float32)
        assert resolve("selective_scan", "auto", x["u"], A=x["A"], B=x["B"], C=x["C"]) == expected
        assert torch.equal(selective_scan(**x), selective_scan(**x, backend=expected))
        other = {"cpu": "chunked", "chunked": "cpu"}[expected]
        assert not torch.equal(selective_scan(**x), selective_scan(**x, backend=other)), "the two differ in rounding"

    def test_an_explicit_backend_is_kept(self) -> None:
        for backend in BACKENDS:
            assert resolve("selective_scan", backend, torch.zeros(1, 1, 1)) == backend

    @pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
    @pytest.mark.parametrize("groups", [1, 2])
    def test_triton_in_its_interpreter(self, groups: int) -> None:
        """Through the public function, whose arguments reach the kernels transposed."""
        printed = fresh_process(
            "import torch\n"
            "from kan_mamba_layers import selective_scan\n"
            "torch.manual_seed(0)\n"
            "shapes = {'u': (2, 6, 19), 'delta': (2, 6, 19), 'A': (6, 3), 'C': (2, 3, 19)}\n"
            f"shapes['B'] = (2, {groups}, 3, 19)\n"
            "x = {k: (torch.rand(v) - float(k == 'A')).requires_grad_() for k, v in shapes.items()}\n"
            "outs = [selective_scan(**x, backend=b) for b in ('triton', 'reference')]\n"
            "pairs = zip(*((y, *torch.autograd.grad(y.square().sum(), list(x.values()))) for y in outs))\n"
            "print(max(float((a - e).norm() / e.norm()) for a, e in pairs))\n",
            TRITON_INTERPRET="1",
        )
        assert float(printed) <= 1e-5

    def test_positional_arguments_are_those_of_mamba(self) -> None:
        x = make_inputs(gate=True, bias=True, positive=False)
        out, state = selective_scan(*(x[k] for k in TENSORS), True, True)
        expected, expected_state = line_oracle(x, softplus=True)
        assert_close("out", out, expected, 1e-12)
        assert_close("state", state, expected_state, 1e-12)
