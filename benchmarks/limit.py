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
from benchmarks.clock import seconds_per_call

try:
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic, models, register_model
except ImportError:
    numba = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LANES, CHAINS = 16, 4  # floats in a vector, and states side by side: enough to keep the vector units busy
CPU_STEPS = 2_000_000
REPETITIONS = 10
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # many times the cache


Rates = dict[str, float | None]


def measure(device: str) -> Rates:
    """Elements (CPU, of one core) or exponentials (GPU) per second, and bytes read and written per second by a copy."""
    if device == "cuda":
        return {"elements_per_second": _gpu_exponentials(), "copy_bytes_per_second": _copy_rate(device)}
    return {"elements_per_second": cpu_elements_per_second(), "copy_bytes_per_second": _copy_rate(device)}


def faster(first: Rates, second: Rates) -> Rates:
    """The larger rate of two measurements: whatever disturbs one can only make it slower."""
    return {name: max((r for r in (rate, second[name]) if r is not None), default=None) for name, rate in first.items()}


def seconds(case: Case, rates: Rates, device: str, threads: int, value_bytes: int = 4) -> float | None:
    """The least time that the forward pass of an op can take; None where the limit is not known.

    `value_bytes` are those of one value of the map, which a GPU's kernels read and write in its own dtype.
    """
    rate, copy = rates["elements_per_second"], rates["copy_bytes_per_second"]
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
    FLOAT, INT = ir.FloatType(), ir.IntType(32)
    VECTOR, BITS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
    # Minimax coefficients of 2^f on |f| <= 1/2, highest power first. A relative error of 3e-9 leaves only the rounding
    # of float32, as in the kernels that are measured; one power less would be 9e-8.
    EXP2 = (0.000155946778, 0.00134066434, 0.00961769279, 0.0555031039, 0.240226522, 0.693147242, 1.0)
    ROUNDER = 12583039.0  # 1.5 * 2^23 + 127: adding it rounds, and leaves the biased exponent in the low bits
    SMALLEST = 12582913.0  # the same of the exponent -126

    class Vector(types.Type):
        """16 floats in one register."""

    vector = Vector(name="limit_vector")

    @register_model(Vector)
    class VectorModel(models.PrimitiveModel):
        """A vector is an LLVM value of its own type."""

        def __init__(self, manager: Any, kind: Any) -> None:
            super().__init__(manager, kind, VECTOR)

    def _constant(value: float) -> Any:
        rounded = float(torch.tensor(value, dtype=torch.float32))
        return ir.Constant(VECTOR, [ir.Constant(FLOAT, rounded)] * LANES)

    def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
        signature = ir.FunctionType(VECTOR, (VECTOR,) * 3)
        return builder.call(builder.module.declare_intrinsic(f"llvm.fmuladd.v{LANES}f32", (), signature), (x, y, z))

    @intrinsic
    def splat(_context: Any, _value: Any) -> Any:
        """A float in all lanes."""

        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            empty = ir.Constant(VECTOR, ir.Undefined)
            one = builder.insert_element(empty, args[0], ir.Constant(INT, 0))
            return builder.shuffle_vector(one, empty, ir.Constant(BITS, [0] * LANES))

        return vector(types.float32), generate

    @intrinsic
    def add(_context: Any, _x: Any, _y: Any) -> Any:
        """`x + y`."""
        return vector(vector, vector), lambda _c, builder, _s, args: builder.fadd(*args)

    @intrinsic
    def multiply(_context: Any, _x: Any, _y: Any) -> Any:
        """`x y`."""
        return vector(vector, vector), lambda _c, builder, _s, args: builder.fmul(*args)

    @intrinsic
    def multiply_add(_context: Any, _x: Any, _y: Any, _z: Any) -> Any:
        """`x y + z`."""
        return vector(vector, vector, vector), lambda _c, builder, _s, args: _multiply_add(builder, *args)

    @intrinsic
    def exp2_of_product(_context: Any, _x: Any, _y: Any) -> Any:
        """`2^(x y)`."""

        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            x, y = args
            biased = _multiply_add(builder, x, y, _constant(ROUNDER))
            small = builder.fcmp_ordered(">", biased, _constant(SMALLEST))
            biased = builder.select(small, biased, _constant(SMALLEST))
            whole = builder.fsub(biased, _constant(ROUNDER))
            fraction = _multiply_add(builder, x, y, builder.fneg(whole))
            power = _constant(EXP2[0])
            for coefficient in EXP2[1:]:
                power = _multiply_add(builder, power, fraction, _constant(coefficient))
            shift = ir.Constant(BITS, [23] * LANES)
            scale = builder.bitcast(builder.shl(builder.bitcast(biased, BITS), shift), VECTOR)
            return builder.fmul(power, scale)

        return vector(vector, vector), generate

    @intrinsic
    def first(_context: Any, _x: Any) -> Any:
        """The first lane."""

        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return builder.extract_element(args[0], ir.Constant(INT, 0))

        return types.float32(vector), generate

    @numba.njit(error_model="numpy")
    def _body(steps: int, rate: float) -> float:
        """`CHAINS` states; dt grows a little at each step, so that no exponential can be taken out of the loop."""
        a0 = splat(numba.float32(rate))
        a1 = add(a0, a0)
        a2 = add(a1, a0)
        a3 = add(a2, a0)
        b, c = splat(numba.float32(0.5)), splat(numba.float32(0.25))
        dt, growth = splat(numba.float32(1e-3)), splat(numba.float32(1e-8))
        h0, h1, h2, h3 = b, b, b, b
        y = c
        for _ in range(steps):
            dt = add(dt, growth)
            h0 = multiply_add(exp2_of_product(dt, a0), h0, multiply(dt, b))
            h1 = multiply_add(exp2_of_product(dt, a1), h1, multiply(dt, c))
            h2 = multiply_add(exp2_of_product(dt, a2), h2, multiply(dt, a0))
            h3 = multiply_add(exp2_of_product(dt, a3), h3, multiply(dt, a1))
            y = multiply_add(h3, b, multiply_add(h2, c, multiply_add(h1, b, multiply_add(h0, c, y))))
        return first(y)
