"""The tables of walks as the ops use them, also where there is a compiler.

A compiler knows neither a table that is kept from call to call nor, with sizes that vary, its key. There an operator
makes the table. It returns a copy, since compilers may write into what operators return.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kan_mamba_layers.ops.operator import transformed
from kan_mamba_layers.walks.keys import DIRECTIONS, keys_of
from kan_mamba_layers.walks.walk import Part, Walks, make

_LIBRARY = torch.library.Library("kan_mamba_layers", "FRAGMENT")
_LIBRARY.define(
    "walk_orders(str name, SymInt[] grid, int[] parameters, Device device) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def orders_on(walks: Walks, device: torch.device) -> Tensor:  # k l
    """The table of walks on a device, not to be written to."""
    if torch.onnx.is_in_onnx_export():
        return _for_onnx(walks, device)
    eager = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack() and not transformed()
    if eager:
        return walks.on(device)
    tables = [_copied(walks, part, device) for part in walks.parts]
    return torch.cat(tables) if len(tables) > 1 else tables[0]


def _copied(walks: Walks, part: Part, device: torch.device) -> Tensor:  # k l
    if part.table is None:
        return torch.ops.kan_mamba_layers.walk_orders(part.name, walks.grid, part.parameters, device)
    table = part.table.orders
    if not torch.compiler.is_dynamo_compiling():  # dynamo sees it as an input, others as a constant of the graph
        table = torch.ops.aten.lift_fresh_copy(table)
    return table.to(device)


def _make(name: str, grid: Sequence[int], parameters: Sequence[int], device: torch.device) -> Tensor:
    return make(tuple(grid), (Part(name, tuple(parameters)),)).on(device).clone()


def _shape(name: str, grid: Sequence[int], parameters: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(DIRECTIONS[name], prod(grid), dtype=torch.int32, device=device)


_LIBRARY.impl("walk_orders", _make, "CompositeExplicitAutograd")
torch.library.register_fake("kan_mamba_layers::walk_orders", _shape, lib=_LIBRARY)


def _for_onnx(walks: Walks, device: torch.device) -> Tensor:  # k l
    """A constant, or the sorted keys where sizes vary: ONNX has no operator of ours."""
    return walks.made_on(device) if all(type(size) is int for size in walks.grid) else by_keys(walks, device)


def by_keys(walks: Walks, device: torch.device) -> Tensor:  # k l
    """The same table in PyTorch's operators, for sizes that are not known."""
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in walks.grid), indexing="ij")
    coordinates = [axis.flatten() for axis in axes]  # l, l
    directions: list[Tensor] = []
    for part in walks.parts:
        if part.table is not None:
            directions += part.table.orders.to(device).unbind(0)
            continue
        forwards = [key.argsort() for key in keys_of(part.name, walks.grid, part.parameters, coordinates)]
        directions += [*forwards, *(order.flip(0) for order in forwards)]
    return torch.stack(directions)
