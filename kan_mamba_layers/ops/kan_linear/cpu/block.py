"""What the kernels share: the layout of a call, and the factors by which rows of weights are multiplied.

At any x at most ``s + 1`` bases are not zero: those whose first knot is one of the ``s + 1`` at or before the cell that
x lies in. So an edge needs ``s + 2`` products instead of one per basis; the cell's number says which rows of weights.

A kernel takes 16 features and a block of rows at a time. First it finds, for 16 rows of one feature at a time, their
cells and factors: that of the activation, then those of the splines.
"""

from kan_mamba_layers.ops.simd.kernel import Layout, compiled, inlined
from kan_mamba_layers.ops.simd.vector import (
    LANES,
    broadcast,
    floor,
    fma,
    integers,
    is_present,
    load,
    read,
    read_integer,
    sigmoid,
    splat,
    store,
    transpose,
    where_less,
    write,
    write_integers,
    zeros,
)

ZERO, CLAMP, LINEAR = range(3)  # values of ``extrapolation``

LAYOUT = Layout(
    numbers=(
        *("rows", "features", "outputs", "intervals", "degree", "uniform", "extrapolation"),
        *("row_block", "output_blocks", "output_groups", "row_splits"),
    ),
    arrays=(
        *("bounds", "x", "activated", "knots", "weight", "base", "splines", "bias", "y"),
        *("grad_y", "grad_x", "grad_weight"),
    ),
)


def scratch_elements(row_block: int, degree: int, intervals: int) -> int:
    """Scratch of one thread, in elements of the compute dtype."""
    masks = 2 * (row_block // 64) * (intervals + 2 * degree)  # of 64 bits, which may be two elements
    return row_block * LANES * (degree + 6) + LANES * (4 * degree + 4 + LANES) + masks


@inlined
def work_at(call):
    """Offset of the memory for a group of 16 rows, behind three tiles of features and rows and behind the factors."""
    return LANES * call.row_block * (call.degree + 5)


@inlined
def factor_at(call, feature, row):
    """Offset of the factors of an edge, which are ``LANES`` apart."""
    tile = feature * (call.row_block // LANES) + row // LANES
    return LANES * (3 * call.row_block + tile * (call.degree + 2)) + row % LANES


@inlined
def more_at(call):
    """Offset behind that memory: a position, bases, derivatives, knots, and a square of one vector per lane."""
    return work_at(call) + LANES * (4 * call.degree + 4 + LANES)


@inlined
def slots(call):
    """Rows of weights per feature: the activation's, the splines', and ``s`` rows of zeros on either side of these."""
    return 1 + call.intervals + 3 * call.degree


@inlined
def cell_of(call, scratch, feature, row):
    """The cell that a row's value of a feature lies in."""
    return read_integer(scratch, (2 * LANES + feature) * call.row_block + row)


@inlined
def vectors_of(call, output_block):
    """The first vector of a block of outputs, and its number of vectors."""
    bounds = integers(call.bounds)
    first = read(bounds, output_block)
    return first, read(bounds, output_block + 1) - first


@inlined
def for_width(function, call, vectors, splines, scratch, first, rows, feature, into):
    """Call a function with a zero vector as wide as a block of outputs, a power of two."""
    if vectors == 1:
        function(call, zeros(call, 16), splines, scratch, first, rows, feature, into)
    elif vectors == 2:
        function(call, zeros(call, 32), splines, scratch, first, rows, feature, into)
    else:
        function(call, zeros(call, 64), splines, scratch, first, rows, feature, into)


@compiled
def write_factors(call, first_row, rows, first_feature, scratch, slopes):
    """Find cells and factors of 16 features in a block of rows; with ``slopes`` the factors of the derivative by x."""
    row_block = call.row_block
    groups = (rows + LANES - 1) // LANES
    _copy(call, call.x, first_row, rows, first_feature, scratch, 0)
    if is_present(call.activated):
        _copy(call, call.activated, first_row, rows, first_feature, scratch, LANES * row_block)
    for feature in range(LANES):
        for group in range(groups):
            at = feature * row_block + LANES * group
            into = factor_at(call, feature, LANES * group)
            _write_activation(call, at, scratch, into, slopes)
            if call.uniform:
                _locate_uniform(call, first_feature + feature, at, scratch, slopes)
            else:
                _locate_nonuniform(call, first_feature + feature, at, scratch)
            _write_splines(call, first_feature + feature, scratch, into + LANES, slopes)


@compiled
def _copy(call, source, first_row, rows, first_feature, scratch, into):
    """Copy 16 features of a block of rows, features first; the last row fills up the last group."""
    features, row_block = call.features, call.row_block
    for group in range(0, rows, LANES):
        for k in range(LANES):
            row = first_row + min(group + k, rows - 1)
            store(scratch, into + k * row_block + group, load(source, row * features + first_feature))
        transpose(scratch, into + group, row_block)


@compiled
def _write_activation(call, at, scratch, into, slopes):
    """The factor of the base weights: ``silu(x)``, or the activation given; its slope is silu's, or 0."""
    if is_present(call.activated):
        activated = load(scratch, LANES * call.row_block + at)
        store(scratch, into, splat(0.0, scratch) if slopes else activated)
    else:
        x, one = load(scratch, at), splat(1.0, scratch)
        gate = sigmoid(x)
        store(scratch, into, gate * (one + x * (one - gate)) if slopes else x * gate)


@inlined
def _hold(x, low, high):
    """Clamp to ``low`` and ``high``."""
    return where_less(low, x, where_less(x, high, x, high), low)


@inlined
def _one_unless_nan(x, zero, one):
    return where_less(x, one, one, where_less(zero, x, one, x))


@compiled
def _locate_uniform(call, feature, at, scratch, slopes):
    """Find the cell of x among equally spaced knots, and its position there, from 0 to 1.

    Also 1, or 0 outside all cells, or NaN; and how far x lies beyond the end that it is clamped to.
    """
    knots = call.knots
    zero, one = splat(0.0, knots), splat(1.0, knots)
    x, per_spacing = load(scratch, at), broadcast(knots, 5 * feature + 1)
    first = broadcast(knots, 5 * feature + 4) if slopes else broadcast(knots, 5 * feature)
    intervals, degree = call.intervals, call.degree
    if call.extrapolation == ZERO:
        u, end = (x - first) * per_spacing, splat(float(intervals + 2 * degree), knots)
        counts = where_less(u, end, where_less(u, zero, zero, one), where_less(zero, u, zero, u))
        u = where_less(u, end, where_less(u, zero, zero, u), zero)
        cell, distance = floor(u), zero
    else:
        held = _hold(x, broadcast(knots, 5 * feature + 2), broadcast(knots, 5 * feature + 3))
        u, distance, counts = (held - first) * per_spacing, x - held, _one_unless_nan(x, zero, one)
        cell = _hold(floor(u), splat(float(degree), knots), splat(float(degree + intervals - 1), knots))
    _write_location(call, at, scratch, u - cell, counts, distance, cell)


@compiled
def _locate_nonuniform(call, feature, at, scratch):
    """The same among any knots, with x itself, or the end that it is clamped to, as its position."""
    knots = call.knots
    zero, one = splat(0.0, knots), splat(1.0, knots)
    intervals, degree = call.intervals, call.degree
    first = feature * (intervals + 4 * degree + 1) + degree
    x = held = load(scratch, at)
    if call.extrapolation != ZERO:
        held = _hold(x, broadcast(knots, first + degree), broadcast(knots, first + degree + intervals))
    cell = zero - one
    for k in range(intervals + 2 * degree + 1):
        cell = cell + where_less(held, broadcast(knots, first + k), zero, one)
    if call.extrapolation == ZERO:
        end = splat(float(intervals + 2 * degree), knots)
        outside = where_less(x, one, zero, where_less(zero, x, zero, x))
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
    write_integers(scratch, 2 * LANES * call.row_block + at, cell)


@inlined
def _copy_knots(call, feature, at, scratch):
    """Copy the ``2 s`` knots about the cell of each of 16 rows; of the ``s`` outermost only the order matters."""
    degree, cells = call.degree, 2 * LANES * call.row_block + at
    knots, into = call.knots, work_at(call) + LANES * (2 * degree + 4)
    first = feature * (call.intervals + 4 * degree + 1) + 1
    for row in range(LANES):
        cell = read_integer(scratch, cells + row)
        for k in range(2 * degree):
            write(scratch, into + k * LANES + row, read(knots, first + cell + k))


@inlined
def _rise(call, feature, position, p, k, scratch):
    """The share of the k-th basis of degree p - 1 that has risen at x, from 0 to 1, and its slope times p."""
    knots, one = call.knots, splat(1.0, scratch)
    if call.uniform:
        return (position + splat(float(p - k), scratch)) * splat(1.0 / p, scratch), broadcast(knots, 5 * feature + 1)
    degree = call.degree
    local = work_at(call) + LANES * (3 * degree + 3 + k)
    left = load(scratch, local - LANES * p)
    width, zero = load(scratch, local) - left, splat(0.0, scratch)
    per_width = where_less(zero, width, one / width, zero)
    return (position - left) * per_width, splat(float(p), scratch) * per_width


@compiled
def _write_splines(call, feature, scratch, into, slopes):
    """The ``s + 1`` bases of the cell, or their derivatives, by the Cox-de Boor recursion.

    From degree ``p - 1`` to ``p`` each basis passes the share that has risen to its right neighbour.
    """
    degree, mode = call.degree, call.extrapolation
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
