"""Triton kernels of the step sizes: all of them at once before the backward kernel, and their gradients after it.

Neither follows a direction, so their programs are many and independent. A program takes a range of pixels.
"""

import triton
import triton.language as tl

from kan_mamba_layers.ops.selective_scan.triton.forward_kernel import step_size


@triton.jit
def load_low(coeffs, rows, inside, r, R: tl.constexpr, PITCH: tl.constexpr):  # rows r
    """The low-rank steps of some pixels, with zeros up to the power of two."""
    return tl.load(coeffs + rows[:, None] * PITCH + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def load_weight(weight, r, d, keep, channels, R: tl.constexpr):  # r d
    """The weights of the low-rank steps of a block of channels."""
    return tl.load(weight + r[:, None] * channels + d[None, :], mask=(r < R)[:, None] & keep[None, :], other=0.0)


@triton.jit
def raw_steps(low, w, delta, rows, d, bias, channels, there, R: tl.constexpr, DIRECTIONS: tl.constexpr):  # rows d
    """Steps before softplus: ``low @ w + bias`` or, for ``R = 0``, ``delta + bias``."""
    if R > 0:
        return tl.dot(low, w, input_precision="ieee") + bias[None, :]
    else:
        at = rows[:, None] * (DIRECTIONS * channels) + d[None, :]
        return tl.load(delta + at, mask=there, other=0.0) + bias[None, :]


@triton.jit
def load_masks(mask, rows, inside):  # rows 1
    """What the steps at some pixels are multiplied by."""
    if mask is None:
        return 1.0
    else:
        return tl.load(mask + rows, mask=inside, other=0.0)[:, None]


@triton.jit
def step_sizes(
    coeffs,  # m k*g r+2n
    delta,  # m k d, read where R = 0
    weight,  # k r d
    bias,  # k d
    mask,  # m
    steps,  # m k d
    pixels, channels, group, blocks,
    R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    DIRECTIONS: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All step sizes of the ``m = b l`` pixels."""
    ROW: tl.constexpr = RANK + 2 * N
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < pixels
    k, g = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    r = tl.arange(0, RP)
    low = load_low(coeffs + (k * GROUPS + g) * ROW, rows, inside, r, R, DIRECTIONS * GROUPS * ROW)
    weight += k * R * channels
    bias += k * channels
    delta += k * channels
    steps += k * channels
    for block in range(blocks):
        lane = block * BLOCK + tl.arange(0, BLOCK)
        keep = lane < group
        d = g * group + lane
        there = inside[:, None] & keep[None, :]
        w = load_weight(weight, r, d, keep, channels, R)
        z = raw_steps(low, w, delta, rows, d, tl.load(bias + d, mask=keep, other=0.0), channels, there, R, DIRECTIONS)
        dt, _ = step_size(z, load_masks(mask, rows, inside), SOFTPLUS)
        tl.store(steps + rows[:, None] * (DIRECTIONS * channels) + d[None, :], dt, mask=there)


@triton.jit
def step_gradients(
    coeffs,  # m k*g r+2n
    delta,  # m k d, read where R = 0
    weight,  # k r d
    bias,  # k d
    mask,  # m
    grad_steps,  # m k d: gradients of the steps; where R = 0 those of delta take their index
    grad_coeffs,  # m k*g r+2n: the first r are written
    grad_weight,  # t k r d: one part for each range of pixels
    grad_bias,  # t k d
    pixels, channels, group, blocks,
    R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    DIRECTIONS: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Through softplus and the low-rank product."""
    ROW: tl.constexpr = RANK + 2 * N
    PITCH: tl.constexpr = DIRECTIONS * GROUPS * ROW
    part = tl.program_id(0).to(tl.int64)
    rows = part * ROWS + tl.arange(0, ROWS)
    inside = rows < pixels
    k, g = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    r = tl.arange(0, RP)
    first = (k * GROUPS + g) * ROW
    low = load_low(coeffs + first, rows, inside, r, R, PITCH)
    weight += k * R * channels
    bias += k * channels
    delta += k * channels
    grad_steps += k * channels
    grad_weight += (part * DIRECTIONS + k) * R * channels
    grad_bias += (part * DIRECTIONS + k) * channels
    grad_low = tl.zeros((ROWS, RP), tl.float32)
    for block in range(blocks):
        lane = block * BLOCK + tl.arange(0, BLOCK)
        keep = lane < group
        d = g * group + lane
        there = inside[:, None] & keep[None, :]
        w = load_weight(weight, r, d, keep, channels, R)
        z = raw_steps(low, w, delta, rows, d, tl.load(bias + d, mask=keep, other=0.0), channels, there, R, DIRECTIONS)
        _, slope = step_size(z, load_masks(mask, rows, inside), SOFTPLUS)
        at = grad_steps + rows[:, None] * (DIRECTIONS * channels) + d[None, :]
        grad_z = tl.load(at, mask=there, other=0.0) * slope
        tl.store(grad_bias + d, tl.sum(grad_z, 0), mask=keep)
        if R > 0:
            grad_low = tl.dot(grad_z, tl.trans(w), grad_low, input_precision="ieee")
            product = tl.dot(tl.trans(low), grad_z, input_precision="ieee")  # r d
            to = grad_weight + r[:, None] * channels + d[None, :]
            tl.store(to, product, mask=(r < R)[:, None] & keep[None, :])
        else:
            tl.store(at, grad_z, mask=there)
    if R > 0:
        to = grad_coeffs + first + rows[:, None] * PITCH + r[None, :]
        tl.store(to, grad_low, mask=inside[:, None] & (r < R)[None, :])
