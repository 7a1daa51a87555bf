"""The gradients of the scan as a Numba kernel; :mod:`.block` says how it works."""

from collections.abc import Callable

from kan_mamba_layers.ops.selective_scan.call import LN2
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
    sum_lanes,
    transpose,
    write,
)


def entry(digest: int) -> Callable[..., None]:
    """The C function; see :func:`.kernel.c_function`."""

    def run(call):
        if digest >= 0:
            backward(call)

    return run


@compiled
def backward(call):
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
    """The gradients of a group of tiles, chunk by chunk from the last to the first."""
    length, channels = call.height * call.width, call.channels
    states, rank = call.states, call.rank
    row_length = rank + 2 * states
    sequence = image * call.directions + k
    first, end = block.tiles_of(call, tile_group)
    positions, next_positions = integers(pointer(scratch, call)), integers(pointer(scratch + 8 * block.CHUNK, call))
    work = pointer(scratch + 16 * block.CHUNK, call)
    rows = 10 * block.TIMES
    sums = rows + row_length * block.CHUNK
    # Of each tile: the adjoint state; dA, ddt_weight, ddt_bias, dD; and what their sums have lost by rounding.
    totals = sums + row_length * block.CHUNK
    kept = (states + 2 * (states + rank + 2)) * LANES

    for tile in range(first, end):
        total = totals + (tile - first) * kept
        for i in range(0, kept, LANES):
            store(work, total + i, splat(0.0, call))
        for n in range(states):
            at = (sequence * states + n) * channels + tile * LANES
            store(work, total + n * LANES, load(call.grad_last, at))
    last = (length + block.CHUNK - 1) // block.CHUNK - 1
    steps = length - last * block.CHUNK
    block.fill_positions(call, k, last * block.CHUNK, steps, positions)
    for chunk in range(last, -1, -1):
        next_steps = block.CHUNK if chunk > 0 else 0
        block.fill_positions(call, k, (chunk - 1) * block.CHUNK, next_steps, next_positions)
        to_prefetch = next_steps if states >= block.FEW_STATES else 0
        for tile in range(first, end):
            if tile == first or block.opens_group(call, tile):
                block.copy_rows(call, image, k, tile, steps, positions, work, rows)
                for i in range(0, row_length * block.CHUNK, LANES):
                    store(work, sums + i, splat(0.0, call))
            total = totals + (tile - first) * kept
            _backward_tile(
                *(call, image, direction_group, k, tile, overwrite, chunk, steps, positions, work, rows, sums, total),
                *(to_prefetch, next_positions, tile == first),
            )
            if tile == end - 1 or block.opens_group(call, tile + 1):
                _store_rows(call, image, tile_group, k, tile, steps, positions, work, sums)
        positions, next_positions, steps = next_positions, positions, next_steps
    for tile in range(first, end):
        total = totals + (tile - first) * kept
        for n in range(states):
            into = (sequence * states + n) * channels + tile * LANES
            store(call.grad_initial, into, load(work, total + n * LANES))
            store(call.grad_A, into, load(work, total + (states + n) * LANES))
        for r in range(rank):
            into = (sequence * rank + r) * channels + tile * LANES
            store(call.grad_dt_proj_weight, into, load(work, total + (2 * states + r) * LANES))
        rest = total + (2 * states + rank) * LANES
        store(call.grad_dt_proj_bias, sequence * channels + tile * LANES, load(work, rest))
        if k == 0:
            store(call.grad_D, image * channels + tile * LANES, load(work, rest + LANES))


@compiled
def _backward_tile(
    call, image, direction_group, k, tile, overwrite, chunk, steps, positions, work, rows, sums, total,
    to_prefetch, next_positions, prefetches_rows,
):  # fmt: skip
    """One chunk of one tile; prefetches the next chunk's inputs on the way."""
    channels, states, rank, directions = call.channels, call.states, call.rank, call.directions
    length, channel, row_length = call.height * call.width, tile * LANES, rank + 2 * states
    u, grad_y, grad_u, A_, saved = call.u, call.grad_y, call.grad_u, call.A, call.saved
    softplus = call.softplus
    skip = load(call.D, channel)
    pixel = image * length * channels + channel
    grad_u_pixel = pixel + direction_group * call.batch * length * channels
    step, slope, entry, grad, grad_entry, grad_step = (
        0,
        block.TIMES,
        2 * block.TIMES,
        3 * block.TIMES,
        4 * block.TIMES,
        5 * block.TIMES,
    )
    decays, before, terms_B, terms_C = 6 * block.TIMES, 7 * block.TIMES, 8 * block.TIMES, 9 * block.TIMES
    adjoint, da_total = total, total + states * LANES
    dw_total = da_total + states * LANES
    dbias_total = dw_total + rank * LANES
    lost = (states + rank + 2) * LANES  # from a sum to what it has lost

    block.steps_before_softplus(call, image, k, tile, steps, positions, work, rows, step)
    if softplus != 0:
        for t in range(steps):
            dt, dt_slope = softplus_and_slope(load(work, step + t * LANES))
            store(work, step + t * LANES, dt)
            store(work, slope + t * LANES, dt_slope)
    if is_present(call.mask):
        if softplus == 0:
            for t in range(steps):
                store(work, slope + t * LANES, splat(1.0, call))
        block.mask_steps(call, image, steps, positions, work, step)
        block.mask_steps(call, image, steps, positions, work, slope)
    has_slope = softplus != 0 or is_present(call.mask) != 0
    for t in range(steps):
        position = read(positions, t)
        store(work, entry + t * LANES, load(work, step + t * LANES) * load(u, pixel + position * channels))
        store(work, grad + t * LANES, load(grad_y, pixel + position * channels))
        store(work, grad_entry + t * LANES, splat(0.0, call))
        store(work, grad_step + t * LANES, splat(0.0, call))

    saved_first = (
        (image * directions + k) * ((length + block.CHUNK - 1) // block.CHUNK) + chunk
    ) * states * channels + channel
    for n in range(states):
        for t in range(to_prefetch * n // states, to_prefetch * (n + 1) // states):
            position = read(next_positions, t)
            prefetch(u, pixel + position * channels)
            prefetch(grad_y, pixel + position * channels)
            prefetch(grad_u, grad_u_pixel + position * channels)
            if prefetches_rows:
                block.prefetch_rows(call, image, k, tile, position)
        a = load(A_, (k * states + n) * channels + channel)
        h = load(saved, saved_first + n * channels)
        for t in range(steps):
            row = rows + t * row_length + rank + n
            decay = exp2_product(load(work, step + t * LANES), a)
            store(work, decays + t * LANES, decay)
            store(work, before + t * LANES, h)
            h = fma(h, decay, load(work, entry + t * LANES) * broadcast(work, row))
        carried = load(work, adjoint + n * LANES)
        da = splat(0.0, call)
        for t in range(steps - 1, -1, -1):
            row = rows + t * row_length + rank + n
            g = load(work, grad + t * LANES)
            dh = fma(g, broadcast(work, row + states), carried)
            store(work, terms_B + t * LANES, dh * load(work, entry + t * LANES))
            store(work, terms_C + t * LANES, g * h)
            into = grad_entry + t * LANES
            store(work, into, fma(dh, broadcast(work, row), load(work, into)))
            carried = dh * load(work, decays + t * LANES)
            h = load(work, before + t * LANES)
            dexponent = carried * h
            into = grad_step + t * LANES
            store(work, into, fma(dexponent, a, load(work, into)))
            da = fma(dexponent, load(work, step + t * LANES), da)
        store(work, adjoint + n * LANES, carried)
        _add_to(work, da_total + n * LANES, lost, da)
        _add_sums(work, terms_B, steps, sums + (rank + n) * block.CHUNK)
        _add_sums(work, terms_C, steps, sums + (rank + states + n) * block.CHUNK)

    dbias, dskip = splat(0.0, call), splat(0.0, call)
    for t in range(steps):
        position = read(positions, t)
        x = load(u, pixel + position * channels)
        g = load(work, grad + t * LANES)
        dentry = load(work, grad_entry + t * LANES)
        dz = fma(load(work, grad_step + t * LANES), splat(LN2, call), dentry * x)
        if has_slope:
            dz = dz * load(work, slope + t * LANES)
        dbias = dbias + dz
        store(work, slope + t * LANES, dz)
        if rank == 0:
            store(call.grad_delta, ((image * length + position) * directions + k) * channels + channel, dz)
        dx = dentry * load(work, step + t * LANES)
        if k == 0:
            dx = fma(skip, g, dx)
            dskip = fma(g, x, dskip)
        into = grad_u_pixel + position * channels
        store(grad_u, into, dx if overwrite else load(grad_u, into) + dx)
    _add_to(work, dbias_total, lost, dbias)
    _add_to(work, dbias_total + LANES, lost, dskip)

    for r in range(rank):
        weight = load(call.dt_proj_weight, (k * rank + r) * channels + channel)
        dw = splat(0.0, call)
        for t in range(steps):
            dz = load(work, slope + t * LANES)
            store(work, terms_B + t * LANES, dz * weight)
            dw = fma(dz, broadcast(work, rows + t * row_length + r), dw)
        _add_to(work, dw_total + r * LANES, lost, dw)
        _add_sums(work, terms_B, steps, sums + r * block.CHUNK)


@compiled
def _add_to(work, total, lost, x):
    """Add a chunk's sum to the direction's, and keep what the rounding loses (Kahan): directions are long."""
    before = load(work, total)
    x = x - load(work, total + lost)
    after = before + x
    store(work, total, after)
    store(work, total + lost, (after - before) - x)


@compiled
def _add_sums(work, terms, steps, into):
    """Add the sum over a tile's channels to the total of each time."""
    for t in range(0, steps, LANES):
        store(work, into + t, load(work, into + t) + sum_lanes(work, terms + t * LANES))


@compiled
def _store_rows(call, image, tile_group, k, tile, steps, positions, work, sums):
    """Bring the sums, one row of times for each map, to the rows of the chunk's positions."""
    grad_coeffs = call.grad_coeffs
    first, length, distance = block.row_of(call, image, k, tile)
    first += tile_group % call.parts * call.batch * call.height * call.width * distance
    whole = length // LANES * LANES
    for m in range(0, whole, LANES):
        for t in range(0, steps, LANES):
            transpose(work, sums + m * block.CHUNK + t, block.CHUNK)
    for t in range(steps):
        row = first + read(positions, t) * distance
        column, lane = t // LANES * LANES, t % LANES
        for m in range(0, whole, LANES):
            store(grad_coeffs, row + m, load(work, sums + (m + lane) * block.CHUNK + column))
        for m in range(whole, length):
            write(grad_coeffs, row + m, read(work, sums + m * block.CHUNK + t))
