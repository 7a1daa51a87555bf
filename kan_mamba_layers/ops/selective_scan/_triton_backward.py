"""The Triton kernel of the scan, backward.

A program takes one chunk of one walk, like the forward kernels. It expands the steps of the chunk and goes through its
tiles against the direction: once along the direction from the saved state, leaving every step's state in a scratch of
one tile, and back with the adjoint of the state in registers. Nothing is unrolled.

Sums over the states and sums over the channels are both needed here, so lanes lie across both: Triton gives every lane
four neighbouring channels of some of the states if the tile's addresses run through the channels, and they do.
"""

import triton
import triton.language as tl

from kan_mamba_layers.ops.selective_scan._triton_forward import (
    load_row,
    step_size,
    this_program,
    walk_from,
    walk_on,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scan_backward(
    grad_y,  # b l d
    u, maps, delta, weight, bias, a2,
    saved,  # b k t n d: state that enters each tile
    behind,  # b k c n d: adjoint of the state, from behind each chunk
    scratch,  # one tile of states for each program
    parts,  # k b l d: gradients of u
    grad_maps,  # j b l k*g 2n: gradients of B and C, one part a block of channels
    grad_z,  # b l k d: gradients of the step sizes before softplus
    grad_a,  # b c k n d
    in_front,  # b k n d: adjoint of the initial state
    height, width, channels, group, chunk, chunks, tiles, blocks, batch,
    R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr,
    WALKS: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = RANK + 2 * N
    length = height * width
    block, k, c, b = this_program(blocks, chunks, WALKS)
    g, j = block // (blocks // GROUPS), block % (blocks // GROUPS)
    lane = j * BLOCK + tl.arange(0, BLOCK)
    keep = lane < group
    d = g * group + lane
    n, r = tl.arange(0, NP), tl.arange(0, RP)
    inside = (n < N)[:, None] & keep[None, :]
    tile = n[:, None] * channels + d[None, :]
    local = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(a2 + k * N * channels + tile, mask=inside, other=0.0)

    first = c * chunk
    steps = tl.minimum(chunk, length - first)
    up = k < 2
    bk = b * WALKS + k
    u += b * (length * channels)
    grad_y += b * (length * channels)
    maps += b * (length * (WALKS * GROUPS * ROW)) + (k * GROUPS + g) * ROW
    delta += b * (length * (WALKS * channels)) + k * channels
    grad_z += b * (length * (WALKS * channels)) + k * channels
    parts += (k * batch + b) * (length * channels)
    grad_maps += (j * batch + b) * (length * (WALKS * GROUPS * 2 * N)) + (k * GROUPS + g) * (2 * N)
    scratch += ((bk * chunks + c) * blocks + block) * (TILE * NP * BLOCK)

    # The steps before softplus stand where their gradients will stand.
    w = tl.load(weight + (k * R + r[:, None]) * channels + d[None, :], mask=(r < R)[:, None] & keep[None, :], other=0.0)
    bi = tl.load(bias + k * channels + d, mask=keep, other=0.0)
    p, i, line, stride, jump = walk_from(first, k, True, height, width)
    for _step in range(steps):
        if R > 0:
            z = tl.sum(w * load_row(maps + p * (WALKS * GROUPS * ROW), r, R, RP)[:, None], 0) + bi
        else:
            z = tl.load(delta + p * (WALKS * channels) + d, mask=keep, other=0.0) + bi
        tl.store(grad_z + p * (WALKS * channels) + d, z, mask=keep)
        p, i = walk_on(p, i, line, stride, jump)
    tl.debug_barrier()

    back = tl.load(behind + (bk * chunks + c) * (N * channels) + tile, mask=inside, other=0.0)
    sum_a = tl.zeros((NP, BLOCK), tl.float32)
    turns = tl.cdiv(steps, TILE)
    for turn in range(turns):
        place = first + tl.where(up, turns - 1 - turn, turn) * TILE
        count = tl.minimum(TILE, first + steps - place)
        h = tl.load(saved + (bk * tiles + place // TILE) * (N * channels) + tile, mask=inside, other=0.0)

        p, i, line, stride, jump = walk_from(tl.where(up, place, place + count - 1), k, up, height, width)
        for s in range(count):
            tl.store(scratch + s * (NP * BLOCK) + local, h)
            row = maps + p * (WALKS * GROUPS * ROW)
            z = tl.load(grad_z + p * (WALKS * channels) + d, mask=keep, other=0.0)
            dt, _ = step_size(z, SOFTPLUS)
            x = tl.load(u + p * channels + d, mask=keep, other=0.0).to(tl.float32)
            h = tl.exp2(dt[None, :] * a) * h + (dt * x)[None, :] * load_row(row + RANK, n, N, NP)[:, None]
            p, i = walk_on(p, i, line, stride, jump)
        tl.debug_barrier()

        p, i, line, stride, jump = walk_from(tl.where(up, place + count - 1, place), k, not up, height, width)
        for s in range(count):
            row = maps + p * (WALKS * GROUPS * ROW)
            bt, ct = load_row(row + RANK, n, N, NP), load_row(row + RANK + N, n, N, NP)
            x = tl.load(u + p * channels + d, mask=keep, other=0.0).to(tl.float32)
            gy = tl.load(grad_y + p * channels + d, mask=keep, other=0.0).to(tl.float32)
            z = tl.load(grad_z + p * (WALKS * channels) + d, mask=keep, other=0.0)
            dt, slope = step_size(z, SOFTPLUS)
            grad_h = gy[None, :] * ct[:, None] + back
            grad_row = grad_maps + p * (WALKS * GROUPS * 2 * N)
            tl.store(grad_row + n, tl.sum(grad_h * (dt * x)[None, :], 1), mask=n < N)
            tl.store(grad_row + N + n, tl.sum(gy[None, :] * h, 1), mask=n < N)
            h = tl.load(scratch + (count - 1 - s) * (NP * BLOCK) + local)  # the state before this step
            back = tl.exp2(dt[None, :] * a) * grad_h
            rate = back * h
            sum_a += rate * dt[None, :]
            inflow = tl.sum(grad_h * bt[:, None], 0)
            tl.store(parts + p * channels + d, inflow * dt, mask=keep)
            grad_step = inflow * x + tl.sum(rate * a, 0) * LN2
            tl.store(grad_z + p * (WALKS * channels) + d, grad_step * slope, mask=keep)
            p, i = walk_on(p, i, line, stride, jump)
        tl.debug_barrier()  # the next tile uses the scratch again
    tl.store(grad_a + ((b * chunks + c) * WALKS + k) * (N * channels) + tile, sum_a, mask=inside)
    if c == tl.where(up, 0, chunks - 1):
        tl.store(in_front + bk * (N * channels) + tile, back, mask=inside)
