"""What a result was measured with: processor, accelerator, versions. No names of hosts or users, and no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import kan_mamba_layers

LIBRARIES = ("torch", "numpy", "numba", "llvmlite", "triton", "mambapy", "mamba_ssm")


def describe() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {"cpu": _processor(), "cores": cores, "gpu": None}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        multiprocessors, memory = gpu.multi_processor_count, gpu.total_memory
        machine["gpu"] = {"name": gpu.name, "multiprocessors": multiprocessors, "memory_bytes": memory}
    return machine


def versions() -> dict[str, str | None]:
    """Of Python, of the libraries that are installed, of this package and its commit."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["cuda"] = torch.version.cuda
    found["kan_mamba_layers"] = kan_mamba_layers.__version__
    found["commit"] = _commit()
    return found


def memory_bytes() -> int | None:
    """Main memory, where the system tells."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, with a plus sign if the package or the benchmarks were changed since."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "kan_mamba_layers", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
