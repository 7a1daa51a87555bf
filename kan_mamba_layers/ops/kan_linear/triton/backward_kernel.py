"""The Triton kernels of the KAN linear map, backward. They make the bases again from x, in registers.

The slope of basis j of degree s is the difference of two splines of degree s - 1, that of j and that of j + 1, so each
slot needs one new spline and keeps the one before.
"""

import triton
import triton.language as tl

from kan_mamba_layers.ops.kan_linear.triton.forward_kernel import (
    basis,
    cardinal,
    cox_de_boor,
    end_slope,
    ends,
    last_inside,
    locate,
    product,
)


@triton.jit
def lower_spline(z, j, knots, inside, IN, S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr):
    """Spline j of degree S - 1, so scaled that the slope of basis j is the difference of this one and the next.

    For equally spaced knots without ``unit(S - 1)`` over the spacing.
    """
    if UNIFORM:
        return cardinal(z - (j * (2 / S) + 1.0), S - 1)
    else:
        rate = S * tl.load(knots + (S * (BASES + S + 1) + j) * IN, mask=inside, other=0.0)
        return rate * cox_de_boor(z, j, knots, inside, IN, BASES + S + 1, S - 1)


@triton.jit
def grad_slot(
    whole, grad_y, weight, r, k, i, rows, IN, OUT,
    ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr, BASES: tl.constexpr, ONCE: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of grad_y @ weight of one slot; ONCE: the tile ``whole`` is as wide as grad_y."""
    g = tl.zeros((ROWS, INS), tl.float32)
    if ONCE:
        at = weight + k[:, None].to(tl.int64) * ((1 + BASES) * IN) + i
        w = tl.load(at, mask=(k[:, None] < OUT) & (i < IN), other=0.0)
        g = product(whole, w, g, PRECISION, INTERPRETED)
    else:
        for k0 in range(0, OUT, OUTS):
            o = k0 + k
            gy = tl.load(grad_y + r * OUT + o[None, :], mask=(r < rows) & (o[None, :] < OUT), other=0.0)
            at = weight + o[:, None].to(tl.int64) * ((1 + BASES) * IN) + i
            w = tl.load(at, mask=(o[:, None] < OUT) & (i < IN), other=0.0)
            g = product(gy, w, g, PRECISION, INTERPRETED)
    return g


@triton.jit
def grad_input(
    grad_y,  # rows o
    x,  # rows i
    weight,  # o 1+g+s i
    knots,  # m i, or s+1 m i with reciprocals unless UNIFORM
    slopes,  # 2 g+s i, read unless UNIFORM
    grad_x,  # rows i
    grad_activated,  # rows i, written unless SILU
    rows, IN, OUT,
    S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr, EXTRAPOLATION: tl.constexpr, SILU: tl.constexpr,
    LOWER_UNIT: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of grad_x: ``silu'(x) g_0 + sum_j B_j'(x) g_{1+j}``, with ``g_j = grad_y @ weight_j`` in registers."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1) * INS + tl.arange(0, INS)[None, :]
    k = tl.arange(0, OUTS)
    inside = i < IN
    there = (r < rows) & inside
    xi = tl.load(x + r * IN + i, mask=there, other=0.0).to(tl.float32)
    # 0 @ 0 + x is x, be it infinite or NaN, but lies in the registers where the products will lie.
    zero = tl.zeros((ROWS, 16), weight.dtype.element_ty)
    xi = product(zero, tl.zeros((16, INS), weight.dtype.element_ty), xi, PRECISION, INTERPRETED)
    first, rate, low, high = ends(knots + i, inside, IN, BASES + S + 1, S)
    z = (xi - first) * (rate * (2 / S)) if UNIFORM else xi
    # A knot belongs to the cell on its right, and the last one to the cell inside.
    if UNIFORM and S == 1:  # whose slope jumps at a knot
        z += 2.0**-20 * (rate * (tl.abs(first) + tl.abs(high)) + 1.0)  # more than what is rounded in z
        if EXTRAPOLATION != "zero":
            z = tl.where(xi >= high, 2.0 * BASES - 1.0, z)
    if not UNIFORM and EXTRAPOLATION != "zero":
        z = tl.where(xi >= high, last_inside(knots + i, inside, IN, BASES + S + 1, S), z)
    gy = tl.load(grad_y + r * OUT + k[None, :], mask=(r < rows) & (k[None, :] < OUT), other=0.0)
    sums = tl.zeros((ROWS, INS), tl.float32)
    left = lower_spline(z, 0, knots + i, inside, IN, S, BASES, UNIFORM)
    for j in range(BASES):  # a loop, so that the next slot's weight is on its way
        right = lower_spline(z, j + 1, knots + i, inside, IN, S, BASES, UNIFORM)
        slope = left - right
        if EXTRAPOLATION == "linear":
            if UNIFORM:
                slope_below = end_slope(j, S)
                slope_above = -end_slope(BASES - 1 - j, S)
            else:
                slope_below = tl.load(slopes + j * IN + i, mask=inside, other=0.0)
                slope_above = tl.load(slopes + (BASES + j) * IN + i, mask=inside, other=0.0)
            slope = tl.where(xi < low, slope_below, tl.where(xi > high, slope_above, slope))
        sums += slope * grad_slot(
            gy, grad_y, weight + (1 + j) * IN, r, k, i, rows, IN, OUT,
            ROWS, INS, OUTS, BASES, ONCE, PRECISION, INTERPRETED,
        )  # fmt: skip
        left = right
    if UNIFORM:
        sums *= rate * LOWER_UNIT
    if EXTRAPOLATION == "clamp":
        sums = tl.where((xi < low) | (xi > high), 0.0, sums)
    elif EXTRAPOLATION == "zero" and not UNIFORM:  # far away the recursion overflows
        last = tl.load(knots + (BASES + S) * IN + i, mask=inside, other=0.0)
        sums = tl.where((xi < first) | (xi > last), 0.0, sums)

    g = grad_slot(
        gy, grad_y, weight, r, k, i, rows, IN, OUT, ROWS, INS, OUTS, BASES, ONCE, PRECISION, INTERPRETED
    )  # fmt: skip
    if SILU:
        s = tl.sigmoid(xi)
        sums += g * (s * (1.0 + xi * (1.0 - s)))
    else:
        tl.store(grad_activated + r * IN + i, g.to(grad_activated.dtype.element_ty), mask=there)
    tl.store(grad_x + r * IN + i, sums.to(grad_x.dtype.element_ty), mask=there)


@triton.jit
def sum_slots(
    grad_y, x, activated, knots, slopes, partial, slot, i, o, begin, end, IN, OUT,
    S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr, EXTRAPOLATION: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr, SCALE: tl.constexpr, BASE: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Gradients of SLOTS neighbouring slots from one range of rows; BASE: the first of them is the activation's."""
    inside = i < IN
    knots += i
    slopes += i
    sum0 = tl.zeros((INS, OUTS), tl.float32)
    sum1 = tl.zeros((INS, OUTS), tl.float32)
    sum2 = tl.zeros((INS, OUTS), tl.float32)
    for r0 in range(begin, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        at = r[None, :] * IN + i
        there = (r[None, :] < end) & inside
        xi = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        gy = tl.load(grad_y + r[:, None] * OUT + o, mask=(r[:, None] < end) & (o < OUT), other=0.0)
        z, below, above = locate(xi, knots, inside, IN, S, BASES, UNIFORM, EXTRAPOLATION)
        if BASE:
            a = xi * tl.sigmoid(xi) if SILU else tl.load(activated + at, mask=there, other=0.0)
        else:
            a = basis(z, below, above, slot - 1, knots, slopes, inside, IN, S, BASES, UNIFORM, EXTRAPOLATION, SCALE)
        sum0 = product(a, gy, sum0, PRECISION, INTERPRETED)
        if SLOTS > 1:
            a = basis(z, below, above, slot, knots, slopes, inside, IN, S, BASES, UNIFORM, EXTRAPOLATION, SCALE)
            sum1 = product(a, gy, sum1, PRECISION, INTERPRETED)
        if SLOTS > 2:
            a = basis(z, below, above, slot + 1, knots, slopes, inside, IN, S, BASES, UNIFORM, EXTRAPOLATION, SCALE)
            sum2 = product(a, gy, sum2, PRECISION, INTERPRETED)
    wanted = inside & (o < OUT)
    partial += o.to(tl.int64) * ((1 + BASES) * IN) + slot * IN + i
    if UNIFORM:
        sum0 *= 1.0 if BASE else UNIT
        sum1 *= UNIT
        sum2 *= UNIT
    tl.store(partial, sum0, mask=wanted)
    if SLOTS > 1:
        tl.store(partial + IN, sum1, mask=wanted & (slot + 1 <= BASES))
    if SLOTS > 2:
        tl.store(partial + 2 * IN, sum2, mask=wanted & (slot + 2 <= BASES))


@triton.jit
def grad_weights(
    grad_y,  # rows o
    x,  # rows i
    activated,  # rows i, read unless SILU
    knots,  # m i, or s+1 m i with reciprocals unless UNIFORM
    slopes,  # 2 g+s i, read unless UNIFORM
    partials,  # p o 1+g+s i
    rows, rows_per_split, IN, OUT,
    S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr, EXTRAPOLATION: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr, SCALE: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of the weights' gradients in a group of slots, from one range of rows; the sums stay in registers."""
    GROUPS: tl.constexpr = (BASES + SLOTS) // SLOTS
    slot = tl.program_id(0) % GROUPS * SLOTS
    i = tl.program_id(0) // GROUPS * INS + tl.arange(0, INS)[:, None]
    o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)[None, :]
    p = tl.program_id(2).to(tl.int64)
    begin = p * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    partial = partials + p * OUT * ((1 + BASES) * IN)
    if slot == 0:
        sum_slots(
            grad_y, x, activated, knots, slopes, partial, slot, i, o, begin, end, IN, OUT,
            S, BASES, UNIFORM, EXTRAPOLATION, SILU, UNIT, SCALE, True, SLOTS,
            ROWS, INS, OUTS, PRECISION, INTERPRETED,
        )  # fmt: skip
    else:
        sum_slots(
            grad_y, x, activated, knots, slopes, partial, slot, i, o, begin, end, IN, OUT,
            S, BASES, UNIFORM, EXTRAPOLATION, SILU, UNIT, SCALE, False, SLOTS,
            ROWS, INS, OUTS, PRECISION, INTERPRETED,
        )  # fmt: skip
