"""The KAN linear map on CPUs: lays out the arguments for the Numba kernels and calls them on PyTorch's threads.

The kernels see features and outputs in whole vectors of 16, padded with zeros, and the weights of a part of the outputs
at a time: a row of a few vectors for every slot of every feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers.ops.kan_linear.cpu import backward_kernel, block, forward_kernel, weight_kernel
from kan_mamba_layers.ops.simd.kernel import Entry, c_function, run_kernel
from kan_mamba_layers.ops.simd.vector import LANES
from kan_mamba_layers.ops.simd.wide import vector_registers

_KERNELS = (block, forward_kernel, backward_kernel, weight_kernel)
_MODES = {"zero": block.ZERO, "clamp": block.CLAMP, "linear": block.LINEAR}
_BLOCK = 128  # rows that a kernel takes at a time

_Fields = dict[str, Tensor | int | None]


def forward(
    x: Tensor,  # rows i
    activated: Tensor | None,  # rows i
    base_weight: Tensor,  # o i
    spline_weight: Tensor,  # o i g+s
    grid: Tensor,  # i g+2s+1
    bias: Tensor | None,  # o
    extrapolation: str,
    uniform: bool,
) -> Tensor:  # rows o
    """The sum over all edges."""
    call = _Call(x, activated, spline_weight, grid, extrapolation, uniform)
    bounds = call.bounds(3)
    y = x.new_empty(call.rows, call.padded_outputs, dtype=call.dtype)
    start = grid.new_zeros(call.outputs) if bias is None else bias
    fields: _Fields = {"WEIGHT": call.pack(base_weight, spline_weight, bounds)}
    fields |= {"BIAS": call.pad(start, call.padded_outputs), "Y": y}
    call.run(forward_kernel.entry, call.blocks, bounds, fields, call.degree)
    return y[:, : call.outputs].to(base_weight.dtype).contiguous()


def backward(
    grad_y: Tensor,  # rows o
    x: Tensor,
    activated: Tensor | None,
    base_weight: Tensor,
    spline_weight: Tensor,
    grid: Tensor,
    extrapolation: str,
    uniform: bool,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, activated, base_weight and spline_weight; empty where they are not wanted."""
    call = _Call(x, activated, spline_weight, grid, extrapolation, uniform)
    grad = call.pad(grad_y, call.padded_outputs)
    dx, dactivated, dbase_weight, dspline_weight = (t.new_empty(0) for t in (x, x, base_weight, spline_weight))
    if input_grad:
        bounds = call.bounds(5)
        dx = x.new_empty(call.rows, call.padded_features, dtype=call.dtype)
        fields: _Fields = {"WEIGHT": call.pack(base_weight, spline_weight, bounds), "GRAD_Y": grad}
        call.run(backward_kernel.input_entry, call.blocks, bounds, fields | {"DX": dx}, call.degree)
        dx = dx[:, : call.features].to(x.dtype).contiguous()
        if activated is not None:
            dactivated = (grad_y @ base_weight).to(x.dtype)
    if weight_grad:
        bounds = call.bounds(call.degree + 3)
        teams, splits = call.shares(len(bounds) - 1)
        dweight = grad.new_empty(splits, call.packed_size)
        fields = {"TEAMS": teams, "SPLITS": splits, "GRAD_Y": grad, "DWEIGHT": dweight}
        tasks = call.padded_features // LANES * teams * splits
        call.run(backward_kernel.weight_entry, tasks, bounds, fields, call.degree)
        total = dweight[0]
        for share in dweight[1:]:
            total += share
        dbase_weight, dspline_weight = (d.to(base_weight.dtype) for d in call.unpack(total, bounds))
    return dx, dactivated, dbase_weight, dspline_weight


class _Call:
    """The sizes of one call, and the layout of its tensors for the kernels."""

    def __init__(
        self,
        x: Tensor,
        activated: Tensor | None,
        spline_weight: Tensor,
        grid: Tensor,
        extrapolation: str,
        uniform: bool,
    ) -> None:
        self.dtype = grid.dtype
        self.rows, self.features = x.shape
        self.outputs, _, self.bases = spline_weight.shape
        self.degree = grid.shape[1] - 1 - self.bases
        self.intervals = self.bases - self.degree
        self.padded_features, self.padded_outputs = (-(-n // LANES) * LANES for n in (self.features, self.outputs))
        slots = 1 + self.bases + 2 * self.degree
        self.packed_size = slots * self.padded_features * self.padded_outputs
        self.block = _BLOCK
        self.blocks = -(-self.rows // self.block)
        pad = self.padded_features
        self.inputs: _Fields = {
            "X": self.pad(x, pad),
            "ACTIVATED": None if activated is None else self.pad(activated, pad),
            "KNOTS": self.even_knots(grid) if uniform else self.free_knots(grid),
            "EXTRAPOLATION": _MODES[extrapolation],
            "EVEN": uniform,
        }

    def pad(self, x: Tensor, length: int) -> Tensor:
        """Fill the last dimension with zeros, in the compute dtype."""
        x = x.to(self.dtype)
        return x.contiguous() if x.shape[-1] == length else F.pad(x, (0, length - x.shape[-1]))

    def even_knots(self, grid: Tensor) -> Tensor:  # i m -> i' 4
        """The first knot, the reciprocal of the spacing, and both ends of the interval."""
        per_spacing = (grid.shape[1] - 1) / (grid[:, -1] - grid[:, 0])
        knots = torch.stack([grid[:, 0], per_spacing, grid[:, self.degree], grid[:, -self.degree - 1]], 1)
        return F.pad(knots, (0, 0, 0, self.padded_features - self.features)).contiguous()

    def free_knots(self, grid: Tensor) -> Tensor:  # i m -> i' m+2s
        """All knots, and ``s`` more on either side, of which only the order counts."""
        beyond = torch.arange(1, self.degree + 1, dtype=grid.dtype)
        knots = torch.cat([grid[:, :1] - beyond.flip(0), grid, grid[:, -1:] + beyond], 1)
        return F.pad(knots, (0, 0, 0, self.padded_features - self.features)).contiguous()

    def bounds(self, vectors: int) -> Tensor:
        """The first vector of each part of the outputs, and the end; each part has 4, 2 or 1.

        As many as fit, where the registers hold ``vectors`` for every one of them.
        """
        registers = vector_registers(8 * self.dtype.itemsize)
        widest = 4 if registers > 4 * vectors else 2 if registers > 2 * vectors else 1
        bounds, end = [0], self.padded_outputs // LANES
        while bounds[-1] < end:
            bounds.append(bounds[-1] + next(n for n in (4, 2, 1) if n <= min(widest, end - bounds[-1])))
        return torch.tensor(bounds)

    def pack(self, base_weight: Tensor, spline_weight: Tensor, bounds: Tensor) -> Tensor:
        """The weights in the order of the kernels; zero where there is no feature, basis or output."""
        packed = torch.empty(self.packed_size, dtype=self.dtype)
        base_weight, spline_weight = base_weight.to(self.dtype), spline_weight.to(self.dtype)
        features, outputs = self.padded_features - self.features, self.padded_outputs - self.outputs
        if features or outputs:
            base_weight = F.pad(base_weight, (0, features, 0, outputs))
            spline_weight = F.pad(spline_weight, (0, 0, 0, features, 0, outputs))
        fields: _Fields = {"WEIGHT": packed, "BASE": base_weight, "SPLINES": spline_weight}
        self.run(weight_kernel.pack_entry, self.padded_outputs // LANES, bounds, fields)
        return packed

    def unpack(self, packed: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:  # o i, o i g+s
        """Undo `pack`."""
        base_weight = packed.new_empty(self.padded_outputs, self.padded_features)
        spline_weight = packed.new_empty(*base_weight.shape, self.bases)
        fields: _Fields = {"WEIGHT": packed, "BASE": base_weight, "SPLINES": spline_weight}
        self.run(weight_kernel.unpack_entry, self.padded_outputs // LANES, bounds, fields)
        edges = slice(self.outputs), slice(self.features)
        return base_weight[edges].contiguous(), spline_weight[edges].contiguous()

    def shares(self, parts: int) -> tuple[int, int]:
        """Into how many teams the parts and into how many splits the rows are cut, to give every thread work."""
        wanted = -(-torch.get_num_threads() * LANES // self.padded_features)
        teams = min(parts, wanted)
        return teams, max(1, min(-(-wanted // teams), self.blocks))

    def run(self, entry: Entry, tasks: int, bounds: Tensor, fields: _Fields, *constants: int) -> None:
        """Let a kernel do its tasks."""
        fields |= {"BOUNDS": bounds, "PARTS": len(bounds) - 1}
        fields |= self.inputs | {"ROWS": self.rows, "FEATURES": self.padded_features, "OUTPUTS": self.padded_outputs}
        fields |= {"INTERVALS": self.intervals, "DEGREE": self.degree, "BLOCK": self.block}
        kernel = c_function(entry, self.dtype, _KERNELS, *constants)
        scratch = block.scratch_elements(self.block, self.degree, self.intervals)
        run_kernel(kernel, block, fields, tasks, scratch, self.dtype)
