"""The weights in the order of the kernels, and back, as Numba kernels; :mod:`.block` says how they are used.

In the kernels' order the 16 outputs of a vector are neighbours, and so are the vectors of a block of outputs, for each
slot of each feature. A task is one vector of outputs.
"""

from collections.abc import Callable

from kan_mamba_layers.ops.kan_linear.cpu import block
from kan_mamba_layers.ops.simd.kernel import compiled, next_task, own_scratch
from kan_mamba_layers.ops.simd.vector import LANES, integers, load, pointer, read, splat, store, transpose


def pack_entry(digest: int) -> Callable[..., None]:
    """The C function; see :func:`.kernel.c_function`."""

    def run(call):
        if digest >= 0:
            move(call, True)

    return run


def unpack_entry(digest: int) -> Callable[..., None]:
    """The C function; see :func:`.kernel.c_function`."""

    def run(call):
        if digest >= 0:
            move(call, False)

    return run


@compiled
def move(call, pack):
    """Do tasks until none is left."""
    scratch = pointer(own_scratch(call), call)
    degree, bases = call.degree, call.intervals + call.degree
    task = next_task(call)
    while task < call.tasks:
        at, lanes = _offset_of(call, task)
        _repack(call, call.base, task, 1, at, lanes, scratch, pack)
        _repack(call, call.splines, task, bases, at + (1 + degree) * lanes, lanes, scratch, pack)
        if pack:
            for feature in range(call.features):
                edge = at + feature * block.slots(call) * lanes
                for k in range(1, degree + 1):
                    store(call.weight, edge + k * lanes, splat(0.0, call))
                    store(call.weight, edge + (degree + bases + k) * lanes, splat(0.0, call))
        task = next_task(call)


@compiled
def _offset_of(call, vector):
    """Offset of the first slot of a vector of outputs, and the distance to the next slot."""
    bounds = integers(call.bounds)
    i = 0
    while read(bounds, i + 1) <= vector:
        i += 1
    first = read(bounds, i)
    row = LANES * call.features * block.slots(call)
    return first * row + (vector - first) * LANES, (read(bounds, i + 1) - first) * LANES


@compiled
def _repack(call, plain, vector, count, at, lanes, scratch, pack):
    """Move ``count`` weights per feature between 16 rows of memory and one vector per weight."""
    weight, length, edge = call.weight, call.features * count, block.slots(call) * lanes
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
