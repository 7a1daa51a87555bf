"""LLVM instructions for vectors: arithmetic, memory, and the transcendental functions as polynomials.

A vector is an LLVM vector of 16 floats or doubles, or of several times as many. LLVM splits it into the registers that
a machine has: 16 floats take one of AVX-512, two of AVX2, four of SSE or NEON. Numba's own vectoriser stops at ``exp``,
since its wheel brings no vector mathematics library, so ``exp2`` and its kin are written here.
"""

import math
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import models, register_model

LANES = 16
INT64 = ir.IntType(64)
_INT32 = ir.IntType(32)


class Vector(types.Type):
    """Numba's type of a vector of ``LANES`` elements, or of several times as many."""

    def __init__(self, element: types.Float, lanes: int = LANES) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"{element}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(llvm_type(vector.element), vector.lanes))


def llvm_type(element: types.Type) -> ir.Type:
    """LLVM's type of a number."""
    return {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int64: INT64}[element]


def vector_registers(bits: int) -> int:
    """Number of 16-lane vectors of ``bits``-bit elements that fit in this machine's registers."""
    machine = llvm.get_process_triple()
    features = {} if machine.startswith(("arm", "aarch64")) else llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 32 * 512 // (LANES * bits)
    if features.get("avx"):
        return 16 * 256 // (LANES * bits)
    return (16 if features else 32) * 128 // (LANES * bits)


class Lanes:
    """Builds instructions for vectors of one type."""

    # exp2 on [-1/2, 1/2] to 3e-9 and log1p(e)/e on [0, 1] to 3e-8: minimax polynomials.
    FLOAT_EXP2 = (1.0, 0.693147242, 0.240226522, 0.0555031039, 0.00961769279, 0.00134066434, 0.000155946778)
    FLOAT_LOG1P = (
        *(0.99999994, -0.499994934, 0.333190978, -0.24842982, 0.191060081),
        *(-0.136632472, 0.0782259628, -0.0295052435, 0.00523269456),
    )
    # Taylor series of exp2, and of 2 atanh(s)/s in s^2 <= 1/9, both to 1e-16.
    DOUBLE_EXP2 = tuple(math.log(2) ** k / math.factorial(k) for k in range(14))
    DOUBLE_ATANH = tuple(2 / (2 * k + 1) for k in range(17))

    def __init__(self, builder: ir.IRBuilder, element: types.Type, lanes: int) -> None:
        self.builder = builder
        self.is_float = element is types.float32
        self.element = llvm_type(element)
        self.lanes = lanes
        self.bits = 32 if self.is_float else 64
        self.type = ir.VectorType(self.element, lanes)
        self.integers = ir.VectorType(ir.IntType(self.bits), lanes)
        self.mantissa, self.bias = (23, 127) if self.is_float else (52, 1023)

    def at(self, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
        """A pointer to the element ``index`` places further on."""
        return self.builder.gep(pointer, [INT64(index) if isinstance(index, int) else index])

    def read(self, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
        """One element."""
        return self.builder.load(self.at(pointer, index))

    def write(self, pointer: ir.Value, index: ir.Value, x: ir.Value) -> None:
        """Write one element."""
        self.builder.store(x, self.at(pointer, index))

    def load(self, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
        """Neighbouring elements, one per lane."""
        address = self.builder.bitcast(self.at(pointer, index), self.type.as_pointer())
        return self.builder.load(address, align=self.bits // 8)

    def store(self, pointer: ir.Value, index: ir.Value | int, x: ir.Value) -> None:
        """Write neighbouring elements."""
        address = self.builder.bitcast(self.at(pointer, index), x.type.as_pointer())
        self.builder.store(x, address, align=self.bits // 8)

    def broadcast(self, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
        """One element in all lanes."""
        return self.splat(self.read(pointer, index))

    def constant(self, value: float) -> ir.Constant:
        """A number in all lanes."""
        rounded = float(np.float32(value)) if self.is_float else float(value)
        return ir.Constant(self.type, [ir.Constant(self.element, rounded)] * self.lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A value in all lanes."""
        undefined = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
        return self.shuffle(one, undefined, [0] * self.lanes)

    def shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Choose among the lanes of x and, numbered after them, those of y."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes)))

    def call(self, name: str, *values: ir.Value) -> ir.Value:
        """One of LLVM's functions of vectors, lane by lane."""
        signature = ir.FunctionType(self.type, [self.type] * len(values))
        name = f"llvm.{name}.v{self.lanes}f{self.bits}"
        return self.builder.call(get_or_insert_function(self.builder.module, signature, name), values)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``x y + z``, rounded once where the machine can (``llvm.fma`` would call a library where it cannot)."""
        return self.call("fmuladd", x, y, z)

    def floor(self, x: ir.Value) -> ir.Value:
        """The largest integer that is not above."""
        return self.call("floor", x)

    def where_less(self, x: ir.Value, y: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a`` where ``x < y``, else ``b``; where one is NaN, ``b``."""
        return self.builder.select(self.builder.fcmp_ordered("<", x, y), a, b)

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """By Horner's rule; the constant term comes first."""
        total = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            total = self.fma(total, x, self.constant(coefficient))
        return total

    def exp2_product(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """``2^(x y)``."""
        return self._exp2_product(x, y, 0.0)

    def _exp2_product(self, x: ir.Value, y: ir.Value, low: float) -> ir.Value:
        """``2^(x y + x low)``, where ``low`` corrects the rounding of a constant ``y``.

        Adding ``1.5 2^mantissa + bias`` rounds the exponent to an integer and leaves it, biased, in the lowest bits:
        shifted to the exponent's place they are the power of two. The product is not rounded on the way. Powers
        below the smallest normal number are zero, above the largest infinite, of NaN NaN.
        """
        b = self.builder
        magic = 1.5 * 2.0**self.mantissa + self.bias
        rounded = self.fma(x, y, self.constant(magic))
        top = self.constant(magic + self.bias + 1)
        rounded = b.select(b.fcmp_ordered(">", rounded, top), top, rounded)
        fraction = self.fma(x, y, b.fsub(self.constant(magic), rounded))
        if low:
            fraction = self.fma(x, self.constant(low), fraction)
        shift = ir.Constant(self.integers, [self.mantissa] * self.lanes)
        power = b.bitcast(b.shl(b.bitcast(rounded, self.integers), shift), self.type)
        value = b.fmul(self.polynomial(fraction, self.FLOAT_EXP2 if self.is_float else self.DOUBLE_EXP2), power)
        normal = b.fcmp_unordered(">=", rounded, self.constant(magic - self.bias + 1))
        return b.select(normal, value, self.constant(0.0))

    def exp(self, x: ir.Value) -> ir.Value:
        """``e^x``, from log2(e) and what its rounding loses."""
        low = 1.925963033500e-08 if self.is_float else 2.0355273740931033e-17
        return self._exp2_product(x, self.constant(math.log2(math.e)), low)

    def softplus_and_slope(self, z: ir.Value) -> list[ir.Value]:
        """``softplus(z) = max(z, 0) + log1p(e)`` with ``e = exp(-|z|)``, and its derivative, the sigmoid."""
        b = self.builder
        zero, one = self.constant(0.0), self.constant(1.0)
        negative = b.fcmp_ordered("<", z, zero)
        e = self.exp(b.select(negative, z, b.fneg(z)))
        if self.is_float:
            log1p = b.fmul(self.polynomial(e, self.FLOAT_LOG1P), e)
        else:
            s = b.fdiv(e, b.fadd(e, self.constant(2.0)))
            log1p = b.fmul(self.polynomial(b.fmul(s, s), self.DOUBLE_ATANH), s)
        sigmoid = b.fmul(b.select(negative, e, one), self.exp(b.fneg(log1p)))
        return [b.fadd(b.select(negative, zero, z), log1p), sigmoid]

    def sigmoid(self, x: ir.Value) -> ir.Value:
        """``1 / (1 + exp(-x))``, from ``exp(-|x|)``."""
        b, one = self.builder, self.constant(1.0)
        negative = b.fcmp_ordered("<", x, self.constant(0.0))
        e = self.exp(b.select(negative, x, b.fneg(x)))
        return b.fdiv(b.select(negative, e, one), b.fadd(one, e))

    def sum_lanes(self, pointer: ir.Value, index: ir.Value) -> ir.Value:
        """The sums of each of 16 neighbouring vectors, as one vector.

        Each step halves the number of vectors: of two, it adds the halves of the first into the lanes whose number
        lacks the bit ``half``, those of the second into the others.
        """
        first = self.at(pointer, index)
        rows = [self.load(first, LANES * i) for i in range(LANES)]
        half = LANES // 2
        while half:
            stay = [lane + LANES * bool(lane & half) for lane in range(LANES)]
            swap = [(lane ^ half) + LANES * bool(lane & half) for lane in range(LANES)]
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [self.builder.fadd(self.shuffle(x, y, stay), self.shuffle(x, y, swap)) for x, y in pairs]
            half //= 2
        return rows[0]

    def transpose(self, pointer: ir.Value, index: ir.Value, stride: ir.Value) -> None:
        """Transpose a square of 16 x 16 elements in place, whose rows are ``stride`` elements apart."""
        places = [self.builder.add(index, self.builder.mul(stride, INT64(i))) for i in range(LANES)]
        rows = [self.load(pointer, place) for place in places]
        half = LANES // 2
        while half:
            upper = [lane if not lane & half else (lane ^ half) + LANES for lane in range(LANES)]
            lower = [lane ^ half if not lane & half else lane + LANES for lane in range(LANES)]
            rows = [
                self.shuffle(rows[i], rows[i + half], upper)
                if not i & half
                else self.shuffle(rows[i - half], rows[i], lower)
                for i in range(LANES)
            ]
            half //= 2
        for place, row in zip(places, rows, strict=True):
            self.store(pointer, place, row)
