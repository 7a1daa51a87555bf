"""The Triton kernels compiled for GPUs that are not here: registers, spills, shared memory, instructions.

`python tests/triton_kernels/test_ahead_of_time.py` writes `resources.json` anew after a change of the kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, and a process without TRITON_INTERPRET", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kan_mamba_layers.ops.selective_scan import _triton, _triton_backward, _triton_forward

RECORDED = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# name: (d, n, r, k, dtype of u, y and their gradients); r = 0 is one walk with given steps
MODELS = {
    "n16 r1": (32, 16, 1, 4, "fp32"),
    "n16 r2": (64, 16, 2, 4, "fp32"),
    "n16 r8": (256, 16, 8, 4, "fp32"),
    "n16 r8 bf16": (256, 16, 8, 4, "bf16"),
    "n1 r0": (192, 1, 0, 1, "fp32"),
    "n1 r0 bf16": (192, 1, 0, 1, "bf16"),
    "n4 r2": (64, 4, 2, 4, "fp32"),
    "n17 r3": (96, 17, 3, 4, "fp32"),
}
BOTH_CHUNK_ENDS = ("n16 r1", "n16 r8", "n1 r0", "n17 r3")  # the rest differs little
POINTERS = {"u", "x", "grad_y", "out"}  # of the dtype above; all others are float32


def variants() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """(name, kernel, constants, dtype), with the constants that the launcher itself would use."""
    for name, (d, n, r, k, dtype) in MODELS.items():
        plans = {back: _triton.choose_plan(8, 1024, d, k, 1, n, 132, back=back) for back in (False, True)}
        yield from (
            (f"{kernel.__name__}{note} {name}", kernel, {**constants(plans[back], d, n, r, k), **more}, dtype)
            for kernel, note, back, more in (
                (_triton_forward.scan, "", False, {"TURNS": 2 if plans[False].pair else 1, "SAVE": True}),
                (_triton_forward.chunk_ends, "", False, {"BACK": False}),
                (_triton_forward.chunk_ends, " back", True, {"BACK": True}),
                (_triton_backward.scan_backward, "", True, {}),
            )
            if kernel is not _triton_forward.chunk_ends or name in BOTH_CHUNK_ENDS
        )
    for back in (False, True):
        more = {"WALKS": 4, "BACK": back, "BLOCK": 128, "num_warps": 4}
        yield f"carry{' back' * back}", _triton_forward.carry, more, "fp32"
    yield "merge bf16", _triton_forward.merge, {"PARTS": 4, "BLOCK": 1024, "num_warps": 4}, "bf16"


def constants(plan: _triton.Plan, d: int, n: int, r: int, k: int) -> dict[str, Any]:
    maps, weight, bias, A = (
        torch.zeros(1, 1, k, r + 2 * n),
        torch.zeros(k, d, r),
        torch.zeros(k, d),
        torch.ones(k, d, n),
    )
    sizes = _triton._sizes(torch.zeros(1, 1, d), maps, weight, A)
    delta = torch.zeros(1, 1, k, d) if r == 0 else None
    return {**_triton._Launch(sizes, plan, maps, delta, weight, bias, A, 1, 1, True).constants, "TILE": _triton.TILE}


def signature(kernel: Any, known: dict[str, Any], dtype: str) -> dict[str, str]:
    """Types of the arguments: tensors are commented or come before `height`, numbers after."""
    names = kernel.arg_names
    first_number = min(names.index(name) for name in ("channels", "height", "total") if name in names)
    kinds = {}
    for i, name in enumerate(names):
        pointer = f"*{dtype}" if name in POINTERS else "*fp32"
        kinds[name] = "constexpr" if name in known else pointer if i < first_number else "i32"
    return kinds


@cache
def compiled(name: str, target: str) -> Any:
    kernel, known, dtype = next(v[1:] for v in variants() if v[0] == name)
    options = {"num_warps": known["num_warps"]}
    known = {k: v for k, v in known.items() if k in kernel.arg_names}
    kinds = signature(kernel, known, dtype)
    # What the launcher finds to be divisible by 16: tensors' addresses, and the sizes of ordinary models.
    numbers = [p.name for p in kernel.params if p.name in ("channels", "group", "values") and not p.do_not_specialize]
    even = [i for i, (name, kind) in enumerate(kinds.items()) if kind[0] == "*" or name in ("chunk", *numbers)]
    source = ASTSource(kernel, kinds, known, attrs={(i,): [["tt.divisibility", 16]] for i in even})
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(name: str, target: str, folder: Path) -> list[int]:
    """[registers, spilled registers or bytes of stack, bytes of shared memory] of a thread or program."""
    binary = compiled(name, target)
    if TARGETS[target].backend == "hip":
        text = binary.asm["amdgcn"]
        registers, spilled = (re.search(rf"\.vgpr_{key}count:\s*(\d+)", text).group(1) for key in ("", "spill_"))
    else:
        file = folder / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return [int(registers), int(spilled), binary.metadata.shared]


NAMES = [name for name, *_ in variants()]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_resources_do_not_rise(name: str, target: str, tmp_path: Path) -> None:
    registers, spilled, shared = resources(name, target, tmp_path)
    assert registers <= (512 if target == "gfx942" else 256)
    if target == "sm_90":
        assert spilled == 0
    recorded = json.loads(RECORDED.read_text())
    if recorded["triton"] == triton.__version__:  # another compiler allocates otherwise
        now, then = (registers, spilled, shared), recorded["resources"][name][target]
        assert all(x <= y for x, y in zip(now, then, strict=True)), f"{now}, recorded {then}"


@pytest.mark.parametrize("name", NAMES)
def test_code(name: str) -> None:
    """No trap, no atomics, the image's offset in 64 bits; the forward loops do not shuffle."""
    binary = compiled(name, "sm_90")
    ptx, ir = binary.asm["ptx"], binary.asm["ttir"]
    assert not re.search(r"\b(trap|atom|red)\b", ptx)
    assert re.search(r"arith\.extsi .* i32 to i64", ir)
    if not name.startswith("scan_backward"):
        assert ptx.count("shfl") <= 1  # at most in the odd last step, where a layout may change


@pytest.mark.parametrize("target", TARGETS)
def test_no_trap_anywhere(target: str) -> None:
    for name in NAMES:
        text = compiled(name, target).asm
        assert "trap" not in text.get("ptx", text.get("amdgcn"))


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        table = {name: {target: resources(name, target, Path(folder)) for target in TARGETS} for name in NAMES}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    RECORDED.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "resources": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main()
