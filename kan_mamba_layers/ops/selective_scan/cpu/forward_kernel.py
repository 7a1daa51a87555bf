"""The scan along its directions as a Numba kernel; :mod:`.block` says how it works."""

from collections.abc import Callable

from kan_mamba_layers.ops.selective_scan.cpu import block
from kan_mamba_layers.ops.simd.kernel import compiled, next_task, own_scratch
from kan_mamba_layers.ops.simd.vector import (
    LANES,
    broadcast,
    exp2_product,
    fma,
    integers,
    is_present,
    load,
    pointer,
    prefetch,
    read,
    softplus_and_slope,
    splat,
    store,
)


def entry(digest: int) -> Callable[..., None]:
    """The C function; see :func:`.kernel.c_function`."""

    def run(call):
        if digest >= 0:
            forward(call)

    return run


@compiled
def forward(call):
    """Do tasks until none is left."""
    scratch = own_scratch(call)
    task = next_task(call)
    while task < call.tasks:
        image, tile_group, direction_group, first, end = block.task_of(call, task)
        for k in range(first, end):
            _scan_direction(call, image, tile_group, direction_group, k, k == first, scratch)
        task = next_task(call)


@compiled
def _scan_direction(call, image, tile_group, direction_group, k, overwrite, scratch):
    """Set, or add to, the output of a group of tiles."""
    length, channels = call.height * call.width, call.channels
    states, row_length = call.states, call.rank + 2 * call.states
    sequence = image * call.directions + k
    chunks = (length + block.CHUNK - 1) // block.CHUNK
    first, end = block.tiles_of(call, tile_group)
    positions, next_positions = integers(pointer(scratch, call)), integers(pointer(scratch + 8 * block.CHUNK, call))
    work = pointer(scratch + 16 * block.CHUNK, call)
    rows = 3 * block.TIMES
    carried = rows + row_length * block.CHUNK

    for tile in range(first, end):
        for n in range(states):
            h = splat(0.0, call)
            if is_present(call.initial_state):
                h = load(call.initial_state, (sequence * states + n) * channels + tile * LANES)
            store(work, carried + ((tile - first) * states + n) * LANES, h)
    steps = min(block.CHUNK, length)
    block.fill_positions(call, k, 0, steps, positions)
    for chunk in range(chunks):
        next_steps = min(block.CHUNK, length - chunk * block.CHUNK - steps)
        block.fill_positions(call, k, chunk * block.CHUNK + steps, next_steps, next_positions)
        to_prefetch = next_steps if states >= block.FEW_STATES else 0
        for tile in range(first, end):
            if tile == first or block.opens_group(call, tile):
                block.copy_rows(call, image, k, tile, steps, positions, work, rows)
            state = carried + (tile - first) * states * LANES
            if call.save != 0:
                for n in range(states):
                    into = ((sequence * chunks + chunk) * states + n) * channels + tile * LANES
                    store(call.saved, into, load(work, state + n * LANES))
            _forward_tile(
                *(call, image, direction_group, k, tile, overwrite, steps, positions, work, rows, state),
                *(to_prefetch, next_positions, tile == first),
            )
        positions, next_positions, steps = next_positions, positions, next_steps
    for tile in range(first, end):
        for n in range(states):
            h = load(work, carried + ((tile - first) * states + n) * LANES)
            store(call.last, (sequence * states + n) * channels + tile * LANES, h)


@compiled
def _forward_tile(
    call, image, direction_group, k, tile, overwrite, steps, positions, work, rows, state,
    to_prefetch, next_positions, prefetches_rows,
):  # fmt: skip
    """One chunk of one tile; prefetches the next chunk's inputs on the way."""
    channels, states, rank = call.channels, call.states, call.rank
    length, channel, row_length = call.height * call.width, tile * LANES, rank + 2 * states
    u, y, A_ = call.u, call.y, call.A
    skip = load(call.D, channel)
    pixel = image * length * channels + channel
    y_pixel = pixel + direction_group * call.batch * length * channels
    step, entry, out = 0, block.TIMES, 2 * block.TIMES
    prefetches_early = states < block.FEW_STATES

    block.steps_before_softplus(call, image, k, tile, steps, positions, work, rows, step)
    softplus, mask, masked = call.softplus, call.mask, is_present(call.mask)
    for t in range(steps):
        if prefetches_early:
            behind = read(next_positions, t)
            prefetch(u, pixel + behind * channels)
            prefetch(y, y_pixel + behind * channels)
        dt = load(work, step + t * LANES)
        if softplus != 0:
            dt, _ = softplus_and_slope(dt)
        position = read(positions, t)
        if masked != 0:
            dt = dt * broadcast(mask, image * length + position)
        store(work, step + t * LANES, dt)
        x = load(u, pixel + position * channels)
        store(work, entry + t * LANES, dt * x)
        store(work, out + t * LANES, splat(0.0, call))
    for n in range(states):
        for t in range(to_prefetch * n // states, to_prefetch * (n + 1) // states):
            position = read(next_positions, t)
            prefetch(u, pixel + position * channels)
            prefetch(y, y_pixel + position * channels)
            if prefetches_rows:
                block.prefetch_rows(call, image, k, tile, position)
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
