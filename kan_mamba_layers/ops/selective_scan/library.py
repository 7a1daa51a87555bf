"""The fused engines as registered operators, with their gradient.

``scan`` and ``scan_backward`` are opaque to PyTorch: it knows their signatures, the shapes of their results and their
cost, so they run under ``torch.compile`` and ``torch.export``. Their gradient is an ``autograd.Function`` around them
that raises where it is differentiated again; one registered with ``torch.library`` would answer with silent zeros.

One form serves both public ops: ``k`` walks over the same positions, and ``g`` groups of channels that share maps. The
CPU engine can make the maps itself.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kan_mamba_layers.ops.autocast import autocast_off
from kan_mamba_layers.ops.flops import register_flops

_LIBRARY = torch.library.Library("kan_mamba_layers", "DEF")
_ARGUMENTS = (
    "Tensor u, Tensor? maps, Tensor? x_proj_weight, Tensor? delta, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D"
)
_SIZES = "SymInt height, SymInt width, bool softplus"
_LIBRARY.define(
    f"scan({_ARGUMENTS}, Tensor? initial, {_SIZES}, bool save, str backend) -> (Tensor y, Tensor last, Tensor saved)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"scan_backward(Tensor grad_y, Tensor grad_last, {_ARGUMENTS}, Tensor saved, {_SIZES}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _engine(backend: str) -> ModuleType:
    """A fused backend, imported at its first use: it brings Numba or Triton along."""
    match backend:
        case "cpu":
            from kan_mamba_layers.ops.selective_scan import cpu

            return cpu
        case _:
            from kan_mamba_layers.ops.selective_scan import triton

            return triton


@torch.no_grad()
def _forward(u: Tensor, maps: Tensor, x_proj_weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = others
    with autocast_off(u):
        if backend == "cpu":
            y, last, saved = _engine(backend).forward(u, maps, x_proj_weight, *rest)
        else:
            y, last, saved = _engine(backend).forward(*_contiguous(u, maps, *rest))
    return y, last, saved.flatten()


@torch.no_grad()
def _backward(
    grad_y: Tensor, grad_last: Tensor, u: Tensor, maps: Tensor, x_proj_weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *rest, backend = others
    with autocast_off(u):
        if backend == "cpu":
            return _engine(backend).backward(grad_y, grad_last, u, maps, x_proj_weight, *rest)
        du, dmaps, *grads = _engine(backend).backward(*_contiguous(grad_y, grad_last, u, maps, *rest))
    return du, dmaps, u.new_empty(0), *grads


def _contiguous(*inputs: Any) -> tuple[Any, ...]:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


_LIBRARY.impl("scan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("kan_mamba_layers::scan", lib=_LIBRARY)
def _forward_shapes(
    u: Tensor,
    maps: Tensor | None,
    x_proj_weight: Tensor | None,
    delta: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    initial: Tensor | None,
    height: int,
    width: int,
    softplus: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    b, l, d = u.shape
    k, _, n = A.shape
    # One dimension: a number of chunks of its own would tie exported graphs to sizes with more than one of them.
    groups = 1 if maps is None else maps.shape[2] // k
    saved = math.prod(_engine(backend).saved_shape(b, l, d, k, groups, n)) if save else 0
    return torch.empty_like(u, memory_format=torch.contiguous_format), A.new_empty(b, k, d, n), A.new_empty(saved)


@torch.library.register_fake("kan_mamba_layers::scan_backward", lib=_LIBRARY)
def _backward_shapes(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    maps: Tensor | None,
    x_proj_weight: Tensor | None,
    delta: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    saved: Tensor,
    height: int,
    width: int,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    optional = (A.new_empty(0) if x is None else x for x in (maps, x_proj_weight, delta))
    inputs = (u, *optional, dt_weight, dt_bias, A, D, grad_last)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _forward_flops(*inputs: Any, **_: Any) -> int:
    """In each walk 9 b l d n operations, as published for the scan, and those of the two projections."""
    u, x_proj_weight, dt_weight, A = (inputs[i] for i in (0, 2, 4, 6))  # shapes
    b, l, d = u
    k, n = A[0], A[2]
    r = dt_weight[2]
    projection = 0 if x_proj_weight is None else 2 * (r + 2 * n)
    return b * l * d * k * (9 * n + 2 * r + projection)


def _backward_flops(grad_y: Any, grad_last: Any, *inputs: Any, **_: Any) -> int:
    """The forward pass once more, and twice its operations."""
    return 3 * _forward_flops(*inputs)


register_flops(torch.ops.kan_mamba_layers.scan, _forward_flops)
register_flops(torch.ops.kan_mamba_layers.scan_backward, _backward_flops)


class _Scan(torch.autograd.Function):
    """The fused scan with its gradient, which recomputes the states between the saved ones."""

    @staticmethod
    def forward(  # torch.compile counts the names
        u: Tensor,
        maps: Tensor | None,
        x_proj_weight: Tensor | None,
        delta: Tensor | None,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        initial: Tensor | None,
        height: int,
        width: int,
        softplus: bool,
        save: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (u, maps, x_proj_weight, delta, dt_weight, dt_bias, A, D, initial)
        return torch.ops.kan_mamba_layers.scan(*tensors, height, width, softplus, save, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, initial, height, width, softplus, _, backend = inputs
        saved = output[2]
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(*tensors, saved)
        ctx.options = (height, width, softplus, backend)
        ctx.given = [x is not None for x in (*tensors, initial)]

    @staticmethod
    def vmap(*_: Any) -> None:
        raise RuntimeError(
            "the fused scan has no vmap; put the mapped dimension into the batch, or call it with backend='reference'"
        )

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # A compiled backward pass refuses a second differentiation by itself.
        differentiate = torch.ops.kan_mamba_layers.scan_backward if torch.compiler.is_compiling() else _Gradient.apply
        grads = differentiate(grad_y, grad_last, *ctx.saved_tensors, *ctx.options)
        return *(grad if given else None for grad, given in zip(grads, ctx.given, strict=True)), *(None,) * 5


class _Gradient(torch.autograd.Function):
    """The gradient as a node of its own, so that whoever differentiates it gets an error and not zeros."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.kan_mamba_layers.scan_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "the fused scan can be differentiated once; for higher derivatives call it with backend='chunked' or "
            "backend='reference'"
        )


def fused_scan(
    u: Tensor,  # b l d
    maps: Tensor | None,  # b l k*g r+2n
    x_proj_weight: Tensor | None,  # k r+2n d; makes the maps where they are not given, in the CPU engine
    delta: Tensor | None,  # b l k d; given where r = 0
    dt_weight: Tensor,  # k d r
    dt_bias: Tensor,  # k d
    A: Tensor,  # k d n
    D: Tensor,  # d
    initial: Tensor | None,  # b k d n
    height: int,
    width: int,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # y: b l d, last state: b k d n
    """Scan ``k`` walks over ``height x width`` positions and sum them, in an engine.

    Walk 0 reads the positions row by row, 1 column by column, 2 and 3 are these two reversed. ``maps`` holds at every
    position the low-rank step (``r``), ``B`` and ``C`` (``n`` each) of every walk and group.
    """
    tensors = (u, maps, x_proj_weight, delta, dt_weight, dt_bias, A, D, initial)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, last, _ = _Scan.apply(*tensors, height, width, softplus, save, backend)
    return y, last
