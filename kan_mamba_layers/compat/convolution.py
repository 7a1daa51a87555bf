"""Stand-ins for the functions of ``causal_conv1d``, in plain PyTorch.

As in the original kernels, sums run in float32 (in float64 if ``x`` is float64), also for half precision and under
autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_shape
from kan_mamba_layers.compat.caches import read_rows, without_padding, write_rows
from kan_mamba_layers.compat.targets import put
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype

Activation = str | None


def causal_conv1d_fn(
    x: Tensor,  # b d l
    weight: Tensor,  # d w
    bias: Tensor | None = None,  # d
    seq_idx: Tensor | Activation = None,  # b l
    initial_states: Tensor | None = None,  # b d w-1
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,  # b d w-1
    activation: Activation = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own causal filter; position ``t`` sees ``t - w + 1`` to ``t``.

    ``seq_idx`` numbers the sequences packed into a row: nothing passes from one to the next, and a position with a
    negative number gives 0. Up to version 1.0 of the package its place was ``activation``'s, so a string there is one.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    _check(x, weight, activation)
    width = weight.shape[1]
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise ValueError("seq_idx cannot be combined with initial_states or return_final_states; pass one or the other")
    if initial_states is None:
        padded = F.pad(x, (width - 1, 0))
    else:
        check_shape("initial_states", initial_states, (x.shape[0], x.shape[1], width - 1), "b, d, w-1")
        padded = torch.cat([initial_states.to(x.dtype), x], -1)
    out = _filter(padded, weight, bias, activation, seq_idx)
    if not return_final_states:
        return out
    final = padded[..., padded.shape[-1] - (width - 1) :]
    return out, put("final_states_out", final, final_states_out, "b, d, w-1")


def causal_conv1d_update(
    x: Tensor,  # b d | b d l
    conv_state: Tensor,  # b' d s, s >= w-1
    weight: Tensor,  # d w
    bias: Tensor | None = None,  # d
    activation: Activation = None,
    cache_seqlens: Tensor | None = None,  # b
    conv_state_indices: Tensor | None = None,  # b
) -> Tensor:  # b d | b d l
    """Convolve the next positions of a sequence, after those in ``conv_state``, which is updated in place.

    With ``cache_seqlens``, the number of positions before, ``conv_state`` is a ring: position ``t`` lies at
    ``t % s``. Otherwise the last position lies last. ``conv_state_indices`` picks the rows of ``conv_state``; a
    negative one marks padding, whose output is 0.
    """
    single = x.ndim == 2
    inputs = x[..., None] if single else x  # b d l
    _check(inputs, weight, activation)
    (batch, channels, length), width, slots = inputs.shape, weight.shape[1], conv_state.shape[-1]
    if slots < width - 1:
        raise ValueError(f"conv_state must hold at least w - 1 = {width - 1} positions, got {slots}; allocate more")
    state = read_rows(conv_state, conv_state_indices)  # b d s
    check_shape("conv_state", state, (batch, channels, slots), "b, d, s")
    if cache_seqlens is None:
        line = torch.cat([state, inputs.to(state.dtype)], -1)
        before, new = state[..., slots - (width - 1) :], line[..., length:]
    else:
        times = torch.arange(1 - width, length, device=x.device) + cache_seqlens[:, None]  # b w-1+l
        slot = (times % slots)[:, None].expand(-1, channels, -1)  # b d w-1+l
        before = state.gather(2, slot[..., : width - 1])
        kept = min(length, slots)  # the rest would be overwritten at once
        new = state.scatter(2, slot[..., slot.shape[-1] - kept :], inputs[..., length - kept :].to(state.dtype))
    out = _filter(torch.cat([before.to(inputs.dtype), inputs], -1), weight, bias, activation, None)
    write_rows(conv_state, conv_state_indices, new)
    out = without_padding(out, conv_state_indices)
    return out[..., 0] if single else out


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:  # l d, b+1 -> b d s
    """The last ``state_len`` positions of each sequence in ``x``, behind zeros if it is shorter.

    Sequence ``i`` lies at ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. As in the original, there is no gradient.
    """
    states = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], state_len)
    bounds = cu_seqlens.tolist()
    for state, start, stop in zip(states, bounds, bounds[1:], strict=False):
        kept = x[max(start, stop - state_len) : stop]  # s d
        state[:, state_len - len(kept) :] = kept.T
    return states


def _check(x: Tensor, weight: Tensor, activation: Activation) -> None:
    check_shape("x", x, ("any", "any", "any"), "b, d, l")
    if x.shape[2] < 1:
        raise ValueError(f"x must have at least one position, got shape {tuple(x.shape)}; pass l >= 1")
    check_shape("weight", weight, (x.shape[1], "any"), "d, w")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")


def _filter(
    padded: Tensor,  # b d w-1+l
    weight: Tensor,  # d w
    bias: Tensor | None,  # d
    activation: Activation,
    seq_idx: Tensor | None,  # b l
) -> Tensor:  # b d l
    dtype, width = compute_dtype(padded), weight.shape[1]
    wide, weight, bias = padded.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with autocast_off(padded):
        if seq_idx is None:
            out = F.conv1d(wide, weight[:, None], bias, groups=weight.shape[0])
        else:
            length = seq_idx.shape[1]
            sources = F.pad(seq_idx, (width - 1, 0), value=-1)  # b w-1+l
            taps = [
                weight[:, j, None] * wide[..., j : j + length] * (sources[:, j : j + length] == seq_idx)[:, None]
                for j in range(width)
            ]
            out = sum(taps[1:], taps[0]) if bias is None else sum(taps, bias[:, None])
            out = out.masked_fill((seq_idx < 0)[:, None], 0)
        out = out if activation is None else F.silu(out)
    return out.to(padded.dtype)
