"""Compiles kernels for other processors than this one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("numba")
import llvmlite.binding as llvm
from numba import cfunc, types

from kan_mamba_layers.ops.simd.kernel import Call, Layout


def portable(entry: Callable[..., None], layout: Layout) -> str:
    """A kernel in float32 as LLVM's text, without what ties it to this machine."""
    compiled: Any = cfunc(types.void(Call(layout, types.float32)), error_model="numpy")(entry)
    lines = compiled._library.get_llvm_str().splitlines()
    text = "\n".join(line for line in lines if not line.startswith(("target datalayout", "target triple")))
    return re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)


def assembly(code: str, triple: str, features: str, **options: str) -> str:
    """Portable code in the assembly language of a processor; skips the test where llvmlite cannot generate it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, features=features, **options)
    except RuntimeError:
        pytest.skip(f"this llvmlite has no code generator for {triple}")
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return machine.emit_assembly(module)
