"""The threads that run a kernel: PyTorch's own where its runtime lends them, otherwise plain ones."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest

from kan_mamba_layers.ops.simd import threads as simd_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pool", ["openmp", "plain"])
def test_every_thread_is_called(
    threads: int, pool: str, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if pool == "plain":
        monkeypatch.setattr(simd_threads, "_openmp_parallel", lambda: None)
    set_threads(threads)
    together, seen = threading.Barrier(threads), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def function(argument: int) -> None:
        together.wait(60)  # breaks unless all of them are here at the same time
        seen.append((argument, threading.get_ident()))

    simd_threads.run_threads(function, 12345, threads)
    assert [argument for argument, _ in seen] == [12345] * threads
    assert len({thread for _, thread in seen}) == threads


def test_number_of_threads(set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(4)
    assert [simd_threads.thread_count(tasks) for tasks in (0, 1, 3, 4, 100)] == [1, 1, 3, 4, 4]
    monkeypatch.setattr(simd_threads, "_in_forked_child", True)
    assert simd_threads.thread_count(100) == 1
