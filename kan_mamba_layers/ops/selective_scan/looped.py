"""The scan for exported graphs: three loops that stay loops, so that one small graph serves every length.

Chunks of ``_STEPS`` steps run side by side from a zero state, their ends are carried over the chunks, and all run again
from the right state, as in ``chunked``. No tensor holds the states of all steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 64


def scan(
    u: Tensor,  # b k l d
    delta: Tensor,  # b k l d
    A: Tensor,  # k d n
    B: Tensor,  # b k l n
    C: Tensor,  # b k l n
    state: Tensor | None = None,  # b k d n
) -> tuple[Tensor, Tensor]:  # y: b k l d, last state: b k d n
    """The same mathematics as ``reference.scan`` in PyTorch's operator of a loop, which ONNX calls ``Scan``."""
    (batch, groups, length, channels), states = u.shape, A.shape[2]
    chunks = length // _STEPS + 2  # never 0 or 1, which exporters take for cases of their own

    def by_steps(x: Tensor) -> Tensor:  # b k l c -> t m b k c
        padded = F.pad(x, (0, 0, 0, chunks * _STEPS - length))  # steps of size 0 leave the state as it is
        return padded.unflatten(2, (chunks, _STEPS)).permute(3, 2, 0, 1, 4)

    u, delta, B, C = (by_steps(x) for x in (u, delta, B, C))
    A = A.mT.contiguous()  # k n d
    state = u.new_zeros(batch, groups, states, channels) if state is None else state.mT.contiguous()  # b k n d
    zero = u.new_zeros(chunks, batch, groups, states, channels)  # m b k n d
    loop = torch.ops.higher_order.scan
    (ends,) = loop(_end, (zero,), (u, delta, B), (A,))  # m b k n d
    decays = torch.exp(delta.sum(0)[..., None, :] * A)  # m b k n d: of whole chunks
    last, starts = loop(_carry, (state,), (decays, ends), ())  # b k n d, m b k n d
    _, y = loop(_output, (starts,), (u, delta, B, C), (A,))  # t m b k d
    return y.permute(2, 3, 1, 0, 4).flatten(2, 3).narrow(2, 0, length), last.mT


def _step(state: Tensor, u: Tensor, delta: Tensor, B: Tensor, A: Tensor) -> Tensor:  # m b k n d
    """One step of the recurrence in all chunks; ``u`` and ``delta``: m b k d, ``B``: m b k n."""
    return torch.exp(delta[..., None, :] * A) * state + (delta * u)[..., None, :] * B[..., None]


def _end(state: Tensor, u: Tensor, delta: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor]:
    return (_step(state, u, delta, B, A),)


def _carry(state: Tensor, decay: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """From the state before a chunk to the one behind it; hands out the former, as a copy."""
    decay = torch.where((state == 0) & decay.isinf(), 0, decay)  # 0 times infinity would be NaN
    return decay * state + end, state.clone()


def _output(state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    state = _step(state, u, delta, B, A)
    return state, (state * C[..., None]).sum(-2)
