"""The four directions in which an image is read as a sequence, and their adjoint."""

import torch
from torch import Tensor

NUM_DIRECTIONS = 4


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
