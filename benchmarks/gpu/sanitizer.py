"""NVIDIA's memory checkers over one small call of each kernel, and the project's tests that need a GPU."""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, search_path, start
from benchmarks.gpu.calls import CALLS
from benchmarks.gpu.processes import run
from benchmarks.gpu.tasks import Setting, Skip, Task, Wrong, find_program

CHECKERS = ("memcheck", "racecheck")
PROGRAM = "compute-sanitizer"
FOUND = 33  # its exit code where it finds something


def checked(checker: str, call: str, setting: Setting) -> dict[str, Any]:
    """Run a call under a checker; what it prints of a fault is the result."""
    program = find_program(PROGRAM)
    command = [
        program,
        "--tool",
        checker,
        "--report-api-errors",
        "no",  # PyTorch asks for what a driver may not have
        "--error-exitcode",
        str(FOUND),
        "--print-limit",
        "20",
        *start("gpu_day", "--out", str(setting.out), "--device", setting.device, "--call", call),
    ]
    # With a cache of its own PyTorch would hide writes behind the end of a tensor.
    environment = {**os.environ, **search_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = run(command, environment)
    faults, harmless = count_faults(result.stdout), count_shared_writes(result.stdout)
    if faults and faults > harmless:
        raise Wrong(f"{faults} faults: {first_fault(result.stdout)}", output=result.stdout[:8000])
    if result.returncode not in (0, FOUND if harmless else 0) or faults is None:
        raise RuntimeError(f"{checker} did not finish ({result.returncode}): {(result.stdout + result.stderr)[-1500:]}")
    return {"faults": 0, "shared_writes": harmless}


def count_faults(output: str) -> int | None:
    """The number in the checker's last summary; None if it wrote none."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    return int(summaries[-1]) if summaries else None


def count_shared_writes(output: str) -> int:
    """Races of one instruction with itself: lanes that hold the same value write it to the same place.

    Triton does that where it moves a sum, which all lanes of a warp have, to other lanes. That the values are the same
    is known from the results, which repeat bit for bit.
    """
    pairs = re.findall(r"Race reported between Write access at (\S+) .*\n=+\s+and Write access at (\S+)", output)
    return sum(first == second for first, second in pairs)


def first_fault(output: str) -> str:
    """The first lines that say what was wrong, and in which kernel."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    told = [line for line in lines if re.search(r"Invalid|hazard|Race|Uninit|Error:|\bat \b", line)]
    return "; ".join(told[:3]) or "see the output"


def project_tests(setting: Setting) -> dict[str, Any]:
    """`pytest -m gpu`; every test that fails is told by name."""
    file = setting.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n0", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = run([*command, f"--junitxml={file.resolve()}"], environment, cwd=ROOT)
    if not file.is_file():
        raise RuntimeError(f"pytest ended with {result.returncode}: {(result.stdout + result.stderr)[-1500:]}")
    try:
        count, failed = read_tests(file)
    finally:
        file.unlink()
    if failed:
        raise Wrong(f"{len(failed)} of {count['tests']} tests fail: {', '.join(failed)}"[:2000], failed=failed, **count)
    if count["tests"] == count["skipped"]:
        raise Skip(f"{count['skipped']} tests need a GPU")
    return dict(count)


def read_tests(file: Path) -> tuple[dict[str, int], dict[str, str]]:
    """How many tests ran, and those that failed with the end of their message."""
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = {}
    for case in cases:
        for fault in (*case.findall("failure"), *case.findall("error")):
            failed[case.get("name", "?")] = (fault.get("message") or "")[:300]
    return {"tests": len(cases), "skipped": sum(case.find("skipped") is not None for case in cases)}, failed


def tasks(setting: Setting) -> Iterator[Task]:
    """The tests, then the kernels under each checker."""
    yield Task("tests", project_tests, limit=300)
    for checker in CHECKERS:
        for call in CALLS if not setting.rehearsal else ("scan",):
            yield Task(f"{checker}/{call}", partial(checked, checker, call))
