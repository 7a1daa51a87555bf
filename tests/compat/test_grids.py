"""2DMamba's recurrence pixel by pixel, against the stand-in for its extension `v2dmamba_scan`."""

from __future__ import annotations

import importlib

import pytest
import torch
from stand_ins import without_originals
from torch import Tensor

from helpers import assert_close, gradients, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
H, W = 3, 4


def plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    """Along the rows first, then down the columns, with the same decay."""
    step = (delta + bias[:, None]).exp().log1p()  # b d l
    along, down, y = {}, {}, []
    zero = torch.zeros(2, 6, 3).double()
    for i in range(H):
        for j in range(W):
            t = i * W + j
            decay = (step[:, :, t, None] * A).exp()  # b d n
            entry = (step * u)[:, :, t, None] * B[..., t].repeat_interleave(3, 1)
            along[i, j] = decay * along.get((i, j - 1), zero) + entry
            down[i, j] = decay * down.get((i - 1, j), zero) + along[i, j]
            y.append((down[i, j] * C[..., t].repeat_interleave(3, 1)).sum(-1) + D * u[:, :, t])
    gate = z / (1 + (-z).exp())
    return torch.cat([torch.stack(y, -1) * gate, torch.stack(y, -1), down[H - 1, W - 1]], -1)


def make() -> dict[str, Tensor]:
    shapes = {"u": (2, 6, 12), "delta": (2, 6, 12), "A": (6, 3), "B": (2, 2, 3, 12), "C": (2, 2, 3, 12), "D": (6,)}
    x = {name: torch.randn(shape).double() for name, shape in {**shapes, "bias": (6,), "z": (2, 6, 12)}.items()}
    return {**x, "A": -x["A"].exp()}


def test_values_and_gradients() -> None:
    module, x = importlib.import_module("v2dmamba_scan"), make()
    true = plain(**x)
    common = [x[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "bias")]
    out, states, gated = module.fwd(*common, True, H, W)
    assert_close("gated", gated, true[..., :12], 1e-12)
    assert_close("out", out, true[..., 12:24], 1e-12)
    assert_close("last", states[:, :, -1, 1::2], true[..., 24:], 1e-12)
    dout = torch.randint(-8, 9, (2, 6, 12), generator=torch.Generator().manual_seed(0)).double() / 8
    true_grads = gradients(lambda **x: plain(**x)[..., :12], x)[1]
    room = torch.empty(2, 6, 12).double()
    *grads, again = module.bwd(*common, dout, states, out, room, True, True, H, W)
    assert grads[-1] is room
    assert_close("out_z", again, gated, 1e-14)
    for name, grad in zip(("u", "delta", "A", "B", "C", "D", "bias", "z"), grads, strict=True):
        assert_close(f"d{name}", grad, true_grads[name], 1e-11)


def test_absent_arguments_dtypes_and_a_wrong_size() -> None:
    module, x = importlib.import_module("v2dmamba_scan"), make()
    half = [x[name].half() if x[name].ndim > 2 else x[name].float() for name in ("u", "delta", "A", "B", "C")]
    out, states = module.fwd(*half, None, None, None, True, H, W)
    assert (out.dtype, states.dtype) == (torch.float32, torch.float32)
    assert module.fwd(*half, None, None, None, True, H, W, False)[0].dtype == torch.float16
    grads = module.bwd(*half, None, None, None, out, states, None, None, True, False, H, W)
    assert [None if g is None else g.dtype for g in grads] == [*(v.dtype for v in half), None, None]
    with pytest.raises(ValueError, match=says("height 3 times width 5", "12")):
        module.fwd(*half, None, None, None, True, H, 5)
