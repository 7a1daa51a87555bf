"""Stand-ins for the Python functions of ``mamba_ssm`` and of VMamba's ``selective_scan``."""

from typing import Literal

from torch import Tensor

from kan_mamba_layers import selective_scan


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: Literal["auto", "reference"] = "auto",
) -> tuple[Tensor, Tensor]:  # y: b d l, last state: b d n
    """Run :func:`kan_mamba_layers.selective_scan` for any of the stand-ins.

    As in the originals, the result is contiguous, so that callers may ask for a view of it.
    """
    if A.is_complex():
        raise TypeError(f"A must be real, got {A.dtype}: complex scans are not supported; use mamba_ssm itself")
    options = (D, z, delta_bias, delta_softplus)
    result = selective_scan(u, delta, A, B, C, *options, return_last_state=True, backend=backend)
    return result[0].contiguous(), result[1].contiguous()


def selective_scan_fn(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b n l | b g n l
    C: Tensor,  # d n | b n l | b g n l
    D: Tensor | None = None,  # d
    z: Tensor | None = None,  # b d l
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stand in for ``mamba_ssm``'s function; see :func:`kan_mamba_layers.selective_scan`."""
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def selective_scan_ref(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b n l | b g n l
    C: Tensor,  # d n | b n l | b g n l
    D: Tensor | None = None,  # d
    z: Tensor | None = None,  # b d l
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stand in for ``mamba_ssm``'s step-by-step reference, with the backend ``"reference"``."""
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="reference")
    return (y, state) if return_last_state else y


# The package of VMamba's first version has neither a gate nor a last state.


def vmamba_selective_scan_fn(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b n l | b g n l
    C: Tensor,  # b n l | b g n l
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Tensor:
    """Stand in for ``selective_scan.selective_scan_fn``; ``nrows`` tunes the original's kernel and has no effect."""
    return scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


def vmamba_selective_scan_ref(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b n l | b g n l
    C: Tensor,  # b n l | b g n l
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
) -> Tensor:
    """Stand in for ``selective_scan.selective_scan_ref``, with the backend ``"reference"``."""
    return scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, backend="reference")[0]
