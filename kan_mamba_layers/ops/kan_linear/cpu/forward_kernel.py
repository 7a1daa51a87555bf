"""The product of the KAN linear map as a Numba kernel; :mod:`.block` says how it works."""

from collections.abc import Callable

from kan_mamba_layers.ops.kan_linear.cpu import block
from kan_mamba_layers.ops.simd.kernel import compiled, inlined, next_task, own_scratch
from kan_mamba_layers.ops.simd.vector import (
    LANES,
    add_rows,
    broadcast_as,
    fma,
    lanes_of,
    load_as,
    pointer,
    store,
    tuple_of,
    zeros,
)

HALF = LANES // 2  # features whose weights stay in the L1 cache while rows pass


def entry(digest: int, degree: int) -> Callable[..., None]:
    """The C function of one degree; see :func:`.kernel.c_function`."""
    nonzero = degree + 1

    def run(call):
        if digest >= 0:
            forward(call, tuple_of(zeros(call, 16), nonzero))

    return run


@inlined
def forward(call, splines):
    """Do tasks until none is left; a task is a block of rows."""
    scratch = pointer(own_scratch(call), call)
    task = next_task(call)
    while task < call.tasks:
        first = task * call.row_block
        rows = min(call.row_block, call.rows - first)
        for feature in range(0, call.features, LANES):
            block.write_factors(call, first, rows, feature, scratch, False)
            for output_block in range(call.output_blocks):
                vector, vectors = block.vectors_of(call, output_block)
                block.for_width(_multiply, call, vectors, splines, scratch, first, rows, feature, vector)
        task = next_task(call)


@compiled
def _multiply(call, zero, splines, scratch, first, rows, first_feature, vector):
    """Add the terms of 16 features to a block of outputs, two rows at a time."""
    outputs, lanes, edge = call.outputs, lanes_of(zero), block.slots(call) * lanes_of(zero)
    weight, bias, y = call.weight, call.bias, call.y
    first_weight = vector * LANES * call.features * block.slots(call)
    for feature in range(0, LANES, HALF):
        for row in range(0, rows, 2):
            other = min(row + 1, rows - 1)
            at_a = (first + row) * outputs + vector * LANES
            at_b = (first + other) * outputs + vector * LANES
            a = b = zero  # short sums of their own lose less to rounding than one long sum
            for f in range(feature, feature + HALF):
                base = first_weight + (first_feature + f) * edge
                factor_a, factor_b = block.factor_at(call, f, row), block.factor_at(call, f, other)
                line = load_as(zero, weight, base)
                a = fma(line, broadcast_as(zero, scratch, factor_a), a)
                b = fma(line, broadcast_as(zero, scratch, factor_b), b)
                cell_a, cell_b = block.cell_of(call, scratch, f, row), block.cell_of(call, scratch, f, other)
                a = add_rows(a, weight, base + (1 + cell_a) * lanes, scratch, factor_a + LANES, splines)
                b = add_rows(b, weight, base + (1 + cell_b) * lanes, scratch, factor_b + LANES, splines)
            if first_feature + feature > 0:
                a, b = load_as(zero, y, at_a) + a, load_as(zero, y, at_b) + b
            else:
                a, b = load_as(zero, bias, vector * LANES) + a, load_as(zero, bias, vector * LANES) + b
            store(y, at_a, a)
            store(y, at_b, b)
