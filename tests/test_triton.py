"""Runs the tests that need Triton's interpreter in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def release(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("name", "least"), [("test_interpreter", 40), ("test_kan_interpreter", 80)])
def test_kernels_in_the_interpreter(name: str, least: int) -> None:
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 turns arrays into numbers as NumPy 2.4 no longer allows")
    file = TESTS / "triton_kernels" / f"{name}.py"
    paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, env=environment, timeout=1800)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed.group(1)) >= least, summary
    assert not re.search(r"skipped|failed|xfailed|error", summary), summary
