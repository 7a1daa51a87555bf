"""Results of the fused backends on the CPU: every size against the formula in float64, special values, threads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_budget, gradients, largest
from kan_mamba_layers import bspline_basis, kan_linear
from ops.kan_linear.calls import kan

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("poisoned_empty")

WIDE = torch.float64
EXTRAPOLATIONS = ("zero", "clamp", "linear")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=["float32", "float64"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "chunked"])
Inputs = dict[str, Tensor]


def knots(kind: str, i: int, g: int, s: int, draw: torch.Generator) -> Tensor:  # i g+2s+1
    """Ascending knots in float64; the kinds named "even" have spacings that are exactly equal."""
    steps = torch.arange(-s, g + s + 1, dtype=WIDE)  # 0 to g inside
    if kind == "even":
        return (0.5 * steps - 1).repeat(i, 1)
    if kind == "even far away":
        return (1000 + 0.125 * steps).repeat(i, 1)
    if kind == "even in their own ways":
        spacing = 2.0 ** torch.randint(-4, 2, (i, 1), generator=draw)
        return spacing * (torch.randint(-g, 1, (i, 1), generator=draw) + steps)
    uneven = 2 / g * steps - 1 + 1.4 / g * torch.rand(i, len(steps), generator=draw, dtype=WIDE)
    if kind == "some coincide":  # pairs inside, and most of those before and after the interval
        uneven[:, s + 1 : -s - 1 : 3] = uneven[:, s : -s - 2 : 3]
        uneven[:, :s] = uneven[:, s - 1 : s]
        uneven[:, -s:] = uneven[:, -s : uneven.shape[1] - s + 1]
    return uneven


KNOTS = ("even", "even in their own ways", "even far away", "uneven", "some coincide")


def make_inputs(
    rows: int, i: int, o: int, g: int = 5, s: int = 3, kind: str = "even", dtype: torch.dtype = WIDE, seed: int = 0
) -> Inputs:
    """Positions inside and outside the interval and, for degrees with slopes there, on knots; in float64.

    Knots and positions are chosen to break a kernel, as random ones seldom do. All values are representable in
    ``dtype``.
    """
    draw = torch.Generator().manual_seed(seed)
    grid = knots(kind, i, g, s, draw).to(torch.promote_types(dtype, torch.float32)).double()
    low, high = grid[:, s], grid[:, -s - 1]
    x = low + (high - low) * (0.5 + 0.5 * torch.randn(rows, i, generator=draw, dtype=WIDE))
    x = torch.where(torch.rand(x.shape, generator=draw) < 0.02, x * 100, x)  # far outside
    if s > 1 and not kind.startswith("some"):
        inner = grid.T[torch.randint(s + 1, g + s, x.shape, generator=draw), torch.arange(i)] if g > 1 else x
        x = torch.where(torch.rand(x.shape, generator=draw) < 0.1, inner, x)
    inputs = {
        "x": x,
        "base_weight": torch.randn(o, i, generator=draw, dtype=WIDE),
        "spline_weight": torch.randn(o, i, g + s, generator=draw, dtype=WIDE),
        "bias": torch.randn(o, generator=draw, dtype=WIDE),
    }
    return {**{k: v.to(dtype).double() for k, v in inputs.items()}, "grid": grid}


def sizes_of_terms(inputs: Inputs, extrapolation: str, uniform: bool) -> dict[str, float]:
    """For the output and each gradient, the largest sum of absolute terms, weighted as in `gradients`."""
    s = inputs["grid"].shape[1] - 1 - inputs["spline_weight"].shape[2]
    x = inputs["x"].clone().requires_grad_()
    bases = bspline_basis(x, inputs["grid"], s, extrapolation=extrapolation, uniform=uniform)  # rows i g+s
    ones = torch.ones_like(bases[..., 0])
    slopes = [torch.autograd.grad(basis, x, ones, retain_graph=True)[0].abs() for basis in bases.unbind(-1)]
    active = F.silu(x)
    (steep,) = torch.autograd.grad(active.sum(), x)
    shape = (len(x), len(inputs["bias"]))
    grad = (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)) / 8).double().abs()
    base, splines = inputs["base_weight"].abs(), inputs["spline_weight"].abs()
    active, bases = active.detach().abs(), bases.detach().abs()
    return {
        "out": largest(active @ base.T + torch.einsum("bic,oic->bo", bases, splines) + inputs["bias"].abs()),
        "x": largest(
            grad @ base * steep.abs() + torch.einsum("bo,oic,bic->bi", grad, splines, torch.stack(slopes, -1))
        ),
        "base_weight": largest(grad.T @ active),
        "spline_weight": largest(torch.einsum("bo,bic->oic", grad, bases)),
        "bias": largest(grad.sum(0)),
    }


def check(inputs: Inputs, dtype: torch.dtype, extrapolation: str, uniform: bool, *backends: str) -> None:
    """The output and every gradient: at most twice the formula's own error in this dtype, plus some roundings."""
    grid = inputs["grid"]
    wide = {k: v for k, v in inputs.items() if k != "grid"}
    narrow, own_grid = {k: v.to(dtype) for k, v in wide.items()}, grid.to(torch.promote_types(dtype, torch.float32))
    sizes = sizes_of_terms(inputs, extrapolation, uniform)
    plain, plain_grads = gradients(kan("reference", own_grid, extrapolation, uniform), narrow)
    # The oracle's knots are shifted to about 0, where the spacing of floats is negligible.
    origin = grid[0, 0].round() if grid[0, 0] > 100 else 0.0
    exact = kan("reference", grid - origin, extrapolation, uniform, base_activation=lambda x: F.silu(x + origin))
    true, true_grads = gradients(exact, {**wide, "x": wide["x"] - origin})
    bands = 32 if dtype == WIDE else 4  # in float64 the formula's own error is unknown
    for backend in backends:
        out, grads = gradients(kan(backend, own_grid, extrapolation, uniform), narrow)
        assert out.dtype == dtype
        assert_budget(f"{backend} out", out, plain, true, dtype, bands=bands, terms=sizes["out"])
        for name, grad in grads.items():
            assert grad.dtype == dtype
            assert_budget(
                f"{backend} d{name}", grad, plain_grads[name], true_grads[name], dtype, bands=bands, terms=sizes[name]
            )


# Each size is tested in a few of these ways, on every backend; together the sizes cover all ways.
WAYS = [(kind, extrapolation) for kind in KNOTS for extrapolation in EXTRAPOLATIONS]
BOTH = ("cpu", "chunked")


class TestSizes:
    @DTYPES
    @pytest.mark.parametrize(("kind", "extrapolation"), WAYS)
    def test_every_way(self, kind: str, extrapolation: str, dtype: torch.dtype) -> None:
        check(make_inputs(50, 17, 33, kind=kind, dtype=dtype), dtype, extrapolation, kind.startswith("even"), *BOTH)

    @DTYPES
    @pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 127, 128, 129, 300])
    def test_rows_around_the_block(self, rows: int, dtype: torch.dtype) -> None:
        for kind, extrapolation in WAYS[rows % 4 :: 4]:
            uniform = kind.startswith("even")
            check(make_inputs(rows, 5, 18, kind=kind, dtype=dtype), dtype, extrapolation, uniform, *BOTH)

    @DTYPES
    @pytest.mark.parametrize("i", [1, 15, 16, 17, 40])
    def test_features_around_the_vector(self, i: int, dtype: torch.dtype) -> None:
        for kind, extrapolation in WAYS[i % 4 :: 4]:
            uniform = kind.startswith("even")
            check(make_inputs(21, i, 7, kind=kind, dtype=dtype), dtype, extrapolation, uniform, *BOTH)

    @DTYPES
    @pytest.mark.parametrize("o", [1, 16, 17, 33, 48, 64, 65, 112, 160])
    def test_outputs_around_the_parts(self, o: int, dtype: torch.dtype) -> None:
        for kind, extrapolation in WAYS[o % 5 :: 5]:
            uniform = kind.startswith("even")
            check(make_inputs(35, 9, o, kind=kind, dtype=dtype), dtype, extrapolation, uniform, *BOTH)

    @DTYPES
    @pytest.mark.parametrize("g", [1, 2, 3, 10, 40])
    def test_intervals(self, g: int, dtype: torch.dtype) -> None:
        for kind, extrapolation in WAYS[g % 3 :: 3]:
            uniform = kind.startswith("even")
            check(make_inputs(60, 6, 20, g, kind=kind, dtype=dtype), dtype, extrapolation, uniform, *BOTH)

    # Compiling one degree for one dtype takes ten seconds.
    @pytest.mark.parametrize(("s", "dtype"), [(1, WIDE), (2, torch.float32), (4, WIDE), (5, WIDE)], ids=str)
    def test_degrees(self, s: int, dtype: torch.dtype) -> None:
        for kind in ("even", "even in their own ways", "uneven"):
            for g, extrapolation in ((5, "zero"), (1, "clamp"), (7, "linear")):
                inputs = make_inputs(40, 5, 20, g, s, kind, dtype)
                check(inputs, dtype, extrapolation, kind != "uneven", *BOTH)

    @DTYPES
    @pytest.mark.parametrize("registers", [4, 8, 16, 32])
    def test_parts_of_every_machine(self, registers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Outputs are processed 64, 32 or 16 at a time, with identical results."""
        from kan_mamba_layers.ops.kan_linear import cpu

        wide = make_inputs(45, 5, 120, dtype=dtype)
        inputs = {k: v.to(dtype) for k, v in wide.items()}
        grid = inputs.pop("grid")
        expected, expected_grads = gradients(kan("cpu", grid, "linear", True), inputs)
        monkeypatch.setattr(cpu, "vector_registers", lambda bits: registers)
        out, grads = gradients(kan("cpu", grid, "linear", True), inputs)
        assert torch.equal(out, expected)
        assert torch.equal(grads["base_weight"], expected_grads["base_weight"])
        assert torch.equal(grads["spline_weight"], expected_grads["spline_weight"])
        tolerance = 8 * torch.finfo(dtype).eps * sizes_of_terms(wide, "linear", True)["x"]
        assert largest(grads["x"] - expected_grads["x"]) <= tolerance, "sums over the outputs run in another order"

    @BACKENDS
    def test_no_rows(self, backend: str) -> None:
        inputs = make_inputs(0, 5, 6)
        grid = inputs.pop("grid")
        out, grads = gradients(kan(backend, grid, "zero", True), inputs)
        assert out.shape == (0, 6) and grads["x"].shape == (0, 5)
        assert all(not grad.any() and grad.isfinite().all() for grad in grads.values())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["even", "uneven"])
    def test_half_is_computed_in_single(self, dtype: torch.dtype, kind: str) -> None:
        """Equal to the bit: the operands of the products are not rounded to half precision."""
        inputs = make_inputs(45, 17, 33, kind=kind, dtype=dtype)
        grid = inputs.pop("grid").float()
        out, grads = gradients(kan("cpu", grid, "linear", kind == "even"), {k: v.to(dtype) for k, v in inputs.items()})
        single = gradients(kan("cpu", grid, "linear", kind == "even"), {k: v.float() for k, v in inputs.items()})
        assert out.dtype == dtype and torch.equal(out, single[0].to(dtype))
        assert all(grad.dtype == dtype for grad in grads.values())
        for name in ("x", "base_weight", "spline_weight"):
            assert torch.equal(grads[name], single[1][name].to(dtype)), name

    @BACKENDS
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_within_the_budget(self, dtype: torch.dtype, backend: str) -> None:
        for kind, extrapolation in zip(KNOTS, ("zero", "linear", "clamp", "linear", "zero"), strict=True):
            if kind != "even far away":  # too far for half precision
                inputs = make_inputs(45, 17, 33, kind=kind, dtype=dtype)
                check(inputs, dtype, extrapolation, kind.startswith("even"), backend)

    @BACKENDS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_any_activation_is_rounded_once(self, dtype: torch.dtype, backend: str) -> None:
        x = torch.linspace(-2, 2, 2000).to(dtype)[:, None]
        weights = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, 8, dtype=dtype)
        grid = torch.linspace(-2.2, 2.2, 12)[None]

        def activation(x: Tensor) -> Tensor:
            return torch.log(torch.exp(0.37 * x) + 1) * 0.73 - 0.11

        out = kan_linear(x, *weights, None, grid, base_activation=activation, backend=backend)
        exact = activation(x.double())
        assert largest(out - exact) <= (0.51 if dtype == torch.bfloat16 else 4) * torch.finfo(dtype).eps

    @BACKENDS
    @pytest.mark.parametrize("threads", [1, 2])
    def test_long_sums(self, backend: str, threads: int, set_threads: Callable[[int], None]) -> None:
        """Gradients of the weights sum 200,000 rows of terms of one sign."""
        set_threads(threads)
        inputs = make_inputs(200_000, 3, 5, dtype=torch.float32)
        grid = inputs.pop("grid")
        grad_y = torch.rand(200_000, 5)
        results = {}
        for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("exact", WIDE)):
            weights = [inputs[k].to(dtype).requires_grad_() for k in ("base_weight", "spline_weight")]
            options = {"uniform": True, "backend": "reference" if name == "exact" else name}
            y = kan_linear(inputs["x"].to(dtype), *weights, None, grid.to(dtype), **options)
            results[name] = torch.autograd.grad(y, weights, grad_y.to(dtype))
        for actual, plain, true in zip(results[backend], results["reference"], results["exact"], strict=True):
            assert_budget("gradient", actual, plain, true, torch.float32, bands=2)


class TestThreadsAndRows:
    @DTYPES
    @pytest.mark.parametrize(("rows", "i", "o"), [(5, 3, 2), (400, 10, 160), (515, 64, 33)])
    def test_any_number_of_threads(
        self, rows: int, i: int, o: int, dtype: torch.dtype, set_threads: Callable[[int], None]
    ) -> None:
        """Output and gradient of x do not depend on the number of threads, to the bit; repeating changes nothing."""
        inputs = {k: v.to(dtype) for k, v in make_inputs(rows, i, o, dtype=dtype).items()}
        grid = inputs.pop("grid")
        results = []
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            out, grads = gradients(kan("cpu", grid, "zero", True), inputs)
            again, grads_again = gradients(kan("cpu", grid, "zero", True), inputs)
            assert torch.equal(out, again) and all(torch.equal(v, grads_again[k]) for k, v in grads.items())
            results.append((out, grads))
        for out, grads in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(grads["x"], results[0][1]["x"])
            for name in ("base_weight", "spline_weight"):
                expected = results[0][1][name]
                tolerance = rows**0.5 * torch.finfo(dtype).eps * largest(expected)
                assert largest(grads[name] - expected) <= tolerance, "sums over the rows run in another order"

    @DTYPES
    @pytest.mark.parametrize("kind", ["even", "uneven"])
    def test_a_row_does_not_see_the_others(self, kind: str, dtype: torch.dtype) -> None:
        inputs = {k: v.to(dtype) for k, v in make_inputs(131, 20, 70, kind=kind, dtype=dtype).items()}
        grid, grad_y = inputs.pop("grid"), torch.randn(131, 70, dtype=dtype)

        def of(rows: slice) -> tuple[Tensor, Tensor]:
            x = inputs["x"][rows].clone().requires_grad_()
            y = kan("cpu", grid, "linear", kind == "even")(**{**inputs, "x": x})
            return y.detach(), *torch.autograd.grad(y, x, grad_y[rows])

        together = of(slice(None))
        for rows in (slice(0, 1), slice(1, 2), slice(14, 17), slice(127, 129), slice(130, 131), slice(3, 100)):
            for alone, all_ in zip(of(rows), together, strict=True):
                assert torch.equal(alone, all_[rows])


class TestSpecialValues:
    @BACKENDS
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    @pytest.mark.parametrize("kind", ["even", "uneven", "some coincide"])
    def test_nan_stays_in_its_row(self, kind: str, extrapolation: str, backend: str) -> None:
        inputs = {k: v.float() for k, v in make_inputs(150, 18, 20, kind=kind, dtype=torch.float32).items()}
        function = kan(backend, inputs.pop("grid"), extrapolation, kind == "even")
        clean, clean_grads = gradients(function, inputs)
        x = inputs["x"].clone()
        x[77, 5] = float("nan")
        out, grads = gradients(function, {**inputs, "x": x})
        others = torch.arange(150) != 77
        assert out[77].isnan().all() and torch.equal(out[others], clean[others])
        # As in a matrix product, NaN reaches the gradients of its own x and of its feature's weights.
        hit = torch.zeros_like(x, dtype=torch.bool)
        hit[77, 5] = True
        assert torch.equal(grads["x"].isnan(), hit)
        assert torch.equal(grads["x"][~hit], clean_grads["x"][~hit])
        features = torch.arange(18) != 5
        for name in ("base_weight", "spline_weight"):
            assert grads[name][:, 5].isnan().any()
            assert torch.equal(grads[name][:, features], clean_grads[name][:, features])

    @BACKENDS
    @pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e30, -1e30])
    @pytest.mark.parametrize("kind", ["even", "uneven"])
    def test_infinite_and_huge(self, kind: str, value: float, backend: str) -> None:
        """Other rows and features do not change, and the result is finite where the formula is."""
        inputs = {k: v.float() for k, v in make_inputs(40, 18, 20, kind=kind, dtype=torch.float32).items()}
        inputs["base_weight"] *= 0.01  # the product must not overflow
        grid, x = inputs.pop("grid"), inputs["x"].clone()
        x[7, 5] = value
        for extrapolation in EXTRAPOLATIONS:
            function = kan(backend, grid, extrapolation, kind == "even")
            clean, clean_grads = gradients(function, inputs)
            out, grads = gradients(function, {**inputs, "x": x})
            others = torch.arange(40) != 7
            assert torch.equal(out[others], clean[others])
            assert torch.equal(grads["x"][others], clean_grads["x"][others])
            features = torch.arange(18) != 5
            assert torch.equal(grads["spline_weight"][:, features], clean_grads["spline_weight"][:, features])
            if abs(value) < 1e31 and extrapolation != "linear":
                assert out.isfinite().all() and grads["x"].isfinite().all(), extrapolation
            if extrapolation == "zero" and value < 0 and abs(value) < 1e31:
                zero = {**inputs, "x": x.clone()}
                zero["x"][7, 5] = -1e3  # where the spline is 0 as well
                assert torch.equal(out, function(**zero))

    @DTYPES
    @BACKENDS
    def test_denormal(self, backend: str, dtype: torch.dtype) -> None:
        """Positions at 0 and next to it, on a grid that begins at 0."""
        tiny, eps = torch.finfo(dtype).smallest_normal / 16, torch.finfo(dtype).eps
        for kind, extrapolation in product(("even", "uneven"), EXTRAPOLATIONS):
            inputs = make_inputs(6, 1, 3, 4, kind=kind, dtype=dtype)
            grid = inputs.pop("grid").to(dtype)
            grid = grid - grid[:, 3:4]
            inputs = {k: v.to(dtype) for k, v in inputs.items()}
            inputs["x"] = torch.tensor([[0.0], [tiny], [-tiny], [-(tiny**0.5)], [tiny**0.5], [-1e-3]], dtype=dtype)
            (out, grads), (expected, true) = (
                gradients(kan(name, grid, extrapolation, kind == "even"), inputs) for name in (backend, "reference")
            )
            assert largest(out - expected) <= 8 * eps * largest(expected), (kind, extrapolation)
            assert largest(grads["x"] - true["x"]) <= 32 * eps * largest(true["x"]), (kind, extrapolation)

    @BACKENDS
    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_knots_that_all_coincide_at_the_ends(self, backend: str, extrapolation: str) -> None:
        """The clamped knots of the textbooks."""
        grid = torch.tensor([[0.0] * 4 + [0.25, 0.5, 0.75] + [1.0] * 4], dtype=WIDE)
        x = torch.tensor([-0.5, 0.0, 0.25, 0.3, 0.99, 1.5], dtype=WIDE)[:, None]
        inputs = {
            "x": x,
            "base_weight": torch.randn(2, 1, dtype=WIDE),
            "spline_weight": torch.randn(2, 1, 7, dtype=WIDE),
        }
        out, grads = gradients(kan(backend, grid, extrapolation, False), inputs)
        expected, true = gradients(kan("reference", grid, extrapolation, False), inputs)
        assert largest(out - expected) <= 1e-13 * largest(expected)
        for name, grad in grads.items():
            assert largest(grad - true[name]) <= 1e-13 * largest(true[name]), name
