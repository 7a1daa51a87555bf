"""The scan on CPUs: lays out the arguments for the Numba kernels and calls them on PyTorch's threads.

A few images are scanned at a time. The coefficients of a scan in four directions need several times the memory of the
image, so they are made from it where they are used, in forward and again in backward, and never stay for a batch.

The kernels see channels in whole tiles of 16: a group of channels that does not fill its last tile is padded with
zeros.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.cpu import backward_kernel, block, forward_kernel
from kan_mamba_layers.ops.simd.kernel import Entry, Fields, c_function, run_kernel
from kan_mamba_layers.ops.simd.vector import LANES
from kan_mamba_layers.ops.tiling import ceil_div, padded

_KERNELS = (block, forward_kernel, backward_kernel)

_GROUP_TILES = 8  # tiles that a thread takes along a direction together: they share the coefficients
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_COEFFS_BYTES = 1 << 24  # made at a time: memory that the allocator keeps, and near enough to stay in a cache


def saved_shape(b: int, l: int, d: int, k: int, g: int, n: int) -> tuple[int, ...]:
    """The shape of the states that forward saves for backward."""
    return b, k, ceil_div(l, block.CHUNK), n, g * padded(d // g, LANES)


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # b l d, b k d n, saved states
    """Scan along all directions and add up."""
    u, launch = call.u, _Launch(call)
    b, l, k, n, d = launch.batch, launch.length, launch.directions, launch.states, launch.padded
    weights = launch.weights(call)
    y, last = u.new_empty(b, l, launch.channels), u.new_empty(b, k, n, d)
    saved = u.new_empty(saved_shape(b, l, launch.channels, k, launch.groups, n) if save else (b, 0))
    for images in launch.blocks():
        count = images.stop - images.start
        threads = torch.get_num_threads() / count  # per image
        tile_groups = launch.tile_groups(threads)
        direction_groups = _direction_groups(threads / tile_groups, k)
        total = launch.target(y[images], direction_groups)
        fields = weights | launch.inputs(call, images) | {"y": total, "last": last[images]}
        fields |= {"save": save, "saved": saved[images]}
        if call.initial_state is not None:
            fields["initial_state"] = launch.pad(call.initial_state[images].mT)
        launch.run(forward_kernel.entry, count, tile_groups, direction_groups, fields)
        launch.collect(total, y[images])
    return y, launch.cut(last).mT.contiguous(), saved.flatten()


def backward(
    call: ScanCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of all tensors that are given."""
    u, weight, launch = call.u, call.x_proj_weight, _Launch(call)
    b, l, k, n, r, d = launch.batch, launch.length, launch.directions, launch.states, launch.rank, launch.padded
    grad_y = torch.zeros_like(u) if grads[0] is None else grads[0]
    grad_last = u.new_zeros(b, k, launch.channels, n) if grads[1] is None else grads[1]
    weights = launch.weights(call)
    grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    grad_coeffs = None if call.coeffs is None else torch.empty_like(call.coeffs, memory_format=torch.contiguous_format)
    grad_weight = None if weight is None else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    per_image = {
        "grad_delta": u.new_empty(0) if call.delta is None else u.new_empty(b, l, k, d),
        "grad_dt_proj_weight": u.new_empty(b, k, r, d),
        "grad_dt_proj_bias": u.new_empty(b, k, d),
        "grad_A": u.new_empty(b, k, n, d),
        "grad_D": u.new_empty(b, d),
        "grad_initial": u.new_empty(b, k, n, d),
    }
    states = saved[0].view(saved_shape(b, l, launch.channels, k, launch.groups, n))
    for images in launch.blocks():
        count = images.stop - images.start
        # Directions have coefficients of their own, tiles share them: cut by directions first, then by groups of tiles,
        # whose gradients of the coefficients are added.
        threads = torch.get_num_threads() / count  # per image
        direction_groups = _direction_groups(threads, k)
        tile_groups = launch.tile_groups(threads / direction_groups)
        total = launch.target(grad_u[images], direction_groups)
        parts = launch.parts(tile_groups)
        new = u.new_zeros if parts > 1 and launch.groups > 1 else u.new_empty
        total_coeffs = new(parts, count, l, k * launch.groups, r + 2 * n)
        fields = weights | launch.inputs(call, images) | {name: grad[images] for name, grad in per_image.items()}
        fields |= {"saved": states[images], "grad_u": total, "grad_coeffs": total_coeffs, "parts": parts}
        fields |= {"grad_y": launch.pad(grad_y[images]), "grad_last": launch.pad(grad_last[images].mT)}
        launch.run(backward_kernel.entry, count, tile_groups, direction_groups, fields)
        launch.collect(total, grad_u[images])
        if grad_coeffs is not None:
            grad_coeffs[images] = _add_up(total_coeffs)
        if weight is not None and grad_weight is not None:
            rows = _add_up(total_coeffs).flatten(0, 1).flatten(1)  # b*l k*(r+2n)
            grad_u[images] += _product(rows, weight.flatten(0, 1).T).view(count, l, -1)
            grad_weight += (rows.T @ u[images].flatten(0, 1)).view_as(weight)
    grad_delta, grad_dt_proj_weight, grad_dt_proj_bias, grad_A, grad_D, grad_initial = per_image.values()
    return (
        grad_u,
        grad_coeffs,
        grad_weight,
        None if call.delta is None else launch.cut(grad_delta),
        launch.cut(grad_dt_proj_weight.sum(0)).mT.contiguous(),
        launch.cut(grad_dt_proj_bias.sum(0)),
        launch.cut(grad_A.sum(0)).mT.contiguous(),
        launch.cut(grad_D.sum(0)),
        launch.cut(grad_initial).mT.contiguous(),
        None,
        None,
    )


class _Launch:
    """The sizes of one call, and the layout of its tensors for the kernels."""

    def __init__(self, call: ScanCall) -> None:
        self.dtype = call.u.dtype
        self.batch, self.length, self.channels = call.u.shape
        self.directions, _, self.states = call.A.shape
        self.rank = call.dt_proj_weight.shape[2]
        self.groups = call.groups
        self.padded = self.groups * padded(self.channels // self.groups, LANES)
        self.tiles = self.padded // LANES
        row = self.directions * self.groups * (self.rank + 2 * self.states)
        self.row_bytes = self.length * row * call.u.element_size()

    def blocks(self) -> Iterator[slice]:
        """Blocks of images: one per thread, or more where they are small."""
        count = max(torch.get_num_threads(), _COEFFS_BYTES // max(1, self.row_bytes))
        return (slice(i, min(i + count, self.batch)) for i in range(0, self.batch, count))

    def tile_groups(self, wanted: float) -> int:
        """Number of groups of tiles: ``wanted`` to give all threads work, and no group too large."""
        return max(1, min(self.tiles, math.ceil(max(wanted, self.tiles / _GROUP_TILES))))

    def parts(self, tile_groups: int) -> int:
        """Most groups of tiles in one group of channels; those take turns at the parts of its gradients."""
        tiles, fewest = self.tiles // self.groups, self.tiles // tile_groups
        return 1 if tiles == 1 else min(tile_groups, (tiles - 2) // fewest + 2)

    def weights(self, call: ScanCall) -> Fields:
        """Fields that all images share."""
        pad = self.pad
        fields: Fields = {"dt_proj_weight": pad(call.dt_proj_weight.mT), "dt_proj_bias": pad(call.dt_proj_bias)}
        fields |= {"A": pad(call.log2_decay.mT), "D": pad(call.D)}
        if call.orders is not None:  # integers of the size of an element, for ``read_integer``
            fields["orders"] = call.orders.to(_INTEGERS[self.dtype]).contiguous()
        return fields | {"height": call.height, "width": call.width, "softplus": call.softplus}

    def inputs(self, call: ScanCall, images: slice) -> Fields:
        """Inputs of a block of images."""
        u, coeffs = call.u[images], call.coeffs
        if coeffs is not None:
            coeffs = coeffs[images].contiguous()
        elif call.x_proj_weight is not None:
            coeffs = _product(u.flatten(0, 1), call.x_proj_weight.flatten(0, 1))  # b*l k*(r+2n)
        inputs: Fields = {"u": self.pad(u), "coeffs": coeffs}
        if call.mask is not None:
            inputs["mask"] = call.mask[images].contiguous()
        return inputs if call.delta is None else inputs | {"delta": self.pad(call.delta[images])}

    def target(self, result: Tensor, parts: int) -> Tensor:  # b l d -> parts b l d'
        """Where a kernel writes what ``collect`` brings to the result: the result itself if possible."""
        if parts == 1 and self.padded == self.channels:
            return result[None]
        return result.new_empty(parts, *result.shape[:2], self.padded)

    def collect(self, parts: Tensor, result: Tensor) -> None:  # parts b l d' -> b l d
        """Add up the parts of the directions."""
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

    def run(self, entry: Entry, batch: int, tile_groups: int, direction_groups: int, fields: Fields) -> None:
        """Let a kernel do the tasks of a block of images."""
        fields |= {"direction_groups": direction_groups, "tile_groups": tile_groups, "batch": batch}
        fields |= {"channels": self.padded, "states": self.states, "rank": self.rank}
        fields |= {"directions": self.directions, "groups": self.groups}
        scratch = block.scratch_elements(ceil_div(self.tiles, tile_groups), self.states, self.rank)
        kernel = c_function(entry, block.LAYOUT, self.dtype, _KERNELS)
        run_kernel(kernel, block.LAYOUT, fields, batch * tile_groups * direction_groups, scratch, self.dtype)


def _direction_groups(wanted: float, directions: int) -> int:
    """Number of parts into which the directions are cut: ``wanted``, or as many as there are."""
    wanted = min(wanted, directions)
    return next((parts for parts in (1, 2, 4) if wanted <= parts <= directions), directions)


def _add_up(parts: Tensor) -> Tensor:
    """Sum over dimension 0, always in the same order."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, by oneDNN where PyTorch has it: on CPUs that are not Intel's, MKL takes twice its time."""
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T
