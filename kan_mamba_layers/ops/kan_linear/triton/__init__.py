"""The KAN linear map on GPUs: launches the Triton kernels of ``forward_kernel`` and ``backward_kernel``.

One kernel computes y, one the gradient of x, one those of the weights. All of them compute the bases in registers:
nothing of the size of x times its bases is ever in memory. Nothing is added atomically and every sum has one order, so
results repeat bit for bit.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kan_mamba_layers.ops.bspline import end_slopes, reciprocal
from kan_mamba_layers.ops.kan_linear.call import KANCall, Wanted
from kan_mamba_layers.ops.kan_linear.triton import backward_kernel, forward_kernel
from kan_mamba_layers.ops.kan_linear.triton.forward_kernel import unit
from kan_mamba_layers.ops.operator import contiguous
from kan_mamba_layers.ops.tiling import ceil_div, power_of_two

_INTERPRETED = not isinstance(forward_kernel.kan_forward, triton.JITFunction)


class Gpu(NamedTuple):
    """What the choice of tiles depends on."""

    architecture: int  # 90 for sm_90; 0 for AMD
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may have


class Job(NamedTuple):
    """Sizes and kind of a call: rows of x, inputs, outputs, bases, spline order."""

    rows: int
    i: int
    o: int
    bases: int
    s: int
    uniform: bool
    half: bool  # operands of products in half precision
    full: bool  # operands in float32 that are not rounded to TF32


class Tiles(NamedTuple):
    """What a program takes at a time."""

    rows: int
    ins: int
    outs: int
    warps: int
    stages: int
    slots: int = 1  # of the packed weight, side by side
    splits: int = 1  # of the rows, in grad_weights


# Tiles are chosen by registers and shared memory, not by timing. Products of float32 at full precision run outside the
# tensor cores, where large tiles spill. AMD GPUs, and NVIDIA's before sm_80, have little shared memory. Nonuniform
# knots take more registers.


@cache
def forward_tiles(job: Job, gpu: Gpu) -> Tiles:
    """Few, large tiles where they fill the GPU; all slots unrolled, so that the bases go to the products in registers.

    Not unrolled are many slots, and all of them on sm_100, where every unrolled product would take tensor memory of its
    own, and on AMD.
    """
    if job.full:
        return Tiles(32, 16, 32, warps=4, stages=2)
    if gpu.architecture < 80:
        return Tiles(64 if job.uniform else 32, 16, _width(job.o, 64), warps=4, stages=2)
    outs = _width(job.o, 128)

    def fills(rows: int) -> bool:
        return ceil_div(job.rows, rows) * ceil_div(job.o, outs) >= 0.9 * gpu.multiprocessors

    slots, stages = 1 + job.bases, 3 if job.half else 2
    fitting = int(0.9 * gpu.shared) // (slots * 16 * outs * (2 if job.half else 4))  # stages of the whole weight
    if not job.uniform or gpu.architecture >= 100 or slots > 16 or fitting < 2:
        slots, fitting = 1, stages
    stages = min(stages, fitting)
    if outs <= 64 and job.half and fills(256):
        return Tiles(256 if job.uniform else 128, 16, outs, 8, stages, slots)
    if fills(128):
        return Tiles(128, 16, outs, 8 if outs > 64 or not job.uniform else 4, stages, slots)
    return Tiles(64, 16, outs, 4, stages, slots)


@cache
def grad_input_tiles(job: Job, gpu: Gpu) -> Tiles:
    """All outputs at once where shared memory holds them."""
    if job.full:
        return Tiles(32, 16, 32, warps=4, stages=2)
    if gpu.architecture < 80:
        if not job.uniform:
            return Tiles(32, 16, _width(job.o, 64), warps=4, stages=2)
        return Tiles(64, _width(job.i, 32), _width(job.o, 64), warps=8, stages=2)
    most = 64 if not job.half else 256 if 128 < job.o <= 256 and gpu.shared >= 160 * 1024 else 128
    outs = _width(job.o, most)
    many = job.rows >= 4096
    rows = 128 if many and job.uniform else 64
    return Tiles(rows, _width(job.i, 32), outs, 8 if many else 4, stages=3 if job.half and outs <= 128 else 2)


@cache
def grad_weights_tiles(job: Job, gpu: Gpu) -> Tiles:
    """A group of slots side by side, and the rows split so that every multiprocessor has two programs."""
    if job.full:
        tiles = Tiles(16, 32, 32, warps=4, stages=2, slots=3)
    elif gpu.architecture < 80:
        tiles = Tiles(16, 64, _width(job.o, 32), warps=4, stages=2, slots=2)
    else:
        wide = job.half and job.o > 64
        tiles = Tiles(32, 64, _width(job.o, 128 if wide else 64), warps=4, stages=3, slots=2 if wide else 3)
    tiles = tiles._replace(slots=tiles.slots if job.uniform else 1)
    programs = ceil_div(job.i, tiles.ins) * ceil_div(job.o, tiles.outs) * ceil_div(1 + job.bases, tiles.slots)
    splits = min(2 * gpu.multiprocessors // programs, ceil_div(job.rows, 8 * tiles.rows))
    return tiles._replace(splits=max(1, splits))


def forward(call: KANCall, save: bool, *, tiles: Tiles | None = None) -> tuple[Tensor]:  # rows o
    """``y_o = sum_i base_oi act(x_i) + sum_ij spline_oij B_j(x_i) + bias_o``."""
    call = KANCall(*contiguous(call))
    x, bias, launch = call.x, call.bias, _Launch(call)
    job = launch.job
    y = _empty(x, job.rows, job.o, dtype=call.base_weight.dtype)
    t = tiles or forward_tiles(job, _gpu(x.device))
    inputs = (x, launch.activated, launch.packed(), y if bias is None else bias, *launch.knots())
    with torch.cuda.device_of(x):
        launch(
            forward_kernel.kan_forward,
            (ceil_div(job.rows, t.rows), ceil_div(job.o, t.outs)),
            t,
            (*inputs, y, job.rows, job.i, job.o),
            UNIT=launch.unit,
            SCALE=launch.scale,
            BIAS=bias is not None,
            UNROLL=t.slots > 1,
        )
    return (y,)


def backward(
    call: KANCall,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    *,
    tiles: tuple[Tiles | None, Tiles | None] = (None, None),
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted."""
    call, (grad_y,), want = KANCall(*contiguous(call)), contiguous(grads), Wanted.of(wanted)
    x, dtype, launch = call.x, call.base_weight.dtype, _Launch(call)
    job = launch.job
    grad_x = grad_activated = grad_base = grad_spline = None
    with torch.cuda.device_of(x):
        knots = launch.knots()
        if want.inputs:
            grad_x = _empty(x, job.rows, job.i, dtype=x.dtype)
            grad_activated = _empty(x, *((job.rows, job.i) if call.activated is not None else (0,)), dtype=x.dtype)
            t = tiles[0] or grad_input_tiles(job, _gpu(x.device))
            launch(
                backward_kernel.grad_input,
                (ceil_div(job.rows, t.rows), ceil_div(job.i, t.ins)),
                t,
                (grad_y, x, launch.packed(), *knots, grad_x, grad_activated, job.rows, job.i, job.o),
                LOWER_UNIT=unit(job.s - 1),
                ONCE=job.o <= t.outs,
            )
        if want.weights:
            t = tiles[1] or grad_weights_tiles(job, _gpu(x.device))
            groups = ceil_div(1 + job.bases, t.slots)
            rows_per_split = ceil_div(max(1, ceil_div(job.rows, t.splits)), t.rows) * t.rows
            partials = _empty(x, ceil_div(job.rows, rows_per_split), job.o, 1 + job.bases, job.i)
            launch(
                backward_kernel.grad_weights,
                (ceil_div(job.i, t.ins) * groups, ceil_div(job.o, t.outs), len(partials)),
                t,
                (grad_y, x, launch.activated, *knots, partials, job.rows, rows_per_split, job.i, job.o),
                UNIT=launch.unit,
                SCALE=launch.scale,
                SLOTS=t.slots,
            )
            packed = partials.sum(0)  # o 1+g+s i
            grad_base = _empty(x, job.o, job.i, dtype=dtype).copy_(packed[:, 0])
            grad_spline = _empty(x, job.o, job.i, job.bases, dtype=dtype).copy_(packed[:, 1:].mT)
    return grad_x, grad_activated, grad_base, grad_spline, None, None


class _Launch:
    """What the kernels of one call have in common."""

    def __init__(self, call: KANCall) -> None:
        outputs, inputs, bases = call.spline_weight.shape
        dtype, order = call.base_weight.dtype, call.spline_order
        half, precision = dtype != torch.float32, _precision(dtype)
        full = precision == "ieee" and not half
        self.job = Job(len(call.x), inputs, outputs, bases, order, bool(call.uniform), half, full)
        self.grid = call.grid
        self.base_weight, self.spline_weight = call.base_weight, call.spline_weight
        self.activated = call.x if call.activated is None else call.activated
        self.unit = unit(order)
        self.scale = unit(order - 1) * (order + 1) / (2 * self.unit)
        self.constants = {
            "S": order,
            "BASES": bases,
            "UNIFORM": call.uniform,
            "EXTRAPOLATION": call.extrapolation,
            "SILU": call.activated is None,
            "PRECISION": precision,
            "INTERPRETED": _INTERPRETED,
        }

    def __call__(
        self, kernel: Any, programs: tuple[int, ...], t: Tiles, arguments: tuple[Any, ...], **more: Any
    ) -> None:
        if 0 not in programs:
            sizes = {"ROWS": t.rows, "INS": t.ins, "OUTS": t.outs, "num_warps": t.warps, "num_stages": t.stages}
            kernel[programs](*arguments, **self.constants, **sizes, **more)

    def packed(self) -> Tensor:  # o 1+g+s i
        """Base and spline weights as one, inputs side by side."""
        return torch.cat([self.base_weight[:, None], self.spline_weight.mT], 1)

    def knots(self) -> tuple[Tensor, Tensor]:
        """The knots, m i, with the reciprocals that they need if they are not equally spaced; slopes at the ends."""
        grid, s, uniform = self.grid, self.job.s, self.job.uniform
        knots = grid.mT.contiguous()  # m i
        if uniform:
            return knots, knots
        table = torch.zeros(s + 1, *knots.shape, dtype=knots.dtype, device=knots.device)
        table[0] = knots
        for p in range(1, s + 1):
            table[p, :-p] = reciprocal(knots[p:] - knots[:-p])
        table[s, -1] = torch.nextafter(knots[-s - 1], knots.new_tensor(-math.inf))  # see `last_inside`
        if self.constants["EXTRAPOLATION"] != "linear":
            return table, knots
        return table, end_slopes(grid, s).mT.contiguous()  # 2 g+s i


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _width(size: int, most: int) -> int:
    """The next power of two, at least 16, which products need."""
    return max(16, min(most, power_of_two(size)))


def _precision(dtype: torch.dtype) -> str:
    """Whether products of float32 are rounded to TF32 first, by torch's own setting; AMD knows no such products."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # since torch 2.9
        return "tf32" if settings.fp32_precision == "tf32" else "ieee"
    return "tf32" if settings.allow_tf32 else "ieee"


@cache
def _gpu(device: torch.device) -> Gpu:
    """For tensors on the CPU, which only the interpreter runs, that of an H200."""
    if device.type == "cpu":
        return Gpu(90, 132, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Gpu(0, properties.multi_processor_count, 64 * 1024)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count, shared)
