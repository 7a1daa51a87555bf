"""The README does what it says: its blocks run, its figures are the models' figures, its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kan_mamba_layers import create_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TABLE_ROWS = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]+) \|", README, re.MULTILINE)


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL).group(1)


def test_quickstart_has_exactly_two_commands():
    assert README.count("\n## Quickstart\n") == 1
    fences = re.findall(r"^```(\w*)$", section("Quickstart"), re.MULTILINE)
    assert fences == ["bash", "", "bash", ""]
    setup, tests = re.findall(r"^```bash\n(.*?)^```$", section("Quickstart"), re.MULTILINE | re.DOTALL)
    assert setup.splitlines()[-1] == "python examples/quickstart.py"
    assert tests.splitlines()[-1] == "python -m pytest"
    for block in (setup, tests):
        assert "pip install -c constraints.txt" in block


def test_every_install_command_uses_the_constraints():
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    commands = [line for path in documents for line in path.read_text("utf-8").splitlines() if "pip install" in line]
    assert commands
    assert [line for line in commands if "-c constraints.txt" not in line] == []


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.splitlines()[0])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_python_blocks():
    assert any("SS2D" in block and "KANLayer" in block for block in PYTHON_BLOCKS)


def test_the_table_lists_models():
    assert len(TABLE_ROWS) >= 6


@pytest.mark.parametrize(("name", "parameters", "gflop"), TABLE_ROWS)
def test_parameters_and_operations_are_those_of_the_models(name, parameters, gflop):
    model, counter = create_model(name).eval(), FlopCounterMode(display=False)
    with torch.no_grad(), counter, FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(1, 3, 256, 256))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == parameters
    assert f"{counter.get_total_flops() / 1e9:.2f}" == gflop


def test_relative_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
