"""The Triton scan in Triton's interpreter, on CPU tensors, against float64: outputs, gradients, memory, repeats.

Triton reads TRITON_INTERPRET when a kernel is defined, so `tests/ops/test_triton.py` runs these tests in a process of
their own. In every case NaN surrounds the inputs, every buffer that the launcher allocates is filled with NaN and lies
between sentinels, and the sentinels are checked afterwards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_budget, gradients, pixel_order, relative_l2, says
from kan_mamba_layers import selective_scan
from kan_mamba_layers.ops.selective_scan import reference
from ops.selective_scan.calls import line_inputs, on_lines, operator_inputs
from test_golden import LAYER_FILES, check_layer

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs triton, and a process with TRITON_INTERPRET=1; tests/ops/test_triton.py starts one",
        allow_module_level=True,
    )

from triton.runtime import interpreter

from benchmarks.gpu.guards import between, between_nan, guarded
from kan_mamba_layers.ops.selective_scan import triton as launcher
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.triton import Plan

pytestmark = pytest.mark.usefixtures("poisoned_empty")

WANTED = [True] * 9 + [False] * 2  # of all tensors but the orders and the mask
INPUTS = ("u", "coeffs", "delta", "dt_proj_weight", "dt_proj_bias", "A", "D", "initial_state")


@dataclass(frozen=True)
class Case:
    b: int = 1
    h: int = 2
    w: int = 4
    d: int = 5
    n: int = 4
    r: int = 2
    k: int = 4
    g: int = 1
    table: bool = False
    masked: bool = False
    initial: bool = False
    softplus: bool = True
    dtype: torch.dtype = torch.float32
    tile: int = 16
    plan: Plan | None = None

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k)]
        return " ".join(changed).replace("torch.", "").replace("plan=Plan", "") or "plain"


def line(**changes: object) -> Case:
    """A sequence in one dimension with given steps, as in `selective_scan`."""
    return Case(**{"h": 1, "w": 11, "d": 6, "r": 0, "k": 1, **changes})


def table(**changes: object) -> Case:
    """A sequence whose directions visit its positions in random orders."""
    return Case(**{"h": 1, "w": 11, "table": True, **changes})


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case(h=3),
    Case(h=1, w=1, d=1, n=1, r=1),
    Case(h=1, w=1, n=17, r=3, initial=True),
    Case(h=1, w=19, r=1),
    Case(h=17, w=1, n=1, r=3),
    Case(h=3, w=6, n=16, r=1, d=8),
    Case(h=5, w=4, n=1, r=10),
    Case(b=2, h=2, w=3, n=17, r=4),
    Case(h=2, w=3, n=16, r=10, d=65),
    Case(n=4, r=20),  # a rank large enough for a matrix product
    Case(h=2, w=3, n=48),  # two warps per program
    Case(softplus=False, r=3),
    Case(initial=True, n=16, r=4),
    Case(b=3, h=2, w=1, initial=True, softplus=False, r=1),
    # Chunks: several, the last one ragged, with and without pairs; the last by the launcher's own plan.
    Case(h=3, w=6, r=1, plan=Plan(32, 16)),
    Case(tile=4, h=2, w=5, r=1, plan=Plan(32, 8, True)),
    Case(tile=4, plan=Plan(32, 4)),
    Case(tile=4, plan=Plan(32, 4, True)),
    Case(tile=4, plan=Plan(32, 8), h=3, w=3),
    Case(tile=4, plan=Plan(32, 8, True), h=3, w=3),
    Case(tile=4, plan=Plan(32, 8, True), h=1, w=10, initial=True, r=1),
    Case(tile=4, plan=Plan(64, 12, True), h=13, w=1, n=16),
    Case(tile=2, plan=Plan(32, 2), h=2, w=2, d=33, n=1, r=10, initial=True),
    Case(tile=2, plan=Plan(32, 4, True), h=2, w=3, d=33, n=17, r=4),
    Case(tile=4, h=3, w=3, n=1, r=1),
    # Half precision.
    Case(dtype=BF16, n=16, r=1),
    Case(dtype=FP16, n=16, r=1),
    Case(dtype=BF16, h=5, w=1, tile=2, plan=Plan(32, 4, True), n=1, r=4),
    Case(dtype=FP16, h=3, w=3, tile=4, plan=Plan(32, 8), n=1, r=4, initial=True),
    Case(dtype=BF16, w=2, n=17, d=40, softplus=False),
    line(dtype=BF16, n=16, initial=True, g=2),
    line(dtype=FP16, n=16, initial=True, tile=4, plan=Plan(32, 4)),
    # One dimension, given steps, groups.
    line(),
    line(w=1),
    line(w=1, n=1, d=1, initial=True),
    line(w=19, n=16, initial=True),
    line(n=17, g=3),
    line(n=1, g=2, softplus=False),
    line(b=2, w=2, g=6, initial=True),
    line(b=2, d=80, g=2, n=4, w=5),
    line(d=70, n=17, w=6),
    line(w=33, g=2),
    line(w=11, tile=2, plan=Plan(32, 4), g=3, initial=True),
    line(w=11, tile=2, plan=Plan(32, 2), softplus=False, initial=True),
    line(w=12, r=3, g=2),  # steps of low rank, one direction
    line(w=5, n=100),
    # Random orders, masked positions, both.
    table(k=1, w=1, masked=True),
    table(k=2, w=5, r=20, masked=True),
    table(k=6, w=5, tile=2, plan=Plan(32, 2), d=8, r=1, initial=True),
    table(w=7, tile=2, plan=Plan(32, 4), n=16, r=1, dtype=BF16, masked=True),
    table(w=9, tile=4, n=1, r=1),  # by the launcher's own plan
    line(tile=2, plan=Plan(32, 4), g=2, table=True, masked=True, dtype=FP16, initial=True),
    line(k=2, w=6, g=2, table=True, masked=True, softplus=False),
    Case(tile=4, plan=Plan(32, 8, True), h=3, w=3, masked=True, initial=True),
    Case(b=2, w=2, masked=True, softplus=False, r=1),
]


def make_inputs(case: Case) -> dict[str, Tensor | None]:
    """Tensors between NaN; None where the case has no such tensor."""
    b, l, d, n, r = case.b, case.h * case.w, case.d, case.n, case.r
    inputs = operator_inputs(b, l, d, n, r, directions=case.k, groups=case.g, initial=case.initial)
    inputs["u"] = inputs["u"].to(case.dtype)
    if not case.softplus:  # positive and negative steps, and a state that may grow, but not out of float32
        inputs["dt_proj_bias"] = 0.2 * inputs["dt_proj_bias"]
        inputs["A"] = 0.2 * inputs["A"].clamp(min=-4) + 0.3
    return {name: between_nan(inputs[name]) if name in inputs else None for name in INPUTS}


def orders(case: Case) -> list[list[int]]:
    """The positions in the order in which each direction visits them."""
    if case.table:
        draw = torch.Generator().manual_seed(2)
        return [torch.randperm(case.h * case.w, generator=draw).tolist() for _ in range(case.k)]
    return [[i * case.w + j for i, j in pixel_order(k, case.h, case.w)] for k in range(case.k)]


def mask(case: Case) -> Tensor | None:  # b l
    """Every third position is masked, beginning elsewhere in every image."""
    return (torch.arange(case.b * case.h * case.w).view(case.b, -1) % 3 > 0).float() if case.masked else None


def oracle(case: Case, x: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """y and the last states by explicit lists of pixels and `reference.scan`, in the dtype of the inputs."""
    groups, n, r = (case.g, -1), case.n, case.r
    u, coeffs, initial = x["u"], x["coeffs"], x["initial_state"]
    y, last = x["D"] * u, []
    unmasked = mask(case)
    for k, order in enumerate(orders(case)):
        rows = coeffs[:, order, k * case.g : (k + 1) * case.g].transpose(1, 2)  # b g l r+2n
        low, B, C = rows.split([r, n, n], -1)
        if x["delta"] is None:
            z = low @ x["dt_proj_weight"][k].unflatten(0, groups).mT  # b g l d/g
        else:
            z = x["delta"][:, order, k].unflatten(2, groups).transpose(1, 2)
        z = z + x["dt_proj_bias"][k].unflatten(0, groups)[:, None]
        step = F.softplus(z) if case.softplus else z
        if unmasked is not None:
            step = step * unmasked[:, order][:, None, :, None]
        A = x["A"][k].unflatten(0, groups)  # g d/g n
        out, end = reference.scan(u[:, order].unflatten(2, groups).transpose(1, 2), step, A, B, C)
        if initial is not None:  # the scan is linear in its initial state
            decay = torch.exp(step.cumsum(2)[..., None] * A[:, None]) * initial[:, k].unflatten(1, groups)[:, :, None]
            out, end = out + (decay * C[:, :, :, None]).sum(-1), end + decay[:, :, -1]
        y = y.index_add(1, torch.tensor(order), out.transpose(1, 2).flatten(2))
        last.append(end.flatten(1, 2))
    return y, torch.stack(last, 1)


def oracle_gradients(
    case: Case, inputs: dict[str, Tensor | None], grad_y: Tensor, grad_last: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """y, the last states and the gradients of all inputs, computed in `dtype`."""
    leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in inputs.items()}
    y, last = oracle(case, leaves)
    loss = (y * grad_y).sum() + (0 if grad_last is None else (last * grad_last).sum())
    wanted = {k: v for k, v in leaves.items() if v is not None and v.numel()}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "last": last.detach(), **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}


def call_of(case: Case, inputs: dict[str, Tensor | None]) -> ScanCall:
    table, unmasked = torch.tensor(orders(case), dtype=torch.int32) if case.table else None, mask(case)
    return ScanCall(
        **inputs,
        x_proj_weight=None,
        height=case.h,
        width=case.w,
        softplus=case.softplus,
        orders=None if table is None else between(table, 1 << 30),  # a position that is nowhere in memory
        mask=None if unmasked is None else between_nan(unmasked),
    )


def run(
    case: Case, inputs: dict[str, Tensor | None], grad_y: Tensor | None, grad_last: Tensor | None
) -> dict[str, Tensor]:
    """What `oracle_gradients` returns, by the Triton kernels."""
    call = call_of(case, inputs)
    y, last, saved = launcher.forward(call, True, plan=case.plan)
    back_plan = case.plan and case.plan._replace(pair=False)
    found = launcher.backward(call, [saved], (grad_y, grad_last), WANTED, plan=back_plan)
    named = {f"d{k}": grad for k, grad in zip(ScanCall._fields, found, strict=False) if grad is not None}
    for name in INPUTS:
        like = inputs[name]
        if like is not None:
            assert named[f"d{name}"].shape == like.shape and named[f"d{name}"].dtype == like.dtype
    return {"y": y, "last": last, **named}


def make_grads(case: Case) -> tuple[Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    grad_y = torch.randn(case.b, case.h * case.w, case.d, generator=draw).to(case.dtype)
    return between_nan(grad_y), torch.randn(case.b, case.k, case.d, case.n, generator=draw) if case.initial else None


@pytest.fixture(scope="module", autouse=True)
def patched_once() -> Iterator[None]:
    """The interpreter patches `triton.language` at every call of a function; once for each module is enough."""
    modules = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        if self.fn.__module__ not in modules:
            modules.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def buffers() -> Iterator[list[Tensor]]:
    """Puts every buffer of the launcher between sentinels, checked afterwards."""
    launcher.choose_plan.cache_clear()  # other tests have another TILE
    with guarded(launcher) as found:
        yield found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient(case: Case, monkeypatch: pytest.MonkeyPatch, buffers: list[Tensor]) -> None:
    monkeypatch.setattr(launcher, "TILE", case.tile)
    inputs, (grad_y, grad_last) = make_inputs(case), make_grads(case)
    got = run(case, inputs, grad_y, grad_last)
    assert len(buffers) > 5
    expected = oracle_gradients(case, inputs, grad_y, grad_last, torch.float64)
    half = case.dtype != torch.float32
    single = oracle_gradients(case, inputs, grad_y, grad_last, torch.float32) if half else {}
    for name, value in expected.items():
        if half and name in ("y", "du"):
            assert_budget(name, got[name], single[name].to(case.dtype), value, case.dtype)
        else:
            allowed = 5e-7 if name in ("y", "last") else 2e-6
            error = relative_l2(got[name], value)
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
    if not case.initial:  # an initial state of zero has a gradient nevertheless
        zero = {**inputs, "initial_state": torch.zeros(case.b, case.k, case.d, case.n)}
        expected = oracle_gradients(case, zero, grad_y, grad_last, torch.float64)
        assert relative_l2(got["dinitial_state"], expected["dinitial_state"]) <= 2e-6


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_gate_is_applied_before_the_one_rounding(dtype: torch.dtype) -> None:
    """Parameters are float32, so an early rounding of y would show in their gradients."""
    inputs = line_inputs(1, 3, 5, 2, gate=True, positive=False, dtype=dtype)

    def grads(backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        leaves = {k: v if dtype is None else v.to(dtype) for k, v in inputs.items()}
        return gradients(on_lines(backend, delta_softplus=True), leaves)[1]

    found, exact = grads("triton"), grads("reference", torch.float64)
    assert relative_l2(found["A"], exact["A"]) <= 2e-6 and relative_l2(found["D"], exact["D"]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_second_derivatives(dtype: torch.dtype) -> None:
    """The kernels' y has the dtype of u, and so must that of the formula that is differentiated."""
    inputs, results = line_inputs(1, 3, 5, 2, positive=False, dtype=dtype), []
    for backend, exact in (("triton", None), ("reference", torch.float64)):
        leaves = {k: v.to(exact or v.dtype).requires_grad_() for k, v in inputs.items()}
        y = on_lines(backend, delta_softplus=True)(**leaves)
        slopes = torch.autograd.grad(y.square().sum(), leaves.values(), create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in slopes), leaves.values()))
    for name, found, expected in zip(inputs, *results, strict=True):
        assert relative_l2(found, expected) <= (1e-6 if dtype == torch.float32 else 0.015), name


@pytest.mark.parametrize(
    "case",
    [Case(h=1, w=3, tile=2, plan=Plan(32, 2, True), d=33), line(w=5, tile=2, plan=Plan(32, 4), g=2, dtype=BF16)],
    ids=str,
)
def test_same_bits_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "TILE", case.tile)
    inputs, grads = make_inputs(case), make_grads(case)
    first, second = run(case, inputs, *grads), run(case, inputs, *grads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inference_gives_the_same_and_saves_nothing() -> None:
    case = Case(h=2, w=5)
    inputs = make_inputs(case)
    call = call_of(case, inputs)
    y, last, saved = launcher.forward(call, False)
    expected, expected_last, expected_saved = launcher.forward(call, True)
    assert torch.equal(y, expected) and torch.equal(last, expected_last)
    assert saved.shape == (0,) and expected_saved.numel() == math.prod(launcher.saved_shape(1, 10, 5, 4, 1, 4))


def test_no_gradient_is_a_gradient_of_zero() -> None:
    case = line(w=3, initial=True)
    inputs, (grad_y, grad_last) = make_inputs(case), make_grads(case)
    for given, same in (
        ((None, grad_last), (torch.zeros_like(grad_y), grad_last)),
        ((grad_y, None), (grad_y, torch.zeros_like(grad_last))),
    ):
        first, second = run(case, inputs, *given), run(case, inputs, *same)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_in_any_layout() -> None:
    case = line(w=3)
    inputs, (grad_y, _) = make_inputs(case), make_grads(case)
    strided = grad_y.transpose(0, 2).contiguous().transpose(0, 2)
    for other, same in ((strided, grad_y), (torch.ones(()).expand(1, 3, 6), torch.ones(1, 3, 6))):
        first, second = run(case, inputs, other, None), run(case, inputs, same, None)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [Case(b=0, initial=True), line(b=0, g=2)], ids=str)
def test_empty_batch(case: Case) -> None:
    got = run(case, make_inputs(case), *make_grads(case))
    assert got["y"].shape == (0, case.h * case.w, case.d)
    assert got["last"].shape == (0, case.k, case.d, case.n)
    assert not case.initial or got["dinitial_state"].shape == got["last"].shape
    assert (got["dA"] == 0).all() and (got["dD"] == 0).all() and (got["dcoeffs"] == 0).all()


@pytest.mark.parametrize("z", [-60.0, -20.0, -10.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 10.0, 20.0, 60.0])
def test_softplus_and_its_slope_everywhere(z: float) -> None:
    """With one step, A = 0 and B = C = u = 1 the output is the step size itself."""
    case = line(w=1, d=1, n=1)
    inputs = {k: None if v is None else torch.ones_like(v) for k, v in make_inputs(case).items()}
    inputs |= {"delta": torch.full((1, 1, 1, 1), z), "dt_proj_bias": torch.zeros(1, 1)}
    inputs |= {"A": torch.zeros(1, 1, 1), "D": torch.zeros(1)}
    got = run(case, inputs, torch.ones(1, 1, 1), None)
    exact = torch.tensor(z, dtype=torch.float64)
    allowed = 3e-7 + 6e-8 * abs(z)  # the exponent itself is rounded
    assert abs(got["y"].item() / torch.logaddexp(exact, exact.new_zeros(())).item() - 1) <= allowed
    assert abs(got["ddelta"].item() / torch.sigmoid(exact).item() - 1) <= allowed


@pytest.mark.parametrize("rate", [0.5, 10.0, 30.0])
def test_growing_states_are_infinite_where_the_reference_is(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "TILE", 4)
    case = line(w=24, softplus=False, plan=Plan(32, 4))
    inputs = make_inputs(case)
    inputs["A"].fill_(rate)
    inputs["delta"].abs_()
    inputs["dt_proj_bias"].zero_()
    inputs["u"][:, :10] = 0.0  # a state of zero stays zero, however fast it could grow
    inputs["coeffs"].abs_()
    inputs["u"].abs_()
    y, last, _ = launcher.forward(call_of(case, inputs), False, plan=case.plan)
    expected, expected_last = oracle(case, inputs)
    for actual, want in ((y, expected), (last, expected_last)):
        assert torch.equal(actual.isfinite(), want.isfinite())
        assert torch.allclose(actual[want.isfinite()], want[want.isfinite()], rtol=1e-4)
    assert expected.isinf().any() == (rate > 1)


def test_too_large_an_image_is_refused() -> None:
    """Both by the op and by the launcher, which an exported program calls directly."""
    u, coeffs = torch.empty(()).expand(1, 1 << 20, 2048), torch.empty(()).expand(1, 1 << 20, 1, 8)
    A, B = torch.empty(2048, 4), coeffs[:, :, 0, :4].mT
    with pytest.raises(ValueError, match=says("backend='triton'", r"2\*\*31", "backend='auto'")):
        selective_scan(u.mT, u.mT, A, B, B, backend="triton")
    rest = (torch.empty(1, 2048, 0), torch.empty(1, 2048), A[None], torch.empty(2048), None)
    with pytest.raises(ValueError, match=says("backend='triton'", r"2\*\*31", "backend='chunked'")):
        launcher.forward(ScanCall(u, coeffs, None, u[:, :, None], *rest, 1, 1 << 20, True), False)


def test_plans() -> None:
    def plan(b: int, l: int, d: int, n: int = 16, k: int = 4, **other: object) -> Plan:
        return launcher.choose_plan(launcher.Sizes(b, l, d, k, 1, n), 132, **other)

    assert plan(64, 3136, 192) == Plan(64, 3136)  # the batch alone fills the GPU
    assert plan(128, 3136, 192) == Plan(64, 3136, True)  # even in pairs
    assert plan(8, 3136, 192).pair and not plan(1, 256, 32).pair
    assert plan(1, 16384, 32).chunk < 1000  # one image: cut it
    assert plan(1, 16384, 32, back=True).pair is False
    assert plan(1, 1, 1) == Plan(32, 16) and plan(1, 1, 1, back=True).block >= 16
    assert plan(64, 3136, 192, rule=launcher.FORWARD._replace(values=512)) == Plan(32, 3136, True)
    assert plan(8, 16384, 32, rule=launcher.FORWARD._replace(wanted=64)).chunk < plan(8, 16384, 32).chunk
    assert not plan(128, 3136, 192, table=True).pair and not plan(8, 3136, 192, table=True).pair
    for b, l, d, n, k in [(1, 1, 1, 1, 1), (1, 17, 3, 17, 4), (2, 4096, 96, 16, 4), (1, 100000, 64, 16, 1)]:
        for back in (False, True):
            block, chunk, pair, *_ = plan(b, l, d, n, k, back=back)
            assert chunk % launcher.TILE == 0 and chunk >= 16 and block in (16, 32, 64, 128) and pair <= (k == 4)


@pytest.mark.parametrize("name", [name for name in LAYER_FILES if name.startswith("ss2d")])
def test_layer_of_the_original(name: str) -> None:
    check_layer(name, "triton")


def test_enough_cases() -> None:
    assert len(CASES) >= 40 and len({str(case) for case in CASES}) == len(CASES)
