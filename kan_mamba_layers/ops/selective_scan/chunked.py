"""The scan in plain PyTorch, in segments that stay in cache and in chunks that run side by side.

A sequence is cut into segments, which follow one another and hand on their last state. Inside a segment of ``m`` chunks
of ``t`` steps the recurrence takes ``2 t + m`` vectorised steps instead of ``m t``: all chunks run side by side from a
zero state, their ends are carried over the ``m`` chunks, and all chunks run again from the right state. Nothing is ever
divided by a cumulative product: ``exp(c) * cumsum(b * exp(-c))`` is shorter and overflows at ordinary values of ``A``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kan_mamba_layers.ops.operator import one_by_one, pull_back, refusal_of_forward_mode, replaced, transformed

# Values of the state, b k l n d, that one segment holds: 4 MiB of float32, so that its few temporaries stay in cache.
_SEGMENT_VALUES = 1 << 20


def scan(
    u: Tensor,  # b k l d
    delta: Tensor,  # b k l d
    A: Tensor,  # k d n
    B: Tensor,  # b k l n
    C: Tensor,  # b k l n
    state: Tensor | None = None,  # b k d n
) -> tuple[Tensor, Tensor]:  # y: b k l d, last state: b k d n
    """The same mathematics as ``reference.scan``, linear in the length, with memory bounded in forward and backward."""
    batch, groups, _, channels = u.shape
    A = A.mT.contiguous()  # k n d: channels last, since they are what the vector units work on
    state = u.new_zeros(batch, groups, A.shape[1], channels) if state is None else state.mT  # b k n d
    plain = torch.compiler.is_compiling() or transformed()
    y, state, *_ = (_scan_segments if plain else _Recomputed.apply)(u, delta, B, C, A, state)
    return y, state.mT


def _segments(state: Tensor, *sequences: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of the same segments of all sequences."""
    length = max(4, _root(_SEGMENT_VALUES // max(1, state.numel()))) ** 2
    return list(zip(*(x.split(length, 2) for x in sequences), strict=True))


def _root(number: int) -> int:
    """The whole part of the square root, as a number.

    A compiler may have a symbol instead, which `range` makes a constant: loops over steps are unrolled in any case.
    """
    return math.isqrt(len(range(number)))


def _scan_segments(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """In PyTorch's operations alone. A compiler repeats segments in backward; ``torch.func`` keeps all states."""
    outputs = []
    for part in _segments(state, u, delta, B, C):
        inputs = (*part, A, state)
        if not transformed() and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            y, state = checkpoint(_scan_segment, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_segment(*inputs)
        outputs.append(y)
    return torch.cat(outputs, 2), state


_refuse = refusal_of_forward_mode("backend='chunked' of the scan")


class _Recomputed(torch.autograd.Function):
    """All segments; backward computes each again, from the state before it.

    What stays is allocated before all temporaries. Pieces of it between them would leave holes in the heap that later
    ones do not fit into, and the process would grow to several times what it needs.
    """

    jvp = staticmethod(_refuse)

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # y, last state, states before the segments
        *sequences, A, state = inputs
        y = torch.empty_like(sequences[0], memory_format=torch.contiguous_format)
        parts = _segments(state, *sequences, y)
        starts = state.new_empty(len(parts), *state.shape)
        for i, (u, delta, B, C, output) in enumerate(parts):
            starts[i] = state
            result, state = _scan_segment(u, delta, B, C, A, state)
            output.copy_(result)
        return y, state.clone(), starts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, starts = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():  # the gradients may be differentiated again, or mapped
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            chosen = [inputs[i] for i in wanted]
            found = pull_back(lambda *x: _scan_segments(*replaced(inputs, wanted, x)), chosen, (grad_y, grad_state))
            return tuple(replaced([None] * len(inputs), wanted, found))
        *sequences, A, state = inputs
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sequences]
        grad_A = torch.zeros_like(A)
        parts = _segments(state, *sequences, grad_y, *grads)
        for start, (u, delta, B, C, grad, *into) in zip(starts.flip(0), parts[::-1], strict=True):
            leaves = [x.detach().requires_grad_() for x in (u, delta, B, C, A, start)]
            with torch.enable_grad():
                results = _scan_segment(*leaves)
            *found, of_A, grad_state = torch.autograd.grad(results, leaves, (grad, grad_state))
            grad_A += of_A
            for target, value in zip(into, found, strict=True):
                target.copy_(value)
        return *grads, grad_A, grad_state


def _scan_segment(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    length = u.shape[2]
    steps = _root(max(length - 1, 0)) + 1
    padding = -length % steps
    if padding:  # steps of size 0 leave the state as it is
        u, delta, B, C = (_lengthened(x, padding) for x in (u, delta, B, C))
    decay = torch.exp(delta[:, :, :, None] * A[:, None])  # b k l n d
    entry = (delta * u)[:, :, :, None] * B[..., None]  # b k l n d
    states = _linear_scan(decay, entry, state, steps, False)  # b k l n d
    y = (states * C[..., None]).sum(3)  # b k l d
    return y[:, :, :length], states[:, :, -1]


def _lengthened(x: Tensor, steps: int) -> Tensor:  # b k l c -> b k l+steps c
    return torch.cat([x, x.new_zeros(*x.shape[:2], steps, x.shape[3])], 2)  # PyTorch 2.4 pads no tensor of size 0


def _linear_scan(a: Tensor, b: Tensor, start: Tensor, steps: int, reverse: bool) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` along dimension 2, forwards or backwards in time."""
    scan: Any = _LinearScan if torch.compiler.is_compiling() else _EagerLinearScan
    return scan.apply(a, b, start, steps, reverse)


class _LinearScan(torch.autograd.Function):
    """Its gradient is a scan of the same kind in the other direction, so it has derivatives of any order."""

    vmap = staticmethod(one_by_one(lambda *arguments: _linear_scan(*arguments)))

    @staticmethod
    def forward(a: Tensor, b: Tensor, start: Tensor, steps: int, reverse: bool) -> Tensor:
        a, b = (x.unflatten(2, (-1, steps)) for x in (a, b))  # b k m t n d
        times = range(steps)[::-1] if reverse else range(steps)
        chunks = range(a.shape[2])[::-1] if reverse else range(a.shape[2])

        product, end = a[:, :, :, times[0]], b[:, :, :, times[0]]  # over one chunk, all side by side: b k m n d
        for t in times[1:]:
            product = product * a[:, :, :, t]
            end = torch.addcmul(b[:, :, :, t], a[:, :, :, t], end)

        state = torch.empty_like(end)  # before each chunk
        for m in chunks:
            state[:, :, m] = start
            # A product may be infinite where there is no state yet: 0 times infinity would be NaN.
            start = torch.where(start == 0, end[:, :, m], torch.addcmul(end[:, :, m], product[:, :, m], start))

        states = torch.empty_like(b)
        for t in times:
            state = torch.addcmul(b[:, :, :, t], a[:, :, :, t], state)
            states[:, :, :, t] = state
        return states.flatten(2, 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, start, ctx.steps, ctx.reverse = inputs
        ctx.save_for_backward(a, start, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, start, states = ctx.saved_tensors
        before = _shift(states, start[:, :, None], ctx.reverse)  # h_{t-1}
        after = _shift(a, torch.zeros_like(a[:, :, :1]), not ctx.reverse)  # a_{t+1}
        adjoint = _linear_scan(after, grad, torch.zeros_like(start), ctx.steps, not ctx.reverse)
        first = -1 if ctx.reverse else 0
        return adjoint * before, adjoint, a[:, :, first] * adjoint[:, :, first], None, None


class _EagerLinearScan(_LinearScan):
    """The same outside a compiler, which takes no function with ``jvp``."""

    jvp = staticmethod(_refuse)


def _shift(x: Tensor, edge: Tensor, reverse: bool) -> Tensor:
    """Every time step's predecessor in the direction of the scan, ``edge`` at its beginning."""
    return torch.cat([x[:, :, 1:], edge] if reverse else [edge, x[:, :, :-1]], 2)
