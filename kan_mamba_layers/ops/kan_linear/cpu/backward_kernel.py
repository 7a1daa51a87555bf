"""The gradients of the KAN linear map as Numba kernels; :mod:`.block` says how they work."""

from collections.abc import Callable

from kan_mamba_layers.ops.kan_linear.cpu import block
from kan_mamba_layers.ops.simd.kernel import compiled, inlined, next_task, own_scratch
from kan_mamba_layers.ops.simd.vector import (
    LANES,
    add_multiples,
    add_rows,
    broadcast_as,
    fma,
    integers,
    lanes_of,
    load,
    load_as,
    lowest_bit,
    offset,
    pointer,
    read,
    reduce_lanes,
    shift_left,
    splat,
    store,
    sum_lanes,
    tuple_of,
    write,
    zeros,
)

HALF = LANES // 2  # features whose weights stay in the L1 cache while rows pass
WORD = 64  # rows of a mask


def input_entry(digest: int, degree: int) -> Callable[..., None]:
    """The C function of one degree; see :func:`.kernel.c_function`."""
    nonzero = degree + 1

    def run(call):
        if digest >= 0:
            input_gradient(call, tuple_of(zeros(call, 16), nonzero))

    return run


@inlined
def input_gradient(call, splines):
    """Do tasks until none is left; a task is a block of rows."""
    scratch = pointer(own_scratch(call), call)
    task = next_task(call)
    while task < call.tasks:
        first = task * call.row_block
        rows = min(call.row_block, call.rows - first)
        for feature in range(0, call.features, LANES):
            block.write_factors(call, first, rows, feature, scratch, True)
            for row in range(rows + rows % 2):
                store(scratch, block.more_at(call) + row * LANES, splat(0.0, scratch))
            for output_block in range(call.output_blocks):
                vector, vectors = block.vectors_of(call, output_block)
                block.for_width(_project, call, vectors, splines, scratch, first, rows, feature, vector)
            _write_sums(call, first, rows, feature, scratch)
        task = next_task(call)


@compiled
def _project(call, zero, splines, scratch, first, rows, first_feature, vector):
    """Add the gradients of a block of outputs times the slopes of their edges, two rows at a time."""
    outputs, lanes, edge = call.outputs, lanes_of(zero), block.slots(call) * lanes_of(zero)
    weight, grad_y = call.weight, call.grad_y
    first_weight = vector * LANES * call.features * block.slots(call)
    products = block.work_at(call)
    for feature in range(0, LANES, HALF):
        for row in range(0, rows, 2):
            other = min(row + 1, rows - 1)
            grad_a = load_as(zero, grad_y, (first + row) * outputs + vector * LANES)
            grad_b = load_as(zero, grad_y, (first + other) * outputs + vector * LANES)
            for f in range(HALF):
                base = first_weight + (first_feature + feature + f) * edge
                factor_a, factor_b = block.factor_at(call, feature + f, row), block.factor_at(call, feature + f, other)
                line = load_as(zero, weight, base)
                a, b = line * broadcast_as(zero, scratch, factor_a), line * broadcast_as(zero, scratch, factor_b)
                cell_a = block.cell_of(call, scratch, feature + f, row)
                cell_b = block.cell_of(call, scratch, feature + f, other)
                a = add_rows(a, weight, base + (1 + cell_a) * lanes, scratch, factor_a + LANES, splines)
                b = add_rows(b, weight, base + (1 + cell_b) * lanes, scratch, factor_b + LANES, splines)
                store(scratch, products + f * LANES, reduce_lanes(a * grad_a))
                store(scratch, products + (HALF + f) * LANES, reduce_lanes(b * grad_b))
            sums = block.more_at(call) + (row + feature // HALF) * LANES
            store(scratch, sums, load(scratch, sums) + sum_lanes(scratch, products))


@inlined
def _write_sums(call, first, rows, first_feature, scratch):
    """Store the sums in the order of memory."""
    grad_x, sums = call.grad_x, block.more_at(call)
    for row in range(rows):
        into = (first + row) * call.features + first_feature
        for feature in range(LANES):
            half, f = feature // HALF, feature % HALF
            write(grad_x, into + feature, read(scratch, sums + (row // 2 * 2 + half) * LANES + row % 2 * HALF + f))


def weight_entry(digest: int, degree: int) -> Callable[..., None]:
    """The C function of one degree; see :func:`.kernel.c_function`."""
    nonzero = degree + 1

    def run(call):
        if digest >= 0:
            weight_gradient(call, tuple_of(zeros(call, 16), nonzero))

    return run


@inlined
def weight_gradient(call, splines):
    """Do tasks until none is left; a task is 16 features, a group of blocks of outputs, and a split of the rows."""
    scratch = pointer(own_scratch(call), call)
    task = next_task(call)
    while task < call.tasks:
        split, rest = task % call.row_splits, task // call.row_splits
        group, feature = rest % call.output_groups, rest // call.output_groups * LANES
        first, end = (
            group * call.output_blocks // call.output_groups,
            (group + 1) * call.output_blocks // call.output_groups,
        )
        row_blocks = (call.rows + call.row_block - 1) // call.row_block
        _clear(call, split, first, end, feature)
        for b in range(row_blocks * split // call.row_splits, row_blocks * (split + 1) // call.row_splits):
            first_row = b * call.row_block
            rows = min(call.row_block, call.rows - first_row)
            block.write_factors(call, first_row, rows, feature, scratch, False)
            for f in range(LANES):
                _mark(call, f, rows, scratch)
                for output_block in range(first, end):
                    vector, vectors = block.vectors_of(call, output_block)
                    block.for_width(_collect, call, vectors, splines, scratch, first_row, split, feature + f, vector)
        task = next_task(call)


@inlined
def _clear(call, split, first_block, end_block, first_feature):
    """Set the gradient to zero."""
    grad_weight = call.grad_weight
    for output_block in range(first_block, end_block):
        vector, vectors = block.vectors_of(call, output_block)
        row = vectors * LANES * block.slots(call)
        base = (split * call.outputs + vector * LANES) * call.features * block.slots(call)
        for k in range(first_feature * row, (first_feature + LANES) * row, LANES):
            store(grad_weight, base + k, splat(0.0, grad_weight))


@inlined
def _mark(call, feature, rows, scratch):
    """Write a mask per cell of the rows that lie in it."""
    words = call.row_block // WORD
    masks = integers(offset(scratch, block.more_at(call)))
    for i in range((call.intervals + 2 * call.degree) * words):
        write(masks, i, 0)
    for row in range(rows):
        i = block.cell_of(call, scratch, feature, row) * words + row // WORD
        write(masks, i, read(masks, i) | (1 << row % WORD))


@compiled
def _collect(call, zero, splines, scratch, first, split, feature, vector):
    """Sum the gradient of a feature's weights for a block of outputs, cell after cell.

    The sums of the ``s + 1`` bases that are not zero in a cell stay in registers; each cell completes one.
    """
    outputs, lanes, cells = call.outputs, lanes_of(zero), call.intervals + 2 * call.degree
    words = call.row_block // WORD
    grad_y, grad_weight = call.grad_y, call.grad_weight
    masks = integers(offset(scratch, block.more_at(call)))
    base = ((split * outputs + vector * LANES) * call.features + feature * lanes) * block.slots(call)
    total, sums = zero, tuple_of(zero, splines)
    for cell in range(cells):
        for word in range(words):
            mask = read(masks, cell * words + word)
            while mask != 0:
                row = word * WORD + lowest_bit(mask)
                mask &= mask - 1
                grad = load_as(zero, grad_y, (first + row) * outputs + vector * LANES)
                factor = block.factor_at(call, feature % LANES, row)
                total = fma(grad, broadcast_as(zero, scratch, factor), total)
                sums = add_multiples(sums, grad, scratch, factor + LANES)
        slot = base + (1 + cell) * lanes
        store(grad_weight, slot, load_as(zero, grad_weight, slot) + sums[0])
        sums = shift_left(sums, zero)
    for k in range(call.degree):
        slot = base + (1 + cells + k) * lanes
        store(grad_weight, slot, load_as(zero, grad_weight, slot) + sums[0])
        sums = shift_left(sums, zero)
    store(grad_weight, base, load_as(zero, grad_weight, base) + total)
