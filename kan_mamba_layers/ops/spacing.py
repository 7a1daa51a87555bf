"""Whether knots are equally spaced. The values decide at every call, whoever wrote them and in whatever way.

On CPUs the knots are compared with a copy of those that were last looked at. On accelerators, where reading would stall
the queue, they are looked at again when the tensor is another one or its version counter has moved.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from kan_mamba_layers.ops.precision import compute_dtype

_TRACERS = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY]
# Largest distance of a knot from its even place, in units of the spacing: the error counts as rounding.
_TOLERANCE = 1e-4


class _Seen(NamedTuple):
    """What is known of a tensor of knots."""

    alive: "weakref.ref[Tensor]"  # forgets the entry with its tensor
    mark: Tensor | int | None  # a copy of the values, or their version
    uniform: bool


_SEEN: dict[int, _Seen] = {}  # by the identity of the tensor


def is_uniform(grid: Tensor) -> bool:  # i m
    """Whether the knots of every feature are equally spaced, up to rounding."""
    grid = grid.to(compute_dtype(grid))
    intervals = grid.shape[1] - 1
    spacing = (grid[:, -1:] - grid[:, :1]) / intervals  # i 1
    even = grid[:, :1] + spacing * torch.arange(intervals + 1, dtype=grid.dtype, device=grid.device)
    return bool(((spacing > 0) & ((grid - even).abs() <= _TOLERANCE * spacing)).all())


def look(grid: Tensor) -> bool | None:
    """`is_uniform`, or None while a compiler, a tracer or vmap hides the values."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not _is_plain(grid):
        return None
    return look_now(grid)


def look_now(grid: Tensor) -> bool:
    """`is_uniform` of a tensor with values. While a CUDA graph is captured it answers False, which is always right."""
    if grid.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a replay must serve other knots too
    seen = _SEEN.get(id(grid))
    if seen is not None and _is_unchanged(grid, seen.mark):
        return seen.uniform
    uniform, key = is_uniform(grid), id(grid)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return uniform  # a copy made here would belong to a transform of torch.func
    mark = grid.detach().clone() if grid.is_cpu else _version(grid)
    _SEEN[key] = _Seen(weakref.ref(grid, lambda _: _SEEN.pop(key, None)), mark, uniform)
    return uniform


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
