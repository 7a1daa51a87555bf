"""The Triton kan_linear in Triton's interpreter, on CPU tensors, against float64: outputs, gradients, memory, repeats.

Triton reads TRITON_INTERPRET when a kernel is defined, so `tests/ops/test_triton.py` runs these tests in a process of
their own. In every case NaN surrounds everything that the kernels read, every buffer that the launcher allocates is
filled with NaN and lies between sentinels, and the sentinels are checked afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_budget, assert_close, basis_oracle, to_array
from kan_mamba_layers import kan_linear
from kan_mamba_layers.ops.kan_linear import reference
from ops.kan_linear.calls import KNOTS_THAT_COINCIDE
from test_golden import LAYER_FILES, check_layer

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs triton, and a process with TRITON_INTERPRET=1; tests/ops/test_triton.py starts one",
        allow_module_level=True,
    )

from benchmarks.gpu.guards import BAND, between_nan, guarded
from kan_mamba_layers.ops.kan_linear import triton as launcher
from kan_mamba_layers.ops.kan_linear.call import KANCall
from kan_mamba_layers.ops.kan_linear.triton import Gpu, Job, Tiles

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Tiles(16, 16, 16, 4, 2)
LARGE = Tiles(512, 16, 16, 4, 2)
SMALL_TILES = {"tiles": SMALL, "back_tiles": (SMALL, SMALL._replace(slots=3, splits=3))}


@dataclass(frozen=True)
class Case:
    rows: int = 7
    i: int = 3
    o: int = 4
    g: int = 5
    s: int = 3
    dtype: torch.dtype = FP32
    weights: torch.dtype | None = None  # if not that of x: autocast
    uniform: bool = True
    extrapolation: str = "zero"
    given: bool = False  # the activation, tanh, as a tensor; else silu in the kernel
    bias: bool = False
    tiles: Tiles | None = None
    back_tiles: tuple[Tiles | None, Tiles | None] = (None, None)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        tiles = [f"{k}={'x'.join(map(str, changed.pop(k)[:3]))}" for k in ("tiles",) if k in changed]
        changed.pop("back_tiles", None)
        return " ".join([f"{k}={v}" for k, v in changed.items()] + tiles).replace("torch.", "") or "plain"


CASES = [
    Case(),
    Case(rows=1, i=1, o=1),
    Case(rows=1, i=1, o=1, g=1, s=1),
    Case(rows=33, i=17, o=35, bias=True),
    Case(i=1, o=33),
    Case(i=33, o=1, bias=True),
    Case(g=1, s=5),
    Case(g=8, s=2),
    Case(g=20, s=3, bias=True),  # too many slots to unroll
    *(Case(s=s, bias=s == 2) for s in (1, 2, 4, 5)),
    *(Case(s=s, g=4, extrapolation="linear") for s in (1, 2, 3, 4, 5)),
    *(Case(s=s, g=4, extrapolation="clamp") for s in (1, 3, 4)),
    # The activation as a tensor.
    Case(given=True),
    Case(given=True, extrapolation="linear", s=2, bias=True),
    Case(given=True, dtype=BF16),
    Case(given=True, i=18, **SMALL_TILES),
    # Any knots.
    *(Case(s=s, g=3, uniform=False) for s in (1, 2, 3, 4, 5)),
    *(Case(s=s, g=3, uniform=False, extrapolation="linear") for s in (1, 2, 3, 4)),
    Case(g=2, uniform=False, extrapolation="clamp", given=True),
    Case(g=2, s=2, uniform=False, i=17, o=18, rows=18, extrapolation="linear", **SMALL_TILES),
    # Several tiles along every axis, the last ones ragged.
    Case(rows=37, i=19, o=23, **SMALL_TILES),
    Case(rows=37, i=19, o=23, bias=True, tiles=SMALL._replace(slots=9), back_tiles=(SMALL, SMALL._replace(slots=2))),
    Case(rows=50, i=5, o=3, back_tiles=(None, SMALL._replace(splits=2))),
    Case(rows=20, i=34, o=20, s=2, extrapolation="clamp", **SMALL_TILES),
    # Half precision, and autocast.
    *(Case(dtype=dtype, s=s, o=17, bias=True) for dtype in (BF16, FP16) for s in (1, 3, 5)),
    Case(dtype=BF16, extrapolation="linear", rows=20, **SMALL_TILES),
    Case(dtype=FP16, uniform=False, g=2, extrapolation="clamp"),
    Case(weights=BF16, o=9),
    Case(weights=FP16, given=True, bias=True, extrapolation="linear"),
    Case(weights=BF16, uniform=False, g=2, s=2),
]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Every feature has its own range; x lies inside, on knots, on both ends of the grid and far outside."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    i, o, g, s = case.i, case.o, case.g, case.s
    spacing = (2 + torch.arange(i) % 3) / g  # i
    grid = spacing[:, None] * torch.arange(-s, g + s + 1) - 1  # i m
    if not case.uniform:
        grid = grid + 0.6 * spacing[:, None] * torch.rand(grid.shape, generator=draw)
    x = 1.2 * randn(case.rows, i)
    places = [grid[:, s], grid[:, -s - 1], grid[:, 0], grid[:, -1], grid[:, s + 1], grid[:, s] - 3, grid[:, -s - 1] + 3]
    for row, place in enumerate(places[: max(0, case.rows - 1)]):
        x[row] = torch.where(torch.arange(i) % 2 == row % 2, place, x[row])
    dtype = case.weights or case.dtype
    inputs = {
        "x": x.to(case.dtype),
        "base_weight": randn(o, i).to(dtype),
        "spline_weight": randn(o, i, g + s).to(dtype),
        "grid": grid,
        "bias": randn(o).to(dtype),
        "grad_y": randn(case.rows, o).to(dtype),
    }
    return {name: between_nan(x) for name, x in inputs.items()}


def expected(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients by the reference, including that of the activation if it is given."""
    x, base, spline = (inputs[k].to(dtype).requires_grad_() for k in ("x", "base_weight", "spline_weight"))
    wide = torch.promote_types(dtype, FP32)
    leaves, activation = [x, base, spline], F.silu
    if case.given:
        activated = torch.tanh(inputs["x"].to(wide)).to(case.dtype).to(wide).requires_grad_()
        leaves.append(activated)
        activation = lambda _: activated  # noqa: E731
    bias = inputs["bias"].to(dtype) if case.bias else None
    grid = inputs["grid"].to(wide)
    y = reference.kan_linear(x, base, spline, grid, bias, activation, case.extrapolation, case.uniform)
    grads = torch.autograd.grad(y, leaves, inputs["grad_y"].to(dtype))
    return {"y": y.detach(), **dict(zip(("dx", "dbase", "dspline", "dactivated"), grads, strict=False))}


def backward(call: KANCall, grad_y: Tensor, inputs: bool = True, weights: bool = True, **tiles: object) -> tuple:
    """The gradients of x, of the activation, of the base weights and of the spline weights."""
    flags = [inputs, inputs and call.activated is not None, weights, weights, False, False]
    return launcher.backward(call, [], [grad_y], flags, **tiles)[:4]


def run(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `expected` returns, by the Triton kernels."""
    activated = between_nan(torch.tanh(inputs["x"].float()).to(case.dtype)) if case.given else None
    rest = (inputs["x"], activated, inputs["base_weight"], inputs["spline_weight"], inputs["grid"])
    call = KANCall(*rest, inputs["bias"] if case.bias else None, case.extrapolation, case.uniform)
    (y,) = launcher.forward(call, False, tiles=case.tiles)
    dx, dactivated, dbase, dspline = backward(call, inputs["grad_y"], tiles=case.back_tiles)
    got = {"y": y, "dx": dx, "dbase": dbase, "dspline": dspline}
    return {**got, "dactivated": dactivated} if case.given else got


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Puts every buffer of the launcher between sentinels, checked afterwards, and its tables between NaN."""
    packed, knots = launcher._Launch.packed, launcher._Launch.knots
    monkeypatch.setattr(launcher._Launch, "packed", lambda self: between_nan(packed(self)))
    monkeypatch.setattr(launcher._Launch, "knots", lambda self: tuple(map(between_nan, knots(self))))
    with guarded(launcher) as found:
        yield found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient(case: Case, buffers: list[Tensor]) -> None:
    inputs = make_inputs(case)
    got, exact = run(case, inputs), expected(case, inputs, torch.float64)
    dtype = case.weights or case.dtype
    for name in exact:
        assert got[name].dtype == (case.dtype if name in ("dx", "dactivated") else dtype)
    assert len(buffers) >= 5
    if dtype == FP32:
        # A position among up to 12 knots carries a few roundings, which the bases pass on.
        for name, value in exact.items():
            assert_close(name, got[name], value, 4e-6 if name == "dx" else 3e-6)
        return
    rounded = expected(case, inputs, dtype) if case.weights is None else exact
    for name, value in exact.items():
        if case.weights and name in ("dx", "dactivated"):  # no intermediate rounding
            assert_close(name, got[name], value, 4e-6)
            continue
        # The interpreter truncates bfloat16 where a GPU rounds: every operand errs by up to one unit instead of half,
        # always in one direction. So bfloat16 gets two units more.
        assert_budget(name, got[name], rounded[name], value, dtype, bands=3.0 if dtype == BF16 else 1.0)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("s", [1, 2, 3, 4, 5])
def test_every_basis_against_scipy(s: int, uniform: bool) -> None:
    """Each output's weights pick one basis; the points cover the whole support, including the knots."""
    grid = torch.linspace(-1.6, 1.4, 2 + 2 * s + 1)[None]  # two intervals
    if not uniform:
        grid = grid + 0.1 * torch.tensor([0.0, 1.0, 0.5]).repeat(5)[: grid.shape[1]]
    bases = 2 + s
    x = torch.cat([torch.linspace(-2, 2, 60), grid[0]])[:, None]
    weights = torch.zeros(bases, 1), torch.eye(bases)[:, None]
    (y,) = launcher.forward(KANCall(x, None, *weights, grid, None, "zero", uniform), False)
    exact = basis_oracle(to_array(x), to_array(grid), s)[:, 0]
    exact[to_array(x) == to_array(grid[:, s + 1 :])] = 0.0  # SciPy's elements are closed on the right
    assert_close("bases", y, exact, 3e-6)
    # All bases at once: the points are repeated per basis, with a gradient of that output alone.
    points, picks = x.repeat(bases, 1), torch.eye(bases).repeat_interleave(len(x), 0)
    call = KANCall(points, None, *weights, grid, None, "zero", uniform)
    slopes = backward(call, picks, weights=False, tiles=(LARGE, None))[0].view(bases, -1).T
    exact = basis_oracle(to_array(x), to_array(grid), s, derivative=1)[:, 0]
    exact[to_array(x) == to_array(grid[:, s + 1 :])] = 0.0
    assert_close("slopes", slopes, exact, 5e-6)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "adaptive"])
def test_far_outside(uniform: bool) -> None:
    """Where the spline is zero, constant or a straight line, up to a distance of a million."""
    for extrapolation in ("zero", "clamp", "linear"):
        case = Case(rows=4, extrapolation=extrapolation, uniform=uniform, g=2)
        inputs = make_inputs(case)
        inputs["x"].copy_(torch.tensor([-1e6, -1e2, 1e2, 1e6])[:, None])
        inputs["base_weight"].zero_()
        got, exact = run(case, inputs), expected(case, inputs, torch.float64)
        for row in range(4):
            scale = exact["y"][row].abs().max().item()
            assert (got["y"][row] - exact["y"][row]).abs().max() <= 1e-6 * scale
            assert_close("dx", got["dx"][row], exact["dx"][row], 1e-6)
        assert (exact["y"].abs().max() > 0) == (extrapolation != "zero")


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float, uniform: bool) -> None:
    case = Case(rows=18, i=18, g=2, s=2, uniform=uniform, **SMALL_TILES)
    inputs = make_inputs(case)
    clean = run(case, inputs)
    inputs["x"][3, 5] = bad
    got = run(case, inputs)
    others = torch.arange(18) != 3
    assert torch.equal(got["y"][others], clean["y"][others]) and not got["y"][3].isfinite().any()
    assert torch.equal(got["dx"][others], clean["dx"][others])
    assert torch.equal(got["dx"][3].isfinite(), torch.arange(18) != 5) or bad == float("inf")
    assert got["dx"][3, torch.arange(18) != 5].isfinite().all()


@pytest.mark.parametrize(
    "case",
    [Case(rows=37, i=19, o=18, s=2, **SMALL_TILES), Case(rows=40, dtype=BF16, extrapolation="linear", given=True)],
    ids=str,
)
def test_same_bits_again(case: Case) -> None:
    inputs = make_inputs(case)
    first, second = run(case, inputs), run(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_slots_in_a_loop_or_unrolled_give_the_same_bits() -> None:
    for extrapolation in ("zero", "linear"):
        case = Case(rows=20, extrapolation=extrapolation)
        x = make_inputs(case)
        call = KANCall(x["x"], None, x["base_weight"], x["spline_weight"], x["grid"], x["bias"], extrapolation, True)
        loop, unrolled = (launcher.forward(call, False, tiles=SMALL._replace(slots=slots))[0] for slots in (1, 9))
        assert_close(extrapolation, loop, unrolled, 3e-7)


@pytest.mark.parametrize("given", [False, True])
def test_only_what_is_asked_for(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = launcher._Launch.__call__

    def count(self: object, kernel: object, *rest: object, **more: object) -> None:
        launches.append(kernel)
        launch(self, kernel, *rest, **more)

    monkeypatch.setattr(launcher._Launch, "__call__", count)
    x = make_inputs(Case())
    activated = x["x"].tanh() if given else None
    call = KANCall(x["x"], activated, x["base_weight"], x["spline_weight"], x["grid"], None, "zero", True)
    both = backward(call, x["grad_y"])
    inputs_only, weights_only, nothing = (backward(call, x["grad_y"], *flags) for flags in ((1, 0), (0, 1), (0, 0)))
    assert len(launches) == 4
    for n in range(4):
        given_it, other = (inputs_only[n], weights_only[n])[:: 1 if n < 2 else -1]
        assert torch.equal(given_it, both[n]) and (both[n].numel() > 0) == (n != 1 or given)
        assert other is None and nothing[n] is None


@pytest.mark.parametrize("given", [False, True])
def test_no_rows(given: bool) -> None:
    case = Case(rows=0, given=given, bias=True)
    got = run(case, make_inputs(case))
    assert got["y"].shape == (0, 4) and got["dx"].shape == (0, 3)
    assert torch.equal(got["dbase"], torch.zeros(4, 3)) and torch.equal(got["dspline"], torch.zeros(4, 3, 8))


def test_nothing_of_the_size_of_the_bases_is_stored(buffers: list[Tensor]) -> None:
    case = Case(rows=1000, i=16, o=8, tiles=LARGE, back_tiles=(LARGE, LARGE))
    run(case, make_inputs(case))
    assert max(buffer.numel() - 2 * BAND for buffer in buffers) <= case.rows * case.i


@pytest.mark.parametrize("extrapolation", ["zero", "clamp", "linear"])
@pytest.mark.parametrize(("order", "knots"), KNOTS_THAT_COINCIDE)
def test_coinciding_knots(order: int, knots: list[float], extrapolation: str) -> None:
    case = Case(s=order, g=len(knots) - 1 - 2 * order, uniform=False, extrapolation=extrapolation)
    inputs = make_inputs(case)
    inputs["grid"].copy_(torch.tensor(knots))
    low, high = knots[order], knots[-order - 1]
    inputs["x"][:5] = torch.tensor([low, low + 0.2, high - 0.2, high, high + 0.7])[:, None]
    got, exact = run(case, inputs), expected(case, inputs, torch.float64)
    for name, value in exact.items():
        assert_close(name, got[name], value, 2e-6)


def test_high_orders_are_refused() -> None:
    x = make_inputs(Case(s=6))
    inputs = {"x": x["x"], "base_weight": x["base_weight"], "spline_weight": x["spline_weight"], "grid": x["grid"]}
    with pytest.raises(ValueError, match=r"order 6.*backend='auto'"):
        kan_linear(**inputs, spline_scaler=None, backend="triton")


def test_float32_products_follow_the_setting_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert launcher._precision(FP32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launcher._precision(FP32) == "tf32" and launcher._precision(BF16) == "ieee"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert launcher._precision(FP32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


GPUS = [
    Gpu(80, 108, 163 << 10),
    Gpu(86, 84, 99 << 10),
    Gpu(90, 132, 227 << 10),
    Gpu(100, 148, 227 << 10),
    Gpu(0, 304, 64 << 10),
]


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_tiles(gpu: Gpu) -> None:
    """Sizes are powers of two that a product accepts, weights fit into shared memory, and no part is empty."""
    for rows in (1, 100, 65536):
        for i, o in ((1, 1), (64, 64), (160, 320), (256, 256)):
            for bases, uniform, half, full in ((2, True, True, False), (8, True, True, False), (8, False, True, False),
                                               (8, True, False, True), (40, True, False, False)):  # fmt: skip
                job = Job(rows, i, o, bases, 1, uniform, half, full)
                plans = [
                    f(job, gpu)
                    for f in (launcher.forward_tiles, launcher.grad_input_tiles, launcher.grad_weights_tiles)
                ]
                for t in plans:
                    assert all(size >= 16 and size & (size - 1) == 0 for size in t[:3])
                    assert t.slots * t.ins * t.outs * (2 if half else 4) * t.stages < gpu.shared or t is plans[2]
                assert plans[0].slots in (1, 1 + bases) and plans[1].slots == 1 and plans[2].slots <= 3
                assert 1 <= plans[2].splits <= max(1, rows // 8)
    many = Job(65536, 64, 64, 8, 3, True, True, False)
    assert (launcher.forward_tiles(many, gpu).slots > 1) == (80 <= gpu.architecture < 100)


@pytest.mark.parametrize("name", [name for name in LAYER_FILES if name.startswith("kan")])
def test_layer_of_the_original(name: str) -> None:
    check_layer(name, "triton")


def test_enough_cases() -> None:
    assert len(CASES) >= 45 and len({str(case) for case in CASES}) == len(CASES)
