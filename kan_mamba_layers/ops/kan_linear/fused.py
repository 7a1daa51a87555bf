"""The operator of the fused KAN linear map, and the backends that run it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.kan_linear import reference
from kan_mamba_layers.ops.kan_linear.call import KANCall, Wanted
from kan_mamba_layers.ops.operator import FusedBackend, FusedOp, Grads, Tensors, explained, register
from kan_mamba_layers.ops.spacing import is_uniform_cached


class Decided(NamedTuple):
    """A backend that is told whether the knots are equally spaced, where the call leaves that to their values."""

    backend: FusedBackend

    def forward(self, call: KANCall, save: bool) -> Tensors:
        return self.backend.forward(_decided(call), save)

    def backward(self, call: KANCall, saved: Tensors, grads: Grads, wanted: Sequence[bool]) -> Grads:
        return self.backend.backward(_decided(call), saved, grads, wanted)


def _decided(call: KANCall) -> KANCall:
    return call if call.uniform is not None else call._replace(uniform=is_uniform_cached(call.grid))


@explained
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


def _formula(call: KANCall) -> Sequence[Tensor]:
    activated = call.activated
    activation = F.silu if activated is None else lambda x: activated.to(x.dtype)
    tensors = (call.x, call.base_weight, call.spline_weight, call.grid, call.bias)
    return (reference.kan_linear(*tensors, activation, call.extrapolation, bool(call.uniform)),)


fused_kan_linear = register(
    KANCall,
    FusedOp(
        name="kan_linear",
        load=lambda backend: Decided(load(backend)),
        results=1,
        saved=0,
        shapes=_shapes,
        flops=_flops,
        gradient_flops=_gradient_flops,
        formula=_formula,
        plain={"bias": lambda grads: grads[0].sum(0)},
    ),
)
