"""The record of a fused KAN linear map, and the operator made from it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.operator import FusedBackend, FusedOp, register


class KANCall(NamedTuple):
    """The arguments of a KAN linear map of rows. Nothing else is saved: the backward pass makes the bases once more."""

    x: Tensor  # rows i
    activated: Tensor | None  # rows i: what the base weights multiply, where that is not silu(x)
    base_weight: Tensor  # o i
    spline_weight: Tensor  # o i g+s
    grid: Tensor  # i g+2s+1
    bias: Tensor | None  # o
    extrapolation: str
    uniform: bool

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
    """Whether it is the function that the fused backends compute themselves."""
    return base_activation is F.silu or type(base_activation) is torch.nn.SiLU


def activate(x: Tensor, base_activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an activation to a copy: it may work in place."""
    return F.silu(x) if is_silu(base_activation) else base_activation(x.clone())


def load(backend: str) -> FusedBackend:
    """A fused backend, imported at its first use: it may bring Numba or Triton along."""
    match backend:
        case "chunked":
            from kan_mamba_layers.ops.kan_linear import chunked

            return chunked
        case "cpu":
            from kan_mamba_layers.ops.kan_linear import cpu

            return cpu
        case _:
            from kan_mamba_layers.ops.kan_linear import triton

            return triton


def _shapes(call: KANCall, save: bool, backend: str) -> Sequence[Tensor]:
    return (call.base_weight.new_empty(call.x.shape[0], call.base_weight.shape[0]),)


def _flops(call: KANCall) -> int:
    """Those of the product of the same width."""
    (o, i, bases), rows = call.spline_weight, call.x[0]
    return 2 * rows * o * i * (1 + bases)


def _gradient_flops(call: KANCall, wanted: Sequence[bool]) -> int:
    return sum(Wanted.of(wanted)) * _flops(call)


fused_kan_linear = register(
    KANCall,
    FusedOp(
        name="kan_linear",
        load=load,
        results=1,
        saved=0,
        shapes=_shapes,
        flops=_flops,
        gradient_flops=_gradient_flops,
        higher="backend='reference'",
        plain={"bias": lambda grads: grads[0].sum(0)},
    ),
)
