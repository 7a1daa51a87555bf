"""The linter, the formatter, the type checker and the documentation build have nothing to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(arguments, tmp_path):
    check("ruff", *arguments, "--cache-dir", str(tmp_path))


def test_types(tmp_path):
    check("mypy", "--cache-dir", str(tmp_path))


def test_documentation_builds_without_warnings(tmp_path):
    check("sphinx", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees"), "docs", str(tmp_path / "html"))
