"""The scan on GPUs: launches the Triton kernels of ``forward_kernel``, ``backward_kernel`` and ``steps_kernel``.

Forward is ``chunk_ends`` and ``carry`` where one chunk is not enough, then ``scan``, then ``merge``; backward the same
with adjoints, between ``step_sizes`` and ``step_gradients``. Nothing is added atomically and every sum has one order,
so results repeat bit for bit.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kan_mamba_layers.ops.limits import against_addresses
from kan_mamba_layers.ops.operator import contiguous
from kan_mamba_layers.ops.selective_scan.call import LOG2E, ScanCall
from kan_mamba_layers.ops.selective_scan.triton import backward_kernel, forward_kernel, steps_kernel
from kan_mamba_layers.ops.tiling import ceil_div, power_of_two

Tensors = tuple[Tensor | None, ...]

TILE = 16  # steps between two saved states
PIXELS = 64  # per program that makes step sizes or their gradients
_MAX_RANK = 16  # for higher ranks a matrix product makes the steps, since registers would not hold the weights


class Plan(NamedTuple):
    """How the work is divided among programs."""

    block: int  # channels per program
    chunk: int  # steps of a chunk, a multiple of TILE
    pair: bool = False  # whether a program scans its chunk in both directions
    warps: int | None = None  # per program; by default one per 32 states
    stages: int | None = None  # of the compiler's software pipeline; by default its own choice


class Rule(NamedTuple):
    """What a plan is chosen by."""

    values: int  # of the state per program, unless it has 32 channels
    enough: int  # programs per multiprocessor that leave sequences whole
    wanted: int  # programs per multiprocessor to aim for when they are cut
    pair_steps: int  # least length of a cut chunk that a program scans in both directions


# The fastest of 120 rules over 12 shapes on an H200: on average 5 and 2 % slower than each shape's best plan.
FORWARD = Rule(values=1024, enough=4, wanted=8, pair_steps=64)
BACKWARD = Rule(values=512, enough=4, wanted=16, pair_steps=32)


class Sizes(NamedTuple):
    """Sizes of a call, by the letters of its shapes."""

    b: int
    l: int
    d: int
    k: int
    g: int
    n: int
    r: int = 0


def saved_shape(b: int, l: int, d: int, k: int, g: int, n: int) -> tuple[int, ...]:
    """Shape of ``saved``: the state that enters every tile of ``TILE`` steps of every direction."""
    return b, k, ceil_div(l, TILE), n, d


@cache
def choose_plan(
    s: Sizes, multiprocessors: int, *, back: bool = False, table: bool = False, rule: Rule | None = None
) -> Plan:
    """Give every multiprocessor work.

    Four programs per multiprocessor, one for each of its schedulers, are enough to leave the sequences whole, since
    cutting them costs a second pass. Otherwise they are cut into chunks of at least two tiles. Directions go in pairs,
    which halves the partial outputs, where that does not force a cut and leaves chunks that are long enough. Those of
    a table of positions have no reverse.
    """
    rule = rule or (BACKWARD if back else FORWARD)
    full = rule.enough * multiprocessors
    narrowest = 16 if back else 32
    widest = max(narrowest, min(128, rule.values // power_of_two(s.n)))
    block = min(widest, max(narrowest, power_of_two(s.d // s.g)))
    programs = s.b * s.k * s.g * ceil_div(s.d // s.g, block)

    def chunk(programs: int) -> int:
        count = 1 if programs >= full else ceil_div(rule.wanted * multiprocessors, programs)
        return min(ceil_div(s.l, TILE), max(2, ceil_div(s.l, count * TILE))) * TILE

    half = programs // 2
    paired = s.k == 4 and not (back or table)
    pair = paired and (half >= full or (programs < full and chunk(half) >= rule.pair_steps))
    return Plan(block, chunk(half if pair else programs), pair)


def forward(
    call: ScanCall, save: bool, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # y: b l d, last: b k d n, saved states
    """Run all directions and add them up in image order."""
    s, call = _sizes(call), ScanCall(*contiguous(call))
    u = call.u
    y = _empty(u, s.b, s.l, s.d, dtype=u.dtype)
    last = _empty(u, s.b, s.k, s.n, s.d)
    saved = _empty(u, math.prod(saved_shape(*s[:-1])) if save else 0)
    if u.numel() == 0:
        return y, last.mT.contiguous(), saved
    plan = plan or choose_plan(s, _multiprocessors(u.device), table=call.orders is not None)
    with torch.cuda.device_of(u):
        launch = _Launch(call, s, plan)
        entering = launch.entering(u, call.initial_state, launch.step_inputs, launch.step_constants, back=False)
        passes = 2 if plan.pair else 1
        partials = _empty(u, s.k // passes, s.b, s.l, s.d)
        launch(
            forward_kernel.scan,
            s.k // passes,
            (u, *launch.step_inputs, launch.a2, entering, partials, saved, last),
            plan.block,
            PASSES=passes,
            SAVE=save,
            **launch.step_constants,
        )
        _merge(partials, u, call.D, y)
    return y, last.mT.contiguous(), saved


def backward(
    call: ScanCall,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    *,
    plan: Plan | None = None,
) -> Sequence[Tensor | None]:
    """The gradients of all tensors."""
    call = ScanCall(*contiguous(call))
    u, s = call.u, _sizes(call)
    grad_y, grad_last = contiguous(grads)
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    if u.numel() == 0:
        return [torch.zeros_like(x) if isinstance(x, Tensor) else None for x in call[: len(wanted)]]
    plan = plan or choose_plan(s, _multiprocessors(u.device), back=True)
    with torch.cuda.device_of(u):
        launch = _Launch(call, s, plan)
        steps = _empty(u, s.b, s.l, s.k, s.d)
        launch.over_pixels(steps_kernel.step_sizes, steps)
        # Ready-made steps in place of what makes them.
        ready = (launch.coeffs, steps, call.dt_proj_weight, torch.zeros_like(call.dt_proj_bias), None)
        behind = launch.entering(grad_y, grad_last, ready, {"R": 0, "RP": 1, "SOFTPLUS": False}, back=True)
        scratch = _empty(u, s.b, s.k, launch.chunks, launch.blocks, TILE, launch.states, plan.block)
        partials = _empty(u, s.k, s.b, s.l, s.d)
        grad_coeffs = _empty(u, s.b, s.l, s.k * s.g, s.r + 2 * s.n)
        parts = launch.blocks // s.g
        grad_bc = grad_coeffs if parts == 1 else _empty(u, parts, s.b, s.l, s.k * s.g, 2 * s.n)
        grad_a = _empty(u, s.b, launch.chunks, s.k, s.n, s.d)
        in_front = _empty(u, s.b, s.k, s.n, s.d)
        inputs = (grad_y, u, launch.coeffs, launch.a2, saved[0], behind, scratch)
        outputs = (partials, grad_bc, steps, grad_a, in_front)
        launch(backward_kernel.scan_backward, s.k, (*inputs, *outputs), plan.block, GRAD_ROW=grad_bc.shape[-1])
        grad_u = _empty(u, s.b, s.l, s.d, dtype=u.dtype)
        _merge(partials, grad_y, call.D, grad_u)

        if parts > 1:
            torch.sum(grad_bc, 0, out=grad_coeffs[..., s.r :])
        ranges = ceil_div(s.b * s.l, PIXELS)
        grad_weight = _empty(u, ranges, s.k, launch.rank, s.d)
        grad_bias = _empty(u, ranges, s.k, s.d)
        launch.over_pixels(steps_kernel.step_gradients, steps, grad_coeffs, grad_weight, grad_bias)

    grad_weight = grad_weight.mT.sum(0)  # the sum is contiguous
    if s.r > launch.rank and call.delta is None:  # a high rank, whose steps a matrix product made
        z = steps.view(s.b * s.l, s.k * s.g, -1).transpose(0, 1)  # k*g b*l d/g
        low = launch.coeffs[..., : s.r].flatten(0, 1).transpose(0, 1)  # k*g b*l r
        grad_low = z @ call.dt_proj_weight.view(s.k * s.g, -1, s.r)  # k*g b*l r
        grad_coeffs[..., : s.r] = grad_low.transpose(0, 1).view(s.b, s.l, s.k * s.g, s.r)
        grad_weight = (z.mT @ low).view(call.dt_proj_weight.shape)
    return (
        grad_u,
        grad_coeffs,
        None,
        steps if call.delta is not None else None,
        grad_weight,
        grad_bias.sum(0),
        grad_a.mT.sum((0, 1)),
        (grad_y.float() * u.float()).sum((0, 1)),
        in_front.mT.contiguous() if wanted[ScanCall._fields.index("initial_state")] else None,
        None,
        None,
    )


class _Launch:
    """What all kernels of one call have in common."""

    def __init__(self, call: ScanCall, s: Sizes, plan: Plan) -> None:
        rank, delta = s.r if call.delta is None else 0, call.delta
        coeffs = _coeffs(call)
        if rank > _MAX_RANK:
            low = coeffs[..., :rank].unflatten(2, (s.k, s.g))  # b l k g r
            weight = call.dt_proj_weight.unflatten(1, (s.g, -1))
            delta = torch.einsum("blkgr,kgdr->blkgd", low, weight).flatten(3).contiguous()
            rank = 0
        self.s, self.plan, self.height, self.width = s, plan, call.height, call.width
        self.chunks, self.blocks = ceil_div(s.l, plan.chunk), s.g * ceil_div(s.d // s.g, plan.block)
        self.a2 = torch.mul(call.A.mT, LOG2E, out=_empty(call.u, s.k, s.n, s.d))  # k n d
        self.coeffs, self.delta = coeffs, coeffs if delta is None else delta
        self.dt_proj_weight, self.dt_proj_bias = call.dt_proj_weight.mT.contiguous(), call.dt_proj_bias
        self.orders, self.mask = call.orders, call.mask
        self.up = 2 if call.orders is None else s.k  # directions that visit their indices upwards
        self.rank, self.states, self.softplus = rank, power_of_two(s.n), call.softplus
        self.sizes = {"N": s.n, "RANK": s.r, "DIRECTIONS": s.k, "GROUPS": s.g}

    @property
    def step_inputs(self) -> Tensors:
        """Inputs of the step sizes."""
        return self.coeffs, self.delta, self.dt_proj_weight, self.dt_proj_bias, self.mask

    @property
    def step_constants(self) -> dict[str, Any]:
        """Constants of the forward kernels that make them."""
        return {"R": self.rank, "RP": power_of_two(max(self.rank, 1)), "SOFTPLUS": self.softplus}

    def __call__(self, kernel: Any, directions: int, tensors: Tensors, block: int, **constants: Any) -> None:
        """Launch a kernel over blocks of channels, directions, chunks and images."""
        s, plan = self.s, self.plan
        blocks, tiles = s.g * ceil_div(s.d // s.g, block), ceil_div(s.l, TILE)
        numbers = (self.height, self.width, s.d, s.d // s.g, plan.chunk, self.chunks, tiles, blocks, s.b)
        constants |= {"NP": self.states, "BLOCK": block, "TILE": TILE, "UP": self.up, **self.sizes}
        constants["num_warps"] = plan.warps or min(16, max(1, self.states // 32))
        if plan.stages:
            constants["num_stages"] = plan.stages
        kernel[(blocks * directions * self.chunks * s.b,)](*tensors, self.orders, *numbers, **constants)

    def over_pixels(self, kernel: Any, *outputs: Tensor) -> None:
        """Launch a kernel of the step sizes."""
        s = self.s
        block = max(16, min(32, power_of_two(s.d // s.g)))
        kernel[(ceil_div(s.b * s.l, PIXELS), s.k * s.g)](
            *self.step_inputs, *outputs, s.b * s.l, s.d, s.d // s.g, ceil_div(s.d // s.g, block),
            R=self.rank, RP=max(16, power_of_two(max(self.rank, 1))), SOFTPLUS=self.softplus, **self.sizes,
            ROWS=PIXELS, BLOCK=block, num_warps=4,
        )  # fmt: skip

    def entering(
        self, x: Tensor, start: Tensor | None, inputs: Tensors, constants: dict[str, Any], *, back: bool
    ) -> Tensor:  # b k c n d
        """The state that enters each chunk, or (back) the adjoint that comes from behind it."""
        s = self.s
        start = _empty(x, s.b, s.k, s.n, s.d).zero_() if start is None else start.mT.contiguous()
        if self.chunks == 1:
            return start
        ends, sums = _empty(x, s.b, s.k, self.chunks, s.n, s.d), _empty(x, s.b, s.k, self.chunks, s.d)
        block = max(32, self.plan.block)
        self(forward_kernel.chunk_ends, s.k, (x, *inputs, self.a2, ends, sums), block, BACK=back, **constants)
        grid = (ceil_div(s.n * s.d, 128) * s.b * s.k,)
        sizes = (s.d, self.chunks, s.n * s.d)
        forward_kernel.carry[grid](
            ends, sums, self.a2, start, *sizes, DIRECTIONS=s.k, UP=self.up, BACK=back, BLOCK=128, num_warps=4
        )
        return ends


def _merge(partials: Tensor, x: Tensor, skip: Tensor, out: Tensor) -> None:
    grid = (ceil_div(x.numel(), 1024),)
    forward_kernel.merge[grid](
        partials, x, skip, out, x.numel(), x.shape[-1], COUNT=len(partials), BLOCK=1024, num_warps=4
    )


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of the GPU; for tensors on the CPU, which only the interpreter runs, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _coeffs(call: ScanCall) -> Tensor:
    """The coefficients, which the public ops give this backend."""
    if call.coeffs is None:
        raise ValueError("coeffs is None, and backend='triton' does not make them from x_proj_weight; give coeffs")
    return call.coeffs


def _sizes(call: ScanCall) -> Sizes:
    b, l, d = call.u.shape
    k, _, n = call.A.shape
    _, _, groups, row = _coeffs(call).shape
    # `resolve` has checked it, but an exported program may be run on larger images than it was checked for.
    if reason := against_addresses("u", l, d, max(k * d, groups * row)):
        raise ValueError(f"backend='triton' cannot run this scan: {reason}; use smaller images or backend='chunked'")
    return Sizes(b, l, d, k, groups // k, n, row - 2 * n)
