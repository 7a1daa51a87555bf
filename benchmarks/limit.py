"""The physical limit of a scan on this machine, measured: how fast the arithmetic alone can go, and how fast a copy.

An element is one update of one state, `h <- exp2(dt a) h + dt b u` and `y <- y + c h`: one exponential and three
operations. On a CPU a loop does just that in registers, 16 channels to a vector, with no memory traffic; on a GPU
exponentials and copies are measured, and the slower of the two is the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.measure import seconds_per_call

try:  # the exponential of the kernels that are measured
    import numba

    from kan_mamba_layers.ops.simd.vector import LANES, exp2_product, fma, pointer, splat, store
except ImportError:
    numba = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CHAINS = 4  # states side by side: enough to keep the vector units busy
CPU_STEPS = 2_000_000
REPETITIONS = 10
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # many times the cache


Rates = dict[str, float | None]


def measure(device: str) -> Rates:
    """Elements (CPU, of one core) or exponentials (GPU) per second, and bytes read and written per second by a copy."""
    elements = _gpu_exponentials() if device == "cuda" else cpu_elements_per_second()
    return {"elements_per_second": elements, "copy_bytes_per_second": _copy_rate(device)}


def faster(first: Rates, second: Rates) -> Rates:
    """The larger rate of two measurements: whatever disturbs one can only make it slower."""
    return {name: max((r for r in (rate, second[name]) if r is not None), default=None) for name, rate in first.items()}


def seconds(case: Case, rates: Rates, device: str, threads: int, value_bytes: int = 4) -> float | None:
    """The least time that the forward pass of an op can take; None where the limit is not known.

    `value_bytes` are those of one value of the map, which a GPU's kernels read and write in its own dtype.
    """
    rate, copy = rates.get("elements_per_second"), rates.get("copy_bytes_per_second")
    if case.op not in ("cross_selective_scan", "selective_scan") or rate is None or copy is None:
        return None
    if device == "cuda":  # the map is read and written once, whatever happens between
        map_bytes = 2 * value_bytes * case.sizes["b"] * case.length * case.sizes["d"]
        return max(case.elements / rate, map_bytes / copy)
    return case.elements / (rate * threads)


def cpu_elements_per_second(steps: int = CPU_STEPS) -> float | None:
    """Elements per second of one core, or None without Numba."""
    if numba is None:
        return None
    _body(1, -1.0)
    return steps * CHAINS * LANES / _fastest(lambda: _body(steps, -1.0))


def _body(steps: int, rate: float) -> float:
    """The arithmetic alone, and one lane of what it comes to."""
    return float(_loop(steps, rate, torch.empty(LANES).numpy()))


def _copy_rate(device: str) -> float:
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES[device] / _fastest(lambda: target.copy_(source), device)


def _gpu_exponentials() -> float | None:
    if triton is None:
        return None
    programs, steps, width = 64 * torch.cuda.get_device_properties(0).multi_processor_count, 4096, 1024
    out = torch.zeros(programs * width, device="cuda")

    def run() -> None:
        exponentials[(programs,)](out, steps, width)

    run()
    return programs * steps * width / _fastest(run, "cuda")


def _fastest(call: Callable[[], Any], device: str = "cpu") -> float:
    return min(seconds_per_call(call, 1, device) for _ in range(REPETITIONS))


if triton is not None:

    @triton.jit
    def exponentials(out, steps, width: tl.constexpr):  # type: ignore[no-untyped-def]
        """Repeat `v <- exp2(-v)` in registers; the chain stays within (0, 1], and nothing of it can be left out."""
        index = tl.program_id(0) * width + tl.arange(0, width)
        value = tl.load(out + index)
        for _ in range(steps):
            value = tl.exp2(-value)
        tl.store(out + index, value)


if numba is not None:

    @numba.njit(error_model="numpy")
    def _loop(steps: int, rate: float, out: Any) -> float:
        """`CHAINS` states; dt grows a little at each step, so that no exponential can be taken out of the loop."""
        a0 = splat(rate, out)
        a1 = a0 + a0
        a2 = a1 + a0
        a3 = a2 + a0
        b, c = splat(0.5, out), splat(0.25, out)
        dt, growth = splat(1e-3, out), splat(1e-8, out)
        h0, h1, h2, h3 = b, b, b, b
        y = c
        for _ in range(steps):
            dt = dt + growth
            h0 = fma(exp2_product(dt, a0), h0, dt * b)
            h1 = fma(exp2_product(dt, a1), h1, dt * c)
            h2 = fma(exp2_product(dt, a2), h2, dt * a0)
            h3 = fma(exp2_product(dt, a3), h3, dt * a1)
            y = fma(h3, b, fma(h2, c, fma(h1, b, fma(h0, c, y))))
        store(pointer(out.ctypes.data, out), 0, y)
        return out[0]
