"""The KAN linear map a few rows at a time, in PyTorch's operators, so that the bases stay in the cache.

The left operand of the product, ``1 + g + s`` columns per feature, exists for one tile of rows only. Its slots (slot 0
for the activation, slot 1 + j for basis j) come first and its features last, so every operation runs along memory.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kan_mamba_layers.ops.bspline import breakpoints, end_slopes, reciprocal
from kan_mamba_layers.ops.kan_linear.call import KANCall, Wanted
from kan_mamba_layers.ops.operator import contiguous

_TILE_ELEMENTS = {"cpu": 1 << 17, "other": 1 << 25}  # of the operand: a core's cache, and enough to fill a GPU


def forward(call: KANCall, save: bool) -> tuple[Tensor]:  # rows o
    """The product of each tile's features with the weights."""
    call = KANCall(*contiguous(call))
    weight = _pack(call.base_weight, call.spline_weight)  # slots*i o
    y = weight.new_empty(len(call.x), weight.shape[1])
    for rows, features, _ in _tiles(call, weight, slopes=False):
        if call.bias is None:
            torch.mm(features, weight, out=y[rows])
        else:
            torch.addmm(call.bias, features, weight, out=y[rows])
    return (y,)


def backward(
    call: KANCall, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted."""
    call, (grad_y,), want = KANCall(*contiguous(call)), contiguous(grads), Wanted.of(wanted)
    x, weight = call.x, _pack(call.base_weight, call.spline_weight)  # slots*i o
    exact = call.grid.dtype
    grad_x = x.new_empty(x.shape if want.inputs else 0)
    grad_activated = x.new_empty(x.shape if want.inputs and call.activated is not None else 0)
    grad_weight = torch.zeros(weight.shape[::-1] if want.weights else 0, dtype=exact, device=x.device)  # o slots*i
    for rows, features, slopes in _tiles(call, weight, slopes=want.inputs):
        if want.weights:
            if exact == weight.dtype:
                grad_weight.addmm_(grad_y[rows].T, features)
            else:
                grad_weight += grad_y[rows].T @ features
        if want.inputs:
            grad_features = (grad_y[rows] @ weight.T).view(slopes.shape)  # rows slots i
            if call.activated is not None:
                grad_activated[rows] = grad_features[:, 0]
            grad_x[rows] = slopes.mul_(grad_features).sum(1)
    grad_base = grad_spline = None
    if want.weights:
        grad_weight = grad_weight.to(weight.dtype).view(len(call.base_weight), -1, x.shape[1])  # o slots i
        grad_base, grad_spline = grad_weight[:, 0].contiguous(), grad_weight[:, 1:].mT.contiguous()
    return grad_x, grad_activated, grad_base, grad_spline, None, None


def _pack(base_weight: Tensor, spline_weight: Tensor) -> Tensor:  # slots*i o
    """Base and splines as the right operand of one product."""
    return torch.cat([base_weight.T[None], spline_weight.permute(2, 1, 0)]).flatten(0, 1)


def _tiles(call: KANCall, weight: Tensor, slopes: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tile by tile: its rows, its features (rows slots*i), and their derivatives by x (rows slots i), if wanted.

    Both live in the same memory for all tiles.
    """
    x, activated, (rows, i) = call.x, call.activated, call.x.shape
    slots = weight.shape[0] // i
    splines = _Splines(call)
    tile = max(16, _TILE_ELEMENTS["cpu" if x.device.type == "cpu" else "other"] // len(weight))
    if x.device.type == "cpu":
        tile *= torch.get_num_threads()
    features = x.new_empty(min(tile, rows), slots, i, dtype=splines.dtype)
    derivatives = torch.empty_like(features) if slopes else x.new_empty(0, slots, i)
    for first in range(0, rows, tile):
        count = min(tile, rows - first)
        some = slice(first, first + count)
        wide = x[some].to(splines.dtype)
        into, slope = features[:count], derivatives[:count]
        splines.write(wide, into[:, 1:], slope[:, 1:])
        gate = torch.sigmoid(wide)
        if activated is None:
            torch.mul(wide, gate, out=into[:, 0])
        else:
            into[:, 0] = activated[some]
        if slopes:
            slope[:, 0] = gate * (1 + wide * (1 - gate)) if activated is None else 0
        yield some, into.flatten(1).to(weight.dtype), slope


class _Splines:
    """Bases of a degree on a grid, written into a tile of the operand."""

    def __init__(self, call: KANCall) -> None:
        self.dtype = call.grid.dtype
        self.knots = call.grid.T.contiguous()  # m i
        self.degree = call.spline_order
        self.low, self.high = self.knots[self.degree], self.knots[-self.degree - 1]
        self.extrapolation = call.extrapolation
        if call.extrapolation == "linear":
            self.ends = end_slopes(call.grid, self.degree).mT.contiguous()  # 2 g+s i
        if call.uniform and self.degree > 1:  # the recursion gives degree 1 the right slopes at knots, in one step
            self.evaluate = self._closed_form
            self.per_unit = (len(self.knots) - 1) / (self.knots[-1] - self.knots[0])  # i
            bases = torch.arange(len(self.knots) - 1 - self.degree, dtype=self.dtype, device=self.knots.device)
            self.centres = (bases + (self.degree + 1) / 2)[:, None]  # g+s 1
        else:
            self.evaluate = self._cox_de_boor
            margin = 0 if call.extrapolation == "zero" else self.degree
            self.breakpoints = breakpoints(call.grid, margin).T.contiguous()  # m i
            widths = (self.knots[p:] - self.knots[:-p] for p in range(1, self.degree + 1))
            self.per_width = [reciprocal(width) for width in widths]  # m-p i

    def write(self, x: Tensor, into: Tensor, slopes: Tensor) -> None:  # rows i, rows g+s i, rows g+s i or empty
        """Write bases and, unless it is empty, their derivatives."""
        if self.extrapolation == "zero":
            self.evaluate(x, into, slopes)
            return
        self.evaluate(torch.clamp(x, self.low, self.high), into, slopes)
        outside = (x < self.low)[:, None], (x > self.high)[:, None]  # rows 1 i
        if self.extrapolation == "clamp":
            slopes.masked_fill_((outside[0] | outside[1])[: len(slopes)], 0)
            return
        for end, slope, beyond in zip((self.low, self.high), self.ends, outside, strict=True):
            into.addcmul_((x - end)[:, None] * beyond, slope)
            if len(slopes):
                slopes.copy_(torch.where(beyond, slope, slopes))

    def _closed_form(self, x: Tensor, into: Tensor, slopes: Tensor) -> None:
        """For equally spaced knots a sum of truncated powers about each centre; see ``bspline.closed_form``."""
        s = self.degree
        position = (x - self.knots[0]) * self.per_unit  # rows i
        signed = position[:, None] - self.centres  # rows g+s i
        distance = signed.abs()
        into.zero_()
        slopes.zero_()
        for j in range(math.ceil((s + 1) / 2)):
            weight = (-1) ** j * math.comb(s + 1, j) / math.factorial(s)
            near = ((s + 1) / 2 - j - distance).clamp_min_(0)
            power = near.square() if s == 3 else near ** (s - 1)
            if len(slopes):
                slopes.add_(power, alpha=-s * weight)
            into.add_(power.mul_(near), alpha=weight)
        if len(slopes):
            slopes.mul_(signed.sign_()).mul_(self.per_unit)

    def _cox_de_boor(self, x: Tensor, into: Tensor, slopes: Tensor) -> None:
        """For any knots the recursion, with the reciprocals of all widths made beforehand."""
        x = x[:, None]  # rows 1 i
        bases = ((x >= self.breakpoints[:-1]) & (x < self.breakpoints[1:])).to(x.dtype)  # rows m-1 i
        x = torch.clamp(x, self.knots[0], self.knots[-1])  # an infinity times 0 would be NaN
        for p, per_width in enumerate(self.per_width, 1):
            shares = bases * per_width  # rows m-p i
            bases = (x - self.knots[: -p - 1]) * shares[:, :-1] + (self.knots[p + 1 :] - x) * shares[:, 1:]
        into.copy_(bases)
        if len(slopes):
            torch.sub(shares[:, :-1], shares[:, 1:], out=slopes).mul_(self.degree)
