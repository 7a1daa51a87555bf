"""The KAN linear map on CPUs: lays out the arguments for the Numba kernels and calls them on PyTorch's threads.

The kernels see features and outputs in whole vectors of 16, padded with zeros, and the weights of a block of outputs
at a time: a row of a few vectors for every slot of every feature.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.kan_linear.call import KANCall, Wanted
from kan_mamba_layers.ops.kan_linear.cpu import backward_kernel, block, forward_kernel, weight_kernel
from kan_mamba_layers.ops.operator import contiguous
from kan_mamba_layers.ops.simd.kernel import Entry, Fields, c_function, run_kernel
from kan_mamba_layers.ops.simd.vector import LANES, vector_registers
from kan_mamba_layers.ops.tiling import ceil_div, padded

_KERNELS = (block, forward_kernel, backward_kernel, weight_kernel)
_MODES = {"zero": block.ZERO, "clamp": block.CLAMP, "linear": block.LINEAR}
_ROW_BLOCK = 128  # rows per task


def forward(call: KANCall, save: bool) -> tuple[Tensor]:  # rows o
    """The sum over all edges."""
    call = KANCall(*contiguous(call))
    launch = _Launch(call)
    bounds = launch.bounds(3)
    y = call.x.new_empty(launch.rows, launch.padded_outputs, dtype=launch.dtype)
    start = call.grid.new_zeros(launch.outputs) if call.bias is None else call.bias
    fields: Fields = {"weight": launch.pack(call, bounds)}
    fields |= {"bias": launch.pad(start, launch.padded_outputs), "y": y}
    launch.run(forward_kernel.entry, launch.row_blocks, bounds, fields, launch.degree)
    return (y[:, : launch.outputs].to(call.base_weight.dtype).contiguous(),)


def backward(
    call: KANCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted."""
    call, (grad_y,), want = KANCall(*contiguous(call)), contiguous(grads), Wanted.of(wanted)
    launch = _Launch(call)
    grad = launch.pad(grad_y, launch.padded_outputs)
    grad_x = grad_activated = grad_base = grad_spline = None
    if want.inputs:
        bounds = launch.bounds(5)
        padded = call.x.new_empty(launch.rows, launch.padded_features, dtype=launch.dtype)
        fields: Fields = {"weight": launch.pack(call, bounds), "grad_y": grad, "grad_x": padded}
        launch.run(backward_kernel.input_entry, launch.row_blocks, bounds, fields, launch.degree)
        grad_x = padded[:, : launch.features].to(call.x.dtype).contiguous()
        if call.activated is not None:
            grad_activated = (grad_y @ call.base_weight).to(call.x.dtype)
    if want.weights:
        bounds = launch.bounds(launch.degree + 3)
        output_groups, row_splits = launch.shares(len(bounds) - 1)
        grad_weight = grad.new_empty(row_splits, launch.packed_size)
        fields = {"output_groups": output_groups, "row_splits": row_splits, "grad_y": grad, "grad_weight": grad_weight}
        tasks = launch.padded_features // LANES * output_groups * row_splits
        launch.run(backward_kernel.weight_entry, tasks, bounds, fields, launch.degree)
        total = grad_weight[0]
        for rest in grad_weight[1:]:
            total += rest
        grad_base, grad_spline = (g.to(call.base_weight.dtype) for g in launch.unpack(total, bounds))
    return grad_x, grad_activated, grad_base, grad_spline, None, None


class _Launch:
    """The sizes of one call, and the layout of its tensors for the kernels."""

    def __init__(self, call: KANCall) -> None:
        self.dtype = call.grid.dtype
        self.rows, self.features = call.x.shape
        self.outputs, _, self.bases = call.spline_weight.shape
        self.degree = call.spline_order
        self.intervals = self.bases - self.degree
        self.padded_features, self.padded_outputs = (padded(n, LANES) for n in (self.features, self.outputs))
        slots = 1 + self.bases + 2 * self.degree
        self.packed_size = slots * self.padded_features * self.padded_outputs
        self.row_block = _ROW_BLOCK
        self.row_blocks = ceil_div(self.rows, self.row_block)
        pad = self.padded_features
        self.inputs: Fields = {
            "x": self.pad(call.x, pad),
            "activated": None if call.activated is None else self.pad(call.activated, pad),
            "knots": self.uniform_knots(call.grid) if call.uniform else self.nonuniform_knots(call.grid),
            "extrapolation": _MODES[call.extrapolation],
            "uniform": call.uniform,
        }

    def pad(self, x: Tensor, length: int) -> Tensor:
        """Fill the last dimension with zeros, in the compute dtype."""
        x = x.to(self.dtype)
        return x.contiguous() if x.shape[-1] == length else F.pad(x, (0, length - x.shape[-1]))

    def uniform_knots(self, grid: Tensor) -> Tensor:  # i m -> i' 5
        """The first knot, the reciprocal of the spacing, both ends of the interval, the first knot for slopes.

        Slopes of degree 1 jump at the knots, and a knot belongs to the cell on its right, however it was rounded.
        """
        first, last = grid[:, 0], grid[:, -1]
        per_spacing = (grid.shape[1] - 1) / (last - first)
        before = first if self.degree > 1 else first - 4 * torch.finfo(grid.dtype).eps * (first.abs() + last.abs())
        knots = torch.stack([first, per_spacing, grid[:, self.degree], grid[:, -self.degree - 1], before], 1)
        return F.pad(knots, (0, 0, 0, self.padded_features - self.features)).contiguous()

    def nonuniform_knots(self, grid: Tensor) -> Tensor:  # i m -> i' m+2s
        """All knots, and ``s`` more on either side, of which only the order counts."""
        beyond = torch.arange(1, self.degree + 1, dtype=grid.dtype, device=grid.device)
        knots = torch.cat([grid[:, :1] - beyond.flip(0), grid, grid[:, -1:] + beyond], 1)
        return F.pad(knots, (0, 0, 0, self.padded_features - self.features)).contiguous()

    def bounds(self, vectors: int) -> Tensor:
        """The first vector of each block of outputs, and the end; a block has 4, 2 or 1 vectors.

        It has as many as fit where the registers hold ``vectors`` for each of them.
        """
        registers = vector_registers(8 * self.dtype.itemsize)
        widest = 4 if registers > 4 * vectors else 2 if registers > 2 * vectors else 1
        bounds, end = [0], self.padded_outputs // LANES
        while bounds[-1] < end:
            bounds.append(bounds[-1] + next(n for n in (4, 2, 1) if n <= min(widest, end - bounds[-1])))
        return torch.tensor(bounds, device="cpu")

    def pack(self, call: KANCall, bounds: Tensor) -> Tensor:
        """The weights in the order of the kernels; zero where there is no feature, basis or output."""
        packed = torch.empty(self.packed_size, dtype=self.dtype, device="cpu")
        base_weight, spline_weight = call.base_weight.to(self.dtype), call.spline_weight.to(self.dtype)
        features, outputs = self.padded_features - self.features, self.padded_outputs - self.outputs
        if features or outputs:
            base_weight = F.pad(base_weight, (0, features, 0, outputs))
            spline_weight = F.pad(spline_weight, (0, 0, 0, features, 0, outputs))
        fields: Fields = {"weight": packed, "base": base_weight, "splines": spline_weight}
        self.run(weight_kernel.pack_entry, self.padded_outputs // LANES, bounds, fields)
        return packed

    def unpack(self, packed: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:  # o i, o i g+s
        """Undo `pack`."""
        base_weight = packed.new_empty(self.padded_outputs, self.padded_features)
        spline_weight = packed.new_empty(*base_weight.shape, self.bases)
        fields: Fields = {"weight": packed, "base": base_weight, "splines": spline_weight}
        self.run(weight_kernel.unpack_entry, self.padded_outputs // LANES, bounds, fields)
        edges = slice(self.outputs), slice(self.features)
        return base_weight[edges].contiguous(), spline_weight[edges].contiguous()

    def shares(self, output_blocks: int) -> tuple[int, int]:
        """Number of groups of outputs and of splits of the rows, to give every thread work."""
        wanted = ceil_div(torch.get_num_threads() * LANES, self.padded_features)
        groups = min(output_blocks, wanted)
        return groups, max(1, min(ceil_div(wanted, groups), self.row_blocks))

    def run(self, entry: Entry, tasks: int, bounds: Tensor, fields: Fields, *constants: int) -> None:
        """Let a kernel do its tasks."""
        fields |= {"bounds": bounds, "output_blocks": len(bounds) - 1}
        fields |= self.inputs | {"rows": self.rows, "features": self.padded_features, "outputs": self.padded_outputs}
        fields |= {"intervals": self.intervals, "degree": self.degree, "row_block": self.row_block}
        kernel = c_function(entry, block.LAYOUT, self.dtype, _KERNELS, *constants)
        scratch = block.scratch_elements(self.row_block, self.degree, self.intervals)
        run_kernel(kernel, block.LAYOUT, fields, tasks, scratch, self.dtype)
