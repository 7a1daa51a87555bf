"""Directions as sequences and back: by index arithmetic for the four of an image, by tables for others."""

import torch
from torch import Tensor

NUM_DIRECTIONS = 4  # of an image without walks


def flatten_directions(x: Tensor) -> Tensor:  # b h w 4 c -> b 4 l c
    """Order the pixels of channel block k along direction k: rows, columns, reversed rows, reversed columns."""
    rows = x[:, :, :, 0].flatten(1, 2)  # b l c
    columns = x[:, :, :, 1].transpose(1, 2).flatten(1, 2)
    rows_back = x[:, :, :, 2].flatten(1, 2).flip(1)
    columns_back = x[:, :, :, 3].transpose(1, 2).flatten(1, 2).flip(1)
    return torch.stack([rows, columns, rows_back, columns_back], 1)


def sum_directions(y: Tensor, height: int, width: int) -> Tensor:  # b 4 l d -> b h w d
    """Add the four sequences in image order: the adjoint of repeating an image and flattening it along them."""
    rows = y[:, 0] + y[:, 2].flip(1)  # b l d
    columns = y[:, 1] + y[:, 3].flip(1)
    return rows.unflatten(1, (height, width)) + columns.unflatten(1, (width, height)).transpose(1, 2)


def flatten_walks(x: Tensor, orders: Tensor) -> Tensor:  # b l k c, k l -> b k l c
    """Order the positions of channel block k along walk k."""
    # One walk at a time: an index without repetitions, whose gradient adds nothing up, in whatever order. 64 bits, or
    # vmap in PyTorch 2.4 refuses it.
    return torch.stack([x[:, :, k].index_select(1, order) for k, order in enumerate(orders.long().unbind(0))], 1)


def sum_walks(y: Tensor, orders: Tensor) -> Tensor:  # b k l d, k l -> b l d
    """Add the sequences in the order of the grid."""
    times = torch.arange(orders.shape[1], device=orders.device).expand(orders.shape)
    inverse = torch.empty_like(times).scatter(1, orders.long(), times)  # k l
    parts = [y[:, k].index_select(1, order) for k, order in enumerate(inverse.unbind(0))]
    total = parts[0]  # b l d
    for part in parts[1:]:
        total = total + part
    return total
