"""The CPU kernels for machines that are not here: they become vector instructions, without a call of a library."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("numba")

import llvmlite.binding as llvm
from numba import cfunc, types

from kan_mamba_layers.ops.selective_scan.cpu import backward_kernel, forward_kernel

# A triple, a processor's features, a fused multiply-add or what stands for it there, and registers for 16 floats.
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
    """The kernel in LLVM's language, without what ties it to this machine."""
    entry = {"forward": forward_kernel.entry, "backward": backward_kernel.entry}[request.param]
    compiled = cfunc(types.void(types.CPointer(types.float32)), error_model="numpy")(entry(1))
    lines = compiled._library.get_llvm_str().splitlines()
    text = "\n".join(line for line in lines if not line.startswith(("target datalayout", "target triple")))
    return re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)


@pytest.mark.parametrize("name", TARGETS)
def test_kernel_lowers_to_vector_instructions(code: str, name: str) -> None:
    triple, features, instruction, registers = TARGETS[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, features=features)
    except RuntimeError:
        pytest.skip(f"this llvmlite has no code generator for {triple}")
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = triple, str(machine.target_data)
    assembly = machine.emit_assembly(module)
    # How many there are depends on how far Numba has unrolled for this machine; a few are joined or left out.
    vectors = len(re.findall(r"call .*@llvm\.fmuladd\.v16f32", code))
    assert vectors > 25
    assert len(re.findall(instruction, assembly)) >= 0.9 * registers * vectors
    assert not re.search(r"\b(bl|callq?)\s+_?(exp2?f?|fmaf?|logf?|log1pf?|expm1f?|powf?)\b", assembly)
