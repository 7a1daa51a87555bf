"""The recurrence, one step at a time: the definition and the oracle of the other backends."""

import torch
from torch import Tensor


@torch.jit.script_if_tracing  # so that a trace has the loop, and not its steps at one length
def scan(
    u: Tensor,  # b k l d
    delta: Tensor,  # b k l d
    A: Tensor,  # k d n
    B: Tensor,  # b k l n
    C: Tensor,  # b k l n
    state: Tensor | None = None,  # b k d n
) -> tuple[Tensor, Tensor]:  # y: b k l d, last state: b k d n
    """``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` and ``y_t = <C_t, h_t>`` for ``k`` independent sequences."""
    batch, groups, length, channels = u.shape
    if state is None:
        state = u.new_zeros(batch, groups, channels, A.shape[-1])
    # One view for each step: the gradient of slices would take a time that is quadratic in the length.
    us, deltas, Bs, Cs = u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2)  # b k d, b k d, b k n, b k n
    outputs = []
    for t in range(length):
        decay = torch.exp(deltas[t][..., None] * A)  # b k d n
        state = decay * state + (deltas[t] * us[t])[..., None] * Bs[t][:, :, None]
        outputs.append((state * Cs[t][:, :, None]).sum(-1))  # b k d
    y = torch.stack(outputs, 2) if outputs else torch.zeros_like(u)
    return y, state
