"""The dtype that ops compute in, and autocast, also on devices that have none (such as ``meta``)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once: torch.compile before PyTorch 2.12 cannot trace the question.
_DEVICES = tuple(d for d in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(d))


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operations on ``x``'s device keep the dtypes they are given."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()


def check_dtype(name: str, x: Tensor, weight_name: str, weight: object) -> None:
    """``x`` has the dtype of a weight that it is multiplied by, or autocast casts both; a weight may be missing."""
    if not isinstance(weight, Tensor) or x.dtype == weight.dtype:
        return
    is_wide = torch.float64 in (x.dtype, weight.dtype)  # which autocast leaves alone
    if is_wide or not autocast_is_on(x):
        fix = "convert one" + ("" if is_wide else ", or use torch.autocast")
        raise ValueError(f"{name} is {x.dtype} but {weight_name} is {weight.dtype}; {fix}")


def autocast_is_on(x: Tensor) -> bool:
    """Whether operations on ``x``'s device choose their dtypes themselves."""
    return x.device.type in _DEVICES and torch.is_autocast_enabled(x.device.type)
