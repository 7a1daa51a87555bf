"""The Triton kernel of the scan, backward.

A program takes one chunk of one direction, like the forward kernels, and goes through its tiles from the last to the
first: once along the direction from the saved state, leaving every step's state in a scratch of one tile, and back with
the adjoint of the state in registers. What the next step needs is loaded before this one is computed. Nothing is
unrolled.

The step sizes are in memory, where ``steps_kernel`` has put them, and their gradients take their index.

Sums over the states and over the channels are both needed here, so lanes lie across both: Triton gives every lane four
neighbouring channels of some of the states if the scratch's addresses run through the channels, and they do.
"""

import triton
import triton.language as tl

from kan_mamba_layers.ops.selective_scan import call
from kan_mamba_layers.ops.selective_scan.triton.forward_kernel import advance, load_row, start_at, this_program

LN2 = tl.constexpr(call.LN2)


@triton.jit
def scan_backward(
    grad_y,  # b l d
    u, coeffs, a2,
    saved,  # b k t n d: state that enters each tile
    behind,  # b k c n d: adjoint of the state, from behind each chunk
    scratch,  # one tile of states for each program
    partials,  # k b l d: gradients of u
    grad_coeffs,  # j b l k*g m: gradients of B and C at the end of each row, one part per block of channels
    steps,  # b l k d: step sizes, then their gradients
    grad_a,  # b c k n d
    in_front,  # b k n d: adjoint of the initial state
    orders, height, width, channels, group, chunk, chunks, tiles, blocks, batch,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, DIRECTIONS: tl.constexpr, UP: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, GRAD_ROW: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk; GRAD_ROW is ``m``."""
    ROW: tl.constexpr = RANK + 2 * N
    length = height * width
    block, k, c, b = this_program(blocks, chunks, DIRECTIONS)
    g, j = block // (blocks // GROUPS), block % (blocks // GROUPS)
    lane = j * BLOCK + tl.arange(0, BLOCK)
    keep = lane < group
    d = g * group + lane
    n = tl.arange(0, NP)
    inside = (n < N)[:, None] & keep[None, :]
    tile = n[:, None] * channels + d[None, :]
    local = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(a2 + k * N * channels + tile, mask=inside, other=0.0)

    first = c * chunk
    count_all = tl.minimum(chunk, length - first)
    up = k < UP
    bk = b * DIRECTIONS + k
    u += b * (length * channels)
    grad_y += b * (length * channels)
    coeffs += b * (length * (DIRECTIONS * GROUPS * ROW)) + (k * GROUPS + g) * ROW + RANK
    steps += b * (length * (DIRECTIONS * channels)) + k * channels
    partials += (k * batch + b) * (length * channels)
    grad_coeffs += (j * batch + b) * (length * (DIRECTIONS * GROUPS * GRAD_ROW))
    grad_coeffs += (k * GROUPS + g) * GRAD_ROW + (GRAD_ROW - 2 * N)
    scratch += ((bk * chunks + c) * blocks + block) * (TILE * NP * BLOCK)

    back = tl.load(behind + (bk * chunks + c) * (N * channels) + tile, mask=inside, other=0.0)
    sum_a = tl.zeros((NP, BLOCK), tl.float32)
    count_tiles = tl.cdiv(count_all, TILE)
    for t in range(count_tiles):
        index = first + tl.where(up, count_tiles - 1 - t, t) * TILE
        count = tl.minimum(TILE, first + count_all - index)
        h = tl.load(saved + (bk * tiles + index // TILE) * (N * channels) + tile, mask=inside, other=0.0)

        p, i, line, stride, jump = start_at(orders, tl.where(up, index, index + count - 1), count, k, up, height, width)
        dt = tl.load(steps + p * (DIRECTIONS * channels) + d, mask=keep, other=0.0)
        x = tl.load(u + p * channels + d, mask=keep, other=0.0)
        bt = load_row(coeffs + p * (DIRECTIONS * GROUPS * ROW), n, N, NP)
        for s in range(count):
            # The loads of the next step are issued first; after the last one the same values are read again.
            p, i = advance(orders, p, i, line, stride, jump, s, count)
            next_dt = tl.load(steps + p * (DIRECTIONS * channels) + d, mask=keep, other=0.0)
            next_x = tl.load(u + p * channels + d, mask=keep, other=0.0)
            next_b = load_row(coeffs + p * (DIRECTIONS * GROUPS * ROW), n, N, NP)
            tl.store(scratch + s * (NP * BLOCK) + local, h)
            h = tl.exp2(dt[None, :] * a) * h + (dt * x.to(tl.float32))[None, :] * bt[:, None]
            dt, x, bt = next_dt, next_x, next_b
        tl.debug_barrier()

        p, i, line, stride, jump = start_at(
            orders, tl.where(up, index + count - 1, index), count, k, not up, height, width
        )
        dt = tl.load(steps + p * (DIRECTIONS * channels) + d, mask=keep, other=0.0)
        x = tl.load(u + p * channels + d, mask=keep, other=0.0)
        gy = tl.load(grad_y + p * channels + d, mask=keep, other=0.0)
        bt = load_row(coeffs + p * (DIRECTIONS * GROUPS * ROW), n, N, NP)
        ct = load_row(coeffs + p * (DIRECTIONS * GROUPS * ROW) + N, n, N, NP)
        before = tl.load(scratch + (count - 1) * (NP * BLOCK) + local)  # the state before this step
        for s in range(count):
            here = p
            p, i = advance(orders, p, i, line, stride, jump, s, count)
            next_dt = tl.load(steps + p * (DIRECTIONS * channels) + d, mask=keep, other=0.0)
            next_x = tl.load(u + p * channels + d, mask=keep, other=0.0)
            next_gy = tl.load(grad_y + p * channels + d, mask=keep, other=0.0)
            next_b = load_row(coeffs + p * (DIRECTIONS * GROUPS * ROW), n, N, NP)
            next_c = load_row(coeffs + p * (DIRECTIONS * GROUPS * ROW) + N, n, N, NP)
            next_before = tl.load(scratch + tl.maximum(count - 2 - s, 0) * (NP * BLOCK) + local)
            x, gy = x.to(tl.float32), gy.to(tl.float32)
            grad_h = gy[None, :] * ct[:, None] + back
            grad_row = grad_coeffs + here * (DIRECTIONS * GROUPS * GRAD_ROW)
            tl.store(grad_row + n, tl.sum(grad_h * (dt * x)[None, :], 1), mask=n < N)
            tl.store(grad_row + N + n, tl.sum(gy[None, :] * h, 1), mask=n < N)
            back = tl.exp2(dt[None, :] * a) * grad_h
            rate = back * before
            sum_a += rate * dt[None, :]
            inflow = tl.sum(grad_h * bt[:, None], 0)
            tl.store(partials + here * channels + d, inflow * dt, mask=keep)
            grad_step = inflow * x + tl.sum(rate * a, 0) * LN2
            tl.store(steps + here * (DIRECTIONS * channels) + d, grad_step, mask=keep)
            h = before
            dt, x, gy, bt, ct, before = next_dt, next_x, next_gy, next_b, next_c, next_before
        tl.debug_barrier()  # the next tile uses the scratch again
    tl.store(grad_a + ((b * chunks + c) * DIRECTIONS + k) * (N * channels) + tile, sum_a, mask=inside)
    if c == tl.where(up, 0, chunks - 1):
        tl.store(in_front + bk * (N * channels) + tile, back, mask=inside)
