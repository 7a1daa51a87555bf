"""The command that runs published models, on checkouts made for the purpose."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, clients
from benchmarks.checkouts import CLIENTS
from helpers import assert_close, says, scan_oracle, to_array

MODEL = """
import torch
from torch import nn
from mamba_ssm import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn


class VSSM(nn.Module):
    def __init__(self, depths, num_classes):
        super().__init__()
        self.mix, self.A_log, self.drop = Mamba(3), nn.Parameter(torch.rand(3, 2)), nn.Dropout(0.5)

    def forward(self, x):  # b c h w
        u = self.drop(self.mix(x[..., :4].flatten(2).mT)).mT
        B = u[:, :2].contiguous()
        return {"y": selective_scan_fn(u, u, -self.A_log.exp(), B, B, delta_softplus=True), "shape": x.shape}
"""
AUTHORS = """
from kan_mamba_layers.compat.modules import Mamba as Ours


class Mamba(Ours):
    def forward(self, x):
        return SCALE * super().forward(x)
"""


@pytest.mark.parametrize(
    ("scale", "broken"),
    [(1, ""), *(pytest.param(*case, marks=pytest.mark.nightly) for case in [(2, ""), (1, "import no_such_package")])],
)
def test_the_table(scale: int, broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout, theirs = tmp_path / "MedMamba", tmp_path / "mamba/mamba_ssm/modules/mamba_simple.py"
    for file, text in {
        checkout / "MedMamba.py": f"{broken}\n{MODEL}",
        theirs: AUTHORS.replace("SCALE", str(scale)),
        tmp_path / "stubs/einops.py": "",
        tmp_path / "stubs/a_stub.py": "",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with (checkout / "MedMamba.py").open("a") as file:
        file.write("import a_stub\n")
    out = tmp_path / "table.md"
    clients.main([str(tmp_path), "--only", "Med*", "--stubs", str(tmp_path / "stubs"), "--out", str(out)])
    lines = out.read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines() and len({line.count("|") for line in lines}) == 1
    row = next(line for line in lines if line.startswith("| MedMamba | "))
    assert any(line.startswith("| MedVKAN | ") and "| absent |" in line for line in lines)
    if broken:
        assert "no_such_package" in row
        return
    model, *errors, ours, plain = [cell.strip() for cell in row.split("|")[2:-1]]
    assert model.endswith("(a_stub)") and ours.endswith(" s") and plain.endswith(" s")
    assert all((float(found) < 1e-5) is (scale == 1) for found in errors)


def test_expressions_can_be_read() -> None:
    for client in CLIENTS:
        compile(client.make, client.repository, "eval")
        assert client.inputs and client.folders


@pytest.mark.parametrize("form", ["dn", "bnl", "bgnl"])
def test_the_plain_recurrence(form: str) -> None:
    B, C = (torch.randn({"dn": (6, 3), "bnl": (2, 3, 5), "bgnl": (2, 2, 3, 5)}[form]).double() for _ in range(2))
    u, z = torch.randn(2, 6, 5).double(), torch.randn(2, 6, 5).double()
    delta, A, (D, bias) = torch.randn(2, 6, 5).double(), -torch.rand(6, 3).double(), torch.randn(2, 6).double()
    inputs = (u, delta, A, B, C, D, z, bias)
    y, state = baselines.recurrence(*inputs, True)
    true = scan_oracle(*map(to_array, inputs), True)
    assert_close("y", y, true[0], 1e-12)
    assert_close("state", state, true[1], 1e-12)
    assert_close("bare", baselines.recurrence(*inputs[:5])[0], scan_oracle(*map(to_array, inputs[:5]))[0], 1e-12)


def test_the_error() -> None:
    true = {"a": torch.tensor([1.0, -4.0]), "b": torch.zeros(3)}
    assert clients.error(true, true) == 0
    assert clients.error({"a": torch.tensor([1.0, -3.5]), "b": torch.full((3,), 1.0)}, true) == 0.25
    for value, name in product((math.nan, math.inf), "ab"):
        spoiled = {**true, name: torch.full_like(true[name], value)}
        assert clients.error(spoiled, true) == clients.error(true, spoiled) == math.inf
    with pytest.raises(ValueError, match=says("only one", "b")):
        clients.error({"a": true["a"]}, true)
