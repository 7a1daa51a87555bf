"""The Triton kernel of the KAN linear map, forward, and the bases in registers, which the backward kernels share.

Slot 0 of the packed weight, ``o 1+g+s i``, belongs to the activation, slot 1 + j to basis j of the g + s bases. The
operand A of every product is made in registers from a tile of x and goes to the tensor cores from there.

Bases of equally spaced knots are computed without their factor ``unit(s)``; the kernels multiply it in where a tile is
finished, and divide the activation by it instead. So the weights are used as they are.
"""

import math

import triton
import triton.language as tl


def unit(degree: int) -> float:
    """``((s+1)/2)^s / s!``, the factor that ``cardinal`` leaves out."""
    return ((degree + 1) / 2) ** degree / math.factorial(degree)


@triton.jit
def clamp_unit(t):
    """Clamp to [0, 1]. On NVIDIA GPUs that is a free modifier of the addition before it; one-sided it would not be."""
    return tl.minimum(tl.maximum(t, 0.0), 1.0)


@triton.jit
def power(t, S: tl.constexpr):
    """``t^S``."""
    if S == 1:
        return t
    elif S == 2:
        return t * t
    elif S == 3:
        return t * t * t
    elif S == 4:
        return (t * t) * (t * t)
    else:
        return (t * t) * (t * t) * t


@triton.jit
def cardinal(d, S: tl.constexpr):
    """The B-spline of degree S on equally spaced knots, over ``unit(S)``; its support is ``|d| < 1``, its centre 0.

    Symmetric truncated powers, ``sum_j (-1)^j binomial(S+1, j) relu(p - 2j/(S+1))^S`` with ``p = 1 - |d|``, where each
    binomial coefficient is moved into its power, so that every term lies in [0, 1]. Degree 0 is 1 on [-1, 1).
    """
    if S == 0:
        return tl.where((d >= -1.0) & (d < 1.0), 1.0, 0.0)
    else:
        p = clamp_unit(1.0 - tl.abs(d))
        b = power(p, S)
        if S == 2:
            b -= power(clamp_unit(p * 1.7320508075688772 - 1.7320508075688772 * 2 / 3), S)  # binomial(3, 1)^(1/2)
        if S == 3:
            b -= power(clamp_unit(p * 1.5874010519681994 - 1.5874010519681994 * 2 / 4), S)  # binomial(4, 1)^(1/3)
        if S == 4:
            b -= power(clamp_unit(p * 1.4953487812212205 - 1.4953487812212205 * 2 / 5), S)  # binomial(5, 1)^(1/4)
            b += power(clamp_unit(p * 1.7782794100389228 - 1.7782794100389228 * 4 / 5), S)  # binomial(5, 2)^(1/4)
        if S == 5:
            b -= power(clamp_unit(p * 1.4309690811052556 - 1.4309690811052556 * 2 / 6), S)  # binomial(6, 1)^(1/5)
            b += power(clamp_unit(p * 1.7187719275874789 - 1.7187719275874789 * 4 / 6), S)  # binomial(6, 2)^(1/5)
        return b


@triton.jit
def blend(lower, upper, x, j, knots, inside, IN, KNOTS: tl.constexpr, P: tl.constexpr):
    """Basis j of degree P from those of degree P - 1 at j and j + 1.

    ``knots`` is s+1 m i: the knots, and in table p the reciprocals of p intervals; the last row is `last_inside`.
    """
    rising = x - tl.load(knots + j * IN, mask=inside, other=0.0)
    falling = tl.load(knots + (j + P + 1) * IN, mask=inside, other=0.0) - x
    rate0 = tl.load(knots + (P * KNOTS + j) * IN, mask=inside, other=0.0)
    rate1 = tl.load(knots + (P * KNOTS + j + 1) * IN, mask=inside, other=0.0)
    return rising * rate0 * lower + falling * rate1 * upper


# One function per degree, since Triton 3.4 has no recursion. The compiler merges what several branches compute.


@triton.jit
def degree_0(x, j, knots, inside, IN, KNOTS: tl.constexpr):
    """Basis j of degree 0."""
    t0 = tl.load(knots + j * IN, mask=inside, other=0.0)
    t1 = tl.load(knots + (j + 1) * IN, mask=inside, other=0.0)
    return tl.where((x >= t0) & (x < t1), 1.0, 0.0)


@triton.jit
def degree_1(x, j, knots, inside, IN, KNOTS: tl.constexpr):
    """Basis j of degree 1."""
    lower, upper = degree_0(x, j, knots, inside, IN, KNOTS), degree_0(x, j + 1, knots, inside, IN, KNOTS)
    return blend(lower, upper, x, j, knots, inside, IN, KNOTS, 1)


@triton.jit
def degree_2(x, j, knots, inside, IN, KNOTS: tl.constexpr):
    """Basis j of degree 2."""
    lower, upper = degree_1(x, j, knots, inside, IN, KNOTS), degree_1(x, j + 1, knots, inside, IN, KNOTS)
    return blend(lower, upper, x, j, knots, inside, IN, KNOTS, 2)


@triton.jit
def degree_3(x, j, knots, inside, IN, KNOTS: tl.constexpr):
    """Basis j of degree 3."""
    lower, upper = degree_2(x, j, knots, inside, IN, KNOTS), degree_2(x, j + 1, knots, inside, IN, KNOTS)
    return blend(lower, upper, x, j, knots, inside, IN, KNOTS, 3)


@triton.jit
def degree_4(x, j, knots, inside, IN, KNOTS: tl.constexpr):
    """Basis j of degree 4."""
    lower, upper = degree_3(x, j, knots, inside, IN, KNOTS), degree_3(x, j + 1, knots, inside, IN, KNOTS)
    return blend(lower, upper, x, j, knots, inside, IN, KNOTS, 4)


@triton.jit
def degree_5(x, j, knots, inside, IN, KNOTS: tl.constexpr):
    """Basis j of degree 5."""
    lower, upper = degree_4(x, j, knots, inside, IN, KNOTS), degree_4(x, j + 1, knots, inside, IN, KNOTS)
    return blend(lower, upper, x, j, knots, inside, IN, KNOTS, 5)


@triton.jit
def hold(x, knots, inside, IN, KNOTS: tl.constexpr):
    """Outside all knots the last one, where all bases are zero too: far away the recursion would overflow."""
    first = tl.load(knots, mask=inside, other=0.0)
    last = tl.load(knots + (KNOTS - 1) * IN, mask=inside, other=0.0)
    return tl.where((x < first) | (x > last), last, x)


@triton.jit
def cox_de_boor(x, j, knots, inside, IN, KNOTS: tl.constexpr, P: tl.constexpr):
    """Basis j of degree P on any knots."""
    if P == 0:
        return degree_0(x, j, knots, inside, IN, KNOTS)
    elif P == 1:
        return degree_1(x, j, knots, inside, IN, KNOTS)
    elif P == 2:
        return degree_2(x, j, knots, inside, IN, KNOTS)
    elif P == 3:
        return degree_3(x, j, knots, inside, IN, KNOTS)
    elif P == 4:
        return degree_4(x, j, knots, inside, IN, KNOTS)
    else:
        return degree_5(x, j, knots, inside, IN, KNOTS)


@triton.jit
def ends(knots, inside, IN, KNOTS: tl.constexpr, S: tl.constexpr):
    """First knot, reciprocal spacing, and the interval that the grid covers."""
    first = tl.load(knots, mask=inside, other=0.0)
    last = tl.load(knots + (KNOTS - 1) * IN, mask=inside, other=1.0)
    low = tl.load(knots + S * IN, mask=inside, other=0.0)
    high = tl.load(knots + (KNOTS - 1 - S) * IN, mask=inside, other=1.0)
    return first, (KNOTS - 1) / (last - first), low, high


@triton.jit
def last_inside(knots, inside, IN, KNOTS: tl.constexpr, S: tl.constexpr):
    """The last number below the end of the grid's interval, kept in the last row of the tables of the knots.

    Cells are half open, and of knots that coincide at the end no cell would hold it.
    """
    return tl.load(knots + ((S + 1) * KNOTS - 1) * IN, mask=inside, other=0.0)


@triton.jit
def end_slope(j, S: tl.constexpr):
    """Slope of basis j of equally spaced knots at the lower end of the grid, over ``unit(S - 1)``, a scalar.

    At the upper end it is minus the slope of the basis in the mirror.
    """
    d = tl.full((), 1.0, tl.float32) - j * (2 / S)
    return cardinal(d, S - 1) - cardinal(d - 2 / S, S - 1)


@triton.jit
def locate(
    x, knots, inside, IN, S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr, EXTRAPOLATION: tl.constexpr
):
    """Where the bases of x are evaluated, and how far x lies below (negative) and above the interval of the grid.

    In units of half a support for equally spaced knots, in units of x otherwise.
    """
    first, rate, low, high = ends(knots, inside, IN, BASES + S + 1, S)
    z = x
    below = 0.0
    above = 0.0
    if EXTRAPOLATION != "zero":
        z = tl.minimum(tl.maximum(x, low), high if UNIFORM else last_inside(knots, inside, IN, BASES + S + 1, S))
    elif not UNIFORM:
        z = hold(x, knots, inside, IN, BASES + S + 1)
    if EXTRAPOLATION == "linear":
        below = tl.minimum(x - low, 0.0)
        above = tl.maximum(x - high, 0.0)
    if UNIFORM:
        rate = rate * (2 / (S + 1))
        z = (z - first) * rate
        below = below * rate
        above = above * rate
    return z, below, above


@triton.jit
def basis(
    z, below, above, j, knots, slopes, inside, IN,
    S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr, EXTRAPOLATION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Basis j, over ``unit(S)`` for equally spaced knots; ``knots`` and ``slopes`` point at the features of the tile.

    SCALE is ``unit(S - 1) (S + 1) / (2 unit(S))``: from the units of ``end_slope`` to those of ``locate``.
    """
    if UNIFORM:
        b = cardinal(z - (j * (2 / (S + 1)) + 1.0), S)
        if EXTRAPOLATION == "linear":
            b += below * (end_slope(j, S) * SCALE) - above * (end_slope(BASES - 1 - j, S) * SCALE)
    else:
        b = cox_de_boor(z, j, knots, inside, IN, BASES + S + 1, S)
        if EXTRAPOLATION == "linear":
            b += below * tl.load(slopes + j * IN, mask=inside, other=0.0)
            b += above * tl.load(slopes + (BASES + j) * IN, mask=inside, other=0.0)
    return b


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``sums + a @ b`` with a rounded to the dtype of b. The interpreter would multiply the bits of bfloat16."""
    a = a.to(b.dtype)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def kan_forward(
    x,  # rows i
    activated,  # rows i, read unless SILU
    weight,  # o 1+g+s i
    bias,  # o, read if BIAS
    knots,  # m i, or s+1 m i with reciprocals unless UNIFORM
    slopes,  # 2 g+s i, read unless UNIFORM
    y,  # rows o
    rows, IN, OUT,
    S: tl.constexpr, BASES: tl.constexpr, UNIFORM: tl.constexpr, EXTRAPOLATION: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of y: for every block of features one product for the activation and one for each basis."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)[None, :]
    sums = tl.zeros((ROWS, OUTS), tl.float32)
    for i0 in range(0, IN, INS):
        i = i0 + tl.arange(0, INS)
        across, down = i[None, :], i[:, None]
        inside = across < IN
        there = (r < rows) & inside
        w = weight + o.to(tl.int64) * ((1 + BASES) * IN) + down
        wanted = (down < IN) & (o < OUT)
        xi = tl.load(x + r * IN + across, mask=there, other=0.0).to(tl.float32)
        if SILU:
            base = xi * tl.sigmoid(xi)
        else:
            base = tl.load(activated + r * IN + across, mask=there, other=0.0).to(tl.float32)
        if UNIFORM:
            base *= 1 / UNIT
        sums = product(base, tl.load(w, mask=wanted, other=0.0), sums, PRECISION, INTERPRETED)
        z, below, above = locate(xi, knots + across, inside, IN, S, BASES, UNIFORM, EXTRAPOLATION)
        if UNROLL:
            for j in tl.static_range(BASES):
                b = basis(
                    z, below, above, j, knots + across, slopes + across, inside, IN,
                    S, BASES, UNIFORM, EXTRAPOLATION, SCALE,
                )  # fmt: skip
                wj = tl.load(w + (1 + j) * IN, mask=wanted, other=0.0)
                sums = product(b, wj, sums, PRECISION, INTERPRETED)
        else:
            for j in range(BASES):
                b = basis(
                    z, below, above, j, knots + across, slopes + across, inside, IN,
                    S, BASES, UNIFORM, EXTRAPOLATION, SCALE,
                )  # fmt: skip
                wj = tl.load(w + (1 + j) * IN, mask=wanted, other=0.0)
                sums = product(b, wj, sums, PRECISION, INTERPRETED)
    if UNIFORM:
        sums *= UNIT
    if BIAS:
        sums += tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)
    tl.store(y + r * OUT + o, sums.to(y.dtype.element_ty), mask=(r < rows) & (o < OUT))
