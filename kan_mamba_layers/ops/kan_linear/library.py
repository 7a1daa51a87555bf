"""The fused engines as registered operators, with their gradient.

``kan`` and ``kan_backward`` are opaque to PyTorch: it knows their signatures, the shapes of their results and their
cost, so they run under ``torch.compile`` and ``torch.export``. Their gradient is an ``autograd.Function`` around them
that raises where it is differentiated again; one registered with ``torch.library`` would answer with silent zeros.

Nothing but the arguments is saved: the backward pass makes the bases once more.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kan_mamba_layers.ops.autocast import autocast_off
from kan_mamba_layers.ops.flops import register_flops

_LIBRARY = torch.library.Library("kan_mamba_layers", "FRAGMENT")
_ARGUMENTS = "Tensor x, Tensor? activated, Tensor base_weight, Tensor spline_weight, Tensor grid"
_OPTIONS = "str extrapolation, bool uniform"
_NO_VMAP = (
    "the fused kan_linear has no vmap; put the mapped dimension into the batch, or call it with backend='reference'"
)
_LIBRARY.define(f"kan({_ARGUMENTS}, Tensor? bias, {_OPTIONS}, str backend) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    f"kan_backward(Tensor grad_y, {_ARGUMENTS}, {_OPTIONS}, bool input_grad, bool weight_grad, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _engine(backend: str) -> ModuleType:
    """A backend, imported at its first use: it may bring Numba or Triton along."""
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


@torch.no_grad()
def _forward(x: Tensor, *others: Any) -> Tensor:
    *rest, backend = others
    with autocast_off(x):
        return _engine(backend).forward(*_contiguous(x, *rest))


@torch.no_grad()
def _backward(grad_y: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *rest, backend = others
    with autocast_off(grad_y):
        return _engine(backend).backward(*_contiguous(grad_y, *rest))


def _contiguous(*inputs: Any) -> tuple[Any, ...]:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


_LIBRARY.impl("kan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("kan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("kan_mamba_layers::kan", lib=_LIBRARY)
def _forward_shapes(x: Tensor, activated: Tensor | None, base_weight: Tensor, *_: Any) -> Tensor:
    return base_weight.new_empty(x.shape[0], base_weight.shape[0])


@torch.library.register_fake("kan_mamba_layers::kan_backward", lib=_LIBRARY)
def _backward_shapes(
    grad_y: Tensor,
    x: Tensor,
    activated: Tensor | None,
    base_weight: Tensor,
    spline_weight: Tensor,
    grid: Tensor,
    extrapolation: str,
    uniform: bool,
    input_grad: bool,
    weight_grad: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if wanted else (0,))

    return (
        *(like(x, input_grad), like(x, input_grad and activated is not None)),
        *(like(base_weight, weight_grad), like(spline_weight, weight_grad)),
    )


def _forward_flops(x: Any, activated: Any, base_weight: Any, spline_weight: Any, *_: Any, **__: Any) -> int:
    """Those of the product of the same width; the arguments are shapes."""
    o, i, bases = spline_weight
    return 2 * x[0] * o * i * (1 + bases)


def _backward_flops(
    grad_y: Any,
    x: Any,
    activated: Any,
    base_weight: Any,
    spline_weight: Any,
    grid: Any,
    extrapolation: Any,
    uniform: Any,
    input_grad: bool,
    weight_grad: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (input_grad + weight_grad) * _forward_flops(x, activated, base_weight, spline_weight)


register_flops(torch.ops.kan_mamba_layers.kan, _forward_flops)
register_flops(torch.ops.kan_mamba_layers.kan_backward, _backward_flops)


class _KANLinear(torch.autograd.Function):
    """The fused map with its gradient."""

    @staticmethod
    def forward(  # torch.compile counts the names
        x: Tensor,
        activated: Tensor | None,
        base_weight: Tensor,
        spline_weight: Tensor,
        grid: Tensor,
        bias: Tensor | None,
        extrapolation: str,
        uniform: bool,
        backend: str,
    ) -> Tensor:
        return torch.ops.kan_mamba_layers.kan(
            x, activated, base_weight, spline_weight, grid, bias, extrapolation, uniform, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, extrapolation, uniform, backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = (extrapolation, uniform, backend)

    @staticmethod
    def vmap(*_: Any) -> None:
        raise RuntimeError(_NO_VMAP)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, activated, base_weight, spline_weight, _ = needed = ctx.needs_input_grad[:5]
        extrapolation, uniform, backend = ctx.options
        # A compiled backward pass refuses a second differentiation by itself.
        differentiate = torch.ops.kan_mamba_layers.kan_backward if torch.compiler.is_compiling() else _Gradient.apply
        wanted = (x or activated, base_weight or spline_weight)
        grads = differentiate(grad_y, *ctx.saved_tensors, extrapolation, uniform, *wanted, backend)
        given = (grad if need else None for grad, need in zip(grads, needed, strict=False))
        return *given, None, grad_y.sum(0) if ctx.needs_input_grad[5] else None, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient as a node of its own, so that whoever differentiates it gets an error and not zeros."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.kan_mamba_layers.kan_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(*_: Any) -> None:
        raise RuntimeError(_NO_VMAP)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "the fused kan_linear can be differentiated once; for higher derivatives call it with backend='reference'"
        )


def fused_kan_linear(
    x: Tensor,  # rows i
    activated: Tensor | None,  # rows i; silu(x) where it is not given
    base_weight: Tensor,  # o i
    spline_weight: Tensor,  # o i g+s
    grid: Tensor,  # i g+2s+1
    bias: Tensor | None,  # o
    extrapolation: str,
    uniform: bool,
    backend: str,
) -> Tensor:  # rows o
    """``y_o = sum_i base_oi act(x_i) + sum_ij spline_oij B_j(x_i) + bias_o`` in an engine."""
    return _KANLinear.apply(x, activated, base_weight, spline_weight, grid, bias, extrapolation, uniform, backend)
