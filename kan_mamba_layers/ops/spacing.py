"""Whether knots are equally spaced, kept for each tensor of knots until it changes.

On CPUs the values decide: they are compared with a copy. On accelerators, where reading would stall the queue, it is
the tensor's version counter: a write that PyTorch does not count, through ``.data`` or by a collective, goes unseen.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

_TRACERS = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY]
# Largest distance of a knot from its even place, in units of the spacing: the error counts as rounding.
_TOLERANCE = 1e-4


class _Entry(NamedTuple):
    """What is known of a tensor of knots."""

    tensor: "weakref.ref[Tensor]"  # drops the entry with its tensor
    mark: Tensor | int | None  # a copy of the values, or their version
    uniform: bool


_ENTRIES: dict[int, _Entry] = {}  # by the identity of the tensor


def is_uniform(grid: Tensor) -> bool:  # i m
    """Whether the knots of every feature are equally spaced, up to rounding."""
    # In float64: in their own dtype even places far from zero would round as the knots did, and hide how far they are.
    grid = grid.detach().to("cpu", torch.float64)
    intervals = grid.shape[1] - 1
    spacing = (grid[:, -1:] - grid[:, :1]) / intervals  # i 1
    even = grid[:, :1] + spacing * torch.arange(intervals + 1, dtype=grid.dtype, device=grid.device)
    return bool(((spacing > 0) & ((grid - even).abs() <= _TOLERANCE * spacing)).all())


def uniform_if_known(grid: Tensor) -> bool | None:
    """`is_uniform`, or None while a compiler, a tracer or vmap hides the values."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not _is_plain(grid):
        return None
    return is_uniform_cached(grid)


def is_uniform_cached(grid: Tensor) -> bool:
    """`is_uniform` of a tensor with values. While a CUDA graph is captured it answers False, which is always right."""
    if grid.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a replay must serve other knots too
    entry = _ENTRIES.get(id(grid))
    if entry is not None and _is_unchanged(grid, entry.mark):
        return entry.uniform
    uniform, key = is_uniform(grid), id(grid)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return uniform  # a copy made here would belong to a transform of torch.func
    mark = grid.detach().clone() if grid.is_cpu else _version(grid)
    _ENTRIES[key] = _Entry(weakref.ref(grid, lambda _: _ENTRIES.pop(key, None)), mark, uniform)
    return uniform


def forget(grid: Tensor) -> None:
    """Drop what is known of a tensor, since PyTorch swaps the contents of no tensor that a weak reference points to."""
    _ENTRIES.pop(id(grid), None)


def _is_unchanged(grid: Tensor, mark: Tensor | int | None) -> bool:
    if isinstance(mark, Tensor):
        return grid.is_cpu and mark.dtype is grid.dtype and torch.equal(mark, grid)
    return mark is not None and mark == _version(grid)


def _version(grid: Tensor) -> int | None:
    """PyTorch's count of the writes to a tensor; inference tensors have none."""
    return None if grid.is_inference() else grid._version


def _is_plain(grid: Tensor) -> bool:
    """Neither a subclass, such as a fake tensor, nor wrapped by ``torch.func``, nor without values or being traced."""
    return (
        type(grid) in (Tensor, torch.nn.Parameter)
        and not grid.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(grid)
        and (torch._C._len_torch_dispatch_stack() == 0 or not any(map(torch._C._get_dispatch_mode, _TRACERS)))
    )
