"""The command line: programs run with the stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import python, without_originals

pytestmark = without_originals

PROGRAM = """
import sys
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from neighbour import VALUE
print(__name__, VALUE, sys.argv[1:], sys.modules["__main__"].__file__ == __file__)
u = torch.ones(1, 2, 3)
print(selective_scan_fn(u, u, -torch.ones(2, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3)).shape)
if "fail" in sys.argv:
    raise ValueError("planted")
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.py").write_text(PROGRAM)
    (folder / "neighbour.py").write_text("VALUE = 7")
    return folder / "train.py"


class TestCommandLine:
    RUNNER = ("-m", "kan_mamba_layers.compat")

    def test_script(self, program: Path, tmp_path: Path) -> None:
        plain = python(program, cwd=tmp_path)
        assert plain.returncode == 1 and "No module named 'mamba_ssm'" in plain.stderr
        result = python(*self.RUNNER, "repository/train.py", "-m", "--lr", "1", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (3, "")
        assert result.stdout.splitlines() == ["__main__ 7 ['-m', '--lr', '1'] True", "torch.Size([1, 2, 3])"]

    @pytest.mark.parametrize("before", [(), ("--",)])
    def test_dashes_are_passed_on(self, before: tuple, tmp_path: Path) -> None:
        (tmp_path / "show.py").write_text("import sys; print(sys.argv[1:])")
        result = python(*self.RUNNER, *before, "show.py", "--", "a", "--force", "--", cwd=tmp_path)
        assert (result.stdout, result.stderr) == ("['--', 'a', '--force', '--']\n", "")

    def test_module(self, program: Path) -> None:
        result = python(*self.RUNNER, "-m", "train", "--lr", "1", cwd=program.parent)
        assert (result.returncode, result.stderr) == (3, "")
        assert result.stdout.splitlines() == ["__main__ 7 ['--lr', '1'] True", "torch.Size([1, 2, 3])"]

    def test_traceback(self, program: Path, tmp_path: Path) -> None:
        result = python(*self.RUNNER, program, "fail", cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.endswith("ValueError: planted\n") and f'"{program}", line' in result.stderr

    def test_missing_script(self, tmp_path: Path) -> None:
        result = python(*self.RUNNER, "absent.py", cwd=tmp_path)
        assert result.returncode == 2
        assert "absent.py" in result.stderr and "Traceback" not in result.stderr

    def test_refuses_to_shadow(self, program: Path, tmp_path: Path) -> None:
        (program.parent / "mamba_ssm").mkdir()
        (program.parent / "mamba_ssm" / "__init__.py").write_text("")
        result = python(*self.RUNNER, program, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert "ImportError" in result.stderr and "will not stand in for 'mamba_ssm'" in result.stderr
