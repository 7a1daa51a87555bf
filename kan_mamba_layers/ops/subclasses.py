"""Tensors of other types than PyTorch's own, such as the MetaTensor of MONAI's loaders."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
Result = TypeVar("Result")

_PLAIN = frozenset((Tensor, nn.Parameter))
_DISABLED = torch._C._disabled_torch_function_impl


def accepts_subclasses(*, jagged: bool = False) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Let an op take subclasses of Tensor as PyTorch's functions do: their ``__torch_function__`` decides.

    By default the result has the type of the argument. The op itself sees plain tensors, so a method that a subclass
    overrides cannot break it. Classes with a ``__torch_dispatch__``, such as FakeTensor, have no plain form and pass.

    Args:
        jagged: whether the op maps the rows of its first argument one by one, so that it can be jagged, (b j i).
    """

    def decorate(op: Callable[P, Result]) -> Callable[P, Result]:
        first = next(iter(signature(op).parameters))

        @wraps(op)
        def call(*arguments: Any, **options: Any) -> Any:
            for x in (*arguments, *options.values()):
                if type(x) not in _PLAIN and isinstance(x, Tensor):
                    rows = arguments[0] if arguments else options.get(first)
                    if jagged and _is_jagged(rows):
                        return _on_jagged(op, rows, *arguments[1:], **{k: v for k, v in options.items() if k != first})
                    return _dispatch(call, op, arguments, options)
            return op(*arguments, **options)

        return call

    return decorate


def _plain(x: Any) -> Any:
    """``x`` without its subclass, as part of the same graph."""
    if type(x) in _PLAIN or not isinstance(x, Tensor) or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


def _dispatch(call: Any, op: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    given = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
    if any(hasattr(x, "full_tensor") for x in given):
        _refuse_distributed(signature(op).bind(*arguments, **options).arguments)
    overriding = [x for x in given if type(x).__torch_function__ is not _DISABLED]
    if has_torch_function(overriding):
        return handle_torch_function(call, overriding, *arguments, **options)
    return op(*map(_plain, arguments), **{name: _plain(x) for name, x in options.items()})


def rows_of(x: Any) -> Any:
    """The rows of a jagged tensor, and any other tensor as it is."""
    if not _is_jagged(x):
        return x
    return x.values() if x.lengths() is None else torch.cat(x.unbind())  # with lengths, not all values are rows


def _is_jagged(x: Any) -> bool:
    return getattr(x, "_ragged_idx", None) == 1


def _on_jagged(op: Any, x: Any, *arguments: Any, **options: Any) -> Any:  # b j i -> b j o
    values = x.values() if x.lengths() is None else _without_gaps(x)
    y = op(values, *arguments, **options)  # rows o
    return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())


def _without_gaps(x: Any) -> Tensor:  # rows i
    """The values with zeros between the sequences, where a NaN would get into the gradients of the weights."""
    values, starts = x.values(), x.offsets()[:-1]
    steps = torch.zeros(len(values) + 1, dtype=starts.dtype, device=starts.device)
    steps.index_add_(0, starts, torch.ones_like(starts)).index_add_(0, starts + x.lengths(), -torch.ones_like(starts))
    return values.masked_fill((steps.cumsum(0) == 0)[:-1, None], 0)


def _refuse_distributed(arguments: Mapping[str, Any]) -> None:
    name = next(name for name, x in arguments.items() if hasattr(x, "full_tensor"))
    raise TypeError(
        f"{name} must be a local tensor, got a {type(arguments[name]).__name__}; pass {name}.to_local() or "
        f"{name}.full_tensor()"
    )
