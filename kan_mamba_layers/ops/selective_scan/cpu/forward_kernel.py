"""The scan along its walks as a Numba kernel; :mod:`.block` says how it works."""

from collections.abc import Callable

from kan_mamba_layers.ops.selective_scan.cpu.block import (
    BATCH,
    CHANNELS,
    CHUNK,
    FEW_STATES,
    HEIGHT,
    INITIAL,
    LAST,
    RANK,
    SAVE,
    SAVED,
    SOFTPLUS,
    STATES,
    TIMES,
    WALKS,
    WIDTH,
    A,
    D,
    U,
    Y,
    copy_rows,
    expect_rows,
    follow,
    opens_group,
    steps_before_softplus,
    task_of,
    tiles_of,
)
from kan_mamba_layers.ops.simd.kernel import TASKS, array, compiled, next_task, own_scratch, size
from kan_mamba_layers.ops.simd.vector import (
    LANES,
    broadcast,
    exp2_product,
    fma,
    integers,
    load,
    pointer,
    prefetch,
    read,
    softplus_and_slope,
    splat,
    store,
)


def entry(sources: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source.

    Numba's cache sees the values that a function closes over and its own file, but no file that it imports.
    """

    def run(call):
        if sources >= 0:
            forward(call)

    return run


@compiled
def forward(call):
    """Work on tasks until none is left."""
    scratch = own_scratch(call)
    job = next_task(call)
    while job < size(call, TASKS):
        image, team, part, first, end = task_of(call, job)
        for k in range(first, end):
            _forward_walk(call, image, team, part, k, k == first, scratch)
        job = next_task(call)


@compiled
def _forward_walk(call, image, team, part, k, overwrite, scratch):
    """Set, or add to, the output of a team of tiles."""
    length, channels = size(call, HEIGHT) * size(call, WIDTH), size(call, CHANNELS)
    states, row_length = size(call, STATES), size(call, RANK) + 2 * size(call, STATES)
    walk = image * size(call, WALKS) + k
    chunks = (length + CHUNK - 1) // CHUNK
    first, end = tiles_of(call, team)
    positions, coming = integers(pointer(scratch, call)), integers(pointer(scratch + 8 * CHUNK, call))
    work = pointer(scratch + 16 * CHUNK, call)
    rows = 3 * TIMES
    carried = rows + row_length * CHUNK

    for tile in range(first, end):
        for n in range(states):
            h = splat(0.0, call)
            if size(call, INITIAL) != 0:
                h = load(array(call, INITIAL), (walk * states + n) * channels + tile * LANES)
            store(work, carried + ((tile - first) * states + n) * LANES, h)
    steps = min(CHUNK, length)
    follow(call, k, 0, steps, positions)
    for chunk in range(chunks):
        next_steps = min(CHUNK, length - chunk * CHUNK - steps)
        follow(call, k, chunk * CHUNK + steps, next_steps, coming)
        expected = next_steps if states >= FEW_STATES else 0
        for tile in range(first, end):
            if tile == first or opens_group(call, tile):
                copy_rows(call, image, k, tile, steps, positions, work, rows)
            state = carried + (tile - first) * states * LANES
            if size(call, SAVE) != 0:
                for n in range(states):
                    into = ((walk * chunks + chunk) * states + n) * channels + tile * LANES
                    store(array(call, SAVED), into, load(work, state + n * LANES))
            _forward_tile(
                *(call, image, part, k, tile, overwrite, steps, positions, work, rows, state),
                *(expected, coming, tile == first),
            )
        positions, coming, steps = coming, positions, next_steps
    for tile in range(first, end):
        for n in range(states):
            h = load(work, carried + ((tile - first) * states + n) * LANES)
            store(array(call, LAST), (walk * states + n) * channels + tile * LANES, h)


@compiled
def _forward_tile(
    call, image, part, k, tile, overwrite, steps, positions, work, rows, state, expected, coming, expects_rows
):
    """One chunk of one tile. Little by little it asks for what the next chunk will read."""
    channels, states, rank = size(call, CHANNELS), size(call, STATES), size(call, RANK)
    length, channel, row_length = size(call, HEIGHT) * size(call, WIDTH), tile * LANES, rank + 2 * states
    u, y, A_ = array(call, U), array(call, Y), array(call, A)
    skip = load(array(call, D), channel)
    pixel = image * length * channels + channel
    y_pixel = pixel + part * size(call, BATCH) * length * channels
    step, entry, out = 0, TIMES, 2 * TIMES

    steps_before_softplus(call, image, k, tile, steps, positions, work, rows, step)
    if size(call, SOFTPLUS) != 0:
        for t in range(steps):
            dt, _ = softplus_and_slope(load(work, step + t * LANES))
            store(work, step + t * LANES, dt)
    for t in range(steps):
        position = read(positions, t)
        x = load(u, pixel + position * channels)
        store(work, entry + t * LANES, load(work, step + t * LANES) * x)
        store(work, out + t * LANES, splat(0.0, call))
    for n in range(states):
        for t in range(expected * n // states, expected * (n + 1) // states):
            position = read(coming, t)
            prefetch(u, pixel + position * channels)
            prefetch(y, y_pixel + position * channels)
            if expects_rows:
                expect_rows(call, image, k, tile, position)
        a = load(A_, (k * states + n) * channels + channel)
        h = load(work, state + n * LANES)
        for t in range(steps):
            row = rows + t * row_length + rank + n
            decay = exp2_product(load(work, step + t * LANES), a)
            h = fma(h, decay, load(work, entry + t * LANES) * broadcast(work, row))
            store(work, out + t * LANES, fma(h, broadcast(work, row + states), load(work, out + t * LANES)))
        store(work, state + n * LANES, h)
    for t in range(steps):
        position = read(positions, t)
        into = y_pixel + position * channels
        value = load(work, out + t * LANES)
        if k == 0:  # last, since it is the largest term of a new layer
            value = fma(skip, load(u, pixel + position * channels), value)
        store(y, into, value if overwrite else load(y, into) + value)
