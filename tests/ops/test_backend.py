"""`resolve` names the backend that runs: each rule, through `resolve` and the op, and random calls on the CPU.

No GPU is needed: `OnGpu` is a CPU tensor that claims to be on a GPU. Every entry to a backend is recorded, and the
entries that need a GPU are replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import kan_mamba_layers as kml
from helpers import fresh_process, says
from kan_mamba_layers import resolve
from kan_mamba_layers.ops import backend as choice
from kan_mamba_layers.ops import limits, subclasses
from kan_mamba_layers.ops.kan_linear.call import KANCall
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from ops.kan_linear.calls import kan_inputs
from ops.selective_scan.calls import Inputs, image_inputs, line_inputs

OPS: dict[str, Callable[..., Tensor]] = {
    name: getattr(kml, name) for name in ("selective_scan", "cross_selective_scan", "kan_linear")
}
SCANS = sys.modules["kan_mamba_layers.ops.selective_scan"]
KAN = sys.modules["kan_mamba_layers.ops.kan_linear"]
MANY = 1 << 20
ON_CPU = "cpu" if choice._HAS["numba"] else "chunked"  # what "auto" takes there


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.as_subclass(OnGpu).requires_grad_(v.requires_grad) for k, v in inputs.items()}


def scan_inputs(dtype: torch.dtype = torch.float32, **changes: object) -> Inputs:
    """Signals in `dtype`, everything else in float32."""
    inputs = line_inputs(**{"length": 5, "skip": False, **changes})
    return {k: v.to(dtype) if k in ("u", "delta") else v for k, v in inputs.items()}


cross_inputs = partial(image_inputs, b=1, w=2, d=4, r=1, n=3, weight_dtype=torch.float32)


def kan_call(*, learned_grid: bool = False, **changes: object) -> Inputs:
    inputs = kan_inputs(**{"rows": 5, **changes})
    inputs["grid"].requires_grad_(learned_grid)
    return inputs


MAKE = {"selective_scan": scan_inputs, "cross_selective_scan": cross_inputs, "kan_linear": kan_call}


def answer(op: str, backend: str, inputs: dict[str, Tensor]) -> str:
    """What `resolve` answers, given all tensors of a call."""
    x, *others = inputs
    return resolve(op, backend, inputs[x], **{name: inputs[name] for name in others})


class Entries(list):
    """The backends that were entered, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stand_in: bool = False) -> None:
        """With `stand_in`, a plain backend or zeros replace what a fused backend would compute."""
        scans, fused_scan = dict(SCANS._SCANS), SCANS.fused_scan
        reference, fused_kan = KAN.reference.kan_linear, KAN.fused_kan_linear

        def plain(name: str) -> Callable[..., object]:
            return lambda *inputs: self.append(name) or scans[name](*inputs)

        def scan(call: ScanCall, backend: str) -> object:
            self.append(backend)
            if not stand_in:
                return fused_scan(call, backend)
            return torch.zeros_like(call.u), call.u.new_zeros(len(call.u), *call.A.shape)

        def kan(call: KANCall, backend: str) -> object:
            self.append(backend)
            return fused_kan(call, "chunked" if stand_in else backend)

        for name in scans:
            monkeypatch.setitem(SCANS._SCANS, name, plain(name))
        monkeypatch.setattr(SCANS, "fused_scan", scan)
        monkeypatch.setattr(KAN, "fused_kan_linear", kan)
        monkeypatch.setattr(KAN.reference, "kan_linear", lambda *inputs: self.append("reference") or reference(*inputs))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Entries:
    """Pretends that Triton is installed, and answers in its place."""
    monkeypatch.setitem(choice._HAS, "triton", True)
    monkeypatch.setattr(subclasses, "_PLAIN", subclasses._PLAIN | {OnGpu})
    return Entries(monkeypatch, stand_in=True)


class Rule(NamedTuple):
    """A call on a GPU, the backend that "auto" takes, and what the error of Triton says (empty if Triton runs it)."""

    op: str
    changes: dict[str, object]
    auto: str
    against: tuple[str, ...] = ()


RULES = [
    Rule("selective_scan", {}, "triton"),
    Rule("selective_scan", {"B": "bgnl"}, "triton"),
    Rule("selective_scan", {"dtype": torch.bfloat16}, "triton"),
    Rule("selective_scan", {"dtype": torch.float64}, "chunked", ("x is float64",)),
    Rule("selective_scan", {"B": "dn"}, "chunked"),
    Rule("selective_scan", {"C": "dn"}, "chunked"),
    Rule("selective_scan", {"n": 1024}, "triton"),
    Rule("selective_scan", {"n": 1025}, "chunked", ("A has 1025 states", "up to 1024")),
    Rule("selective_scan", {"n": 0}, "chunked"),
    Rule("selective_scan", {"d": 0}, "chunked"),
    Rule("cross_selective_scan", {}, "triton"),
    Rule("cross_selective_scan", {"dtype": torch.float16}, "triton"),
    Rule("cross_selective_scan", {"dtype": torch.float64}, "chunked", ("x is float64",)),
    Rule("cross_selective_scan", {"n": 1025}, "chunked", ("A_log has 1025 states", "up to 1024")),
    Rule("cross_selective_scan", {"n": 0}, "chunked"),
    Rule("cross_selective_scan", {"r": 0}, "chunked"),
    Rule("cross_selective_scan", {"d": 0}, "chunked"),
    Rule("kan_linear", {}, "triton"),
    Rule("kan_linear", {"dtype": torch.bfloat16}, "triton"),
    Rule("kan_linear", {"dtype": torch.float64}, "chunked", ("x is float64",)),
    Rule("kan_linear", {"s": 5}, "triton"),
    Rule("kan_linear", {"s": 6}, "chunked", ("grid and spline_weight", "order 6", "1 to 5")),
    Rule("kan_linear", {"learned_grid": True}, "reference", ("grid requires a gradient", "backend='reference'")),
    Rule("kan_linear", {"o": 0}, "reference"),
]


def name_of(rule: Rule) -> str:
    return " ".join([rule.op, *(f"{k}={v}" for k, v in rule.changes.items())]).replace("torch.", "")


class TestOnAGpu:
    @pytest.mark.parametrize("rule", RULES, ids=name_of)
    def test_auto(self, rule: Rule, gpu: Entries) -> None:
        inputs = on_gpu(MAKE[rule.op](**rule.changes))
        assert answer(rule.op, "auto", inputs) == rule.auto
        OPS[rule.op](**inputs)
        assert gpu == [rule.auto]

    @pytest.mark.parametrize("rule", RULES, ids=name_of)
    def test_triton_by_name(self, rule: Rule, gpu: Entries) -> None:
        inputs = on_gpu(MAKE[rule.op](**rule.changes))
        if not rule.against:
            OPS[rule.op](**inputs, backend="triton")
            expected = rule.auto if 0 in rule.changes.values() else "triton"  # sizes of zero are not for kernels
            assert gpu == [answer(rule.op, "triton", inputs)] == [expected]
            return
        text = says("backend='triton'", f"call of {rule.op}:", *rule.against, "use backend='auto'")
        with pytest.raises(ValueError, match=text):
            answer(rule.op, "triton", inputs)
        with pytest.raises(ValueError, match=text):
            OPS[rule.op](**inputs, backend="triton")
        assert gpu == [], "it raises before anything runs"

    @pytest.mark.parametrize("backend", ["chunked", "reference"])
    @pytest.mark.parametrize("rule", [rule for rule in RULES if rule.auto == "chunked"], ids=name_of)
    def test_the_plain_backends_run_what_triton_does_not(self, rule: Rule, backend: str, gpu: Entries) -> None:
        inputs = on_gpu(MAKE[rule.op](**rule.changes))
        assert answer(rule.op, backend, inputs) == backend
        OPS[rule.op](**inputs, backend=backend)
        assert gpu == [backend]

    def test_without_triton(self, gpu: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(choice._HAS, "triton", False)
        for op, make in MAKE.items():
            assert answer(op, "auto", on_gpu(make())) == "chunked"

    @pytest.mark.parametrize(
        ("op", "x", "others", "name"),
        [
            # l d, and l g 2n with one group or with a group for each channel.
            ("selective_scan", (1, 2048, MANY), {"A": (2048, 4), "B": (1, 4, MANY), "C": (1, 4, MANY)}, "u"),
            ("selective_scan", (1, 8, MANY), {"A": (8, 1024), "B": (1, 1024, MANY), "C": (1, 1024, MANY)}, "u"),
            ("selective_scan", (1, 8, MANY), {"A": (8, 128), "B": (8, 128), "C": (1, 128, MANY)}, "u"),
            # 4 l d, and 4 l (r + 2n).
            ("cross_selective_scan", (1, 8, MANY // 8, 512), {"dt_proj_weight": (4, 512, 2), "A_log": (2048, 3)}, "x"),
            ("cross_selective_scan", (1, 8, MANY // 8, 8), {"dt_proj_weight": (4, 8, 32), "A_log": (32, 240)}, "x"),
        ],
    )
    def test_addresses(
        self,
        op: str,
        x: tuple[int, ...],
        others: dict[str, tuple[int, ...]],
        name: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Each needs 2**31 addresses, one too many; raising the limit by one stands for one address less."""
        monkeypatch.setitem(choice._HAS, "triton", True)
        with FakeTensorMode():
            given = {k: torch.empty(shape, device="cuda") for k, shape in {"x": x, **others}.items()}
            constant = any(given[k].ndim == 2 for k in "BC" if k in given)
            assert resolve(op, "auto", **given) == "chunked"
            text = says("backend='triton'", f"{name} has 1048576 positions", "2147483648 addresses", r"2\*\*31 - 1")
            with pytest.raises(ValueError, match=text):
                resolve(op, "triton", **given)
            monkeypatch.setattr(limits, "ADDRESSES", 1 << 31)
            assert resolve(op, "triton", **given) == "triton"
            assert resolve(op, "auto", **given) == ("chunked" if constant else "triton")

    @pytest.mark.parametrize("sizes", [(1_048_561, 2), (2, 1_048_561)], ids=["outputs", "features"])
    def test_blocks(self, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        """CUDA launches 65,535 blocks along the second dimension, and the narrowest tile has 16 features or outputs."""
        monkeypatch.setitem(choice._HAS, "triton", True)
        o, i = sizes
        with FakeTensorMode():
            shapes = {"x": (3, i), "spline_weight": (o, i, 8), "grid": (i, 12)}
            given = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
            assert resolve("kan_linear", "auto", **given) == "chunked"
            with pytest.raises(ValueError, match=says("backend='triton'", f"{o} outputs of {i} features", "1048560")):
                resolve("kan_linear", "triton", **given)
            monkeypatch.setattr(limits, "BLOCKS", 65_536)
            assert resolve("kan_linear", "auto", **given) == "triton"

    def test_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernels of the step sizes are launched over the groups along the second dimension."""
        monkeypatch.setitem(choice._HAS, "triton", True)
        with FakeTensorMode():
            shapes = {"u": (1, 65_536, 1), "A": (65_536, 2), "B": (1, 65_536, 2, 1), "C": (1, 2, 1)}
            u, *others = (torch.empty(shape, device="cuda") for shape in shapes.values())
            given = dict(zip("ABC", others, strict=True))
            assert resolve("selective_scan", "auto", u, **given) == "chunked"
            with pytest.raises(ValueError, match=says("B and C have 65536 groups of channels", "up to 65535")):
                resolve("selective_scan", "triton", u, **given)

    def test_large_images_run(self, gpu: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond a limit that is lowered for the test."""
        for op, fitting, larger in (
            ("selective_scan", {"length": 9}, {"length": 10}),
            ("selective_scan", {"length": 9, "n": 1, "d": 6}, {"length": 10, "n": 1, "d": 6}),
            ("selective_scan", {"length": 4, "B": "bgnl"}, {"length": 5, "B": "bgnl"}),
            ("cross_selective_scan", {"h": 2, "w": 1}, {"h": 1, "w": 3}),
            ("cross_selective_scan", {"h": 2, "w": 1, "d": 7, "n": 2}, {"h": 1, "w": 3, "d": 7, "n": 2}),
        ):
            monkeypatch.setattr(limits, "ADDRESSES", 59)
            for changes, expected in ((fitting, "triton"), (larger, "chunked")):
                gpu.clear()
                inputs = on_gpu(MAKE[op](**changes))
                assert answer(op, "auto", inputs) == expected
                OPS[op](**inputs)
                assert gpu == [expected]

    def test_few_arguments_apply_few_rules(self, gpu: Entries) -> None:
        inputs = on_gpu(scan_inputs(n=1025))
        u, A, B = inputs["u"], inputs["A"], inputs["B"]
        assert resolve("selective_scan", "auto", u) == "triton"
        assert resolve("selective_scan", "auto", u, B=B, C=B) == "triton"
        assert resolve("selective_scan", "auto", u, A=A) == "chunked"
        assert resolve("selective_scan", "auto", u, A=A, B=B, D=None) == "chunked"
        inputs = on_gpu(cross_inputs(n=1025))
        assert resolve("cross_selective_scan", "auto", inputs["x"]) == "triton"
        assert resolve("cross_selective_scan", "auto", inputs["x"], A_log=inputs["A_log"]) == "chunked"
        assert resolve("cross_selective_scan", "auto", inputs["x"], dt_proj_weight=inputs["dt_proj_weight"]) == "triton"
        inputs = on_gpu(kan_call(s=6))
        assert resolve("kan_linear", "auto", inputs["x"], grid=inputs["grid"]) == "triton"
        assert resolve("kan_linear", "auto", inputs["x"], spline_weight=inputs["spline_weight"]) == "triton"


class TestArguments:
    @pytest.mark.parametrize("op", OPS)
    def test_names_are_those_of_the_op(self, op: str) -> None:
        inputs = MAKE[op]()
        assert answer(op, "auto", inputs) == ON_CPU
        x = next(iter(inputs.values()))
        assert resolve(op, "auto", x, **dict.fromkeys(choice._TENSORS[op])) == ON_CPU, "None is not given"
        with pytest.raises(TypeError, match=says(op, "no tensor argument 'weight'", list(inputs)[-1])):
            resolve(op, "auto", x, weight=x)

    def test_values_are_tensors(self) -> None:
        x = torch.zeros(2, 3)
        with pytest.raises(TypeError, match=says("grid must be a torch.Tensor", "list")):
            resolve("kan_linear", "auto", x, grid=[0.0, 1.0])
        with pytest.raises(TypeError, match=says("bias must", "int64")):
            resolve("kan_linear", "auto", x, bias=torch.zeros(3, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("op", "name", "bad"),
        [
            ("selective_scan", "u", torch.zeros(2, 4)),
            ("selective_scan", "A", torch.zeros(4)),
            ("cross_selective_scan", "x", torch.zeros(3, 4)),
            ("cross_selective_scan", "dt_proj_weight", torch.zeros(4, 4)),
            ("cross_selective_scan", "A_log", torch.zeros(16)),
            ("kan_linear", "spline_weight", torch.zeros(4, 3)),
            ("kan_linear", "grid", torch.zeros(14)),
        ],
    )
    def test_shapes(self, op: str, name: str, bad: Tensor, gpu: Entries) -> None:
        with pytest.raises(ValueError, match=says(f"{name} must have shape", str(tuple(bad.shape))[1:-1])):
            answer(op, "auto", on_gpu({**MAKE[op](), name: bad}))


@pytest.mark.parametrize("groups", [(1, 1), (2, 3), (4, 6), (2, 4), (12, 5)])
def test_the_coarsest_grouping(groups: tuple[int, int]) -> None:
    """The fewest groups into which those of B and of C can both be divided."""
    B, C = (torch.empty(1, number, 2, 7) for number in groups)
    fewest = next(number for number in range(1, 61) if all(number % count == 0 for count in groups))
    assert limits.count_groups(B, C, 60) == fewest
    assert limits.count_groups(B[0, 0], C, 60) == limits.count_groups(B, C[0, 0], 60) == 60


class TestOnTheCpu:
    def test_a_grid_that_learns_is_fast_where_no_gradient_is_wanted(self) -> None:
        inputs = kan_call(learned_grid=True)
        assert answer("kan_linear", "auto", inputs) == "reference"
        with torch.no_grad():
            assert answer("kan_linear", "auto", inputs) == ON_CPU
            expected = kml.kan_linear(**inputs, backend="reference")
            for backend in {ON_CPU, "chunked"}:
                torch.testing.assert_close(kml.kan_linear(**inputs, backend=backend), expected)

    @pytest.mark.parametrize("backend", ["auto", ON_CPU, "chunked"])
    def test_a_mapped_grid_that_learns(self, backend: str) -> None:
        """A batched tensor does not tell that it requires a gradient."""
        inputs = kan_call()
        grids = inputs.pop("grid").repeat(2, 1, 1).requires_grad_()

        def run(grid: Tensor) -> Tensor:
            return kml.kan_linear(**inputs, grid=grid, backend=backend)

        if backend != "auto":
            with pytest.raises(ValueError, match="grid requires a gradient"):
                torch.vmap(run)(grids)
            return
        (found,) = torch.autograd.grad(torch.vmap(run)(grids).square().sum(), grids)
        (expected,) = torch.autograd.grad(sum(run(grid).square().sum() for grid in grids), grids)
        torch.testing.assert_close(found, expected)

    def test_limits_of_triton_are_not_checked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They would tie compiled and exported graphs to their sizes."""

        def forbidden(*_: object) -> str:
            raise AssertionError

        for name in ("against_states", "against_addresses", "count_groups"):
            monkeypatch.setattr(limits, name, forbidden)
        for op, make in MAKE.items():
            for backend in ("auto", "cpu", "chunked", "reference"):
                answer(op, backend, make())

    @given(
        op=st.sampled_from(list(OPS)),
        backend=st.sampled_from(["auto", "auto", "cpu", "chunked", "reference"]),
        numba=st.booleans(),
        data=st.data(),
    )
    def test_the_answer_is_what_runs(self, op: str, backend: str, numba: bool, data: st.DataObject) -> None:
        sizes = {
            "selective_scan": {
                "b": st.integers(0, 2), "d": st.sampled_from([2, 4, 6]), "length": st.integers(1, 9),
                "n": st.integers(0, 4), "B": st.sampled_from(["dn", "bnl", "bgnl"]),
                "C": st.sampled_from(["dn", "bnl", "bgnl"]), "groups": st.integers(1, 2),
            },
            "cross_selective_scan": {
                "b": st.integers(0, 2), "h": st.integers(1, 4), "w": st.integers(1, 4), "d": st.integers(0, 5),
                "n": st.integers(0, 4), "r": st.integers(0, 2),
            },
            "kan_linear": {
                "rows": st.integers(0, 5), "i": st.integers(0, 3), "o": st.integers(0, 3), "g": st.integers(1, 5),
                "s": st.integers(1, 7), "learned_grid": st.booleans(),
            },
        }[op]  # fmt: skip
        dtype = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
        inputs = MAKE[op](**data.draw(st.fixed_dictionaries({**sizes, "dtype": dtype})))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(choice._HAS, "numba", numba and choice._HAS["numba"])
            entries = Entries(monkeypatch)
            try:
                expected = answer(op, backend, inputs)
            except ValueError:
                assert backend != "auto"
                with pytest.raises(ValueError, match=f"backend='{backend}'"):
                    OPS[op](**inputs, backend=backend)
                assert entries == []
                return
            OPS[op](**inputs, backend=backend)
            assert entries == [expected]
            small = any(0 in inputs[name].shape for name in choice._WEIGHTS[op])
            assert backend in ("auto", expected) or small


@pytest.mark.skipif(not choice._HAS["triton"], reason="triton is not installed")
def test_triton_in_its_interpreter_runs_only_on_request() -> None:
    printed = fresh_process(
        "import torch\n"
        "from kan_mamba_layers import kan_linear, resolve\n"
        "x, grid, weight = torch.zeros(2, 3), torch.linspace(-1, 1, 20).repeat(3, 1), torch.ones(4, 3, 13)\n"
        "call = {'spline_weight': weight, 'grid': grid}\n"
        "print(resolve('kan_linear', 'auto', x, **call), resolve('kan_linear', 'triton', x))\n"
        "for function in (lambda: resolve('kan_linear', 'triton', x, **call),\n"
        "                 lambda: kan_linear(x, weight[..., 0], weight, None, grid, backend='triton')):\n"
        "    try:\n"
        "        function()\n"
        "    except ValueError as error:\n"
        "        print('order 6' in str(error))\n",
        TRITON_INTERPRET="1",
    )
    assert printed.split() == [ON_CPU, "triton", "True", "True"]


def test_a_package_that_is_installed_but_broken_is_named(tmp_path: Path) -> None:
    """Nothing falls back silently, so "auto" raises too: the next backend would be many times slower."""
    for package in ("llvmlite", "numba", "triton"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('needs an older NumPy')")
    printed = fresh_process(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, kan_mamba_layers as kml\n"
        "from kan_mamba_layers.ops import backend\n"
        "backend._triton_interprets = lambda: True\n"
        "for make in (lambda name: kml.SS2D(4, backend=name), lambda name: kml.KANLinear(4, 2, backend=name)):\n"
        "    for name, package in (('auto', 'numba'), ('cpu', 'numba'), ('triton', 'triton')):\n"
        "        try:\n"
        "            make(name)(torch.zeros(1, 2, 3, 4))\n"
        "        except ImportError as error:\n"
        "            text = f'needs {package}, which is installed but cannot be imported (needs an older NumPy)'\n"
        "            print(text in str(error))\n"
    )
    assert printed.split() == 6 * ["True"]
