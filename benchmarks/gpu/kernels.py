"""What the compiler made of the kernels: registers, spills, shared memory, and instructions that matter."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import triton

from benchmarks.gpu import launchers

COUNTED = ("SHFL", "MUFU", "BAR", "LDL", "STL", "HGMMA", "HMMA", "FFMA", "LDG", "STG")


def compiled_kernels() -> list[dict[str, Any]]:
    """One row per variant that this process has launched."""
    return [row for kernel in _kernels() for row in _variants(kernel)]


def _kernels() -> Iterator[Any]:
    names = ("scan_forward", "scan_steps", "scan_backward", "kan_forward", "kan_backward")
    seen = set()
    for module in (getattr(launchers, name) for name in names):
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction) and value.fn not in seen:
                seen.add(value.fn)
                yield value


def _variants(kernel: Any) -> Iterator[dict[str, Any]]:
    for caches in kernel.device_caches.values():
        for binary in caches[0].values():
            binary._init_handles()  # which asks the driver
            text = assembly(binary)
            yield {
                "kernel": kernel.fn.__name__,
                "warps": binary.metadata.num_warps,
                "registers": binary.n_regs,
                "spills": binary.n_spills,
                "shared": binary.metadata.shared,
                "instructions": {name: text.count(f" {name}") for name in COUNTED if f" {name}" in text},
            }


def assembly(binary: Any) -> str:
    """The machine code of a compiled kernel as text; empty where there is no disassembler."""
    try:
        text: str = binary.asm["sass"]
    except (KeyError, OSError, RuntimeError, subprocess.CalledProcessError):
        return ""
    return text
