"""Values and gradients of the stand-ins for mamba_ssm and its relatives, against the reference backend of our scan."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helpers import assert_budget, assert_close, gradients, largest, says
from kan_mamba_layers import compat, selective_scan

EXTENSIONS = ("selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")
NAMES = ("selective_scan_fn", "selective_scan_ref")
REAL = [name for name in ("mamba_ssm", "selective_scan", *EXTENSIONS) if importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.skipif(bool(REAL), reason=f"the real {REAL} are installed; nothing stands in for them"),
    pytest.mark.usefixtures("stand_ins"),
]


@pytest.fixture
def stand_ins() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


def function(module: str, name: str = "selective_scan_fn") -> Callable:
    return getattr(importlib.import_module(module), name)


# Values and gradients of the functions


def make_inputs(
    dtype: torch.dtype = torch.float64, *, form: str = "bgnl", z: bool = False, rows: int = 6
) -> dict[str, Tensor]:
    """Inputs of a scan; A, D and delta_bias are float32 or more, as the original kernels want them."""
    wide = torch.promote_types(dtype, torch.float32)
    shape, kind = {"dn": ((6, 3), wide), "bnl": ((2, 3, 11), dtype), "bgnl": ((2, 2, 3, 11), dtype)}[form]
    inputs = {
        "u": torch.randn(2, 6, 11).to(dtype),
        "delta": torch.rand(2, rows, 11).to(dtype),
        "A": -torch.rand(6, 3, dtype=wide),
        "B": torch.randn(shape).to(kind),
        "C": torch.randn(shape).to(kind),
        "D": torch.randn(6, dtype=wide),
        "delta_bias": torch.rand(rows, dtype=wide),
    }
    return {**inputs, "z": torch.randn(2, 6, 11).to(dtype)} if z else inputs


def assert_equals_reference(run: Callable[..., Tensor], inputs: dict[str, Tensor], **options: bool) -> None:
    """Value and every gradient of `run(**inputs)` within the budgets of the scan."""
    dtype = inputs["u"].dtype

    def reference(**x: Tensor) -> Tensor:
        return selective_scan(**x, **options, backend="reference")

    out, grads = gradients(run, inputs)
    same, same_grads = gradients(reference, inputs)
    double = {k: v.double() for k, v in inputs.items()}
    true, true_grads = gradients(reference, double)
    sizes = gradients(reference, {k: v if k == "A" else v.abs() for k, v in double.items()}, absolute=True)[1]
    assert out.dtype == dtype
    assert_budget("out", out, same, true, dtype, bands=8)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        compare = (grad, same_grads[name], true_grads[name], grad.dtype)
        assert_budget(f"d{name}", *compare, bands=8, terms=largest(sizes[name]))


class TestFunctions:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("form", ["dn", "bnl", "bgnl"])
    @pytest.mark.parametrize("name", NAMES)
    def test_mamba_ssm(self, name: str, form: str, dtype: torch.dtype) -> None:
        scan = function("mamba_ssm.ops.selective_scan_interface", name)
        for z in (False, True):
            for softplus in (False, True):
                options = {"delta_softplus": softplus}
                inputs = make_inputs(dtype, form=form, z=z)
                assert_equals_reference(lambda **x: scan(**x, **options), inputs, **options)  # noqa: B023
        for bare in ({"z", "D"}, {"z", "delta_bias"}):
            inputs = {k: v for k, v in make_inputs(dtype, form=form).items() if k not in bare}
            assert_equals_reference(scan, inputs)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("form", ["bnl", "bgnl"])
    @pytest.mark.parametrize("name", NAMES)
    def test_selective_scan(self, name: str, form: str, dtype: torch.dtype) -> None:
        scan = function("selective_scan", name)
        for softplus in (False, True):
            options = {"delta_softplus": softplus}
            assert_equals_reference(lambda **x: scan(**x, **options), make_inputs(dtype, form=form), **options)  # noqa: B023

    def test_backends_and_positions(self) -> None:
        """`fn` is the op as it is, `ref` its reference; arguments stand where the originals' do."""
        x = make_inputs(torch.float32, z=True)
        common, bias = [x[k] for k in ("u", "delta", "A", "B", "C", "D")], x["delta_bias"]
        for name, backend in (("selective_scan_fn", "auto"), ("selective_scan_ref", "reference")):
            out, last = function("mamba_ssm.ops.selective_scan_interface", name)(*common, x["z"], bias, True, True)
            expected = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
            assert torch.equal(out, expected[0]) and torch.equal(last, expected[1])
            out = function("selective_scan", name)(*common, bias, True)
            assert torch.equal(out, selective_scan(*common, None, bias, True, backend=backend))
        assert list(inspect.signature(function("selective_scan")).parameters)[-2:] == ["delta_softplus", "nrows"]
        assert function("mamba_ssm") is function("mamba_ssm.ops.selective_scan_interface")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        x = make_inputs(dtype, z=True)
        out, last = function("mamba_ssm")(**x, return_last_state=True)
        assert (out.dtype, last.dtype, last.shape) == (dtype, torch.float32, (2, 6, 3))

    def test_complex_states_are_refused(self) -> None:
        x = make_inputs(torch.float32)
        x["A"] = x["A"].to(torch.complex64)
        with pytest.raises(TypeError, match=says("A must be real", "complex64")):
            function("mamba_ssm")(**x)


# Values and gradients of the extensions, used as the originals' callers do: from an autograd Function


class Scan(torch.autograd.Function):
    """`module` is one of the three extensions; only selective_scan_cuda knows `z`, and not `nrows`."""

    @staticmethod
    def forward(ctx, module, softplus, u, delta, A, B, C, D, bias, z):
        gate, nrows = ([z], []) if module.__name__ == "selective_scan_cuda" else ([], [1])
        out, x, *gated = module.fwd(u, delta, A, B, C, D, *gate, bias, softplus, *nrows)
        ctx.module, ctx.softplus = module, softplus
        ctx.save_for_backward(u, delta, A, B, C, D, bias, z, x, out)
        return gated[0] if gated else out

    @staticmethod
    def backward(ctx, dout):
        *inputs, bias, z, x, out = ctx.saved_tensors
        if ctx.module.__name__ == "selective_scan_cuda":
            grads = ctx.module.bwd(*inputs, z, bias, dout, x, out, None, ctx.softplus, False)
        else:
            grads = ctx.module.bwd(*inputs, bias, dout, x, ctx.softplus, 1)
        return None, None, *grads, *([None] if z is None else [])


def scan_with(name: str, softplus: bool = False) -> Callable[..., Tensor]:
    module = importlib.import_module(name)

    def run(u, delta, A, B, C, D=None, delta_bias=None, z=None) -> Tensor:
        return Scan.apply(module, softplus, u, delta, A, B, C, D, delta_bias, z)

    return run


class TestExtensions:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("softplus", [False, True])
    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_equals_the_reference(self, name: str, softplus: bool, dtype: torch.dtype) -> None:
        run = scan_with(name, softplus)
        assert_equals_reference(run, make_inputs(dtype), delta_softplus=softplus)
        for absent in ("D", "delta_bias"):
            inputs = {k: v for k, v in make_inputs(dtype).items() if k != absent}
            assert_equals_reference(run, inputs, delta_softplus=softplus)
        if name == "selective_scan_cuda":
            assert_equals_reference(run, make_inputs(dtype, z=True), delta_softplus=softplus)
            assert_equals_reference(run, make_inputs(dtype, form="dn"), delta_softplus=softplus)

    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_gradcheck(self, name: str) -> None:
        x = make_inputs()
        run = scan_with(name, True)
        inputs = tuple(v[..., :2].requires_grad_() if v.ndim > 2 else v.requires_grad_() for v in x.values())
        assert torch.autograd.gradcheck(run, inputs)

    @pytest.mark.parametrize("name", EXTENSIONS[1:])
    def test_neighbouring_channels_may_share_a_row_of_delta(self, name: str) -> None:
        x = make_inputs(rows=2)
        out, grads = gradients(scan_with(name, True), x)

        def expected(delta: Tensor, delta_bias: Tensor, **rest: Tensor) -> Tensor:
            full = {"delta": delta.repeat_interleave(3, 1), "delta_bias": delta_bias.repeat_interleave(3)}
            return selective_scan(**rest, **full, delta_softplus=True, backend="reference")

        true, true_grads = gradients(expected, x)
        assert_close("out", out, true, 1e-12)
        for k, grad in grads.items():
            assert_close(f"d{k}", grad, true_grads[k], 1e-12)

    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_results_are_the_originals(self, name: str) -> None:
        """Dtypes, None for what was not given, the last state inside `x`, and no graph through `fwd`."""
        module = importlib.import_module(name)
        x = {k: v.requires_grad_() for k, v in make_inputs(torch.bfloat16).items()}
        common = [x[k] for k in ("u", "delta", "A", "B", "C", "D")]
        gate = [None] if name == "selective_scan_cuda" else []
        out, states = module.fwd(*common, *gate, x["delta_bias"], True)
        last = selective_scan(**x, delta_softplus=True, return_last_state=True)[1]
        assert (out.dtype, out.requires_grad, states.dtype) == (torch.bfloat16, False, torch.float32)
        assert torch.equal(states[:, :, -1, 1::2], last)
        rest = [None, None, True, False] if gate else [True]
        grads = module.bwd(*common[:5], None, *gate, None, out, states, *rest)
        assert [None if g is None else g.dtype for g in grads] == [*(v.dtype for v in common[:5]), None, None]

    def test_oflex_keeps_float_output(self) -> None:
        fwd, x = function("selective_scan_cuda_oflex", "fwd"), make_inputs(torch.float16)
        expected = selective_scan(**{**x, "u": x["u"].float()}, delta_softplus=True)
        assert torch.equal(fwd(*x.values(), True, 1, True)[0], expected)
        assert torch.equal(fwd(*x.values(), True, 1, False)[0], expected.half())

    def test_gate_gradient_goes_where_the_caller_wants_it(self) -> None:
        module = importlib.import_module("selective_scan_cuda")
        x = make_inputs(z=True)
        common = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        out, states, gated = module.fwd(*common, True)
        both = torch.zeros(2, 12, 11, dtype=torch.float64)
        place = both[:, 6:]
        *grads, dz, again = module.bwd(*common, torch.ones_like(out), states, out, place, True, True)
        assert len(grads) == 7 and dz is place and place.abs().min() > 0 and not both[:, :6].any()
        assert_close("out_z", again, gated, 1e-14)
        silu = x["z"].sigmoid() * (1 + x["z"] * (1 - x["z"].sigmoid()))
        assert_close("dz", dz, out * silu, 1e-12)
