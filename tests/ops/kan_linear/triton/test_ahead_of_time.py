"""The Triton kernels of kan_linear compiled for GPUs without having one: registers, spills, memory, instructions.

After a change of the kernels this rewrites the record:
`PYTHONPATH=tests python tests/ops/kan_linear/triton/test_ahead_of_time.py`.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, and a process without TRITON_INTERPRET", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kan_mamba_layers.ops.kan_linear import triton as launcher
from kan_mamba_layers.ops.kan_linear.call import KANCall
from kan_mamba_layers.ops.kan_linear.triton import Gpu, backward_kernel, forward_kernel
from ops.ahead_of_time import check_recorded, own_cache, resources, write_record  # noqa: F401  own_cache is autouse

RECORDED = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Gpu(80, 108, 163 * 1024)),
    "sm_86": (GPUTarget("cuda", 86, 32), Gpu(86, 84, 99 * 1024)),
    "sm_90": (GPUTarget("cuda", 90, 32), Gpu(90, 132, 227 * 1024)),
    "sm_100": (GPUTarget("cuda", 100, 32), Gpu(100, 148, 227 * 1024)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Gpu(0, 304, 64 * 1024)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), Gpu(0, 48, 64 * 1024)),
}
MMA = r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_\w+|v_wmma_\w+)"
KERNELS = {"forward": forward_kernel, "grad_input": backward_kernel, "grad_weights": backward_kernel}


class Model(NamedTuple):
    rows: int = 65536
    i: int = 64
    o: int = 64
    g: int = 5
    s: int = 3
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    uniform: bool = True
    extrapolation: str = "zero"
    given: bool = False  # the activation is given as a tensor


# The first on all targets, the others where they add something; each takes a second to compile.
MODELS = {
    "64 bf16": (Model(), ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")),
    "256 bf16": (Model(4096, 256, 256), ("sm_80", "sm_86", "sm_90", "sm_100")),
    "128 g32": (Model(16384, 128, 128, g=32), ("sm_90",)),
    "64 linear": (Model(extrapolation="linear"), ("sm_90",)),
    "64 adaptive": (Model(uniform=False, extrapolation="linear", given=True), ("sm_90", "gfx1100")),
    "64 tf32": (Model(dtype=torch.float32, precision="tf32"), ("sm_90",)),
    "64 fp32": (Model(dtype=torch.float32), ("sm_90", "gfx942", "gfx1100")),
}
CASES = [(kernel, model, target) for model, (_, targets) in MODELS.items() for target in targets for kernel in KERNELS]


class Launched(Exception):
    """Carries what a kernel was launched with."""


class Recorder:
    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            raise Launched(arguments, constants)

        return launch


def launched(kernel: str, model: Model, target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel, its arguments and its constants, as launched on this target."""
    module, name = KERNELS[kernel], "kan_forward" if kernel == "forward" else kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_gpu", lambda device: TARGETS[target][1])
        patch.setattr(launcher, "_precision", lambda dtype: model.precision)
        found = getattr(module, name)
        patch.setattr(module, name, Recorder())
        rows, i, o, bases = model.rows, model.i, model.o, model.g + model.s
        like = {"device": "meta", "dtype": model.dtype}
        x, weights = torch.empty(rows, i, **like), (torch.empty(o, i, **like), torch.empty(o, i, bases, **like))
        grid = torch.empty(i, model.g + 2 * model.s + 1, device="meta")
        rest = (torch.empty(o, **like), model.extrapolation, model.uniform)
        call, grad_y = KANCall(x, x if model.given else None, *weights, grid, *rest), torch.empty(rows, o, **like)
        inputs, weights = kernel == "grad_input", kernel == "grad_weights"
        try:
            if kernel == "forward":
                launcher.forward(call, False)
            else:
                launcher.backward(call, [], [grad_y], [inputs, False, weights, weights, False, False])
        except Launched as caught:
            return found, *caught.args
    raise AssertionError(f"{kernel} was not launched")


@cache
def compiled(kernel: str, model: str, target: str) -> Any:
    function, arguments, constants = launched(kernel, MODELS[model][0], target)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    kinds = [f"*{names[a.dtype]}" if isinstance(a, torch.Tensor) else "i32" for a in arguments]
    signature = dict(zip(function.arg_names, kinds, strict=False)) | dict.fromkeys(constants, "constexpr")
    # Divisible by 16 at launch: the addresses of tensors, and the sizes of ordinary models.
    even = [n for n, a in enumerate(arguments) if isinstance(a, torch.Tensor) or a % 16 == 0]
    source = ASTSource(function, signature, constants, attrs={(n,): [["tt.divisibility", 16]] for n in even})
    return triton.compile(source, target=TARGETS[target][0], options=options)


@pytest.mark.parametrize(("kernel", "model", "target"), CASES)
def test_resources_and_code(kernel: str, model: str, target: str, tmp_path: Path) -> None:
    binary = compiled(kernel, model, target)
    registers, spilled, shared = resources(binary, tmp_path)
    text = binary.asm.get("ptx") or binary.asm["amdgcn"]
    assert registers <= (512 if target == "gfx942" else 256)
    assert shared <= TARGETS[target][1].shared
    if target == "sm_90" and model != "64 adaptive":  # there Triton 3.4 spills 8 bytes
        assert spilled == 0
    # A kernel that needs too much tensor memory compiles nevertheless, into the single instruction trap.
    assert (getattr(binary.metadata, "tmem_size", None) or 0) <= 512
    assert not re.search(r"\b(trap|s_trap|atom|red|\w+_atomic\w*)\b", text)
    on_tensor_cores = model != "64 fp32" or target == "gfx942"  # the only target that multiplies full float32
    assert bool(re.search(MMA, text)) == on_tensor_cores
    assert re.search(r"arith\.extsi .* i32 to i64", binary.asm["ttir"])  # rows are counted in 64 bits
    check_recorded(RECORDED, f"{kernel} {model}", target, [registers, spilled, shared])


@pytest.mark.parametrize("model", ["64 bf16", "256 bf16", "64 linear"])
@pytest.mark.parametrize("kernel", ["forward", "grad_weights"])
def test_bases_go_from_registers_to_the_tensor_cores(kernel: str, model: str) -> None:
    """On sm_90 the first operand of every product is a list of registers, not a descriptor of shared memory."""
    products = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\},\s*(\S)", compiled(kernel, model, "sm_90").asm["ptx"])
    assert len(products) >= 6 and set(products) == {"{"}


def main() -> None:
    def table(folder: Path) -> dict[str, dict[str, list[int]]]:
        rows: dict[str, dict[str, list[int]]] = {}
        for kernel, model, target in CASES:
            rows.setdefault(f"{kernel} {model}", {})[target] = resources(compiled(kernel, model, target), folder)
        return rows

    write_record(RECORDED, table)


if __name__ == "__main__":
    main()
