"""The CPU backend of kan_linear in its environment: memory, code on disk, forks, and calls from many threads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import fresh_process, gradients, in_threads, nan_filled_empty
from kan_mamba_layers.ops.simd import threads as simd_threads
from ops.kan_linear.calls import kan, kan_inputs

pytest.importorskip("numba")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Fenced:
    """Allocates tensors between walls of NaN, and checks that the walls are intact."""

    WALL = 96

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[Tensor, int]] = []

        def inside(make: Callable[..., Tensor], fill: float) -> Callable[..., Tensor]:
            def allocate(*arguments: object, **options: object) -> Tensor:
                plain = make(*arguments, **options)
                return self.copy(plain.fill_(fill)) if plain.is_floating_point() else plain

            return allocate

        monkeypatch.setattr(Tensor, "new_empty", inside(Tensor.new_empty, float("nan")))
        monkeypatch.setattr(Tensor, "new_zeros", inside(Tensor.new_zeros, 0.0))
        monkeypatch.setattr(torch, "empty", inside(torch.empty, float("nan")))
        monkeypatch.setattr(torch, "zeros", inside(torch.zeros, 0.0))

    def copy(self, x: Tensor) -> Tensor:
        """A copy of x between walls."""
        wide = torch.full((x.numel() + 2 * self.WALL,), float("nan"), dtype=x.dtype)
        self.all.append((wide, x.numel()))
        return wide[self.WALL : self.WALL + x.numel()].view(x.shape).copy_(x.detach())

    def stand(self) -> bool:
        return all(w[: self.WALL].isnan().all() and w[self.WALL + n :].isnan().all() for w, n in self.all)


class TestMemory:
    @DTYPES
    @pytest.mark.parametrize(
        ("rows", "i", "o"), [(17, 16, 16), (129, 32, 64), (128, 16, 112), (1, 3, 5), (130, 17, 33)]
    )
    @pytest.mark.parametrize("uniform", [True, False])
    def test_nothing_beyond_the_ends_is_read_or_written(
        self, rows: int, i: int, o: int, uniform: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Applies to inputs, results and each thread's scratch memory; some positions lie on no grid."""
        inputs = kan_inputs(rows, i, o, uniform=uniform, dtype=dtype)
        inputs["x"][0, 0], inputs["x"][-1, -1] = float("inf"), float("nan")
        grid, grad_y = inputs.pop("grid"), torch.randn(rows, o, dtype=dtype)

        def results(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
            leaves = {k: place(v).requires_grad_() for k, v in inputs.items()}
            y = kan("cpu", place(grid), "zero", uniform)(**leaves)
            return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), place(grad_y))]

        expected = results(torch.clone)
        with monkeypatch.context() as patch:
            fences = Fenced(patch)
            fenced = results(fences.copy)
        assert len(fences.all) > 10 and fences.stand()
        for actual, wanted in zip(fenced, expected, strict=True):
            assert torch.equal(actual.nan_to_num(7.5), wanted.nan_to_num(7.5))

    def test_nothing_unwritten_is_read(self) -> None:
        """Filling uninitialised memory with NaN does not change a bit of the results."""
        inputs = kan_inputs(37, 21, 35, uniform=False)
        function = kan("cpu", inputs.pop("grid"), "linear", False)
        plain = gradients(function, inputs)
        with nan_filled_empty():
            filled = gradients(function, inputs)
        assert torch.equal(plain[0], filled[0])
        assert all(torch.equal(plain[1][k], filled[1][k]) for k in plain[1])

    @on_linux
    @pytest.mark.parametrize("backend", ["cpu", "chunked"])
    def test_of_a_training_step(self, backend: str) -> None:
        """Output and gradient of x take 16 MiB each, the bases alone would take 128; the incoming gradient is given."""
        printed = fresh_process(
            "import torch\n"
            "from kan_mamba_layers import kan_linear\n"
            "torch.set_num_threads(1)\n"
            "def memory(key):\n"
            "    lines = open('/proc/self/status').read().splitlines()\n"
            "    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024 / 1e6\n"
            "grid = torch.linspace(-2.2, 2.2, 12).repeat(64, 1)\n"
            "weights = torch.randn(64, 64), torch.randn(64, 64, 8), torch.randn(64, 64)\n"
            "weights = [w.requires_grad_() for w in weights]\n"
            "def step(x, grad):\n"
            f"    kan_linear(x, *weights, grid, uniform=True, backend={backend!r}).backward(grad)\n"
            "step(torch.randn(300, 64, requires_grad=True), torch.randn(300, 64))\n"
            "x, grad = torch.randn(65536, 64, requires_grad=True), torch.randn(65536, 64)\n"
            "before = memory('VmRSS')\n"
            "try:\n"
            "    open('/proc/self/clear_refs', 'w').write('5')  # forget the peak, which compiling set\n"
            "except OSError:\n"
            "    pass\n"
            "step(x, grad)\n"
            "print(memory('VmHWM') - before)\n"
        )
        assert 33 <= float(printed) <= 50


@pytest.mark.parametrize("pool", ["openmp", "plain"])
def test_calls_from_several_threads(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if pool == "plain":  # as on systems where PyTorch's runtime does not lend its threads
        monkeypatch.setattr(simd_threads, "_openmp_parallel", lambda: None)
    monkeypatch.setattr(simd_threads, "thread_count", lambda tasks: max(1, min(3, tasks)))
    problems = [kan_inputs(200 + i, 20 + i, 30, uniform=i % 2 == 0, seed=i) for i in range(4)]
    functions = [kan("cpu", p.pop("grid"), "zero", i % 2 == 0) for i, p in enumerate(problems)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = [gradients(f, p) for f, p in zip(functions, problems, strict=True)]
    torch.set_num_threads(before)
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        torch.set_num_threads(2)  # OpenMP keeps this number per thread
        start.wait(60)
        for _ in range(15):
            out, grads = gradients(functions[i], problems[i])
            if not torch.equal(out, expected[i][0]):
                wrong.append(f"out of {i}")
            names = ("x", "base_weight", "spline_weight")
            wrong.extend(f"d{k} of {i}" for k in names if not torch.equal(grads[k], expected[i][1][k]))

    in_threads(work, 4)
    assert not wrong


@needs_fork
def test_workers_of_a_data_loader() -> None:
    """The parent has used the backend on three threads, and uses it again afterwards."""
    printed = fresh_process(
        "import signal, torch\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "from kan_mamba_layers import KANLinear\n"
        "torch.set_num_threads(3)\n"
        "layer, x = KANLinear(20, 24, backend='cpu'), torch.randn(4, 500, 20)\n"
        "def step(x):\n"
        "    x = x.clone().requires_grad_()\n"
        "    y = layer(x)\n"
        "    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.spline_weight])\n"
        "expected = [step(one) for one in x]\n"
        "class Steps(Dataset):\n"
        "    def __len__(self): return 6\n"
        "    def __getitem__(self, i):\n"
        "        signal.alarm(100)  # ends a child that hangs\n"
        "        return step(x[i % 4])\n"
        "loader = DataLoader(Steps(), None, num_workers=2, multiprocessing_context='fork', timeout=120)\n"
        "results = [*loader, step(x[0])]\n"
        "def same(actual, wanted):\n"
        "    return all(torch.allclose(a, w, rtol=1e-4, atol=1e-4) for a, w in zip(actual, wanted))\n"
        "print(all(same(r, expected[i]) for r, i in zip(results, [0, 1, 2, 3, 0, 1, 0])), len(results))\n"
    )
    assert printed == "True 7"


class TestCache:
    """The code of every kernel is reused from disk, including kernels that close over the degree."""

    CODE = (
        "import torch\n"
        "from kan_mamba_layers import kan_linear\n"
        "from kan_mamba_layers.ops.simd.kernel import c_function\n"
        "from kan_mamba_layers.ops.kan_linear import cpu\n"
        "calls = []\n"
        "def seen(*key):\n"
        "    calls.append(c_function(*key))\n"
        "    return calls[-1]\n"
        "cpu.c_function = seen\n"
        "def agree(degree, backward):\n"
        "    torch.manual_seed(degree)\n"
        "    tensors = torch.randn(9, 3), torch.randn(4, 3), torch.randn(4, 3, 4 + degree)\n"
        "    tensors = [x.requires_grad_(backward) for x in tensors]\n"
        "    grid = torch.linspace(-1, 1, 5 + 2 * degree).repeat(3, 1)\n"
        "    out, expected = (kan_linear(*tensors, None, grid, backend=b) for b in ('cpu', 'reference'))\n"
        "    if backward:\n"
        "        out, expected = (torch.cat([g.flatten() for g in torch.autograd.grad(y.sum(), tensors)])\n"
        "                         for y in (out, expected))\n"
        "    return torch.allclose(out, expected, atol=1e-5)\n"
        "def hits():\n"
        "    return {call.code.cache_hits for call in calls}\n"
    )

    def test_code_is_kept_on_disk(self, tmp_path: Path) -> None:
        code = self.CODE + "print(agree(1, True), hits(), len({*map(id, calls)}) >= 4)\n"
        assert fresh_process(code, NUMBA_CACHE_DIR=str(tmp_path)) == "True {0} True"
        assert list(tmp_path.rglob("*.nbc"))
        assert fresh_process(code, NUMBA_CACHE_DIR=str(tmp_path)) == "True {1} True"


def test_in_a_process_that_cannot_import_numba() -> None:
    printed = fresh_process(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('numba', 'llvmlite')))\n"
        "import torch\n"
        "from kan_mamba_layers import KANLinear, resolve\n"
        "x = torch.randn(5, 4)\n"
        "KANLinear(4, 3)(x).sum().backward()\n"
        "print(resolve('kan_linear', 'auto', x))\n"
        "try:\n"
        "    KANLinear(4, 3, backend='cpu')(x)\n"
        "except ValueError as error:\n"
        "    print('pip install numba' in str(error))\n"
    )
    assert printed.split() == ["chunked", "True"]
