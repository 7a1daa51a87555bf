"""Blocks of other repositories run unmodified on the stand-ins, and compute what the textbook scan computes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stand_ins import without_originals
from torch import Tensor

from helpers import assert_close, largest

pytestmark = without_originals

BLOCKS = """
import torch
import torch.nn.functional as F
from torch import nn

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from selective_scan import selective_scan_fn as selective_scan_fn_v1
except ImportError:
    pass

SPLIT = [2, 4, 4]  # rank, states, states


class Mamba(nn.Module):
    def __init__(self, dim=8, inner=16):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj = nn.Linear(inner, sum(SPLIT), bias=False)
        self.dt_proj = nn.Linear(SPLIT[0], inner)
        self.A_log = nn.Parameter(torch.arange(1.0, SPLIT[1] + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, tokens):  # b l dim
        x, z = self.in_proj(tokens).mT.chunk(2, 1)
        x = F.silu(self.conv(x)[..., : tokens.shape[1]])
        low, B, C = self.x_proj(x.mT).split(SPLIT, -1)
        y, last = selective_scan_fn(
            x, (low @ self.dt_proj.weight.T).mT, -self.A_log.exp(), B.mT, C.mT, self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True, return_last_state=True,
        )
        return self.out_proj(y.mT) + last.mean()


class SS2D(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.x_proj = nn.Parameter(torch.randn(4, sum(SPLIT), dim) * dim**-0.5)
        self.dt_proj = nn.Parameter(torch.randn(4, dim, SPLIT[0]))
        self.dt_bias = nn.Parameter(torch.randn(4, dim))
        self.A_logs = nn.Parameter(torch.rand(4 * dim, SPLIT[1]))
        self.Ds = nn.Parameter(torch.ones(4 * dim))

    def forward(self, x):  # b dim h w
        b, d, h, w = x.shape
        sequences = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
        xs = torch.cat([sequences, sequences.flip(-1)], 1)  # b k d l
        low, B, C = (self.x_proj @ xs).split(SPLIT, 2)
        y = selective_scan_fn_v1(
            xs.flatten(1, 2), (self.dt_proj @ low).flatten(1, 2), -self.A_logs.exp(), B, C, self.Ds,
            delta_bias=self.dt_bias.flatten(), delta_softplus=True,
        ).view(b, 4, d, h * w)
        y = y[:, :2] + y[:, 2:].flip(-1)
        return y[:, 0].view(b, d, h, w) + y[:, 1].view(b, d, w, h).mT
"""


def textbook(u, delta, A, B, C, D, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The recurrence as the paper prints it, for B and C of the forms b n l and b g n l."""
    delta = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
    B, C = ((x if x.ndim == 4 else x[:, None]) for x in (B, C))
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))  # b d n l
    state, y = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        y.append((C[..., t] * state).sum(-1) + D * u[:, :, t])
    out = torch.stack(y, 2) if z is None else torch.stack(y, 2) * F.silu(z)
    return (out, state) if return_last_state else out


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("block", "shape"), [("Mamba", (2, 9, 8)), ("SS2D", (2, 6, 4, 5))])
def test_foreign_blocks_run_unedited(
    block: str, shape: tuple, dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_blocks.py").write_text(BLOCKS)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = importlib.import_module("foreign_blocks")
    monkeypatch.delitem(sys.modules, "foreign_blocks")
    model, double = getattr(blocks, block)().to(dtype), getattr(blocks, block)().double()
    double.load_state_dict(model.state_dict())

    def run(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = model(x.requires_grad_())
        return out, list(torch.autograd.grad((out * out.detach().cos()).sum(), [x, *model.parameters()]))

    x = torch.randn(shape, dtype=dtype)
    out, grads = run(model, x)
    monkeypatch.setattr(blocks, "selective_scan_fn", textbook)
    monkeypatch.setattr(blocks, "selective_scan_fn_v1", textbook)
    true, true_grads = run(double, x.detach().double())
    assert_close("out", out, true, tolerance)
    for name, grad, true_grad in zip(["x", *dict(model.named_parameters())], grads, true_grads, strict=True):
        assert largest(true_grad) > 0
        assert_close(f"d{name}", grad, true_grad, tolerance)
