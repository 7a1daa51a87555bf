"""Run a compiled kernel on PyTorch's own threads."""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_in_forked_child = False


def _after_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def thread_count(tasks: int) -> int:
    """Number of threads to use for ``tasks`` tasks: at most PyTorch's, and one in a forked process.

    OpenMP's threads do not survive a fork: a child process would wait for them for ever.
    """
    return 1 if _in_forked_child else max(1, min(torch.get_num_threads(), tasks))


def run_threads(function: Callable[[int], None], argument: int, threads: int) -> None:
    """Call ``function(argument)`` once on each of ``threads`` threads at the same time, without the GIL.

    PyTorch's OpenMP runtime lends its threads, so no second pool competes for the cores. Where that runtime lacks GCC's
    interface (macOS, Windows), plain threads do the work.
    """
    openmp = _openmp_parallel()
    if threads == 1:
        function(argument)
    elif openmp is not None:
        openmp(function, argument, threads, 0)
    else:
        others = [threading.Thread(target=function, args=(argument,)) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        function(argument)
        for thread in others:
            thread.join()


@lru_cache(maxsize=1)
def _openmp_parallel() -> Callable[[Any, int, int, int], None] | None:
    """``GOMP_parallel(function, argument, threads, flags)`` of the runtime that PyTorch itself is linked to."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
