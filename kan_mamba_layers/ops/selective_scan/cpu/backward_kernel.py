"""The gradients of the scan as a Numba kernel; :mod:`.block` says how it works."""

from collections.abc import Callable

from kan_mamba_layers.ops.selective_scan.cpu.block import (
    BATCH,
    CHANNELS,
    CHUNK,
    DA,
    DD,
    DDELTA,
    DDT_BIAS,
    DDT_WEIGHT,
    DINITIAL,
    DMAPS,
    DT_WEIGHT,
    DU,
    FEW_STATES,
    GRAD_LAST,
    GRAD_Y,
    HEIGHT,
    LN_2,
    RANK,
    SAVED,
    SOFTPLUS,
    STATES,
    TIMES,
    WALKS,
    WIDTH,
    A,
    D,
    U,
    copy_rows,
    expect_rows,
    follow,
    opens_group,
    row_of,
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
    sum_lanes,
    transpose,
    write,
)


def entry(sources: int) -> Callable[..., None]:
    """The function to compile, which closes over a number that stands for the source.

    Numba's cache sees the values that a function closes over and its own file, but no file that it imports.
    """

    def run(call):
        if sources >= 0:
            backward(call)

    return run


@compiled
def backward(call):
    """Work on tasks until none is left."""
    scratch = own_scratch(call)
    job = next_task(call)
    while job < size(call, TASKS):
        image, team, part, first, end = task_of(call, job)
        for k in range(first, end):
            _backward_walk(call, image, team, part, k, k == first, scratch)
        job = next_task(call)


@compiled
def _backward_walk(call, image, team, part, k, overwrite, scratch):
    """The gradients of a team of tiles, chunk by chunk from the last to the first."""
    length, channels = size(call, HEIGHT) * size(call, WIDTH), size(call, CHANNELS)
    states, rank = size(call, STATES), size(call, RANK)
    row_length = rank + 2 * states
    walk = image * size(call, WALKS) + k
    first, end = tiles_of(call, team)
    positions, coming = integers(pointer(scratch, call)), integers(pointer(scratch + 8 * CHUNK, call))
    work = pointer(scratch + 16 * CHUNK, call)
    rows = 10 * TIMES
    sums = rows + row_length * CHUNK
    # Of each tile: the adjoint state; dA, ddt_weight, ddt_bias, dD; and what their sums have lost by rounding.
    totals = sums + row_length * CHUNK
    kept = (states + 2 * (states + rank + 2)) * LANES

    for tile in range(first, end):
        total = totals + (tile - first) * kept
        for i in range(0, kept, LANES):
            store(work, total + i, splat(0.0, call))
        for n in range(states):
            at = (walk * states + n) * channels + tile * LANES
            store(work, total + n * LANES, load(array(call, GRAD_LAST), at))
    last = (length + CHUNK - 1) // CHUNK - 1
    steps = length - last * CHUNK
    follow(call, k, last * CHUNK, steps, positions)
    for chunk in range(last, -1, -1):
        next_steps = CHUNK if chunk > 0 else 0
        follow(call, k, (chunk - 1) * CHUNK, next_steps, coming)
        expected = next_steps if states >= FEW_STATES else 0
        for tile in range(first, end):
            if tile == first or opens_group(call, tile):
                copy_rows(call, image, k, tile, steps, positions, work, rows)
                for i in range(0, row_length * CHUNK, LANES):
                    store(work, sums + i, splat(0.0, call))
            total = totals + (tile - first) * kept
            _backward_tile(
                *(call, image, part, k, tile, overwrite, chunk, steps, positions, work, rows, sums, total),
                *(expected, coming, tile == first),
            )
            if tile == end - 1 or opens_group(call, tile + 1):
                _store_rows(call, image, team, k, tile, steps, positions, work, sums)
        positions, coming, steps = coming, positions, next_steps
    for tile in range(first, end):
        total = totals + (tile - first) * kept
        for n in range(states):
            into = (walk * states + n) * channels + tile * LANES
            store(array(call, DINITIAL), into, load(work, total + n * LANES))
            store(array(call, DA), into, load(work, total + (states + n) * LANES))
        for r in range(rank):
            into = (walk * rank + r) * channels + tile * LANES
            store(array(call, DDT_WEIGHT), into, load(work, total + (2 * states + r) * LANES))
        rest = total + (2 * states + rank) * LANES
        store(array(call, DDT_BIAS), walk * channels + tile * LANES, load(work, rest))
        if k == 0:
            store(array(call, DD), image * channels + tile * LANES, load(work, rest + LANES))


@compiled
def _backward_tile(
    call,
    image,
    part,
    k,
    tile,
    overwrite,
    chunk,
    steps,
    positions,
    work,
    rows,
    sums,
    total,
    expected,
    coming,
    expects_rows,
):
    """One chunk of one tile. Little by little it asks for what the next chunk will read."""
    channels, states, rank, walks = size(call, CHANNELS), size(call, STATES), size(call, RANK), size(call, WALKS)
    length, channel, row_length = size(call, HEIGHT) * size(call, WIDTH), tile * LANES, rank + 2 * states
    u, grad_y, du, A_, saved = (
        array(call, U),
        array(call, GRAD_Y),
        array(call, DU),
        array(call, A),
        array(call, SAVED),
    )
    softplus = size(call, SOFTPLUS)
    skip = load(array(call, D), channel)
    pixel = image * length * channels + channel
    du_pixel = pixel + part * size(call, BATCH) * length * channels
    step, slope, entry, grad, grad_entry, grad_step = 0, TIMES, 2 * TIMES, 3 * TIMES, 4 * TIMES, 5 * TIMES
    decays, before, terms_B, terms_C = 6 * TIMES, 7 * TIMES, 8 * TIMES, 9 * TIMES
    adjoint, da_total = total, total + states * LANES
    dw_total = da_total + states * LANES
    dbias_total = dw_total + rank * LANES
    lost = (states + rank + 2) * LANES  # from a sum to what it has lost

    steps_before_softplus(call, image, k, tile, steps, positions, work, rows, step)
    if softplus != 0:
        for t in range(steps):
            dt, dt_slope = softplus_and_slope(load(work, step + t * LANES))
            store(work, step + t * LANES, dt)
            store(work, slope + t * LANES, dt_slope)
    for t in range(steps):
        position = read(positions, t)
        store(work, entry + t * LANES, load(work, step + t * LANES) * load(u, pixel + position * channels))
        store(work, grad + t * LANES, load(grad_y, pixel + position * channels))
        store(work, grad_entry + t * LANES, splat(0.0, call))
        store(work, grad_step + t * LANES, splat(0.0, call))

    saved_first = ((image * walks + k) * ((length + CHUNK - 1) // CHUNK) + chunk) * states * channels + channel
    for n in range(states):
        for t in range(expected * n // states, expected * (n + 1) // states):
            position = read(coming, t)
            prefetch(u, pixel + position * channels)
            prefetch(grad_y, pixel + position * channels)
            prefetch(du, du_pixel + position * channels)
            if expects_rows:
                expect_rows(call, image, k, tile, position)
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
        _add_sums(work, terms_B, steps, sums + (rank + n) * CHUNK)
        _add_sums(work, terms_C, steps, sums + (rank + states + n) * CHUNK)

    dbias, dskip = splat(0.0, call), splat(0.0, call)
    for t in range(steps):
        position = read(positions, t)
        x = load(u, pixel + position * channels)
        g = load(work, grad + t * LANES)
        dentry = load(work, grad_entry + t * LANES)
        dz = fma(load(work, grad_step + t * LANES), splat(LN_2, call), dentry * x)
        if softplus != 0:
            dz = dz * load(work, slope + t * LANES)
        dbias = dbias + dz
        store(work, slope + t * LANES, dz)
        if rank == 0:
            store(array(call, DDELTA), ((image * length + position) * walks + k) * channels + channel, dz)
        dx = dentry * load(work, step + t * LANES)
        if k == 0:
            dx = fma(skip, g, dx)
            dskip = fma(g, x, dskip)
        into = du_pixel + position * channels
        store(du, into, dx if overwrite else load(du, into) + dx)
    _add_to(work, dbias_total, lost, dbias)
    _add_to(work, dbias_total + LANES, lost, dskip)

    for r in range(rank):
        weight = load(array(call, DT_WEIGHT), (k * rank + r) * channels + channel)
        dw = splat(0.0, call)
        for t in range(steps):
            dz = load(work, slope + t * LANES)
            store(work, terms_B + t * LANES, dz * weight)
            dw = fma(dz, broadcast(work, rows + t * row_length + r), dw)
        _add_to(work, dw_total + r * LANES, lost, dw)
        _add_sums(work, terms_B, steps, sums + r * CHUNK)


@compiled
def _add_to(work, total, lost, x):
    """Add a chunk's sum to the walk's, and keep what the rounding loses (Kahan): walks are long."""
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
def _store_rows(call, image, team, k, tile, steps, positions, work, sums):
    """Bring the sums, one row of times for each map, to the rows of the chunk's positions."""
    dmaps = array(call, DMAPS)
    first, length, distance = row_of(call, image, k, tile)
    first += team * size(call, BATCH) * size(call, HEIGHT) * size(call, WIDTH) * distance
    whole = length // LANES * LANES
    for m in range(0, whole, LANES):
        for t in range(0, steps, LANES):
            transpose(work, sums + m * CHUNK + t, CHUNK)
    for t in range(steps):
        row = first + read(positions, t) * distance
        block, lane = t // LANES * LANES, t % LANES
        for m in range(0, whole, LANES):
            store(dmaps, row + m, load(work, sums + (m + lane) * CHUNK + block))
        for m in range(whole, length):
            write(dmaps, row + m, read(work, sums + m * CHUNK + t))
