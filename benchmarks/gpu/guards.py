"""Buffers that tell who wrote where: NaN inside, sentinels on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu.tasks import Wrong

BAND, SENTINEL = 64, 12345.0  # elements on each side, and their value


@contextmanager
def guarded(*launchers: ModuleType) -> Iterator[list[Tensor]]:
    """Give launchers guarded buffers, and look at the sentinels afterwards."""
    buffers: list[Tensor] = []

    def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * BAND,), SENTINEL, dtype=dtype, device=like.device)
        buffers.append(buffer)
        return buffer[BAND : BAND + size].fill_(float("nan")).view(shape)

    before = [(launcher, launcher._empty) for launcher in launchers]
    for launcher in launchers:
        launcher._empty = empty  # type: ignore[attr-defined]
    try:
        yield buffers
    finally:
        for launcher, plain in before:
            launcher._empty = plain  # type: ignore[attr-defined]
    for i, buffer in enumerate(buffers):
        sentinels = torch.cat([buffer[:BAND], buffer[-BAND:]])
        if not torch.equal(sentinels, torch.full_like(sentinels, SENTINEL)):
            raise Wrong(f"a kernel wrote outside buffer {i} of {buffer.numel() - 2 * BAND} values")


def between(x: Tensor, value: float) -> Tensor:
    """The same values with another one before and behind them in memory."""
    buffer = torch.full((x.numel() + 2 * BAND,), value, dtype=x.dtype, device=x.device)
    return buffer[BAND : BAND + x.numel()].view(x.shape).copy_(x)


def between_nan(x: Tensor) -> Tensor:
    """The same values with NaN before and behind them in memory."""
    return between(x, float("nan"))
