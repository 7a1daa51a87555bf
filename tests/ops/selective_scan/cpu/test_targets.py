"""The CPU kernels compiled for other machines: they become vector instructions, without library calls."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("numba")

from kan_mamba_layers.ops.selective_scan.cpu import backward_kernel, block, forward_kernel
from ops.simd.targets import assembly, portable

# Triple, processor features, the instruction for a fused multiply-add or its substitute, and registers per 16 floats.
TARGETS = {
    "aarch64": ("aarch64-unknown-linux-gnu", "", r"\bfmla\b", 4),
    "macos-arm64": ("arm64-apple-macosx11.0", "", r"\bfmla", 4),
    "avx512": ("x86_64-unknown-linux-gnu", "+avx512f,+avx512dq,+avx512vl,+fma", r"vfmadd\w+\s.*%zmm", 1),
    "avx2": ("x86_64-unknown-linux-gnu", "+avx2,+fma", r"vfmadd\w+\s.*%ymm", 2),
    "sse2": ("x86_64-unknown-linux-gnu", "", r"\bmulps\b", 4),
    "windows": ("x86_64-pc-windows-msvc", "+avx2,+fma", r"vfmadd\w+\s.*%ymm", 2),
}


@pytest.fixture(scope="module", params=["forward", "backward"])
def code(request: pytest.FixtureRequest) -> str:
    entries = {"forward": forward_kernel.entry, "backward": backward_kernel.entry}
    return portable(entries[request.param](1), block.LAYOUT)


@pytest.mark.parametrize("name", TARGETS)
def test_kernel_lowers_to_vector_instructions(code: str, name: str) -> None:
    triple, features, instruction, registers = TARGETS[name]
    text = assembly(code, triple, features)
    # Their number depends on how far Numba unrolled on this machine; a few are merged or dropped.
    vectors = len(re.findall(r"call .*@llvm\.fmuladd\.v16f32", code))
    assert vectors > 25
    assert len(re.findall(instruction, text)) >= 0.9 * registers * vectors
    assert not re.search(r"\b(bl|callq?)\s+_?(exp2?f?|fmaf?|logf?|log1pf?|expm1f?|powf?)\b", text)
