"""Triton kernels of the scan, forward, and the pieces that the backward kernel shares with them.

A program is one warp (more from 64 states on). It takes one chunk of one direction of one image for one block of
channels. Its registers hold, for every channel and all ``n`` states at once, the state, the decay rates ``A log2(e)``
and the coefficients of the current and the next step.

``channels`` and ``group`` are not specialised: the compiler does not know whether they divide by 16. That settles the
layout: addresses run through the channels without any known alignment, so neighbouring lanes get neighbouring channels,
one at a time, each with all of its states, and the sum over the states stays inside a lane.

An index numbers the pixels along a direction by rows or by columns: ``p_0`` and ``p_1`` of the definition. The reversed
directions visit the same indices downwards. Chunks (the share of a program) and tiles (between two saved states) are
ranges of indices, so a direction and its reverse have the same ones. With a table of positions the index is the time,
and all directions go upwards. The first ``UP`` directions are those that do.

``orders`` and ``mask`` are None where a call has none. Triton compiles that as a variant without them.
"""

import triton
import triton.language as tl

from kan_mamba_layers.ops.selective_scan import call

LOG2E = tl.constexpr(call.LOG2E)


@triton.jit
def softplus_and_slope(z):
    """``log(1 + e^z)`` and its derivative, from ``e = e^-|z|`` and a polynomial for ``log(1 + e) / e`` on [0, 1].

    Good to 3e-8 before rounding, also relative to the tiny values at very negative z, where ``log(1 + e)`` is lost.
    """
    e = tl.exp2(-tl.abs(z) * LOG2E)
    p = 0.00523254694 * e - 0.0295046587
    p = p * e + 0.078225024
    p = p * e - 0.136631697
    p = p * e + 0.191059723
    p = p * e - 0.248429745
    p = p * e + 0.333190948
    p = p * e - 0.499994934
    log1p = (p * e + 0.99999994) * e
    return tl.maximum(z, 0.0) + log1p, tl.where(z < 0.0, e, 1.0) * tl.exp2(-log1p * LOG2E)


@triton.jit
def step_size(z, unmasked, SOFTPLUS: tl.constexpr):
    """The step from its raw value, and the derivative; both 0 where ``unmasked`` is."""
    if SOFTPLUS:
        step, slope = softplus_and_slope(z)
        return step * unmasked, slope * unmasked
    else:
        return z * unmasked, unmasked


@triton.jit
def this_program(blocks, chunks, DIRECTIONS: tl.constexpr):
    """Block of channels, direction, chunk and image of this program; the image in 64 bits, as all addresses need it."""
    i = tl.program_id(0)
    block, i = i % blocks, i // blocks
    k, i = i % DIRECTIONS, i // DIRECTIONS
    return block, k, i % chunks, (i // chunks).to(tl.int64)


@triton.jit
def start_at(orders, index, steps, k, up, height, width):
    """Position of an index, and what it takes to go on for ``steps`` steps: (position, i, line, stride, jump).

    A line is a row or a column of the image, and ``i`` counts the steps since it began. After ``line`` steps of
    ``stride`` the next line begins, ``jump`` further. With a table, ``i`` is the next position, ``line`` the address
    of this one, and ``stride`` leads to the address of the next. ``up`` tells whether indices are visited upwards.
    """
    if orders is None:
        column = k % 2 == 1
        line = tl.where(column, height, width)
        i = index % line
        p = tl.where(column, i * width + index // line, index)
        stride = tl.where(column, width, 1)
        jump = tl.where(column, 1 - height * width, 0)
        return p, tl.where(up, i, line - 1 - i), line, tl.where(up, stride, -stride), tl.where(up, jump, -jump)
    else:
        line = orders + k * (height * width) + index
        stride = tl.where(up, 1, -1)
        return tl.load(line), tl.load(line + stride * tl.minimum(1, steps - 1)), line, stride, 0


@triton.jit
def advance(orders, p, i, line, stride, jump, s, steps):
    """The position after the s-th step, without a division, and ``i`` there; after the last step the same position.

    All other loads wait for a table's, so it is read for the step after the next one.
    """
    if orders is None:
        i += 1
        ends = i == line
        after = p + stride + tl.where(ends, jump, 0)
        i = tl.where(ends, 0, i)
        return tl.where(s + 1 < steps, after, p), i
    else:
        return i, tl.load(line + stride * tl.minimum(s + 2, steps - 1))


@triton.jit
def load_mask(mask, p):
    """What the step at a position is multiplied by."""
    if mask is None:
        return tl.full((), 1.0, tl.float32)
    else:
        return tl.load(mask + p)


@triton.jit
def load_row(at, i, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """``SIZE`` neighbouring values, and zeros up to the next power of two."""
    if SIZE == PADDED:
        return tl.load(at + i)
    else:
        return tl.load(at + i, mask=i < SIZE, other=0.0)


@triton.jit
def load_raw_step(coeffs, delta, r, d, keep, R: tl.constexpr, RP: tl.constexpr):
    """What the step size is made from: its ``R`` coefficients or, for ``R = 0``, the given values."""
    if R > 0:
        return load_row(coeffs, r, R, RP)
    else:
        return tl.load(delta + d, mask=keep, other=0.0)


@triton.jit
def raw_step(low, weight, bias, R: tl.constexpr):
    """The step before softplus, from its coefficients or as given."""
    if R > 0:
        return tl.sum(weight * low[:, None], 0) + bias
    else:
        return low + bias


@triton.jit(do_not_specialize=["channels", "group"])
def chunk_ends(
    x,  # b l d: u, or the gradient of y
    coeffs, delta, weight, bias, mask, a2,
    ends,  # b k c n d
    sums,  # b k c d: sums of the step sizes
    orders, height, width, channels, group, chunk, chunks, tiles, blocks, batch,
    R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr,
    DIRECTIONS: tl.constexpr, UP: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The state after each chunk if zero enters it; with BACK the adjoint in front of it if none comes from behind."""
    ROW: tl.constexpr = RANK + 2 * N
    length = height * width
    block, k, c, b = this_program(blocks, chunks, DIRECTIONS)
    g = block // (blocks // GROUPS)
    lane = block % (blocks // GROUPS) * BLOCK + tl.arange(0, BLOCK)
    keep = lane < group
    d = g * group + lane
    n, r = tl.arange(0, NP), tl.arange(0, RP)
    inside = (n < N)[:, None] & keep[None, :]
    tile = n[:, None] * channels + d[None, :]
    a = tl.load(a2 + k * N * channels + tile, mask=inside, other=0.0)
    w = tl.load(weight + (k * R + r[:, None]) * channels + d[None, :], mask=(r < R)[:, None] & keep[None, :], other=0.0)
    bi = tl.load(bias + k * channels + d, mask=keep, other=0.0)

    first = c * chunk
    steps = tl.minimum(chunk, length - first)
    up = (k < UP) != BACK
    p, i, line, stride, jump = start_at(orders, tl.where(up, first, first + steps - 1), steps, k, up, height, width)
    x += b * (length * channels)
    coeffs += b * (length * (DIRECTIONS * GROUPS * ROW)) + (k * GROUPS + g) * ROW
    delta += b * (length * (DIRECTIONS * channels)) + k * channels
    if mask is not None:
        mask += b * length
    offset: tl.constexpr = RANK + N if BACK else RANK  # of C or B in a row of coeffs

    h = tl.zeros((NP, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    row = coeffs + p * (DIRECTIONS * GROUPS * ROW)
    xt = tl.load(x + p * channels + d, mask=keep, other=0.0)
    low = load_raw_step(row, delta + p * (DIRECTIONS * channels), r, d, keep, R, RP)
    unmasked = load_mask(mask, p)
    bt = load_row(row + offset, n, N, NP)
    for s in tl.range(0, steps, loop_unroll_factor=2):
        # The loads of the next step are issued first; after the last one the same values are read again.
        p, i = advance(orders, p, i, line, stride, jump, s, steps)
        row = coeffs + p * (DIRECTIONS * GROUPS * ROW)
        next_x = tl.load(x + p * channels + d, mask=keep, other=0.0)
        next_low = load_raw_step(row, delta + p * (DIRECTIONS * channels), r, d, keep, R, RP)
        next_unmasked = load_mask(mask, p)
        next_b = load_row(row + offset, n, N, NP)
        dt, _ = step_size(raw_step(low, w, bi, R), unmasked, SOFTPLUS)
        decay = tl.exp2(dt[None, :] * a)
        xt = xt.to(tl.float32)
        inflow = xt if BACK else dt * xt
        h = decay * (h + inflow[None, :] * bt[:, None]) if BACK else decay * h + inflow[None, :] * bt[:, None]
        total += dt
        xt, low, unmasked, bt = next_x, next_low, next_unmasked, next_b
    at = (b * DIRECTIONS + k) * chunks + c
    tl.store(ends + at * (N * channels) + tile, h, mask=inside)
    tl.store(sums + at * channels + d, total, mask=keep)


@triton.jit
def load_chunk(ends, sums, s, down, chunks, values, channels, inside):
    """What the s-th chunk along the direction ends with, and the sum of its step sizes; zeros behind the last one."""
    c = tl.where(down, chunks - 1 - s, s).to(tl.int64)
    there = inside & (s < chunks)
    return tl.load(ends + c * values, mask=there, other=0.0), tl.load(sums + c * channels, mask=there, other=0.0)


@triton.jit
def carry(
    ends,  # b k c n d
    sums,  # b k c d
    a2,  # k n d
    start,  # b k n d
    channels, chunks, values, DIRECTIONS: tl.constexpr, UP: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn, in index, what each chunk ends with if it starts from zero into what really enters it."""
    blocks = tl.cdiv(values, BLOCK)  # values = n d
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    bk = (tl.program_id(0) // blocks).to(tl.int64)
    inside = e < values
    k = (bk % DIRECTIONS).to(tl.int32)
    down = (k >= UP) != BACK
    ends += bk * chunks * values + e
    sums += bk * chunks * channels + e % channels
    a = tl.load(a2 + k * values + e, mask=inside, other=0.0)
    h = tl.load(start + bk * values + e, mask=inside, other=0.0)
    # Four chunks are on their way, since nothing else here takes time.
    end0, sum0 = load_chunk(ends, sums, 0, down, chunks, values, channels, inside)
    end1, sum1 = load_chunk(ends, sums, 1, down, chunks, values, channels, inside)
    end2, sum2 = load_chunk(ends, sums, 2, down, chunks, values, channels, inside)
    end3, sum3 = load_chunk(ends, sums, 3, down, chunks, values, channels, inside)
    for s in range(chunks):
        tl.store(ends + tl.where(down, chunks - 1 - s, s).to(tl.int64) * values, h, mask=inside)
        # Half of the decay on each side: for growing states no product overflows unless the result does.
        half = tl.exp2(0.5 * (a * sum0))
        h = tl.where(h == 0.0, end0, (half * h) * half + end0)
        end0, sum0, end1, sum1, end2, sum2 = end1, sum1, end2, sum2, end3, sum3
        end3, sum3 = load_chunk(ends, sums, s + 4, down, chunks, values, channels, inside)


@triton.jit(do_not_specialize=["channels", "group"])
def scan(
    u, coeffs, delta, weight, bias, mask, a2,
    entering,  # b k c n d: state that enters each chunk
    partials,  # j b l d: sums over n of C h, one buffer per pair of directions or direction
    saved,  # b k t n d: state that enters each tile
    last,  # b k n d
    orders, height, width, channels, group, chunk, chunks, tiles, blocks, batch,
    R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr,
    DIRECTIONS: tl.constexpr, UP: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr,
    PASSES: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y of one chunk, without the skip. With PASSES = 2 also of the reverse, added."""
    ROW: tl.constexpr = RANK + 2 * N
    length = height * width
    block, k0, c, b = this_program(blocks, chunks, DIRECTIONS // PASSES)
    g = block // (blocks // GROUPS)
    lane = block % (blocks // GROUPS) * BLOCK + tl.arange(0, BLOCK)
    keep = lane < group
    d = g * group + lane
    n, r = tl.arange(0, NP), tl.arange(0, RP)
    inside = (n < N)[:, None] & keep[None, :]
    tile = n[:, None] * channels + d[None, :]
    first = c * chunk
    steps = tl.minimum(chunk, length - first)
    u += b * (length * channels)
    if mask is not None:
        mask += b * length
    partials += (k0 * batch + b) * (length * channels)

    for backwards in tl.static_range(PASSES):
        k = k0 + 2 * backwards
        up = k < UP
        bk = b * DIRECTIONS + k
        a = tl.load(a2 + k * N * channels + tile, mask=inside, other=0.0)
        w = tl.load(
            weight + (k * R + r[:, None]) * channels + d[None, :], mask=(r < R)[:, None] & keep[None, :], other=0.0
        )
        bi = tl.load(bias + k * channels + d, mask=keep, other=0.0)
        h = tl.load(entering + (bk * chunks + c) * (N * channels) + tile, mask=inside, other=0.0)
        p, i, line, stride, jump = start_at(orders, tl.where(up, first, first + steps - 1), steps, k, up, height, width)
        coeffs_k = coeffs + b * (length * (DIRECTIONS * GROUPS * ROW)) + (k * GROUPS + g) * ROW
        delta_k = delta + b * (length * (DIRECTIONS * channels)) + k * channels

        row = coeffs_k + p * (DIRECTIONS * GROUPS * ROW)
        xt = tl.load(u + p * channels + d, mask=keep, other=0.0)
        low = load_raw_step(row, delta_k + p * (DIRECTIONS * channels), r, d, keep, R, RP)
        unmasked = load_mask(mask, p)
        bt, ct = load_row(row + RANK, n, N, NP), load_row(row + RANK + N, n, N, NP)
        for s in tl.range(0, steps, loop_unroll_factor=2):
            if SAVE & ((s == 0) | (tl.where(up, s, steps - s) % TILE == 0)):
                index = first + tl.where(up, s, steps - 1 - s)
                tl.store(saved + (bk * tiles + index // TILE) * (N * channels) + tile, h, mask=inside)
            out = partials + p * channels + d
            if backwards > 0:
                before = tl.load(out, mask=keep, other=0.0)
            p, i = advance(orders, p, i, line, stride, jump, s, steps)
            row = coeffs_k + p * (DIRECTIONS * GROUPS * ROW)
            next_x = tl.load(u + p * channels + d, mask=keep, other=0.0)
            next_low = load_raw_step(row, delta_k + p * (DIRECTIONS * channels), r, d, keep, R, RP)
            next_unmasked = load_mask(mask, p)
            next_b, next_c = load_row(row + RANK, n, N, NP), load_row(row + RANK + N, n, N, NP)
            dt, _ = step_size(raw_step(low, w, bi, R), unmasked, SOFTPLUS)
            h = tl.exp2(dt[None, :] * a) * h + (dt * xt.to(tl.float32))[None, :] * bt[:, None]
            y = tl.sum(h * ct[:, None], 0)
            if backwards > 0:
                y += before
            tl.store(out, y, mask=keep)
            xt, low, unmasked, bt, ct = next_x, next_low, next_unmasked, next_b, next_c
        if c == tl.where(up, chunks - 1, 0):
            tl.store(last + bk * (N * channels) + tile, h, mask=inside)
        tl.debug_barrier()  # the way back reads what the way there wrote


@triton.jit
def merge(partials, x, skip, out, total, channels, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """``out = skip x + sum of the partials``, in one fixed order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    value = tl.load(skip + i % channels, mask=inside, other=0.0)
    value *= tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    at = partials + i
    for _i in tl.static_range(COUNT):
        value += tl.load(at, mask=inside, other=0.0)
        at += total
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)
