"""The record of a fused KAN linear map, and its activation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
