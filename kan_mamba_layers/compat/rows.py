"""The rows of a cache that belong to a batch: all, or those of given indices, of which negative ones mark padding."""

import torch
from torch import Tensor


def read_rows(cache: Tensor, indices: Tensor | None) -> Tensor:
    """The rows of the batch; of padding any."""
    return cache if indices is None else cache[indices.clamp_min(0)]


@torch.no_grad()
def write_rows(cache: Tensor, indices: Tensor | None, rows: Tensor) -> None:
    """Write the rows of the batch, but not of padding."""
    if indices is None:
        cache.copy_(rows)
    else:
        used = indices >= 0
        cache[indices[used]] = rows[used].to(cache.dtype)


def without_padding(out: Tensor, indices: Tensor | None) -> Tensor:
    """The outputs of the batch, 0 for padding."""
    return out if indices is None else out.masked_fill((indices < 0).view(-1, *[1] * (out.ndim - 1)), 0)
