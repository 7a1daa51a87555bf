"""What the forward and the backward kernels share: the argument block, positions, rows of coefficients, step sizes.

A task is a group of tiles of 16 channels of one image, along some of the directions. A kernel visits the positions of a
direction in chunks of ``CHUNK`` steps. For each chunk it copies the rows of coefficients, which all tiles share, and
then takes one tile after the other: first the step sizes of all times, then each state through all times. So everything
that a loop touches stays in the L1 cache, and a state stays in a register while it is carried.

All sizes and addresses of a call are in one block of integers, which the threads share. Names are those of the
definition; ``A`` is scaled by ``log2(e)``, since the kernels work with powers of two.
"""

from kan_mamba_layers.ops.simd.kernel import Layout, compiled
from kan_mamba_layers.ops.simd.vector import (
    LANES,
    broadcast,
    fma,
    is_present,
    load,
    prefetch,
    read,
    read_integer,
    store,
    write,
)

CHUNK = 32  # steps between saved states
FEW_STATES = 4  # below this, a chunk is prefetched during softplus, since its states take too little time
TIMES = CHUNK * LANES  # elements of one vector for each time of a chunk

LAYOUT = Layout(
    numbers=(
        *("direction_groups", "tile_groups", "parts", "softplus", "save"),
        *("batch", "height", "width", "channels", "states", "rank", "directions", "groups"),
    ),
    arrays=(
        *("u", "coeffs", "delta", "dt_proj_weight", "dt_proj_bias", "A", "D", "initial_state", "orders", "mask"),
        *("y", "last", "saved"),
        *("grad_y", "grad_last", "grad_u", "grad_coeffs", "grad_delta"),
        *("grad_dt_proj_weight", "grad_dt_proj_bias", "grad_A", "grad_D", "grad_initial"),
    ),
)


def scratch_elements(tiles: int, states: int, rank: int) -> int:
    """Scratch of one thread for a group of tiles, in elements of the compute dtype; a position counts as two.

    Positions are those of a chunk and of the next one.
    """
    row = rank + 2 * states
    return 4 * CHUNK + 10 * TIMES + 2 * row * CHUNK + tiles * (3 * states + 2 * rank + 4) * LANES


@compiled
def task_of(call, task):
    """A task's image, group of tiles, and group of directions with its first direction and its end."""
    groups, directions = call.direction_groups, call.directions
    group, task = task % groups, task // groups
    first, end = directions * group // groups, directions * (group + 1) // groups
    return task // call.tile_groups, task % call.tile_groups, group, first, end


@compiled
def tiles_of(call, tile_group):
    """The first tile of a group and its end."""
    tiles, tile_groups = call.channels // LANES, call.tile_groups
    return tiles * tile_group // tile_groups, tiles * (tile_group + 1) // tile_groups


@compiled
def fill_positions(call, k, start, steps, positions):
    """The positions that direction k visits from time ``start`` on.

    From the table, or by rows or columns, from the first or the last.
    """
    height, width = call.height, call.width
    if is_present(call.orders):
        first = k * height * width + start
        for t in range(steps):
            write(positions, t, read_integer(call.orders, first + t))
        return
    time = start if k < 2 else height * width - 1 - start
    step = 1 if k < 2 else -1
    if k % 2 == 0:
        for t in range(steps):
            write(positions, t, time + step * t)
    else:
        column = time // height
        row = time - column * height
        for t in range(steps):
            write(positions, t, row * width + column)
            row += step
            if row == height:
                row = 0
                column += 1
            elif row < 0:
                row = height - 1
                column -= 1


@compiled
def row_of(call, image, k, tile):
    """Offset of the row of coefficients of position 0, its length, and the distance to the next position's row."""
    directions, groups, height, width = call.directions, call.groups, call.height, call.width
    length = call.rank + 2 * call.states
    distance = directions * groups * length
    group = tile * LANES * groups // call.channels
    return image * height * width * distance + (k * groups + group) * length, length, distance


@compiled
def opens_group(call, tile):
    """Whether a tile is the first of a group of channels."""
    return tile * LANES % (call.channels // call.groups) == 0


@compiled
def copy_rows(call, image, k, tile, steps, positions, work, rows):
    """Copy the chunk's rows of coefficients."""
    coeffs = call.coeffs
    first, length, distance = row_of(call, image, k, tile)
    for t in range(steps):
        source, into = first + read(positions, t) * distance, rows + t * length
        if length < LANES:
            for i in range(length):
                write(work, into + i, read(coeffs, source + i))
        else:
            for i in range(0, length - LANES, LANES):
                store(work, into + i, load(coeffs, source + i))
            store(work, into + length - LANES, load(coeffs, source + length - LANES))


@compiled
def prefetch_rows(call, image, k, tile, position):
    """Prefetch a row of coefficients of the next chunk."""
    coeffs = call.coeffs
    first, length, distance = row_of(call, image, k, tile)
    row = first + position * distance
    for i in range(0, length, LANES):
        prefetch(coeffs, row + i)
    prefetch(coeffs, row + length - 1)


@compiled
def steps_before_softplus(call, image, k, tile, steps, positions, work, rows, into):
    """``dt_proj_weight @ low + dt_proj_bias``, or ``delta + dt_proj_bias``, at all times of a chunk."""
    channels, rank, directions = call.channels, call.rank, call.directions
    row_length, channel = rank + 2 * call.states, tile * LANES
    weights, weight, delta = call.dt_proj_weight, k * rank * channels + channel, call.delta
    pixel = (image * call.height * call.width * directions + k) * channels + channel
    bias = load(call.dt_proj_bias, k * channels + channel)
    if rank == 0:
        for t in range(steps):
            z = load(delta, pixel + read(positions, t) * directions * channels)
            store(work, into + t * LANES, bias + z)
    # Four times share the loads of the weights; those behind the last one of a chunk are not used.
    for t in range(0, steps if rank > 0 else 0, 4):
        row = rows + t * row_length
        z0, z1, z2, z3 = bias, bias, bias, bias
        for r in range(rank):
            w = load(weights, weight + r * channels)
            z0 = fma(w, broadcast(work, row + r), z0)
            z1 = fma(w, broadcast(work, row + row_length + r), z1)
            z2 = fma(w, broadcast(work, row + 2 * row_length + r), z2)
            z3 = fma(w, broadcast(work, row + 3 * row_length + r), z3)
        store(work, into + t * LANES, z0)
        store(work, into + (t + 1) * LANES, z1)
        store(work, into + (t + 2) * LANES, z2)
        store(work, into + (t + 3) * LANES, z3)


@compiled
def mask_steps(call, image, steps, positions, work, values):
    """Multiply the values of all times of a chunk by the mask."""
    first = image * call.height * call.width
    for t in range(steps):
        at = values + t * LANES
        store(work, at, load(work, at) * broadcast(call.mask, first + read(positions, t)))
