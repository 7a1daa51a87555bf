"""The CPU backend of the scans among threads and processes: repeats, concurrency, forks, memory, missing Numba."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from helpers import assert_close, fresh_process, gradients, in_threads, says
from kan_mamba_layers import SS2D, cross_selective_scan, resolve
from kan_mamba_layers.ops import backend
from kan_mamba_layers.ops.simd import threads as simd_threads
from ops.selective_scan.calls import full_line_inputs, image_inputs, on_images, on_lines_with_state

pytest.importorskip("numba")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

THREADS = (1, 2, 4, 7)


# These cases divide different work among the threads: tiles, images, channels or groups.
CASES = {
    "one wide image": (on_images("cpu"), image_inputs(1, 9, 11, 150, 2, 3)),
    "one narrow image": (on_images("cpu"), image_inputs(1, 20, 17, 7, 2, 3)),
    "images": (on_images("cpu"), image_inputs(5, 7, 6, 20, 2, 3)),
    "one sequence": (on_lines_with_state("cpu"), full_line_inputs(1, 40, 70)),
    "groups": (on_lines_with_state("cpu"), full_line_inputs(2, 120, 40, groups=3, C="bgnl")),
}


class TestThreads:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("pool", ["openmp", "plain"])
    def test_any_number_gives_the_same(
        self, name: str, pool: str, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Up to rounding for different numbers of threads, to the bit for the same number."""
        if pool == "plain":  # as on systems where PyTorch's runtime does not lend its threads
            monkeypatch.setattr(simd_threads, "_openmp_parallel", lambda: None)
        function, inputs = CASES[name]
        set_threads(1)
        expected, expected_grads = gradients(function, inputs)
        for threads in THREADS:
            set_threads(threads)
            (out, grads), (again, grads_again) = gradients(function, inputs), gradients(function, inputs)
            assert_close(f"{threads} threads", out, expected, 1e-6)
            assert torch.equal(out, again)
            for key, grad in grads.items():
                assert_close(f"d{key}, {threads} threads", grad, expected_grads[key], 2e-6)
                assert torch.equal(grad, grads_again[key])

    @pytest.mark.parametrize("pool", ["openmp", "plain"])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_calls_from_several_threads(
        self, threads: int, pool: str, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if pool == "plain":
            monkeypatch.setattr(simd_threads, "_openmp_parallel", lambda: None)
        set_threads(threads)
        problems = [image_inputs(2, 9 + i, 8, 20 + i, 2, 3, seed=i) for i in range(4)]
        expected = [gradients(on_images("cpu"), x) for x in problems]
        wrong: list[str] = []
        start = threading.Barrier(4)

        def work(i: int) -> None:
            torch.set_num_threads(threads)  # OpenMP keeps this number per thread
            start.wait(60)
            for _ in range(15):
                out, grads = gradients(on_images("cpu"), problems[i])
                if not torch.equal(out, expected[i][0]):
                    wrong.append(f"out of {i}")
                wrong.extend(f"d{k} of {i}" for k, v in grads.items() if not torch.equal(v, expected[i][1][k]))

        in_threads(work, 4)
        assert not wrong


# A new process uses the backend on three threads and defines `check`, which uses it again and compares the results.
# PyTorch's own matrix products hang in a forked child that has not set the number of threads to 1 (workers of a
# DataLoader do); our kernels do not, so a sequence is scanned before that.
PREPARED = """
import os, signal, torch
from kan_mamba_layers import SS2D, cross_selective_scan, selective_scan

torch.set_num_threads(3)
torch.manual_seed(0)
layer = SS2D(24, d_state=4, backend="cpu")
images = torch.randn(4, 48, 48, 24)
u, delta, A, B = torch.randn(4, 32, 99), torch.rand(4, 32, 99), -torch.rand(32, 5), torch.randn(4, 5, 99)


def line():
    x = u.clone().requires_grad_()
    y = selective_scan(x, delta, A, B, B, backend="cpu")
    return y.detach(), *torch.autograd.grad(y.square().sum(), x)


def image():
    y = layer(images)
    return y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))


def same(actual, expected):
    return all(torch.allclose(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max())) for a, e in zip(actual, expected))


expected = line(), image()


def check():
    signal.alarm(60)  # ends a child that hangs
    sequences = same(line(), expected[0])
    torch.set_num_threads(1)
    return sequences and same(line(), expected[0]) and same(image(), expected[1])
"""


class TestProcesses:
    @needs_fork
    def test_fork_after_use(self) -> None:
        """A child computes repeatedly and forks again, and its parent continues."""
        printed = fresh_process(
            PREPARED + "if (child := os.fork()) == 0:\n"
            "    fine = check() and check()\n"
            "    if (grandchild := os.fork()) == 0:\n"
            "        os._exit(0 if check() else 1)\n"
            "    fine = fine and os.waitpid(grandchild, 0)[1] == 0\n"
            "    os._exit(0 if fine else 1)\n"
            "print(os.waitpid(child, 0)[1], check())\n"
        )
        assert printed == "0 True"

    @needs_fork
    def test_multiprocessing(self) -> None:
        printed = fresh_process(
            PREPARED + "import multiprocessing\n"
            "def work(queue):\n"
            "    queue.put(check())\n"
            "context = multiprocessing.get_context('fork')\n"
            "queue = context.Queue()\n"
            "children = [context.Process(target=work, args=(queue,), daemon=True) for _ in range(2)]\n"
            "for child in children: child.start()\n"
            "print([queue.get(timeout=70) for _ in children])\n"
        )
        assert printed == "[True, True]"

    @needs_fork
    def test_workers_of_a_data_loader(self) -> None:
        printed = fresh_process(
            PREPARED + "from torch.utils.data import DataLoader, Dataset\n"
            "class Scans(Dataset):\n"
            "    def __len__(self): return 6\n"
            "    def __getitem__(self, i):\n"
            "        signal.alarm(100)\n"
            "        with torch.no_grad(): return layer(images[i % 4 : i % 4 + 1])[0]\n"
            "loader = DataLoader(Scans(), 3, num_workers=2, multiprocessing_context='fork', timeout=120)\n"
            "out = torch.cat(list(loader))\n"
            "print(torch.allclose(out, expected[1][0][[0, 1, 2, 3, 0, 1]], atol=1e-5))\n"
        )
        assert printed == "True"

    @on_linux
    def test_memory(self) -> None:
        """Forward and backward of eight images of 128x128 with 32 channels; the saved states alone take 128 MiB."""
        printed = fresh_process(
            "import torch\n"
            "from kan_mamba_layers import cross_selective_scan\n"
            "torch.set_num_threads(2)\n"
            "def memory(key):\n"
            "    lines = open('/proc/self/status').read().splitlines()\n"
            "    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024\n"
            "def step(batch, side):\n"
            "    x = torch.randn(batch, side, side, 32, requires_grad=True)\n"
            "    weights = [torch.randn(4, 33, 32), torch.randn(4, 32, 1), torch.randn(4, 32) - 4]\n"
            "    weights += [torch.arange(1.0, 17).log().repeat(128, 1), torch.ones(128)]\n"
            "    weights = [w.requires_grad_() for w in weights]\n"
            "    cross_selective_scan(x, *weights, backend='cpu').sum().backward()\n"
            "step(2, 8)\n"
            "before = memory('VmRSS')\n"
            "try:\n"
            "    open('/proc/self/clear_refs', 'w').write('5')  # forget the peak, which compiling set\n"
            "except OSError:\n"
            "    pass\n"
            "step(8, 128)\n"
            "print(memory('VmHWM') - before)\n"
        )
        assert 128 <= float(printed) <= 260


class TestWithoutNumba:
    def test_auto_is_chunked_and_cpu_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(backend._HAS, "numba", False)
        inputs = image_inputs(1, 3, 4, 5)
        for op in ("selective_scan", "cross_selective_scan"):
            assert resolve(op, "auto", inputs["x"]) == "chunked"
        assert torch.equal(cross_selective_scan(**inputs), cross_selective_scan(**inputs, backend="chunked"))
        expected = says("backend='cpu'", "needs Numba", r"pip install numba", "backend='auto'")
        with pytest.raises(ValueError, match=expected):
            cross_selective_scan(**inputs, backend="cpu")
        with pytest.raises(ValueError, match=expected):
            SS2D(4, backend="cpu")(torch.randn(1, 3, 4, 4))

    def test_in_a_process_that_cannot_import_it(self) -> None:
        printed = fresh_process(
            "import sys\n"
            "sys.modules.update(dict.fromkeys(('numba', 'llvmlite')))\n"
            "import torch\n"
            "from kan_mamba_layers import SS2D, resolve, selective_scan\n"
            "x = torch.randn(1, 5, 6, 4)\n"
            "SS2D(4)(x).sum().backward()\n"
            "print(resolve('selective_scan', 'auto', x))\n"
            "try:\n"
            "    SS2D(4, backend='cpu')(x)\n"
            "except ValueError as error:\n"
            "    print('pip install numba' in str(error))\n"
        )
        assert printed.split() == ["chunked", "True"]
