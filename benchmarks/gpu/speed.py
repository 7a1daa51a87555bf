"""How fast the ops, layers and models are, beside what a user would take instead, and beside the limits of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import limit, run
from benchmarks.candidates import MODES, Candidate
from benchmarks.cases import CASES, Case, block, cross, kan, model
from benchmarks.gpu import walks
from benchmarks.gpu.compare import tf32
from benchmarks.gpu.tasks import Setting, Task
from benchmarks.kan_layers import EFFICIENT, GEMM, TUNED
from benchmarks.measure import call_of, seconds_per_call
from benchmarks.peers import MAMBA_CUDA, VMAMBA_CUDA

DTYPES = ("bfloat16", "float32")
# What is worth a GPU's minutes: our kernels, what else a user would take there, and what cannot be passed.
MEASURED = (
    "triton",
    "chunked",
    VMAMBA_CUDA,
    MAMBA_CUDA,
    "without SS2D",
    "compiled reference",
    EFFICIENT,
    GEMM,
    "nn.Linear",
)
TUNED_CASES = ("kan-16384x128-128-g5-bfloat16", "kan-65536x64-64-g5-bfloat16")
BATCHES = (model("km_unet_base", b=8), model("km_unet_tiny", b=8), model("km_unet_pp_base", b=8))
SUITES = ("ops-b8", "kan", "blocks", "ops", "models")  # the most telling first
PRODUCT = 8192  # rows and columns of the matrices whose product is the limit of the tensor cores


def cases(setting: Setting) -> list[tuple[Case, str]]:
    """Every case with its dtype, in the order in which they are measured."""
    if setting.rehearsal:
        return [(cross(1, 1, 1, 2, 1, 1), "float32"), (kan(5, 2, 3), "float32"), (block(1, 1, 1, 8, 1), "bfloat16")]
    found: list[tuple[Case, str]] = []
    for suite in SUITES:
        of_suite = [case for case in (*CASES, *BATCHES) if case.suite == suite]
        if suite == "kan":  # whose cases name their dtype
            found += [(case, case.dtype or "float32") for case in sorted(of_suite, key=lambda case: case.dtype == "")]
        else:
            found += [(case, dtype) for dtype in DTYPES for case in of_suite]
    return found


def chosen(case: Case, dtype: str, setting: Setting) -> list[Candidate]:
    """The candidates of a case that are measured here; in a rehearsal nothing is compiled."""
    options = _options(dtype, setting)
    wanted = {*MEASURED, TUNED} if case.name in TUNED_CASES else set(MEASURED)
    wanted |= {"reference"} if case.op == "kan_linear" else set()
    wanted -= {"compiled reference"} if setting.rehearsal else set()
    return [candidate for candidate in run.candidates_of(case, options) if candidate.name in wanted]


def warm(case: Case, dtype: str, setting: Setting) -> None:
    """Compile what the measurement will run, so that it finds all of it in the caches on disk."""
    for candidate in chosen(case, dtype, setting):
        if candidate.absent or candidate.name == TUNED:  # which must choose its tiles on a quiet GPU
            continue
        for mode in MODES:
            if not candidate.skip_reason(case, mode):
                try:
                    call_of(candidate.bind(case, setting.device, run.DTYPES[dtype]), mode)()
                except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                    print(f"{candidate.name} on {case.name}: {error}")  # the measurement records it


def measured(case: Case, dtype: str, setting: Setting) -> dict[str, Any]:
    """Error, time and memory of every candidate, as `run` measures them; float32 without TF32."""
    with tf32(False):
        return {"rows": run.measure_case(case, chosen(case, dtype, setting), _options(dtype, setting))}


def _options(dtype: str, setting: Setting) -> run.Options:
    return run.Options(
        device=setting.device,
        dtype=dtype,
        rounds=1 if setting.rehearsal else 7,
        budget=0.01 if setting.rehearsal else 0.25,
        longest=60.0 if setting.rehearsal else 0.25,  # what is a hundred times slower than ours tells no more
        memory=not setting.rehearsal,
        peers=tuple(setting.peers.items()),
    )


def limits(setting: Setting) -> dict[str, Any]:
    """What the GPU can do at most: a copy, exponentials, and products in the tensor cores."""
    unknown = dict.fromkeys(("elements_per_second", "copy_bytes_per_second"))
    rates = unknown if setting.rehearsal else limit.measure(setting.device)
    sizes = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    products = {name: product_rate(dtype, name == "tf32", setting) for name, dtype in sizes.items()}
    return {"rates": {**rates, "product_flops_per_second": products}}


def product_rate(dtype: torch.dtype, rounded: bool, setting: Setting) -> float:
    """Operations per second of a large product of random matrices."""
    size = 64 if setting.rehearsal else PRODUCT
    a, b = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
    with tf32(rounded):
        for _ in range(3):
            a @ b
        seconds = min(seconds_per_call(lambda: a @ b, 5, setting.device) for _ in range(5))
    return 2 * size**3 / seconds


def tasks(setting: Setting) -> Iterator[Task]:
    """Compile side by side, then measure one after the other."""
    for case, dtype in cases(setting):
        if not setting.rehearsal:
            yield Task(f"warm/{case.name}/{dtype}", partial(warm, case, dtype), limit=240)
    yield Task("limits", limits, alone=True)
    yield from walks.timings(setting)
    for case, dtype in cases(setting):
        yield Task(f"time/{case.name}/{dtype}", partial(measured, case, dtype), limit=300, alone=True)
