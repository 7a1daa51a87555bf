"""The recurrence, one step at a time: the definition and the oracle of the other backends."""

import torch
from torch import Tensor


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
    outputs = []
    for t in range(length):
        step = delta[:, :, t, :, None]  # b k d 1
        decay = torch.exp(step * A)  # b k d n
        state = decay * state + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        outputs.append((state * C[:, :, t, None]).sum(-1))  # b k d
    y = torch.stack(outputs, 2) if outputs else torch.zeros_like(u)
    return y, state
