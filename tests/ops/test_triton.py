"""Runs the tests that need Triton's interpreter, each op's in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers import release

OPS = Path(__file__).resolve().parent
ROOT = OPS.parents[1]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("op", "least"), [("selective_scan", 40), ("kan_linear", 80)])
def test_kernels_in_the_interpreter(op: str, least: int) -> None:
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 turns arrays into numbers as NumPy 2.4 no longer allows")
    file = OPS / op / "triton" / "test_interpreter.py"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1800)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed.group(1)) >= least, summary
    assert not re.search(r"skipped|failed|xfailed|error", summary), summary
