"""What the forward and the backward kernels share: the block of a call, and the factors of the rows of weights.

At most ``s + 1`` bases are not zero at any place: those whose first knot is one of the ``s + 1`` at or before the cell
that the place lies in. So an edge needs ``s + 2`` products, and not one for every basis; which rows of the weights they
take follows from the number of the cell.

A kernel takes 16 features and a block of rows at a time. First it finds, for 16 rows of one feature at a time, the
cells and the factors: that of the activation, then those of the splines.
"""

from kan_mamba_layers.ops.simd.kernel import OWN_FIELDS, array, compiled, inlined, size
from kan_mamba_layers.ops.simd.vector import LANES, broadcast, fma, integers, load, read, splat, store, transpose, write
from kan_mamba_layers.ops.simd.wide import floor, read_integer, sigmoid, where_less, write_integers, zeros

ZERO, CLAMP, LINEAR = range(3)  # the ways to extrapolate

# What stands where in the block of a call: sizes, switches, and addresses (0 for what a call has not).
# fmt: off
(
    ROWS, FEATURES, OUTPUTS, INTERVALS, DEGREE, UNIFORM, EXTRAPOLATION, BLOCK, PARTS, OUTPUT_GROUPS, SPLITS,
    BOUNDS, X, ACTIVATED, KNOTS, WEIGHT, BASE, SPLINES, BIAS, Y, GRAD_Y, GRAD_X, GRAD_WEIGHT,
    FIELDS,
) = range(OWN_FIELDS, OWN_FIELDS + 24)
# fmt: on


def scratch_elements(block: int, degree: int, intervals: int) -> int:
    """What one thread needs, in elements of the compute dtype."""
    masks = 2 * (block // 64) * (intervals + 2 * degree)  # of 64 bits, which may be two elements
    return block * LANES * (degree + 6) + LANES * (4 * degree + 4 + LANES) + masks


@inlined
def work_at(call):
    """Where the memory for one group of 16 rows begins, after three tiles of features and rows and the factors."""
    return LANES * size(call, BLOCK) * (size(call, DEGREE) + 5)


@inlined
def factor_at(call, feature, row):
    """Where the factors of an edge are; they are ``LANES`` apart."""
    tile = feature * (size(call, BLOCK) // LANES) + row // LANES
    return LANES * (3 * size(call, BLOCK) + tile * (size(call, DEGREE) + 2)) + row % LANES


@inlined
def more_at(call):
    """Where that memory ends: after a place, bases, derivatives and knots, and a square of a vector for each lane."""
    return work_at(call) + LANES * (4 * size(call, DEGREE) + 4 + LANES)


@inlined
def slots(call):
    """Rows of weights of a feature: the activation's, the splines', and zeros for ``s`` bases on either side."""
    return 1 + size(call, INTERVALS) + 3 * size(call, DEGREE)


@inlined
def cell_of(call, scratch, feature, row):
    """The cell that a row's value of a feature lies in."""
    return read_integer(scratch, (2 * LANES + feature) * size(call, BLOCK) + row)


@inlined
def part_of(call, part):
    """The first vector of outputs of a part, and how many it has."""
    bounds = integers(array(call, BOUNDS))
    first = read(bounds, part)
    return first, read(bounds, part + 1) - first


@inlined
def for_width(function, call, vectors, splines, scratch, first, rows, feature, into):
    """Call a function that takes a part of the outputs at a time with a vector of its width, a power of two."""
    if vectors == 1:
        function(call, zeros(call, 16), splines, scratch, first, rows, feature, into)
    elif vectors == 2:
        function(call, zeros(call, 32), splines, scratch, first, rows, feature, into)
    else:
        function(call, zeros(call, 64), splines, scratch, first, rows, feature, into)


@compiled
def write_factors(call, first_row, rows, first_feature, scratch, slopes):
    """Find cells and factors of 16 features in a block of rows, or the factors of the derivative by x."""
    block = size(call, BLOCK)
    groups = (rows + LANES - 1) // LANES
    _copy(call, array(call, X), first_row, rows, first_feature, scratch, 0)
    if size(call, ACTIVATED):
        _copy(call, array(call, ACTIVATED), first_row, rows, first_feature, scratch, LANES * block)
    for feature in range(LANES):
        for group in range(groups):
            at = feature * block + LANES * group
            into = factor_at(call, feature, LANES * group)
            _write_activation(call, at, scratch, into, slopes)
            if size(call, UNIFORM):
                _locate_uniform(call, first_feature + feature, at, scratch)
            else:
                _locate_nonuniform(call, first_feature + feature, at, scratch)
            _write_splines(call, first_feature + feature, scratch, into + LANES, slopes)


@compiled
def _copy(call, source, first_row, rows, first_feature, scratch, into):
    """Copy 16 features of a block of rows, features first; the last row stands for those that miss."""
    features, block = size(call, FEATURES), size(call, BLOCK)
    for group in range(0, rows, LANES):
        for k in range(LANES):
            row = first_row + min(group + k, rows - 1)
            store(scratch, into + k * block + group, load(source, row * features + first_feature))
        transpose(scratch, into + group, block)


@compiled
def _write_activation(call, at, scratch, into, slopes):
    """The factor of the base weights: ``silu(x)`` or what was given; or the derivative of silu, and 0 for the other."""
    if size(call, ACTIVATED):
        activated = load(scratch, LANES * size(call, BLOCK) + at)
        store(scratch, into, splat(0.0, scratch) if slopes else activated)
    else:
        x, one = load(scratch, at), splat(1.0, scratch)
        gate = sigmoid(x)
        store(scratch, into, gate * (one + x * (one - gate)) if slopes else x * gate)


@inlined
def _hold(x, low, high):
    """Not below ``low`` nor above ``high``."""
    return where_less(low, x, where_less(x, high, x, high), low)


@inlined
def _one_unless_nan(x, zero, one):
    return where_less(x, one, one, where_less(zero, x, one, x))


@compiled
def _locate_uniform(call, feature, at, scratch):
    """Find where x lies among equally spaced knots: its cell, and its place there, from 0 to 1.

    Also 1 if it counts, or 0 outside of all cells, except for NaN; and the way to go on from the place.
    """
    knots = array(call, KNOTS)
    zero, one = splat(0.0, knots), splat(1.0, knots)
    x, first, per_spacing = load(scratch, at), broadcast(knots, 4 * feature), broadcast(knots, 4 * feature + 1)
    intervals, degree = size(call, INTERVALS), size(call, DEGREE)
    if size(call, EXTRAPOLATION) == ZERO:
        u, end = (x - first) * per_spacing, splat(float(intervals + 2 * degree), knots)
        counts = where_less(u, end, where_less(u, zero, zero, one), where_less(zero, u, zero, u))
        u = where_less(u, end, where_less(u, zero, zero, u), zero)
        cell, distance = floor(u), zero
    else:
        held = _hold(x, broadcast(knots, 4 * feature + 2), broadcast(knots, 4 * feature + 3))
        u, distance, counts = (held - first) * per_spacing, x - held, _one_unless_nan(x, zero, one)
        cell = _hold(floor(u), splat(float(degree), knots), splat(float(degree + intervals - 1), knots))
    _write_location(call, at, scratch, u - cell, counts, distance, cell)


@compiled
def _locate_nonuniform(call, feature, at, scratch):
    """The same among any knots, with x itself, or the end that it passed, as its place."""
    knots = array(call, KNOTS)
    zero, one = splat(0.0, knots), splat(1.0, knots)
    intervals, degree = size(call, INTERVALS), size(call, DEGREE)
    first = feature * (intervals + 4 * degree + 1) + degree
    x = held = load(scratch, at)
    if size(call, EXTRAPOLATION) != ZERO:
        held = _hold(x, broadcast(knots, first + degree), broadcast(knots, first + degree + intervals))
    cell = zero - one
    for k in range(intervals + 2 * degree + 1):
        cell = cell + where_less(held, broadcast(knots, first + k), zero, one)
    if size(call, EXTRAPOLATION) == ZERO:
        end, outside = (
            splat(float(intervals + 2 * degree), knots),
            where_less(x, one, zero, where_less(zero, x, zero, x)),
        )
        counts = where_less(cell, end, where_less(cell, zero, zero, one), outside)
        start = broadcast(knots, first)
        held = where_less(cell, end, where_less(cell, zero, start, x), start)
        cell, distance = where_less(cell, end, where_less(cell, zero, zero, cell), zero), zero
    else:
        last = splat(float(degree + intervals - 1), knots)
        cell, distance, counts = where_less(cell, last, cell, last), x - held, _one_unless_nan(x, zero, one)
    _write_location(call, at, scratch, held, counts, distance, cell)
    _copy_knots(call, feature, at, scratch)


@inlined
def _write_location(call, at, scratch, position, counts, distance, cell):
    store(scratch, work_at(call), position)
    store(scratch, work_at(call) + LANES, distance)
    store(scratch, work_at(call) + 2 * LANES, counts)
    write_integers(scratch, 2 * LANES * size(call, BLOCK) + at, cell)


@inlined
def _copy_knots(call, feature, at, scratch):
    """Copy the ``2 s`` knots about the cell of each of 16 rows; of ``s`` more on either side only the order counts."""
    degree, cells = size(call, DEGREE), 2 * LANES * size(call, BLOCK) + at
    knots, into = array(call, KNOTS), work_at(call) + LANES * (2 * degree + 4)
    first = feature * (size(call, INTERVALS) + 4 * degree + 1) + 1
    for row in range(LANES):
        cell = read_integer(scratch, cells + row)
        for k in range(2 * degree):
            write(scratch, into + k * LANES + row, read(knots, first + cell + k))


@inlined
def _rise(call, feature, position, p, k, scratch):
    """How far the k-th basis of degree p - 1 has risen in its support, and the slope of that times the degree p."""
    knots, one = array(call, KNOTS), splat(1.0, scratch)
    if size(call, UNIFORM):
        return (position + splat(float(p - k), scratch)) * splat(1.0 / p, scratch), broadcast(knots, 4 * feature + 1)
    degree = size(call, DEGREE)
    local = work_at(call) + LANES * (3 * degree + 3 + k)
    left = load(scratch, local - LANES * p)
    width, zero = load(scratch, local) - left, splat(0.0, scratch)
    per_width = where_less(zero, width, one / width, zero)
    return (position - left) * per_width, splat(float(p), scratch) * per_width


@compiled
def _write_splines(call, feature, scratch, into, slopes):
    """The ``s + 1`` bases of the cell, or their derivatives, by the Cox-de Boor recursion.

    From degree ``p - 1`` to ``p`` each basis hands the share that has risen on to its right neighbour.
    """
    degree, mode = size(call, DEGREE), size(call, EXTRAPOLATION)
    wanted = slopes or mode == LINEAR
    bases, derivatives = work_at(call) + 2 * LANES, work_at(call) + LANES * (degree + 3)
    position, distance, zero = load(scratch, work_at(call)), load(scratch, work_at(call) + LANES), splat(0.0, scratch)
    for p in range(1, degree + 1):
        store(scratch, bases + LANES * p, zero)
        store(scratch, derivatives + LANES * p, zero)
        for k in range(p, 0, -1):
            old = load(scratch, bases + LANES * (k - 1))
            share, steep = _rise(call, feature, position, p, k, scratch)
            moved = share * old
            store(scratch, bases + LANES * k, load(scratch, bases + LANES * k) + moved)
            store(scratch, bases + LANES * (k - 1), old - moved)
            if p == degree and wanted:
                store(scratch, derivatives + LANES * k, load(scratch, derivatives + LANES * k) + steep * old)
                store(scratch, derivatives + LANES * (k - 1), zero - steep * old)
    for k in range(degree + 1):
        basis, derivative = load(scratch, bases + LANES * k), load(scratch, derivatives + LANES * k)
        if mode == LINEAR:
            basis = fma(distance, derivative, basis)
        elif mode == CLAMP:
            derivative = where_less(zero, distance, zero, where_less(distance, zero, zero, derivative))
        store(scratch, into + LANES * k, derivative if slopes else basis)
