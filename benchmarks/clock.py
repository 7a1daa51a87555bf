"""How long calls take on a device: by CUDA events on a GPU, by the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A moment, as `torch.cuda.Event` has it."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds."""


class HostEvent:
    """The stand-in for a CUDA event where calls are finished when they return."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.seconds - self.seconds)


def event(device: str) -> Event:
    """A new event of the device."""
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else HostEvent()  # type: ignore[return-value]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(call: Callable[[], object], repeats: int, device: str) -> float:
    """The mean over calls in a row."""
    start, end = event(device), event(device)
    synchronize(device)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3 / repeats
