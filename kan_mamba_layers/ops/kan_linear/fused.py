"""The operator of the fused KAN linear map, and the backends that run it."""

from collections.abc import Sequence

from torch import Tensor

from kan_mamba_layers.ops.kan_linear.call import KANCall, Wanted
from kan_mamba_layers.ops.operator import FusedBackend, FusedOp, register


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
