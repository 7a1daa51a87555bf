"""cross_selective_scan along walks and under masks, against a recurrence over the sequence of each direction."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import assert_close, gradients, relative_l2, says
from kan_mamba_layers import cross_selective_scan, export_onnx, resolve, selective_scan, walks
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.orders import by_keys
from kan_mamba_layers.walks import Walks, walk
from ops.selective_scan.calls import Inputs, image_inputs, normal, operator_inputs

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("reference", "chunked", "cpu")
OPS = torch.ops.kan_mamba_layers
SHUFFLED = torch.stack([torch.randperm(35, generator=torch.Generator().manual_seed(k)) for k in range(3)])
CASES = {
    "cross": walks.cross(5, 7),
    "snake": walks.snake(5, 7),
    "diagonal": walks.diagonal(5, 7),
    "windows": walks.windows(5, 7, (2, 3)),
    "strided": walks.strided(5, 7, 2),
    "hilbert": walks.hilbert(5, 7),
    "volume": walks.volume(3, 2, 6),
    "bidirectional": walks.bidirectional(35),
    "own": walks.from_order(SHUFFLED, (5, 7)),
    "sum": walks.snake(4, 9) + walks.from_order(torch.arange(36).view(2, 18).T.flatten(), (4, 9)),
}


def grid_inputs(
    of: Walks, b: int = 2, d: int = 3, r: int = 2, n: int = 2, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Arguments of `cross_selective_scan` for walks."""
    randn, k = normal(len(of)), len(of)
    inputs = {
        "x": randn(b, *of.grid, d),
        "x_proj_weight": randn(k, r + 2 * n, d) * d**-0.5,
        "dt_proj_weight": randn(k, d, r) * r**-0.5,
        "dt_proj_bias": randn(k, d) - 1,
        "A_log": randn(k * d, n),
        "D": randn(k * d),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def some(of: Walks, b: int = 2) -> Tensor:
    """A mask that leaves out a third of the positions."""
    return torch.rand(b, *of.grid, generator=torch.Generator().manual_seed(1)) > 0.33


def on(of: Walks | None, mask: Tensor | None, backend: str) -> Callable[..., Tensor]:
    return partial(cross_selective_scan, walks=of, mask=mask, backend=backend)


def recurrence(of: Walks, mask: Tensor | None) -> Callable[..., Tensor]:
    """The definition: each image and direction by itself, along the sequence without the masked positions."""

    def function(
        x: Tensor, x_proj_weight: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A_log: Tensor, D: Tensor
    ) -> Tensor:
        (_, d, r), n = dt_proj_weight.shape, A_log.shape[1]
        images = []
        for i, image in enumerate(x.flatten(1, -2)):  # l d
            counts = torch.ones(len(image), dtype=torch.bool) if mask is None else mask[i].flatten()
            total = torch.zeros_like(image)
            for direction, order in enumerate(of.orders):
                mine = slice(direction * d, direction * d + d)
                A, h = -A_log[mine].exp(), image.new_zeros(d, n)
                for p in order[counts[order]]:
                    low, B, C = (x_proj_weight[direction] @ image[p]).split([r, n, n])
                    step = F.softplus(dt_proj_weight[direction] @ low + dt_proj_bias[direction])
                    h = torch.exp(step[:, None] * A) * h + (step * image[p])[:, None] * B
                    total = total.index_add(0, p[None], (h @ C + D[mine] * image[p])[None])
            images.append(total)
        return torch.stack(images).view(x.shape)

    return function


class TestAgainstTheRecurrence:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("name", CASES)
    def test_output_and_every_gradient(self, name: str, masked: bool) -> None:
        """Under the mask x is not finite."""
        of = CASES[name]
        inputs, mask = grid_inputs(of), some(of) if masked else None
        expected, expected_grads = gradients(recurrence(of, mask), inputs)
        if mask is not None:
            inputs["x"] = torch.where(mask[..., None], inputs["x"], torch.tensor([torch.nan, torch.inf, 1e300]))
        for backend in BACKENDS:
            out, grads = gradients(on(of, mask, backend), inputs)
            assert_close(f"{backend} out", out, expected, 1e-12)
            for key, grad in grads.items():
                assert_close(f"{backend} d{key}", grad, expected_grads[key], 1e-12)
            if mask is not None:
                assert not out[~mask].any() and not grads["x"][~mask].any()

    @pytest.mark.parametrize("of", [walks.hilbert(9, 11), walks.volume(3, 5, 7), walks.cross(9, 11)], ids=repr)
    def test_single_precision(self, of: Walks) -> None:
        inputs, mask = grid_inputs(of, 2, 20, 2, 4, torch.float32), some(of)
        out, grads = gradients(on(of, mask, "cpu"), inputs)
        expected, expected_grads = gradients(on(of, mask, "reference"), {k: v.double() for k, v in inputs.items()})
        assert relative_l2(out, expected) < 2e-7
        assert all(relative_l2(grad, expected_grads[key]) < 2e-6 for key, grad in grads.items())

    @pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
    def test_any_number_of_directions_on_any_number_of_threads(
        self, count: int, set_threads: Callable[[int], None]
    ) -> None:
        of = walks.from_order(torch.stack([torch.randperm(40) for _ in range(count)]))
        inputs = grid_inputs(of, 1, 17)
        expected, expected_grads = gradients(on(of, None, "reference"), inputs)
        for threads in (2, 3, 4, 8):
            set_threads(threads)
            out, grads = gradients(on(of, None, "cpu"), inputs)
            assert_close("out", out, expected, 1e-12)
            for key, grad in grads.items():
                assert_close(f"d{key}", grad, expected_grads[key], 1e-12)


def along(inputs: Inputs, k: int, order: Tensor) -> Tensor:  # b l d
    """Direction k by the scan of sequences, in the order of the positions."""
    x, d = inputs["x"].flatten(1, -2)[:, order], inputs["x"].shape[-1]  # b l d
    n, r = inputs["A_log"].shape[1], inputs["dt_proj_weight"].shape[2]
    low, B, C = (x @ inputs["x_proj_weight"][k].T).split([r, n, n], -1)
    y = selective_scan(
        x.mT,
        (low @ inputs["dt_proj_weight"][k].T).mT,
        -inputs["A_log"][k * d : k * d + d].exp(),
        B.mT,
        C.mT,
        inputs["D"][k * d : k * d + d],
        delta_bias=inputs["dt_proj_bias"][k],
        delta_softplus=True,
    )
    return y.mT[:, order.argsort()]


@pytest.mark.parametrize("backend", BACKENDS)
class TestIdentities:
    def test_a_volume_is_six_sequences(self, backend: str) -> None:
        d, h, w = 2, 3, 4
        inputs = grid_inputs(walks.volume(d, h, w))
        axes = torch.arange(d * h * w).view(d, h, w)
        orders = [axes, axes.permute(1, 2, 0), axes.permute(2, 0, 1)]
        orders = [order.flatten() for order in orders] + [order.flatten().flip(0) for order in orders]
        expected = sum(along(inputs, k, order) for k, order in enumerate(orders))
        out = on(walks.volume(d, h, w), None, backend)(**inputs)
        assert_close("out", out.flatten(1, -2), expected, 1e-12)

    def test_bidirectional_is_two_sequences(self, backend: str) -> None:
        inputs, forwards = grid_inputs(walks.bidirectional(40)), torch.arange(40)
        expected = along(inputs, 0, forwards) + along(inputs, 1, forwards.flip(0))
        assert_close("out", on(walks.bidirectional(40), None, backend)(**inputs), expected, 1e-12)

    def test_cross_is_no_walks(self, backend: str) -> None:
        inputs = image_inputs(2, 5, 7, dtype=torch.float64)
        assert torch.equal(on(walks.cross(5, 7), None, backend)(**inputs), on(None, None, backend)(**inputs))
        table = walks.from_order(walks.cross(5, 7).orders, (5, 7))
        assert_close("out", on(table, None, backend)(**inputs), on(None, None, backend)(**inputs), 1e-13)

    @pytest.mark.parametrize("kind", [walks.snake, walks.hilbert, partial(walks.strided, step=2)])
    def test_transposing_exchanges_rows_and_columns(self, kind: Callable[[int, int], Walks], backend: str) -> None:
        inputs = grid_inputs(kind(5, 6))
        out = on(kind(5, 6), None, backend)(**inputs)
        swapped = {k: v.unflatten(0, (4, -1))[[1, 0, 3, 2]].flatten(0, 1) for k, v in inputs.items() if k != "x"}
        turned = on(kind(6, 5), None, backend)(x=inputs["x"].transpose(1, 2), **swapped)
        assert_close("out", turned.transpose(1, 2), out, 1e-12)

    def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_leaves_nothing(self, backend: str) -> None:
        of = CASES["snake"]
        inputs = grid_inputs(of)
        every = torch.ones(2, *of.grid, dtype=torch.bool)
        assert torch.equal(on(of, every, backend)(**inputs), on(of, None, backend)(**inputs))
        out, grads = gradients(on(of, ~every, backend), inputs)
        assert not out.any() and not any(grad.any() for grad in grads.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_same_bits_again(self, dtype: torch.dtype, backend: str) -> None:
        of = CASES["sum"]
        inputs, mask = grid_inputs(of, dtype=dtype), some(of)
        torch.use_deterministic_algorithms(True)
        try:
            (out, grads), (again, grads_again) = (gradients(on(of, mask, backend), inputs) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        assert out.dtype == dtype and torch.equal(out, again)
        assert all(torch.equal(grads[key], grads_again[key]) for key in grads)


class TestDerivatives:
    def test_second_derivatives(self) -> None:
        of = walks.bidirectional(3)
        inputs = tuple(v.requires_grad_() for v in grid_inputs(of, 1, 1, 1, 1).values())
        mask = torch.tensor([[True, False, True]])
        for backend in ("reference", "chunked"):
            function = on(of, mask, backend)
            assert torch.autograd.gradgradcheck(lambda *v, function=function: function(*v), inputs)

    def test_functional_transforms(self) -> None:
        """The first use of a table may be inside a transform, or in inference mode; the next is not."""
        inputs = grid_inputs(walks.snake(3, 13))

        def loss(x: Tensor, of: Walks, backend: str) -> Tensor:
            return on(of, None, backend)(**{**inputs, "x": x}).square().sum()

        x = inputs["x"].requires_grad_()
        fresh = [walks.snake(3, 13), walks.hilbert(3, 13), walks.strided(3, 13, 2)]
        (expected,) = torch.autograd.grad(loss(x, walks.from_order(fresh[0].orders, (3, 13)), "reference"), x)
        assert_close("grad", torch.func.grad(loss)(x.detach(), fresh[0], "cpu"), expected, 1e-12)
        each = torch.vmap(lambda x: on(fresh[0], None, "reference")(**{**inputs, "x": x[None]})[0])
        assert_close("vmap", each(x), on(fresh[0], None, "reference")(**inputs), 1e-12)
        torch.vmap(lambda x: on(fresh[1], None, "reference")(**{**inputs, "x": x[None]})[0])(x)
        with torch.inference_mode():
            on(fresh[2], None, "cpu")(**inputs)
        for of in fresh:
            assert torch.autograd.grad(loss(x, of, "cpu"), x)[0].isfinite().all()


class Walking(nn.Module):
    """Makes the walks of the size of its input."""

    def __init__(self, kind: Callable[[int, int], Walks], backend: str = "cpu", masked: bool = False) -> None:
        super().__init__()
        self.kind, self.backend, self.masked = kind, backend, masked
        inputs = grid_inputs(kind(3, 4), dtype=torch.float32)
        self.weights = nn.ParameterList([v for k, v in inputs.items() if k != "x"])

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > 0 if self.masked else None
        of = self.kind(x.shape[1], x.shape[2])
        return cross_selective_scan(x, *self.weights, walks=of, mask=mask, backend=self.backend)


def joined(h: int, w: int) -> Walks:
    return walks.hilbert(h, w) + walks.windows(h, w, (2, 3))


OWN = walks.from_order(torch.arange(40).view(8, 5).T.flatten(), (5, 8)) + walks.snake(5, 8)


class Fixed(Walking):
    """Has walks of one size."""

    def __init__(self) -> None:
        super().__init__(lambda h, w: walks.from_order([range(h * w)], (h, w)) + walks.snake(h, w))
        self.kind = lambda h, w: OWN


class TestCompilers:
    def test_one_dynamic_graph_serves_every_size(self) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        module = Walking(lambda h, w: walks.windows(h, w, (2, 3)), masked=True)
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for b, h, w in [(2, 5, 8), (3, 9, 7)]:
            x = torch.randn(b, h, w, 3, requires_grad=True)
            (out, grad), (expected, expected_grad) = (
                (y, torch.autograd.grad(y.square().sum(), x)[0]) for y in (compiled(x), module(x))
            )
            assert_close("out", out, expected, 1e-6)
            assert_close("gradient", grad, expected_grad, 1e-5)
        assert counter.frame_count <= 2

    def test_own_orders_compile(self) -> None:
        torch._dynamo.reset()
        x, module = torch.randn(2, 5, 8, 3), Fixed()
        assert_close("out", torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x), 1e-6)
        assert OWN.on(x.device) is OWN.on(x.device)

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_of_any_size(self, strict: bool) -> None:
        module = Walking(joined, masked=True).eval()
        shapes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}}
        program = torch.export.export(module, (torch.randn(2, 5, 8, 3),), dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for shape in [(1, 2, 3, 3), (3, 11, 4, 3)]:
            x = torch.randn(shape)
            assert_close("out", loaded(x), module(x), 1e-6)

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_of_own_orders(self, strict: bool) -> None:
        x, module = torch.randn(2, 5, 8, 3), Fixed().eval()
        assert_close("out", torch.export.export(module, (x,), strict=strict).module()(x), module(x), 1e-6)

    def test_own_orders_are_not_made_inside(self) -> None:
        torch._dynamo.reset()
        module = Walking(lambda h, w: walks.from_order([range(h * w)], (h, w)))
        with pytest.raises(Exception, match="make the walks outside"):
            torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(2, 3, 4, 3))

    def test_fake_tensors(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        of = walks.snake(4, 11) + walks.from_order(torch.arange(44).flip(0), (4, 11))
        inputs = grid_inputs(of)
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) for k, v in inputs.items()}
            assert on(of, None, "cpu")(**fakes).shape == inputs["x"].shape
        assert on(of, None, "cpu")(**inputs).isfinite().all()

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("module", [Walking(walks.hilbert), Fixed()])
    def test_a_trace_serves_images_of_its_size(self, module: nn.Module) -> None:
        x = torch.randn(2, 5, 8, 3)
        traced = torch.jit.trace(module, torch.randn_like(x))
        assert_close("out", traced(x), module(x), 1e-6)
        for h, w in [(8, 5), (10, 4), (5, 9), (1, 1)]:
            with pytest.raises(RuntimeError, match="size"):
                traced(torch.randn(2, h, w, 3))

    @pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
    def test_opcheck(self) -> None:
        of = walks.windows(5, 7, 2)
        tensors = {k: v.double() for k, v in operator_inputs(2, 35, 6, 3, 2, directions=4, coeffs=False).items()}
        inputs = [tensors[k].requires_grad_() if k in tensors else None for k in ScanCall._fields[:9]]
        sizes = (1, 35, True, of.on(torch.device("cpu")), some(of).flatten(1).double())
        torch.library.opcheck(OPS.selective_scan.default, (*inputs, *sizes, True, "cpu"))
        with torch.no_grad():
            y, last, saved = OPS.selective_scan(*inputs, *sizes, True, "cpu")
        wanted = [*(x is not None for x in inputs), False, False]
        arguments = (*inputs, *sizes, saved, torch.randn_like(y), torch.randn_like(last), wanted, "cpu")
        torch.library.opcheck(OPS.selective_scan_backward.default, arguments)
        torch.library.opcheck(OPS.walk_orders.default, ("windows", [5, 7], [2, 2], torch.device("cpu")))

    def test_the_operator_hands_out_copies(self) -> None:
        first = OPS.walk_orders("snake", [5, 8], [], torch.device("cpu")).zero_()
        assert not first.any() and torch.equal(walks.snake(5, 8).orders[:, -1], torch.tensor([39, 7, 0, 0]))

    @pytest.mark.parametrize("softplus", [False, True])
    def test_the_mask_of_a_sequence_with_given_steps(self, softplus: bool) -> None:
        """The operator beneath: steps under the mask and their gradients are 0."""
        inputs = operator_inputs(2, 40, 6, 3)
        inputs |= {k: inputs[k].abs() * 0.3 for k in ("delta", "dt_proj_bias")}
        mask = torch.rand(2, 40) > 0.3
        call = [inputs.get(k) for k in ScanCall._fields[:9]]
        y, last, saved = OPS.selective_scan(*call, 1, 40, softplus, None, mask.float(), True, "cpu")
        delta = (
            F.softplus(inputs["delta"] + inputs["dt_proj_bias"])
            if softplus
            else inputs["delta"] + inputs["dt_proj_bias"]
        )
        given = {**inputs, "delta": delta * mask[..., None, None], "dt_proj_bias": torch.zeros(1, 6)}
        call_of_given = [given.get(k) for k in ScanCall._fields[:9]]
        expected = OPS.selective_scan(*call_of_given, 1, 40, False, None, None, True, "cpu")
        assert_close("y", y, expected[0], 1e-6)
        assert_close("last", last, expected[1], 1e-6)
        grads = (torch.randn_like(y), torch.randn_like(last))
        wanted = [x is not None for x in call] + [False] * 2
        ours = OPS.selective_scan_backward(*call, 1, 40, softplus, None, mask.float(), saved, *grads, wanted, "cpu")
        theirs = OPS.selective_scan_backward(
            *call_of_given, 1, 40, False, None, None, expected[2], *grads, wanted, "cpu"
        )
        slope = torch.sigmoid(inputs["delta"] + inputs["dt_proj_bias"]) if softplus else torch.ones(2, 40, 1, 6)
        assert_close("ddelta", ours[3], theirs[3] * slope * mask[..., None, None], 1e-5)
        for i in (0, 1, 6, 7):
            assert_close(f"gradient {i}", ours[i], theirs[i], 1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "hilbert"])
def test_arithmetic_gives_the_table(name: str) -> None:
    assert torch.equal(by_keys(CASES[name], torch.device("cpu")), CASES[name].orders)


@pytest.mark.nightly
class TestOnnx:
    @pytest.fixture(autouse=True)
    def packages(self) -> None:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)

    def test_any_size_by_arithmetic(self, tmp_path: Path) -> None:
        kind = lambda h, w: walks.snake(h, w) + walks.windows(h, w, (2, 3))  # noqa: E731
        sizes = {0: "batch", 1: "height", 2: "width"}
        report = export_onnx(
            Walking(kind, masked=True).eval(), tmp_path / "m.onnx", torch.randn(2, 10, 7, 3), sizes=sizes
        )
        assert len(report.shapes) == 4 and report.error < 1e-5

    def test_one_size_by_a_table(self, tmp_path: Path) -> None:
        module, x = Walking(walks.hilbert).eval(), torch.randn(2, 5, 8, 3)
        assert export_onnx(module, tmp_path / "m.onnx", x, sizes={0: "batch"}).error < 1e-5
        with pytest.raises(ValueError, match=says("walks.hilbert", "leave height and width out")):
            export_onnx(module, tmp_path / "n.onnx", x, sizes={1: "height", 2: "width"})


def call(**changes: object) -> Tensor:
    inputs: dict = {**grid_inputs(walks.snake(3, 4)), "walks": walks.snake(3, 4), **changes}
    return cross_selective_scan(**inputs)


def resolved(**arguments: Tensor) -> str:
    return resolve("cross_selective_scan", "auto", torch.zeros(1, 2, 3), **arguments)


BAD = [
    (lambda: call(walks="snake"), TypeError, ("walks must be a Walks", "'snake'", r"walks.snake\(h, w\)")),
    (lambda: call(walks=walks.snake(4, 3)), ValueError, (r"\(3, 4\)", r"walks.snake\(4, 3\)", "sizes of x")),
    (lambda: call(walks=walks.bidirectional(12)), ValueError, (r"\(2, 3, 4, 3\)", r"\(12,\)")),
    (lambda: call(walks=walks.snake(3, 4) + walks.hilbert(3, 4)), ValueError, ("A_log must have shape", "24")),
    (lambda: call(x=torch.zeros(3, dtype=torch.int64)), TypeError, ("x must be", "int64")),
    (lambda: call(x=torch.zeros(())), ValueError, ("positions", r"\(\)")),
    (lambda: call(mask=torch.ones(2, 3, 4)), TypeError, ("mask must be a boolean tensor", "float32", r"mask.bool\(\)")),
    (lambda: call(mask=torch.ones(3, 4).bool()), ValueError, ("mask must have shape", r"\(2, 3, 4\)", r"\(3, 4\)")),
    (lambda: call(mask=[True]), TypeError, ("mask must be a boolean tensor", "list")),
    (lambda: call(walks=None, x=torch.zeros(2, 12, 3)), ValueError, ("x must have shape", "b, h, w, d")),
    (lambda: resolved(mask=torch.ones(1, 3).bool()), ValueError, ("mask must have shape", r"\(1, 2\)", r"\(1, 3\)")),
    (lambda: resolved(mask=torch.ones(1, 2)), TypeError, ("mask must be a boolean tensor", "float32")),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "parts"), BAD)
def test_bad_input(bad: Callable[[], object], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error, match=says(*parts)):
        bad()


def test_flops_count_every_direction() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    of, d, r, n = walks.volume(2, 3, 4), 3, 2, 2
    with FlopCounterMode(display=False) as counter:
        on(of, None, "cpu")(**grid_inputs(of, 2, d, r, n))
    assert counter.get_total_flops() == 2 * prod(of.grid) * 6 * (9 * d * n + 2 * r * d + 2 * d * (r + 2 * n))


def test_cross_makes_no_table() -> None:
    of = walks.cross(6, 11)
    on(of, None, "cpu")(**grid_inputs(of))
    assert (of, torch.device("cpu")) not in walk._TABLES


def test_walks_made_in_inference_mode_train_under_a_compiler() -> None:
    with torch.inference_mode():
        of = walks.from_order([[0, 2, 1, 3], [3, 1, 0, 2]])
    given = grid_inputs(of)
    given["x"].requires_grad_()
    torch.compile(lambda: cross_selective_scan(**given, walks=of), backend="aot_eager")().sum().backward()
    assert given["x"].grad.isfinite().all()
