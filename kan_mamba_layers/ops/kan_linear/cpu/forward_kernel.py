"""The product of the KAN linear map as a Numba kernel; :mod:`.block` says how it works."""

from collections.abc import Callable

from kan_mamba_layers.ops.kan_linear.cpu.block import (
    BIAS,
    BLOCK,
    FEATURES,
    OUTPUTS,
    PARTS,
    ROWS,
    WEIGHT,
    Y,
    cell_of,
    factor_at,
    for_width,
    part_of,
    slots,
    write_factors,
)
from kan_mamba_layers.ops.simd.kernel import TASKS, array, compiled, inlined, next_task, own_scratch, size
from kan_mamba_layers.ops.simd.vector import LANES, fma, pointer, store
from kan_mamba_layers.ops.simd.wide import add_rows, lanes_of, load_as, several, spread, zeros

HALF = LANES // 2  # features whose weights stay in the first cache while rows pass


def entry(number: int, degree: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source, and over the degree."""

    nonzero = degree + 1

    def run(call):
        if number >= 0:
            forward(call, several(zeros(call, 16), nonzero))

    return run


@inlined
def forward(call, splines):
    """Work on tasks, blocks of rows, until none is left."""
    scratch = pointer(own_scratch(call), call)
    task = next_task(call)
    while task < size(call, TASKS):
        first = task * size(call, BLOCK)
        rows = min(size(call, BLOCK), size(call, ROWS) - first)
        for feature in range(0, size(call, FEATURES), LANES):
            write_factors(call, first, rows, feature, scratch, False)
            for part in range(size(call, PARTS)):
                vector, vectors = part_of(call, part)
                for_width(_multiply, call, vectors, splines, scratch, first, rows, feature, vector)
        task = next_task(call)


@compiled
def _multiply(call, zero, splines, scratch, first, rows, first_feature, vector):
    """Add what 16 features give to some outputs, for two rows at a time."""
    outputs, lanes, edge = size(call, OUTPUTS), lanes_of(zero), slots(call) * lanes_of(zero)
    weight, bias, y = array(call, WEIGHT), array(call, BIAS), array(call, Y)
    part = vector * LANES * size(call, FEATURES) * slots(call)
    for feature in range(0, LANES, HALF):
        for row in range(0, rows, 2):
            other = min(row + 1, rows - 1)
            at_a = (first + row) * outputs + vector * LANES
            at_b = (first + other) * outputs + vector * LANES
            a = b = zero  # sums of their own, which keep what one long sum would lose
            for f in range(feature, feature + HALF):
                base = part + (first_feature + f) * edge
                factor_a, factor_b = factor_at(call, f, row), factor_at(call, f, other)
                line = load_as(zero, weight, base)
                a = fma(line, spread(zero, scratch, factor_a), a)
                b = fma(line, spread(zero, scratch, factor_b), b)
                cell_a, cell_b = cell_of(call, scratch, f, row), cell_of(call, scratch, f, other)
                a = add_rows(a, weight, base + (1 + cell_a) * lanes, scratch, factor_a + LANES, splines)
                b = add_rows(b, weight, base + (1 + cell_b) * lanes, scratch, factor_b + LANES, splines)
            if first_feature + feature > 0:
                a, b = load_as(zero, y, at_a) + a, load_as(zero, y, at_b) + b
            else:
                a, b = load_as(zero, bias, vector * LANES) + a, load_as(zero, bias, vector * LANES) + b
            store(y, at_a, a)
            store(y, at_b, b)
