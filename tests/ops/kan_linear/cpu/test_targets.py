"""The CPU kernels compiled for other machines: they become vector instructions, without library calls."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("numba")

from kan_mamba_layers.ops.kan_linear.cpu import backward_kernel, block, forward_kernel
from ops.simd.targets import assembly, portable

# Triple, processor features, and the instruction for a fused multiply-add or its substitute.
TARGETS = {
    "aarch64": ("aarch64-unknown-linux-gnu", "", r"\bfmla\b"),
    "macos-arm64": ("arm64-apple-macosx11.0", "", r"\bfmla"),
    "sse2": ("x86_64-unknown-linux-gnu", "", r"\bmulps\b"),
    "windows": ("x86_64-pc-windows-msvc", "+avx2,+fma", r"vfmadd\w+\s.*%ymm"),
}
ENTRIES = {
    "forward": forward_kernel.entry,
    "input": backward_kernel.input_entry,
    "weight": backward_kernel.weight_entry,
}


@pytest.fixture(scope="module", params=ENTRIES)
def code(request: pytest.FixtureRequest) -> str:
    return portable(ENTRIES[request.param](1, 1), block.LAYOUT)


@pytest.mark.parametrize("name", TARGETS)
def test_kernel_lowers_to_vector_instructions(code: str, name: str) -> None:
    """It calls only itself and what every system has; floor too, if the machine has no instruction for it."""
    triple, features, instruction = TARGETS[name]
    text = assembly(code, triple, features, codemodel="small")
    assert len(re.findall(instruction, text)) > 50
    called = set(re.findall(r"^\s+(?:bl|callq?|jmp|b)\s+\"?([A-Za-z_][\w.$@]*)", text, re.MULTILINE))
    defined = set(re.findall(r"^\"?([\w.$]+)\"?:", text, re.MULTILINE))
    outside = {function.lstrip("_") for function in {name.split("@")[0] for name in called} - defined}
    outside = {function for function in outside if not re.match("NRT_|Py|numba_", function)}  # Numba's own runtime
    assert outside <= {"memset", "memcpy", "bzero", "chkstk"} | ({"floorf"} if name == "sse2" else set())
