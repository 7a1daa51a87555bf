"""The record of a fused KAN linear map, and its activation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)


class KANCall(NamedTuple):
    """The arguments of a KAN linear map of rows. Nothing else is saved: the backward pass makes the bases once more."""

    x: Tensor  # rows i
    activated: Tensor | None  # rows i: what the base weights multiply, where that is not silu(x)
    base_weight: Tensor  # o i
    spline_weight: Tensor  # o i g+s
    grid: Tensor  # i g+2s+1
    bias: Tensor | None  # o
    extrapolation: str
    uniform: bool | None  # None: the values of the knots decide where the operator runs

    @property
    def spline_order(self) -> int:
        """The degree ``s``."""
        return self.grid.shape[1] - 1 - self.spline_weight.shape[2]


class Wanted(NamedTuple):
    """Which gradients of a call are wanted: those that are computed together count as one."""

    inputs: bool
    weights: bool

    @classmethod
    def of(cls, wanted: Sequence[bool]) -> "Wanted":
        """From one flag for each tensor of the call."""
        x, activated, base_weight, spline_weight, *_ = wanted
        return cls(x or activated, base_weight or spline_weight)


def is_silu(base_activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether it is the function that the fused backends compute themselves.

    A module with hooks, or with a ``forward`` of its own, is called.
    """
    if type(base_activation) is torch.nn.SiLU:
        module = base_activation
        return not (
            "forward" in module.__dict__
            or module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_pre_hooks
            or module._backward_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        )
    return base_activation is F.silu


def activate(x: Tensor, base_activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an activation to a copy, since it may work in place, in the dtype of its parameters if it has any."""
    if is_silu(base_activation):
        return F.silu(x)
    y = base_activation(x.to(_own_dtype(base_activation) or x.dtype, copy=True))
    name = getattr(base_activation, "__name__", None) or type(base_activation).__name__
    if not isinstance(y, Tensor) or not y.is_floating_point():
        found = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"base_activation must return a real floating-point tensor, got {found} from {name}")
    # A constant may lack leading dimensions, and is the same for all rows.
    if y.shape != x.shape[max(0, x.ndim - y.ndim) :] or y.device != x.device or y.layout != torch.strided:
        raise ValueError(
            f"base_activation must act elementwise: from {tuple(x.shape)} on {str(x.device)!r} {name} made "
            f"{tuple(y.shape)} on {str(y.device)!r} ({y.layout}); return a dense tensor like the input"
        )
    return y.to(x.dtype).expand(x.shape)


def _own_dtype(base_activation: Callable[[Tensor], Tensor]) -> torch.dtype | None:
    """The dtype of an activation's first floating-point parameter, such as PReLU's."""
    module = base_activation
    if not isinstance(module, torch.nn.Module) or not (module._parameters or module._modules):
        return None  # walking through a module takes microseconds
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
