"""Which implementation of an op runs: a pure function of the call's arguments and of what is installed."""

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kan_mamba_layers._check import check_choice, check_mask, check_tensor
from kan_mamba_layers.ops import limits

Backend = Literal["auto", "reference", "chunked", "cpu", "triton"]

# Every op has all of them; "auto" takes the first one that serves the call.
_BACKENDS = ("triton", "cpu", "chunked", "reference")
# For export to ONNX and for calls with a size of zero.
_PURE_PYTORCH = {"selective_scan": "chunked", "cross_selective_scan": "chunked", "kan_linear": "reference"}
# Tensors of each op besides its first argument.
_TENSORS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
    "cross_selective_scan": ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D", "mask"),
    "kan_linear": ("base_weight", "spline_weight", "spline_scaler", "grid", "bias"),
}
# Those whose shapes hold the number of channels, states, features and outputs, and the rank.
_WEIGHTS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("A",),
    "cross_selective_scan": ("dt_proj_weight", "A_log"),
    "kan_linear": ("spline_weight",),
}
# Why a backend cannot run a call, judged by its arguments except for dtype and device.
_LIMITS: dict[str, Callable[..., str]] = {
    "selective_scan": limits.against_selective_scan,
    "cross_selective_scan": limits.against_cross_selective_scan,
    "kan_linear": limits.against_kan_linear,
}
_HAS = {package: importlib.util.find_spec(package) is not None for package in ("numba", "triton")}


def resolve(op: str, backend: Backend, x: Tensor, **arguments: Tensor | None) -> str:
    """Return the name of the backend that ``op`` runs for a call.

    ``"auto"`` takes the first of these that can run the call:

    1. ``"triton"`` for tensors on a GPU, where Triton is installed;
    2. ``"cpu"`` for tensors on a CPU, where Numba is installed;
    3. ``"chunked"``, which runs every call but the gradient of ``kan_linear`` with respect to ``grid``;
    4. ``"reference"``, which runs every call.

    ``"triton"`` cannot run float64, more than 1024 states, spline orders above 5, images of 2**31 addresses or more, or
    more than 1,048,560 features or outputs of ``kan_linear``.

    ``"auto"`` takes ``"chunked"`` if ``B`` or ``C`` is constant in time. Where ``"chunked"`` would be compiled,
    ``kan_linear`` gives the compiler its ``"reference"``. It takes ``"reference"``, which alone has forward-mode
    derivatives, inside ``torch.func.jvp``, ``jacfwd``, ``hessian`` and ``torch.autograd.forward_ad.dual_level``.

    A backend requested by name runs or raises: nothing falls back silently, and no environment variable chooses one.
    So ``resolve(op, "triton", ...)`` raises an error that tells why ``"auto"`` does not take ``"triton"``. Three kinds
    of calls never run a kernel, whatever backend is requested:

    * Without channels, states, rank, features or outputs, a scan runs ``"chunked"`` and ``kan_linear`` ``"reference"``.
    * ``torch.jit.trace`` records ``"reference"``, which can be saved, and loaded without this package.
    * An ONNX file gets ``"chunked"`` for the scans and ``"reference"`` for ``kan_linear``.

    Args:
        op: ``"selective_scan"``, ``"cross_selective_scan"`` or ``"kan_linear"``.
        backend: the ``backend`` argument of the op.
        x: the op's first argument.
        arguments: the op's other tensors, by the names of the op's arguments. All are optional, but a rule applies only
            if the tensors that it needs are given.

    Returns:
        ``"reference"``, ``"chunked"``, ``"cpu"`` or ``"triton"``.

    Raises:
        TypeError: ``x`` or an argument is not a floating-point tensor, or the op has no such argument.
        ValueError: the op is unknown, it has no such backend, the backend cannot run the call, or a shape does not fit.

    Example:
        >>> import torch
        >>> u, A, B, C = torch.zeros(1, 8, 5), torch.zeros(8, 4), torch.zeros(1, 4, 5), torch.zeros(8, 4)
        >>> resolve("selective_scan", "auto", u, A=A, B=B, C=C)
        'chunked'
        >>> resolve("selective_scan", "reference", u)
        'reference'
    """
    check_backend(op, backend)
    check_tensor("x", x)
    _check_arguments(op, x, arguments)
    return select(op, backend, x, **arguments)


def select(op: str, backend: Backend, x: Tensor, **arguments: Tensor | None) -> str:
    """What ``resolve`` returns, for an op that has checked the name of the backend and its arguments."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no operator for a fused backend
        chosen = _PURE_PYTORCH[op]
    elif backend == "auto":
        chosen = _choose(op, x, arguments)
    else:
        chosen = backend
        if reason := _reason_against(op, backend, x, arguments):
            raise ValueError(f"backend={backend!r} cannot run this call of {op}: {reason}; use backend='auto'")
    traced = torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()  # type: ignore[attr-defined]
    if traced or chosen == "reference":
        return "reference"
    weights = (arguments.get(name) for name in _WEIGHTS[op])
    return _PURE_PYTORCH[op] if any(x is not None and 0 in x.shape for x in weights) else chosen


def check_backend(op: str, backend: str) -> None:
    """``op`` has a backend of that name; modules ask when they are built."""
    check_choice("op", op, _PURE_PYTORCH)
    available = ("auto", *_BACKENDS)
    if backend not in available:
        raise ValueError(f"backend={backend!r} cannot run {op}; choose one of {', '.join(map(repr, available))}")


def _check_arguments(op: str, x: Tensor, arguments: dict[str, Tensor | None]) -> None:
    for name, value in arguments.items():
        if name not in _TENSORS[op]:
            raise TypeError(f"{op} has no tensor argument {name!r} besides its first; it has {', '.join(_TENSORS[op])}")
        if name == "mask" and value is not None:
            check_mask(name, value, x.shape[:-1], "b, *grid")
        elif value is not None:
            check_tensor(name, value)


def _choose(op: str, x: Tensor, arguments: dict[str, Tensor | None]) -> str:
    """The backend that ``"auto"`` takes."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return "reference"  # the others have no derivatives in forward mode
    fast = (b for b in _BACKENDS if not _is_slow(b, x, arguments))
    fastest = next(b for b in fast if not _reason_against(op, b, x, arguments))
    # A compiler fuses the formula better than tiles of PyTorch's operators do.
    fuses = op == "kan_linear" and fastest == "chunked" and torch.compiler.is_compiling()
    return "reference" if fuses else fastest


def _is_slow(backend: str, x: Tensor, arguments: dict[str, Tensor | None]) -> bool:
    """Whether ``"auto"`` passes over a backend that may be able to run the call."""
    if backend == "triton" and x.device.type != "cuda":  # Triton's interpreter
        return True
    # With B or C constant in time, every channel of a selective scan would be a group of its own.
    coefficients = (arguments.get("B"), arguments.get("C"))
    return backend in ("triton", "cpu") and any(c is not None and c.ndim == 2 for c in coefficients)


def _reason_against(op: str, backend: str, x: Tensor, arguments: dict[str, Tensor | None]) -> str:
    """Why a backend cannot run a call; empty if it can."""
    device = x.device.type
    if backend == "cpu":
        if not _HAS["numba"]:
            return "it needs Numba, which is not installed (pip install numba, or -e '.[cpu]' in a checkout)"
        if device != "cpu":
            return f"x is on {device!r}, and it computes on 'cpu'"
    if backend == "triton":
        if not _HAS["triton"]:
            return "it needs Triton, which is not installed (pip install triton, or -e '.[triton]' in a checkout)"
        if x.dtype == torch.float64:
            return "it computes in float32, and x is float64"
        if device != "cuda" and not (device == "cpu" and _triton_interprets()):
            return f"x is on {device!r}, and it computes on 'cuda' (on 'cpu' only in Triton's interpreter)"
    return _LIMITS[op](backend, x, **arguments)


def _triton_interprets() -> bool:
    """Triton tells by what it makes of a function; before version 3.4 it has no other way of saying so."""
    import triton

    return not isinstance(triton.jit(_triton_interprets), triton.JITFunction)
