"""The Triton kernels compiled for GPUs without having one: registers, spills, shared memory, instructions.

After a change of the kernels this rewrites the record:
`PYTHONPATH=tests python tests/ops/selective_scan/triton/test_ahead_of_time.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, and a process without TRITON_INTERPRET", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kan_mamba_layers.ops.selective_scan import triton as launcher
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.triton import backward_kernel, forward_kernel, steps_kernel
from ops.ahead_of_time import check_recorded, own_cache, resources, write_record  # noqa: F401  own_cache is autouse

RECORDED = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# One of each maker in every run, all of them at night: each compiles for half a second and more.
EVERY_RUN = ("sm_90", "gfx942")
targets = pytest.mark.parametrize(
    "target", [target if target in EVERY_RUN else pytest.param(target, marks=pytest.mark.nightly) for target in TARGETS]
)
# name: (d, n, r, k, dtype of u, y and their gradients), and what there is of orders and a mask; r = 0 is one direction
# with given steps
MODELS = {
    "n16 r1": (32, 16, 1, 4, "fp32"),
    "n16 r2": (64, 16, 2, 4, "fp32"),
    "n16 r8": (256, 16, 8, 4, "fp32"),
    "n16 r8 bf16": (256, 16, 8, 4, "bf16"),
    "n16 r6 masked": (96, 16, 6, 4, "fp32", "mask"),
    "n16 r6 table bf16": (96, 16, 6, 4, "bf16", "orders"),
    "n16 r6 table masked": (96, 16, 6, 4, "fp32", "orders", "mask"),
    "n1 r0 table": (192, 1, 0, 1, "fp32", "orders"),
    "n1 r0": (192, 1, 0, 1, "fp32"),
    "n1 r0 bf16": (192, 1, 0, 1, "bf16"),
    "n4 r2": (64, 4, 2, 4, "fp32"),
    "n17 r3": (96, 17, 3, 4, "fp32"),
}
# The other models differ little outside the scans.
SOME_MODELS = ("n16 r1", "n16 r8", "n16 r6 table masked", "n1 r0", "n17 r3")
EVEN_SIZES = ("channels", "group", "values", "chunk")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KERNELS = {
    forward_kernel: ("scan", "chunk_ends", "carry", "merge"),
    backward_kernel: ("scan_backward",),
    steps_kernel: ("step_sizes", "step_gradients"),
}


class Variant(NamedTuple):
    """A kernel with the arguments and constants that the launcher gives it."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class Recorder:
    """Replaces a kernel and records what it is launched with."""

    kernel: Any
    found: list[Variant]

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **constants: self.found.append(Variant(self.kernel, arguments, constants))


def launches(d: int, n: int, r: int, k: int, dtype: str, *given: str) -> list[Variant]:
    """What a forward and a backward pass launch for two chunks of an image, under the plans for a batch of 8."""
    found: list[Variant] = []
    sizes, table = launcher.Sizes(8, 1024, d, k, 1, n), "orders" in given
    choose = partial(launcher.choose_plan, sizes, 132, table=table)
    plans = (choose(back=back)._replace(chunk=32) for back in (False, True))
    call = ScanCall(
        u=torch.zeros(1, 64, d, dtype=TYPES[dtype]),
        coeffs=torch.zeros(1, 64, k, r + 2 * n),
        x_proj_weight=None,
        delta=torch.zeros(1, 64, k, d) if r == 0 else None,
        dt_proj_weight=torch.zeros(k, d, r),
        dt_proj_bias=torch.zeros(k, d),
        A=torch.ones(k, d, n),
        D=torch.zeros(d),
        initial_state=None,
        height=1 if table else 8,
        width=64 if table else 8,
        softplus=True,
        orders=torch.zeros(k, 64, dtype=torch.int32) if table else None,
        mask=torch.ones(1, 64) if "mask" in given else None,
    )
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, Recorder(getattr(module, name), found))
        y, last, saved = launcher.forward(call, True, plan=next(plans))
        launcher.backward(call, [saved], [y, last], [True] * 9 + [False] * 2, plan=next(plans))
    return found


@cache
def variants() -> dict[str, Variant]:
    """By name: the scans for every model, the other kernels for some."""
    found = {}
    for model, sizes in MODELS.items():
        for variant in launches(*sizes):
            name = variant.kernel.fn.__name__
            if name.startswith("scan") or model in SOME_MODELS:
                found[f"{name}{' back' * variant.constants.get('BACK', False)} {model}"] = variant
            elif name == "merge" and variant.arguments[1].dtype == torch.bfloat16:
                found["merge bf16"] = variant
    return found


@cache
def compiled(name: str, target: str) -> Any:
    kernel, arguments, constants = variants()[name]
    options = {"num_warps": constants["num_warps"]}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    constants |= {name: None for name, x in given.items() if x is None}
    kinds = {name: pointers[x.dtype] if isinstance(x, Tensor) else "i32" for name, x in given.items()}
    kinds |= dict.fromkeys(constants, "constexpr")
    # Divisible by 16 at launch: the addresses of tensors, and the sizes of ordinary models.
    sizes = [p.name for p in kernel.params if p.name in EVEN_SIZES and not p.do_not_specialize]
    even = [i for i, (name, kind) in enumerate(kinds.items()) if kind[0] == "*" or name in sizes]
    source = ASTSource(kernel, kinds, constants, attrs={(i,): [["tt.divisibility", 16]] for i in even})
    return triton.compile(source, target=TARGETS[target], options=options)


NAMES = list(variants())


@targets
@pytest.mark.parametrize("name", NAMES)
def test_resources_do_not_rise(name: str, target: str, tmp_path: Path) -> None:
    registers, spilled, shared = resources(compiled(name, target), tmp_path)
    assert registers <= (512 if target == "gfx942" else 256)
    if target == "sm_90" and name != "scan_backward n4 r2":  # there Triton 3.8 spills 8 bytes
        assert spilled == 0
    check_recorded(RECORDED, name, target, [registers, spilled, shared])


@pytest.mark.parametrize("name", NAMES)
def test_code(name: str) -> None:
    """No trap, no atomics, 64-bit offsets of images; the forward loops do not shuffle."""
    binary = compiled(name, "sm_90")
    ptx, ir = binary.asm["ptx"], binary.asm["ttir"]
    assert not re.search(r"\b(trap|atom|red)\b", ptx)
    assert re.search(r"arith\.extsi .* i32 to i64", ir)
    if name.split()[0] in ("scan", "chunk_ends", "carry", "merge"):
        assert ptx.count("shfl") <= 1  # allowed in an odd last step, where the layout may change


@targets
def test_no_trap_anywhere(target: str) -> None:
    for name in NAMES:
        text = compiled(name, target).asm
        assert "trap" not in text.get("ptx", text.get("amdgcn"))


def main() -> None:
    write_record(RECORDED, lambda folder: {n: {t: resources(compiled(n, t), folder) for t in TARGETS} for n in NAMES})


if __name__ == "__main__":
    main()
