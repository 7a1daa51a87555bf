"""Autocast, also for devices that have none (such as ``meta``)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operations on ``x``'s device keep the dtypes they are given."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else nullcontext()


def autocast_is_on(x: Tensor) -> bool:
    """Whether operations on ``x``'s device choose their dtypes themselves."""
    available = torch.amp.is_autocast_available(x.device.type)
    return available and torch.is_autocast_enabled(x.device.type)
