"""The weights in the order of the kernels, and back, as Numba kernels; :mod:`.block` says how they are used.

In the kernels' order the 16 outputs of a vector are neighbours, and so are the vectors of a part, for each slot of each
feature. A task is one vector of outputs.
"""

from collections.abc import Callable

from kan_mamba_layers.ops.kan_linear.cpu.block import (
    BASE,
    BOUNDS,
    DEGREE,
    FEATURES,
    INTERVALS,
    SPLINES,
    WEIGHT,
    slots,
)
from kan_mamba_layers.ops.simd.kernel import TASKS, array, compiled, next_task, own_scratch, size
from kan_mamba_layers.ops.simd.vector import LANES, integers, load, pointer, read, splat, store, transpose


def pack_entry(number: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source."""

    def run(call):
        if number >= 0:
            move(call, True)

    return run


def unpack_entry(number: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source."""

    def run(call):
        if number >= 0:
            move(call, False)

    return run


@compiled
def move(call, pack):
    """Work on tasks until none is left."""
    scratch = pointer(own_scratch(call), call)
    degree, bases = size(call, DEGREE), size(call, INTERVALS) + size(call, DEGREE)
    task = next_task(call)
    while task < size(call, TASKS):
        at, lanes = _offset_of(call, task)
        _repack(call, array(call, BASE), task, 1, at, lanes, scratch, pack)
        _repack(call, array(call, SPLINES), task, bases, at + (1 + degree) * lanes, lanes, scratch, pack)
        if pack:
            for feature in range(size(call, FEATURES)):
                edge = at + feature * slots(call) * lanes
                for k in range(1, degree + 1):
                    store(array(call, WEIGHT), edge + k * lanes, splat(0.0, call))
                    store(array(call, WEIGHT), edge + (degree + bases + k) * lanes, splat(0.0, call))
        task = next_task(call)


@compiled
def _offset_of(call, vector):
    """Where the first slot of a vector of outputs is, and the distance to the next slot."""
    bounds = integers(array(call, BOUNDS))
    part = 0
    while read(bounds, part + 1) <= vector:
        part += 1
    first = read(bounds, part)
    row = LANES * size(call, FEATURES) * slots(call)
    return first * row + (vector - first) * LANES, (read(bounds, part + 1) - first) * LANES


@compiled
def _repack(call, plain, vector, count, at, lanes, scratch, pack):
    """Between 16 rows of ``count`` weights for each feature, and a vector for each of these weights."""
    weight, length, edge = array(call, WEIGHT), size(call, FEATURES) * count, slots(call) * lanes
    for column in range(0, length, LANES):
        first = vector * LANES * length + column
        if pack:
            for k in range(LANES):
                store(scratch, k * LANES, load(plain, first + k * length))
            transpose(scratch, 0, LANES)
        for k in range(LANES):
            feature = (column + k) // count
            slot = at + feature * edge + (column + k - feature * count) * lanes
            if pack:
                store(weight, slot, load(scratch, k * LANES))
            else:
                store(scratch, k * LANES, load(weight, slot))
        if not pack:
            transpose(scratch, 0, LANES)
            for k in range(LANES):
                store(plain, first + k * length, load(scratch, k * LANES))
