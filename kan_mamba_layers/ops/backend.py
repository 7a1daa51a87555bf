"""Which implementation of an op runs: a pure function of the call's arguments and of what is installed."""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from kan_mamba_layers._check import check_choice, check_tensor

Backend = Literal["auto", "reference", "chunked", "cpu", "triton"]

# For each op the backends that implement it; "auto" takes the first one that serves the call.
_BACKENDS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("triton", "cpu", "chunked", "reference"),
    "cross_selective_scan": ("triton", "cpu", "chunked", "reference"),
    "kan_linear": ("triton", "cpu", "chunked", "reference"),
}
# The one that consists of PyTorch's own operators and exports well.
_PLAIN = {"selective_scan": "chunked", "cross_selective_scan": "chunked", "kan_linear": "reference"}
_HAS = {package: importlib.util.find_spec(package) is not None for package in ("numba", "triton")}


def resolve(op: str, backend: Backend, x: Tensor) -> str:
    """Return the name of the backend that ``op`` runs for the input ``x``.

    ``"auto"`` takes the fastest backend that serves the call: ``"triton"`` for tensors on a GPU, ``"cpu"`` for those on
    a CPU where Numba is installed, else ``"chunked"``. Where ``"chunked"`` would be compiled, ``kan_linear`` gives the
    compiler its ``"reference"``; for ONNX it is a form that consists of PyTorch's own operators. A backend asked for by
    name either runs or raises: nothing falls back silently, and no environment variable takes part.

    Args:
        op: ``"selective_scan"``, ``"cross_selective_scan"`` or ``"kan_linear"``.
        backend: the ``backend`` argument of the op.
        x: the op's first argument.

    Returns:
        ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: the op is unknown, it has no such backend, or the backend cannot serve the call.

    Example:
        >>> import torch
        >>> resolve("cross_selective_scan", "chunked", torch.zeros(1, 4, 4, 8))
        'chunked'
    """
    check_backend(op, backend)
    check_tensor("x", x)
    if backend == "auto":
        if torch.onnx.is_in_onnx_export():  # ONNX has no operator for a fused engine
            return _PLAIN[op]
        on_gpu = x.device.type == "cuda"
        fastest = next(b for b in _BACKENDS[op] if (on_gpu or b != "triton") and not _reason_against(b, x))
        # A compiler fuses the formula better than tiles of PyTorch's operators do.
        fuses = op == "kan_linear" and fastest == "chunked" and torch.compiler.is_compiling()
        return "reference" if fuses else fastest
    if reason := _reason_against(backend, x):
        raise ValueError(f"backend={backend!r} cannot run this call of {op}: {reason}; use backend='auto'")
    return backend


def check_backend(op: str, backend: str) -> None:
    """``op`` has a backend of that name; modules ask when they are built."""
    check_choice("op", op, _BACKENDS)
    available = ("auto", *_BACKENDS[op])
    if backend not in available:
        raise ValueError(f"backend={backend!r} cannot run {op}; choose one of {', '.join(map(repr, available))}")


def _reason_against(backend: str, x: Tensor) -> str:
    """Why a backend cannot serve a call; empty if it can."""
    device = x.device.type
    if backend == "cpu":
        if not _HAS["numba"]:
            return "it needs Numba, which is not installed (pip install 'kan-mamba-layers[cpu]')"
        if device != "cpu":
            return f"x is on {device!r}, and it computes on 'cpu'"
    if backend == "triton":
        if not _HAS["triton"]:
            return "it needs Triton, which is not installed (pip install 'kan-mamba-layers[triton]')"
        if x.dtype == torch.float64:
            return "it computes in float32, and x is float64"
        if device != "cuda" and not (device == "cpu" and _triton_interprets()):
            return f"x is on {device!r}, and it computes on 'cuda' (on 'cpu' only in Triton's interpreter)"
    return ""


def _triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
