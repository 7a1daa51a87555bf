"""Which implementation of an op runs: a pure function of the call's arguments."""

from typing import Literal

from torch import Tensor

from kan_mamba_layers._check import check_choice, check_tensor

Backend = Literal["auto", "reference", "chunked"]

# For each op the backends that implement it; the first one is what "auto" takes.
_BACKENDS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("chunked", "reference"),
    "cross_selective_scan": ("chunked", "reference"),
    "kan_linear": ("reference",),
}


def resolve(op: str, backend: Backend, x: Tensor) -> str:
    """Return the name of the backend that ``op`` runs for the input ``x``.

    ``"auto"`` takes the fastest backend that serves the call. A backend asked for by name either runs or raises:
    nothing falls back silently, and no environment variable takes part.

    Args:
        op: ``"selective_scan"``, ``"cross_selective_scan"`` or ``"kan_linear"``.
        backend: the ``backend`` argument of the op.
        x: the op's first argument.

    Returns:
        ``"reference"`` or ``"chunked"``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: the op is unknown, or it has no such backend.

    Example:
        >>> import torch
        >>> resolve("cross_selective_scan", "auto", torch.zeros(1, 4, 4, 8))
        'chunked'
    """
    check_backend(op, backend)
    check_tensor("x", x)
    return _BACKENDS[op][0] if backend == "auto" else backend


def check_backend(op: str, backend: str) -> None:
    """``op`` has a backend of that name; modules ask when they are built."""
    check_choice("op", op, _BACKENDS)
    available = ("auto", *_BACKENDS[op])
    if backend not in available:
        raise ValueError(f"backend={backend!r} cannot run {op}; choose one of {', '.join(map(repr, available))}")
