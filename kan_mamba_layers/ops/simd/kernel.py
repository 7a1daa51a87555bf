"""How the Numba kernels are compiled, kept on disk and called.

A kernel is a C function of one address: that of a block of 64-bit integers that its threads share, with all sizes and
addresses of the call. The first fields of every block are those named here.
"""

import ctypes
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType

import numpy as np
import torch
from numba import cfunc, njit, types
from torch import Tensor

from kan_mamba_layers.ops.simd.threads import run_team, team_size
from kan_mamba_layers.ops.simd.vector import integer_field, integers, pointer_field, take_number

Entry = Callable[..., Callable[..., None]]
Fields = Mapping[str, Tensor | int | None]

# Counters, the number of tasks, and memory of each thread's own; a kernel's own fields begin after them.
NEXT_TASK, NEXT_THREAD, TASKS, SCRATCH, SCRATCH_BYTES, OWN_FIELDS = range(6)

size, array = integer_field, pointer_field
compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
# Becomes a part of its callers, and costs no compilation of its own.
inlined = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always")


@compiled
def own_scratch(call):
    """The address of this thread's own memory."""
    return size(call, SCRATCH) + take_number(integers(call), NEXT_THREAD) * size(call, SCRATCH_BYTES)


@compiled
def next_task(call):
    """The number of a task that nobody has taken; at least the number of tasks if none is left."""
    return take_number(integers(call), NEXT_TASK)


def run_kernel(
    kernel: Callable[[int], None], names: ModuleType, fields: Fields, tasks: int, scratch: int, dtype: torch.dtype
) -> None:
    """Write down the block of a call and let PyTorch's threads do its tasks.

    ``names`` holds the place of each field in the block, and ``FIELDS``, their number. Each thread has so many elements
    of ``scratch``.
    """
    if tasks == 0:
        return
    threads = team_size(tasks)
    memory = torch.empty(threads, scratch, dtype=dtype)
    block = np.zeros(names.FIELDS, np.int64)
    block[TASKS] = tasks
    block[SCRATCH], block[SCRATCH_BYTES] = memory.data_ptr(), memory.stride(0) * memory.element_size()
    for name, value in fields.items():
        block[getattr(names, name)] = value.data_ptr() if isinstance(value, Tensor) else value or 0
    run_team(kernel, block.ctypes.data, threads)


@cache
def c_function(
    entry: Entry, dtype: torch.dtype, sources: Sequence[ModuleType], *constants: int
) -> Callable[[int], None]:
    """``entry(number, *constants)`` as a C function, whose pointers are to elements of ``dtype``.

    Numba keeps the machine code on disk where it finds a folder that it can write to. It sees the values that a
    function closes over and the function's own file, but no file that it imports; so ``number`` stands for the text of
    all ``sources``.
    """
    element = {torch.float32: types.float32, torch.float64: types.float64}[dtype]
    build = partial(cfunc, types.void(types.CPointer(element)), error_model="numpy")
    number = _digest(sources)
    try:
        code = build(cache=True)(entry(number, *constants))
    except (RuntimeError, OSError, EOFError, UnpicklingError):  # there is no such folder, or what it holds is damaged
        code = build()(entry(number, *constants))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(code.address))
    function.code = code  # type: ignore[attr-defined]  # which it must not outlive
    return function


def _digest(sources: Sequence[ModuleType]) -> int:
    """A number that changes with the text of the modules, and of those that all kernels share."""
    shared = sorted(Path(__file__).parent.glob("*.py"))
    texts = (path.read_bytes() for path in [*shared, *(Path(str(module.__file__)) for module in sources)])
    return int.from_bytes(hashlib.sha256(b"".join(texts)).digest()[:7], "big")
