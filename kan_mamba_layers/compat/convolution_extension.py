"""Stand-ins for the compiled extension ``causal_conv1d_cuda`` and for its wrappers in ``causal_conv1d.cpp_functions``.

The extension's arguments behind the bias depend on the version of the package, which their number tells; those of the
wrappers do not. Gradients and results are written into the tensors that the caller passes for them. Autograd does not
see into an extension.
"""

from typing import Any

import torch
from torch import Tensor

from kan_mamba_layers.compat.convolution import Activation, causal_conv1d_fn, causal_conv1d_update
from kan_mamba_layers.compat.targets import put

_FORWARD = {
    1: ("silu",),
    2: ("seq_idx", "silu"),
    4: ("seq_idx", "initial_states", "final_states_out", "silu"),
    5: ("seq_idx", "initial_states", "out", "final_states_out", "silu"),
}
_BACKWARD = {
    2: ("dx", "silu"),
    3: ("seq_idx", "dx", "silu"),
    6: ("seq_idx", "initial_states", "dfinal_states", "dx", "return_dinitial_states", "silu"),
    8: ("seq_idx", "initial_states", "dfinal_states", "dx", "dweight", "dbias", "dinitial_states", "silu"),
}


@torch.no_grad()
def causal_conv1d_fwd(
    x: Tensor,  # b d l
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    *rest: Any,
) -> Tensor:  # b d l
    """Stand in for ``causal_conv1d_cuda.causal_conv1d_fwd``."""
    given = _named("causal_conv1d_fwd", _FORWARD, rest)
    out = _run(x, weight, bias, given, given.get("final_states_out"))[0]
    return put("out", out, given.get("out"), "b, d, l")


def causal_conv1d_bwd(
    x: Tensor,  # b d l
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    dout: Tensor,  # b d l
    *rest: Any,
) -> list[Tensor | None]:
    """Stand in for ``causal_conv1d_cuda.causal_conv1d_bwd``: ``[dx, dweight, dbias]`` and, if known, the states'."""
    given = _named("causal_conv1d_bwd", _BACKWARD, rest)
    inputs = {"x": x, "weight": weight, "bias": bias, "initial_states": given.get("initial_states")}
    dfinal = given.get("dfinal_states")
    with torch.enable_grad():
        leaves = {name: v.detach().requires_grad_() for name, v in inputs.items() if v is not None}
        changed = given | {"initial_states": leaves.get("initial_states")}
        width = weight.shape[1]
        final = None if dfinal is None else x.new_empty(x.shape[0], x.shape[1], width - 1)
        results = _run(leaves["x"], leaves["weight"], leaves.get("bias"), changed, final)
        grads = [dout.to(x.dtype), *([] if dfinal is None else [dfinal.to(x.dtype)])]
        found = dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), grads), strict=True))
    if not given.get("return_dinitial_states", True):
        found.pop("initial_states", None)
    letters = {"x": "b, d, l", "weight": "d, w", "bias": "d"}
    letters |= {"initial_states": "b, d, w-1"} if "initial_states" in given else {}
    return [
        put(f"d{name}", found[name], given.get(f"d{name}"), axes) if name in found else None
        for name, axes in letters.items()
    ]


@torch.no_grad()
def causal_conv1d_update_extension(
    x: Tensor,  # b d | b d l
    conv_state: Tensor,  # b' d s
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    *rest: Any,
) -> Tensor:  # b d | b d l
    """Stand in for ``causal_conv1d_cuda.causal_conv1d_update``; in version 1.5 the result's place comes first."""
    out, (silu, *where) = (rest[0], rest[1:]) if isinstance(rest[0], Tensor) else (None, rest)
    y = causal_conv1d_update(x, conv_state, weight, bias, _activation(silu), *where)
    return put("out", y, out, "b, d[, l]")


def causal_conv1d_fwd_function(
    x: Tensor,  # b d l
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    seq_idx: Tensor | None,  # b l
    initial_states: Tensor | None,  # b d w-1
    final_states_out: Tensor | None,  # b d w-1
    silu_activation: bool,
) -> Tensor:  # b d l
    """Stand in for the function of ``cpp_functions``."""
    return causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)


def causal_conv1d_bwd_function(
    x: Tensor,  # b d l
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    dout: Tensor,  # b d l
    seq_idx: Tensor | None,  # b l
    initial_states: Tensor | None,  # b d w-1
    dfinal_states: Tensor | None,  # b d w-1
    dx: Tensor | None,  # b d l
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:
    """Stand in for the function of ``cpp_functions``: the gradients of ``x``, the weight, the bias and the states."""
    rest = (seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation)
    return tuple(causal_conv1d_bwd(x, weight, bias, dout, *rest))


def causal_conv1d_update_function(
    x: Tensor,  # b d | b d l
    conv_state: Tensor,  # b' d s
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    silu_activation: bool,
    cache_seqlens: Tensor | None,  # b
    conv_state_indices: Tensor | None,  # b
) -> Tensor:  # b d | b d l
    """Stand in for the function of ``cpp_functions``."""
    rest = (silu_activation, cache_seqlens, conv_state_indices)
    return causal_conv1d_update_extension(x, conv_state, weight, bias, *rest)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, given: dict[str, Any], final_states_out: Tensor | None
) -> tuple[Tensor, ...]:
    result = causal_conv1d_fn(
        x,
        weight,
        bias,
        given.get("seq_idx"),
        given.get("initial_states"),
        return_final_states=final_states_out is not None,
        final_states_out=final_states_out,
        activation=_activation(given["silu"]),
    )
    return result if isinstance(result, tuple) else (result,)


def _activation(silu: bool) -> Activation:
    return "silu" if silu else None


def _named(function: str, versions: dict[int, tuple[str, ...]], values: tuple[Any, ...]) -> dict[str, Any]:
    if len(values) not in versions:
        raise TypeError(f"{function} takes {sorted(versions)} arguments behind the first ones, got {len(values)}")
    return dict(zip(versions[len(values)], values, strict=True))
