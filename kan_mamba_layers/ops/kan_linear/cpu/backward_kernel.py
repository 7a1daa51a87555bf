"""The gradients of the KAN linear map as Numba kernels; :mod:`.block` says how they work."""

from collections.abc import Callable

from kan_mamba_layers.ops.kan_linear.cpu.block import (
    BLOCK,
    DEGREE,
    FEATURES,
    GRAD_WEIGHT,
    GRAD_X,
    GRAD_Y,
    INTERVALS,
    OUTPUT_GROUPS,
    OUTPUTS,
    PARTS,
    ROWS,
    SPLITS,
    WEIGHT,
    cell_of,
    factor_at,
    for_width,
    more_at,
    part_of,
    slots,
    work_at,
    write_factors,
)
from kan_mamba_layers.ops.simd.kernel import TASKS, array, compiled, inlined, next_task, own_scratch, size
from kan_mamba_layers.ops.simd.vector import LANES, fma, integers, load, pointer, read, splat, store, sum_lanes, write
from kan_mamba_layers.ops.simd.wide import (
    add_multiples,
    add_rows,
    advance,
    fold,
    lanes_of,
    load_as,
    lowest_bit,
    several,
    spread,
    without_first,
    zeros,
)

HALF = LANES // 2  # features whose weights stay in the first cache while rows pass
WORD = 64  # rows of a mask


def input_entry(number: int, degree: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source, and over the degree."""

    nonzero = degree + 1

    def run(call):
        if number >= 0:
            input_gradient(call, several(zeros(call, 16), nonzero))

    return run


@inlined
def input_gradient(call, splines):
    """Work on tasks, blocks of rows, until none is left."""
    scratch = pointer(own_scratch(call), call)
    task = next_task(call)
    while task < size(call, TASKS):
        first = task * size(call, BLOCK)
        rows = min(size(call, BLOCK), size(call, ROWS) - first)
        for feature in range(0, size(call, FEATURES), LANES):
            write_factors(call, first, rows, feature, scratch, True)
            for row in range(rows + rows % 2):
                store(scratch, more_at(call) + row * LANES, splat(0.0, scratch))
            for part in range(size(call, PARTS)):
                vector, vectors = part_of(call, part)
                for_width(_project, call, vectors, splines, scratch, first, rows, feature, vector)
            _write_sums(call, first, rows, feature, scratch)
        task = next_task(call)


@compiled
def _project(call, zero, splines, scratch, first, rows, first_feature, vector):
    """Add the products of the gradients of some outputs with the slopes of their edges, for two rows at a time."""
    outputs, lanes, edge = size(call, OUTPUTS), lanes_of(zero), slots(call) * lanes_of(zero)
    weight, grad_y = array(call, WEIGHT), array(call, GRAD_Y)
    part = vector * LANES * size(call, FEATURES) * slots(call)
    products = work_at(call)
    for feature in range(0, LANES, HALF):
        for row in range(0, rows, 2):
            other = min(row + 1, rows - 1)
            grad_a = load_as(zero, grad_y, (first + row) * outputs + vector * LANES)
            grad_b = load_as(zero, grad_y, (first + other) * outputs + vector * LANES)
            for f in range(HALF):
                base = part + (first_feature + feature + f) * edge
                factor_a, factor_b = factor_at(call, feature + f, row), factor_at(call, feature + f, other)
                line = load_as(zero, weight, base)
                a, b = line * spread(zero, scratch, factor_a), line * spread(zero, scratch, factor_b)
                cell_a = cell_of(call, scratch, feature + f, row)
                cell_b = cell_of(call, scratch, feature + f, other)
                a = add_rows(a, weight, base + (1 + cell_a) * lanes, scratch, factor_a + LANES, splines)
                b = add_rows(b, weight, base + (1 + cell_b) * lanes, scratch, factor_b + LANES, splines)
                store(scratch, products + f * LANES, fold(a * grad_a))
                store(scratch, products + (HALF + f) * LANES, fold(b * grad_b))
            sums = more_at(call) + (row + feature // HALF) * LANES
            store(scratch, sums, load(scratch, sums) + sum_lanes(scratch, products))


@inlined
def _write_sums(call, first, rows, first_feature, scratch):
    """Bring the sums into the order of memory."""
    grad_x, sums = array(call, GRAD_X), more_at(call)
    for row in range(rows):
        into = (first + row) * size(call, FEATURES) + first_feature
        for feature in range(LANES):
            half, f = feature // HALF, feature % HALF
            write(grad_x, into + feature, read(scratch, sums + (row // 2 * 2 + half) * LANES + row % 2 * HALF + f))


def weight_entry(number: int, degree: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source, and over the degree."""

    nonzero = degree + 1

    def run(call):
        if number >= 0:
            weight_gradient(call, several(zeros(call, 16), nonzero))

    return run


@inlined
def weight_gradient(call, splines):
    """Work on tasks until none is left: 16 features, some parts of the outputs, some of the rows."""
    scratch = pointer(own_scratch(call), call)
    task = next_task(call)
    block, groups, splits, parts = size(call, BLOCK), size(call, OUTPUT_GROUPS), size(call, SPLITS), size(call, PARTS)
    while task < size(call, TASKS):
        split, group, feature = task % splits, task // splits % groups, task // splits // groups * LANES
        blocks = (size(call, ROWS) + block - 1) // block
        _clear(call, split, parts * group // groups, parts * (group + 1) // groups, feature)
        for b in range(blocks * split // splits, blocks * (split + 1) // splits):
            rows = min(block, size(call, ROWS) - b * block)
            write_factors(call, b * block, rows, feature, scratch, False)
            for f in range(LANES):
                _mark(call, f, rows, scratch)
                for part in range(parts * group // groups, parts * (group + 1) // groups):
                    vector, vectors = part_of(call, part)
                    for_width(_collect, call, vectors, splines, scratch, b * block, split, feature + f, vector)
        task = next_task(call)


@inlined
def _clear(call, split, first_part, end_part, first_feature):
    """Begin with zeros."""
    grad_weight = array(call, GRAD_WEIGHT)
    for part in range(first_part, end_part):
        vector, vectors = part_of(call, part)
        row = vectors * LANES * slots(call)
        base = (split * size(call, OUTPUTS) + vector * LANES) * size(call, FEATURES) * slots(call)
        for k in range(first_feature * row, (first_feature + LANES) * row, LANES):
            store(grad_weight, base + k, splat(0.0, grad_weight))


@inlined
def _mark(call, feature, rows, scratch):
    """For every cell a mask of the rows that lie in it."""
    words = size(call, BLOCK) // WORD
    masks = integers(advance(scratch, more_at(call)))
    for i in range((size(call, INTERVALS) + 2 * size(call, DEGREE)) * words):
        write(masks, i, 0)
    for row in range(rows):
        i = cell_of(call, scratch, feature, row) * words + row // WORD
        write(masks, i, read(masks, i) | (1 << row % WORD))


@compiled
def _collect(call, zero, splines, scratch, first, split, feature, vector):
    """Add up the gradient of a feature's weights for some outputs.

    Cell after cell: the sums of the ``s + 1`` bases that are not zero there stay in registers, and with each cell the
    first of them is complete.
    """
    outputs, lanes, cells = size(call, OUTPUTS), lanes_of(zero), size(call, INTERVALS) + 2 * size(call, DEGREE)
    words = size(call, BLOCK) // WORD
    grad_y, grad_weight = array(call, GRAD_Y), array(call, GRAD_WEIGHT)
    masks = integers(advance(scratch, more_at(call)))
    part = (split * outputs + vector * LANES) * size(call, FEATURES)
    base = (part + feature * lanes) * slots(call)
    total, sums = zero, several(zero, splines)
    for cell in range(cells):
        for word in range(words):
            mask = read(masks, cell * words + word)
            while mask != 0:
                row = word * WORD + lowest_bit(mask)
                mask &= mask - 1
                grad = load_as(zero, grad_y, (first + row) * outputs + vector * LANES)
                factor = factor_at(call, feature % LANES, row)
                total = fma(grad, spread(zero, scratch, factor), total)
                sums = add_multiples(sums, grad, scratch, factor + LANES)
        slot = base + (1 + cell) * lanes
        store(grad_weight, slot, load_as(zero, grad_weight, slot) + sums[0])
        sums = without_first(sums, zero)
    for k in range(size(call, DEGREE)):
        slot = base + (1 + cells + k) * lanes
        store(grad_weight, slot, load_as(zero, grad_weight, slot) + sums[0])
        sums = without_first(sums, zero)
    store(grad_weight, base, load_as(zero, grad_weight, base) + total)
