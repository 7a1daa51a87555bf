"""What the tests of kernels compiled for other GPUs share: a cache of their own, and what a binary needs of a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's cache in a folder of the module that imports this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def resources(binary: Any, folder: Path) -> list[int]:
    """[registers per thread, spilled registers or bytes of stack per thread, bytes of shared memory per program]."""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        registers, spilled = (re.search(rf"\.vgpr_{key}count:\s*(\d+)", text).group(1) for key in ("", "spill_"))
    else:
        file = folder / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return [int(registers), int(spilled), binary.metadata.shared]


def check_recorded(record: Path, name: str, target: str, now: list[int]) -> None:
    """No more than on record; another compiler allocates otherwise."""
    recorded = json.loads(record.read_text())
    if recorded["triton"] == triton.__version__:
        then = recorded["resources"][name][target]
        assert all(x <= y for x, y in zip(now, then, strict=True)), f"{now}, recorded {then}"


def write_record(record: Path, table: Callable[[Path], dict[str, dict[str, list[int]]]]) -> None:
    """Write what ``table`` finds with a folder for its files, a line per kernel."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows = table(Path(folder))
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    record.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "resources": {{\n{lines}\n  }}\n}}\n')
