"""The scan on CPUs: lays out the arguments for the Numba kernels and calls them on PyTorch's threads.

The engine works on a few images at a time. The maps of a four-direction scan need several times the memory of the
image, so they are made from it where they are used, in forward and again in backward, and never stay for a batch.

The kernels see channels in whole tiles of 16: a group of channels that does not fill its last tile is padded with
zeros.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.selective_scan.cpu import backward_kernel, block, forward_kernel
from kan_mamba_layers.ops.simd.kernel import Entry, c_function, run_kernel
from kan_mamba_layers.ops.simd.vector import LANES

_Fields = dict[str, Tensor | int | None]
_KERNELS = (block, forward_kernel, backward_kernel)

_LOG2_E = 1 / math.log(2)
_TEAM_TILES = 8  # that a thread takes through a walk together: they share the maps
_MAPS_BYTES = 1 << 24  # that are made at a time: memory that the allocator keeps, and near enough to stay in a cache


def saved_shape(b: int, l: int, d: int, k: int, g: int, n: int) -> tuple[int, ...]:
    """The shape of the states that forward saves for backward."""
    return b, k, -(-l // block.CHUNK), n, g * _padded(d // g)


def forward(
    u: Tensor,  # b l d
    maps: Tensor | None,  # b l k*g r+2n
    x_proj_weight: Tensor | None,  # k r+2n d; makes the maps where they are not given
    delta: Tensor | None,  # b l k d
    dt_weight: Tensor,  # k d r
    dt_bias: Tensor,  # k d
    A: Tensor,  # k d n
    D: Tensor,  # d
    initial: Tensor | None,  # b k d n
    height: int,
    width: int,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # y: b l d, last state: b k d n, saved states
    """Scan along all walks and add up."""
    sizes = _Sizes(u, maps, dt_weight, A)
    b, l, k, n, d = sizes.batch, sizes.length, sizes.walks, sizes.states, sizes.padded
    weights = sizes.weights(dt_weight, dt_bias, A, D)
    y, last = u.new_empty(b, l, sizes.channels), u.new_empty(b, k, n, d)
    saved = u.new_empty(saved_shape(b, l, sizes.channels, k, sizes.groups, n) if save else (b, 0))
    for images in sizes.blocks():
        count = images.stop - images.start
        wanted = torch.get_num_threads() / count
        teams = sizes.teams(wanted)
        parts = _parts(wanted / teams, k)
        total = sizes.target(y[images], parts)
        fields = weights | sizes.inputs(images, u, maps, x_proj_weight, delta)
        fields |= {} if initial is None else {"INITIAL": sizes.pad(initial[images].mT)}
        fields |= {"HEIGHT": height, "WIDTH": width, "SOFTPLUS": softplus, "SAVE": save}
        fields |= {"Y": total, "LAST": last[images], "SAVED": saved[images]}
        _run(forward_kernel.entry, sizes, count, teams, parts, fields)
        sizes.collect(total, y[images])
    return y, sizes.cut(last).mT.contiguous(), saved


def backward(
    grad_y: Tensor,  # b l d
    grad_last: Tensor,  # b k d n
    u: Tensor,
    maps: Tensor | None,
    x_proj_weight: Tensor | None,
    delta: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    saved: Tensor,
    height: int,
    width: int,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """The gradients of all tensors of forward, in its order; empty for those that were not given."""
    sizes = _Sizes(u, maps, dt_weight, A)
    b, l, k, n, r, d = sizes.batch, sizes.length, sizes.walks, sizes.states, sizes.rank, sizes.padded
    weights = sizes.weights(dt_weight, dt_bias, A, D)
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    dmaps = torch.empty_like(_or_empty(maps, u), memory_format=torch.contiguous_format)
    dx_proj_weight = torch.zeros_like(_or_empty(x_proj_weight, u), memory_format=torch.contiguous_format)
    ddelta = u.new_empty(0) if delta is None else u.new_empty(b, l, k, d)
    ddt_weight, ddt_bias, dD = u.new_empty(b, k, r, d), u.new_empty(b, k, d), u.new_empty(b, d)
    dA, dinitial = (u.new_empty(b, k, n, d) for _ in range(2))
    saved = saved.view(saved_shape(b, l, sizes.channels, k, sizes.groups, n))
    for images in sizes.blocks():
        count = images.stop - images.start
        # Walks have maps of their own, tiles share them: cut by walks first, then by teams, whose maps are added.
        wanted = torch.get_num_threads() / count
        parts = _parts(wanted, k)
        teams = sizes.teams(wanted / parts)
        total = sizes.target(du[images], parts)
        new = u.new_zeros if teams > 1 and sizes.groups > 1 else u.new_empty
        total_maps = new(teams, count, l, k * sizes.groups, r + 2 * n)
        fields = weights | sizes.inputs(images, u, maps, x_proj_weight, delta)
        fields |= {"HEIGHT": height, "WIDTH": width, "SOFTPLUS": softplus, "SAVED": saved[images]}
        fields |= {"GRAD_Y": sizes.pad(grad_y[images]), "GRAD_LAST": sizes.pad(grad_last[images].mT)}
        fields |= {"DU": total, "DMAPS": total_maps, "DDELTA": ddelta[images], "DINITIAL": dinitial[images]}
        fields |= {"DDT_WEIGHT": ddt_weight[images], "DDT_BIAS": ddt_bias[images], "DA": dA[images], "DD": dD[images]}
        _run(backward_kernel.entry, sizes, count, teams, parts, fields)
        sizes.collect(total, du[images])
        if x_proj_weight is None:
            dmaps[images] = _add_up(total_maps)
        else:
            rows, columns = _add_up(total_maps).flatten(0, 1).flatten(1), u[images].flatten(0, 1)  # b*l k*(r+2n), b*l d
            du[images] += _product(rows, x_proj_weight.flatten(0, 1).T).view(count, l, -1)
            dx_proj_weight += (rows.T @ columns).view_as(x_proj_weight)
    return (
        *(du, dmaps, dx_proj_weight, ddelta if delta is None else sizes.cut(ddelta)),
        *(sizes.cut(ddt_weight.sum(0)).mT.contiguous(), sizes.cut(ddt_bias.sum(0))),
        *(sizes.cut(dA.sum(0)).mT.contiguous(), sizes.cut(dD.sum(0)), sizes.cut(dinitial).mT.contiguous()),
    )


class _Sizes:
    """The sizes of one call, and the layout of its tensors for the kernels."""

    def __init__(self, u: Tensor, maps: Tensor | None, dt_weight: Tensor, A: Tensor) -> None:
        self.dtype = u.dtype
        self.batch, self.length, self.channels = u.shape
        self.walks, _, self.states = A.shape
        self.rank = dt_weight.shape[2]
        self.groups = 1 if maps is None else maps.shape[2] // self.walks
        self.padded = self.groups * _padded(self.channels // self.groups)
        self.tiles = self.padded // LANES
        self.row_bytes = self.length * self.walks * self.groups * (self.rank + 2 * self.states) * u.element_size()

    def blocks(self) -> Iterator[slice]:
        """Some images after the others: one for each thread, and more where they are small."""
        count = max(torch.get_num_threads(), _MAPS_BYTES // max(1, self.row_bytes))
        return (slice(i, min(i + count, self.batch)) for i in range(0, self.batch, count))

    def teams(self, wanted: float) -> int:
        """Into how many teams the tiles are cut, to have so many and none too large."""
        return max(1, min(self.tiles, math.ceil(max(wanted, self.tiles / _TEAM_TILES))))

    def weights(self, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> _Fields:
        """What all images share."""
        pad = self.pad
        return {"DT_WEIGHT": pad(dt_weight.mT), "DT_BIAS": pad(dt_bias), "A": pad((A * _LOG2_E).mT), "D": pad(D)}

    def inputs(
        self, images: slice, u: Tensor, maps: Tensor | None, x_proj_weight: Tensor | None, delta: Tensor | None
    ) -> _Fields:
        """What a block of images is scanned with."""
        u = u[images]
        if maps is not None:
            maps = maps[images].contiguous()
        elif x_proj_weight is not None:
            maps = _product(u.flatten(0, 1), x_proj_weight.flatten(0, 1))  # b*l k*(r+2n)
        inputs: _Fields = {"U": self.pad(u), "MAPS": maps}
        return inputs if delta is None else inputs | {"DELTA": self.pad(delta[images])}

    def target(self, result: Tensor, parts: int) -> Tensor:  # b l d -> parts b l d'
        """Where a kernel leaves what ``collect`` brings to the result: the result itself if it can be."""
        if parts == 1 and self.padded == self.channels:
            return result[None]
        return result.new_empty(parts, *result.shape[:2], self.padded)

    def collect(self, parts: Tensor, result: Tensor) -> None:  # parts b l d' -> b l d
        """Add up the parts of the walks."""
        if parts.data_ptr() != result.data_ptr():
            result.copy_(self.cut(_add_up(parts)))

    def pad(self, x: Tensor) -> Tensor:  # ... d -> ... d'
        """Fill every group of channels up to whole tiles."""
        if self.padded == self.channels:
            return x.contiguous()
        x = x.unflatten(-1, (self.groups, -1))
        return F.pad(x, (0, self.padded // self.groups - x.shape[-1])).flatten(-2).contiguous()

    def cut(self, x: Tensor) -> Tensor:  # ... d' -> ... d
        """Undo `pad`."""
        if self.padded == self.channels:
            return x
        return x.unflatten(-1, (self.groups, -1))[..., : self.channels // self.groups].flatten(-2).contiguous()


def _run(entry: Entry, sizes: _Sizes, batch: int, teams: int, parts: int, fields: _Fields) -> None:
    """Let a kernel do the tasks of a block of images."""
    fields |= {"TEAMS": teams, "PARTS": parts, "BATCH": batch, "CHANNELS": sizes.padded}
    fields |= {"STATES": sizes.states, "RANK": sizes.rank, "WALKS": sizes.walks, "GROUPS": sizes.groups}
    scratch = block.scratch_elements(-(-sizes.tiles // teams), sizes.states, sizes.rank)
    kernel = c_function(entry, sizes.dtype, _KERNELS)
    run_kernel(kernel, block, fields, batch * teams * parts, scratch, sizes.dtype)


def _padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _parts(wanted: float, walks: int) -> int:
    """Into how many parts the walks are cut to get so many times more tasks."""
    return next((parts for parts in (1, 2, 4) if parts >= min(wanted, walks)), walks)


def _add_up(parts: Tensor) -> Tensor:
    """Their sum, always in the same order."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, by oneDNN where PyTorch has it: on CPUs that are not Intel's, MKL takes twice its time."""
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T
