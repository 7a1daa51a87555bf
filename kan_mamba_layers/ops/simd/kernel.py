"""How the Numba kernels are compiled, kept on disk and called.

A kernel is a C function of one address: that of a block of 64-bit integers that its threads share, with all sizes,
switches and addresses of the call. Inside a kernel they are attributes: ``call.height``, ``call.u``.
"""

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, config, njit, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr_generic, models, register_model
from torch import Tensor

from kan_mamba_layers.ops.simd.lanes import INT64, llvm_type
from kan_mamba_layers.ops.simd.threads import run_threads, thread_count
from kan_mamba_layers.ops.simd.vector import fetch_increment, integers

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT turns its compiler off")

Entry = Callable[..., Callable[..., None]]
Fields = dict[str, Tensor | int | None]

_OWN = ("next_task", "next_thread", "tasks", "scratch", "scratch_bytes")
_NEXT_TASK, _NEXT_THREAD = range(2)

compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
# Becomes a part of its callers, and costs no compilation of its own.
inlined = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always")


class Layout(NamedTuple):
    """Names of what a block holds."""

    numbers: tuple[str, ...]  # sizes and switches
    arrays: tuple[str, ...]  # addresses, 0 where the call has no such array


class Call(types.Type):
    """Numba's type of a block, whose arrays are of ``dtype``."""

    def __init__(self, layout: Layout, dtype: types.Float) -> None:
        self.numbers = (*_OWN, *layout.numbers)
        self.fields = (*self.numbers, *layout.arrays)
        self.dtype = dtype
        super().__init__(name=f"Call({' '.join(self.fields)}, {dtype})")


@register_model(Call)
class _CallModel(models.PrimitiveModel):
    def __init__(self, manager: Any, call: Call) -> None:
        super().__init__(manager, call, INT64.as_pointer())


@infer_getattr
class _CallAttributes(AttributeTemplate):
    key = Call

    def generic_resolve(self, call: Call, name: str) -> types.Type | None:
        if name not in call.fields:
            return None
        return types.int64 if name in call.numbers else types.CPointer(call.dtype)


@lower_getattr_generic(Call)
def _field(context: Any, builder: ir.IRBuilder, call: Call, block: ir.Value, name: str) -> ir.Value:
    field = builder.load(builder.gep(block, [INT64(call.fields.index(name))]))
    return field if name in call.numbers else builder.inttoptr(field, llvm_type(call.dtype).as_pointer())


@compiled
def own_scratch(call):
    """The address of this thread's own memory."""
    return call.scratch + fetch_increment(integers(call), _NEXT_THREAD) * call.scratch_bytes


@compiled
def next_task(call):
    """Claim the next task; at least the number of tasks if none is left."""
    return fetch_increment(integers(call), _NEXT_TASK)


def run_kernel(
    kernel: Callable[[int], None], layout: Layout, fields: Fields, tasks: int, scratch: int, dtype: torch.dtype
) -> None:
    """Fill the block of a call and let PyTorch's threads do its tasks, each with ``scratch`` elements of its own."""
    if tasks == 0:
        return
    threads = thread_count(tasks)
    memory = torch.empty(threads, scratch, dtype=dtype, device="cpu")
    own: Fields = {"tasks": tasks, "scratch": memory, "scratch_bytes": memory.stride(0) * memory.element_size()}
    values = own | fields
    names = (*_OWN, *layout.numbers, *layout.arrays)
    addresses = (values.pop(name, None) for name in names)
    block = np.array([_address(x) if isinstance(x, Tensor) else x or 0 for x in addresses], np.int64)
    if values:
        raise KeyError(f"the layout of the kernel has no {', '.join(values)}")
    run_threads(kernel, block.ctypes.data, threads)


def _address(x: Tensor) -> int:
    if not x.is_cpu:  # as in an exported graph that was moved
        raise ValueError(f"a kernel for CPUs got a tensor on {x.device}; move all of them, or use another backend")
    return x.data_ptr()


@cache
def c_function(
    entry: Entry, layout: Layout, dtype: torch.dtype, sources: Sequence[ModuleType], *constants: int
) -> Callable[[int], None]:
    """``entry(digest, *constants)`` as a C function of a block whose arrays are of ``dtype``.

    Numba keeps the machine code on disk where it finds a folder that it can write to. It sees the values that a
    function closes over and the function's own file, but no file that it imports. So the functions that are compiled
    close over ``digest``, which changes with the text of ``sources`` and of the modules that all kernels share.
    """
    element = {torch.float32: types.float32, torch.float64: types.float64}[dtype]
    build = partial(cfunc, types.void(Call(layout, element)), error_model="numpy")
    digest = _digest(sources)
    try:
        code = build(cache=True)(entry(digest, *constants))
    except Exception:
        # There is no such folder, or what it holds is damaged or outdated; an error of ``entry`` comes again.
        code = build()(entry(digest, *constants))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(code.address))
    function.code = code  # type: ignore[attr-defined]  # keeps the machine code alive
    return function


def _digest(sources: Sequence[ModuleType]) -> int:
    shared = sorted(Path(__file__).parent.glob("*.py"))
    texts = (path.read_bytes() for path in [*shared, *(Path(str(module.__file__)) for module in sources)])
    return int.from_bytes(hashlib.sha256(b"".join(texts)).digest()[:7], "big")
