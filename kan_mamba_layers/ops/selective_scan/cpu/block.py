"""What the forward and the backward kernels share: the block of a call, walks, rows of maps, steps.

A task is a team of tiles of 16 channels of one image, along some of the walks. A kernel follows a walk by index, in
chunks of ``CHUNK`` steps. For each chunk it copies the rows of maps, which all tiles share, and then takes one tile
after the other: first the steps of all times, then each state through all times. So everything that a loop touches
stays in the first cache, and a state stays in a register while it is carried.

All sizes and addresses of a call stand in one block of integers that the threads share. Names are those of the
definition; ``A`` is scaled by ``log2(e)``, since the kernels work with powers of two.
"""

import math

from kan_mamba_layers.ops.simd.kernel import OWN_FIELDS, array, compiled, size
from kan_mamba_layers.ops.simd.vector import LANES, broadcast, fma, load, prefetch, read, store, write

CHUNK = 32  # steps between saved states
FEW_STATES = 4  # with fewer a chunk is over before memory could be asked for the next one
TIMES = CHUNK * LANES  # elements of one vector for each time of a chunk
LN_2 = math.log(2)

# What stands where in the block of a call: sizes, switches, and addresses (0 for what a call has not).
# fmt: off
(
    PARTS, TEAMS, BATCH, HEIGHT, WIDTH, CHANNELS, STATES, RANK, WALKS, GROUPS, SOFTPLUS, SAVE,
    U, MAPS, DELTA, DT_WEIGHT, DT_BIAS, A, D, INITIAL, Y, LAST, SAVED,
    GRAD_Y, GRAD_LAST, DU, DMAPS, DDELTA, DDT_WEIGHT, DDT_BIAS, DA, DD, DINITIAL,
    FIELDS,
) = range(OWN_FIELDS, OWN_FIELDS + 34)
# fmt: on


def scratch_elements(tiles: int, states: int, rank: int) -> int:
    """What one thread needs for a team of tiles, in elements of the compute dtype; a position counts as two.

    Positions are those of a chunk and of the next one.
    """
    row = rank + 2 * states
    return 4 * CHUNK + 10 * TIMES + 2 * row * CHUNK + tiles * (3 * states + 2 * rank + 4) * LANES


@compiled
def task_of(call, task):
    """Which image, team of tiles and part of the walks a task is, and the first walk of the part and of the next."""
    parts, teams, walks = size(call, PARTS), size(call, TEAMS), size(call, WALKS)
    part = task % parts
    return task // parts // teams, task // parts % teams, part, walks * part // parts, walks * (part + 1) // parts


@compiled
def tiles_of(call, team):
    """The first tile of a team and of the next one."""
    tiles, teams = size(call, CHANNELS) // LANES, size(call, TEAMS)
    return tiles * team // teams, tiles * (team + 1) // teams


@compiled
def follow(call, k, start, steps, positions):
    """The positions that walk k visits from time ``start`` on: by rows or by columns, from the first or the last."""
    height, width = size(call, HEIGHT), size(call, WIDTH)
    time = start if k < 2 else height * width - 1 - start
    way = 1 if k < 2 else -1
    if k % 2 == 0:
        for t in range(steps):
            write(positions, t, time + way * t)
    else:
        column = time // height
        row = time - column * height
        for t in range(steps):
            write(positions, t, row * width + column)
            row += way
            if row == height:
                row = 0
                column += 1
            elif row < 0:
                row = height - 1
                column -= 1


@compiled
def row_of(call, image, k, tile):
    """Where the row of maps of position 0 begins, its length, and the distance to the next position's row."""
    walks, groups, height, width = size(call, WALKS), size(call, GROUPS), size(call, HEIGHT), size(call, WIDTH)
    length = size(call, RANK) + 2 * size(call, STATES)
    distance = walks * groups * length
    group = tile * LANES * groups // size(call, CHANNELS)
    return image * height * width * distance + (k * groups + group) * length, length, distance


@compiled
def opens_group(call, tile):
    """Whether a tile is the first of a group of channels."""
    return tile * LANES % (size(call, CHANNELS) // size(call, GROUPS)) == 0


@compiled
def copy_rows(call, image, k, tile, steps, positions, work, rows):
    """Bring the chunk's rows of maps together."""
    maps = array(call, MAPS)
    first, length, distance = row_of(call, image, k, tile)
    for t in range(steps):
        source, into = first + read(positions, t) * distance, rows + t * length
        if length < LANES:
            for i in range(length):
                write(work, into + i, read(maps, source + i))
        else:
            for i in range(0, length - LANES, LANES):
                store(work, into + i, load(maps, source + i))
            store(work, into + length - LANES, load(maps, source + length - LANES))


@compiled
def expect_rows(call, image, k, tile, position):
    """Ask for a row of maps that the next chunk will read."""
    maps = array(call, MAPS)
    first, length, distance = row_of(call, image, k, tile)
    row = first + position * distance
    for i in range(0, length, LANES):
        prefetch(maps, row + i)
    prefetch(maps, row + length - 1)


@compiled
def steps_before_softplus(call, image, k, tile, steps, positions, work, rows, into):
    """``dt_weight @ low + dt_bias``, or ``delta + dt_bias``, at all times of a chunk."""
    channels, rank, walks = size(call, CHANNELS), size(call, RANK), size(call, WALKS)
    row_length, channel = rank + 2 * size(call, STATES), tile * LANES
    weights, weight, delta = array(call, DT_WEIGHT), k * rank * channels + channel, array(call, DELTA)
    pixel = (image * size(call, HEIGHT) * size(call, WIDTH) * walks + k) * channels + channel
    bias = load(array(call, DT_BIAS), k * channels + channel)
    for t in range(steps):
        z = bias
        for r in range(rank):
            z = fma(load(weights, weight + r * channels), broadcast(work, rows + t * row_length + r), z)
        if rank == 0:
            z = z + load(delta, pixel + read(positions, t) * walks * channels)
        store(work, into + t * LANES, z)
