"""The activation of a KAN layer, from what its constructor is given."""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def make_activation(
    given: Callable[..., Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> Activation:
    """An elementwise function as it is, or the module that a class or factory makes, with its weights moved."""
    if isinstance(given, nn.Module):
        raise TypeError(f"base_activation must be a class, got the module {given!r}; pass e.g. nn.SiLU")
    if not callable(given):
        raise TypeError(f"base_activation must be a class or a function, got {given!r}; pass e.g. nn.SiLU or F.silu")
    if _is_elementwise(given):
        return given
    with nullcontext() if device is None else torch.device(device):
        try:
            made = given()
        except TypeError as error:
            if _takes_anything(given):
                return given
            raise TypeError(
                f"base_activation={given!r} cannot be called without arguments ({error}); bind them, e.g. "
                "functools.partial(nn.Threshold, 0.1, 0.0)"
            ) from error
    if not callable(made):
        raise TypeError(f"base_activation={given!r} made {made!r}; pass a class or a function that makes a module")
    return made.to(device=device, dtype=dtype) if isinstance(made, nn.Module) else made


def _takes_anything(given: Callable[..., Any]) -> bool:
    """Whether a signature with ``*args`` hides what a function needs, as that of a decorated one may."""
    if isinstance(given, type):
        return False
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(given).parameters.values())


def _is_elementwise(given: Callable[..., Any]) -> bool:
    """Whether a callable needs an argument, as F.silu does and a class or factory does not."""
    inner = given.func if isinstance(given, functools.partial) else given
    if isinstance(inner, type):
        return False
    try:
        parameters = inspect.signature(given).parameters.values()
    except ValueError:  # a function in C, such as torch.tanh
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in positional for p in parameters)
