"""The stand-in for ``layer.weight``, for code that was written for ``nn.Linear`` or ``nn.Conv2d``."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Metadata that may be read; everything else raises.
_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_nested", "is_quantized"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "__len__"),
    *("is_floating_point", "is_complex"),
)
_READ = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


class EdgeWeight(Tensor):
    """The shape, dtype and device of ``base_weight``, for code that asks a layer for those of its weight.

    It refuses everything else: a matrix of weights does not tell what a KAN layer does. PyTorch's fused transformer
    layers see from its ``__torch_function__`` that they have to call the layer.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _READ:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", repr(func))
        if name in ("__get__", "__set__"):
            name = getattr(func.__self__, "__name__", name)  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} was used on the weight of a KAN layer, which has a function on every edge instead of a weight "
            "matrix; call the layer, or use its base_weight and spline_weight (nn.MultiheadAttention multiplies by "
            "out_proj.weight and cannot have a KAN layer there)"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"EdgeWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __format__(self, format_spec: str) -> str:
        return format(repr(self), format_spec)


def edge_weight(base_weight: Tensor) -> EdgeWeight:
    """Stand for a weight like ``base_weight``, which may be sharded; it has no memory of its own."""
    # A real tensor under torch.export as well, whose fake ones cannot be of another class. Dynamo cannot leave a mode.
    with nullcontext() if torch.compiler.is_dynamo_compiling() else _disable_current_modes():
        one = torch.empty((), dtype=base_weight.dtype, device=base_weight.device)
        return one.expand(base_weight.shape).as_subclass(EdgeWeight)
