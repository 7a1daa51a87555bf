"""Vectors of 16 lanes for Numba kernels, as values with arithmetic, loads and stores.

A vector is an LLVM vector of 16 floats or doubles. LLVM splits it into the registers that a machine has: one of
AVX-512, two of AVX2, four of SSE or NEON. Numba's own vectoriser stops at ``exp``, since its wheel brings no vector
mathematics library, so the transcendental functions are written here, as polynomials.

Kernels address memory by typed pointers, made from an integer address, and by indices counted in elements.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16


class Vector(types.Type):
    """Numba's type of a vector of ``LANES`` elements, or of several times as many."""

    def __init__(self, element: types.Float, lanes: int = LANES) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"{element}x{lanes}")


_VECTORS = {element: Vector(element) for element in (types.float32, types.float64)}
_LANE = ir.IntType(32)  # the type of a lane's number in a shuffle


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = ir.FloatType() if vector.element is types.float32 else ir.DoubleType()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


class _Formulas:
    """The formulas, written in LLVM instructions for floats or for doubles."""

    # exp2 on [-1/2, 1/2] to 3e-9 and log1p(e)/e on [0, 1] to 3e-8: minimax polynomials.
    FLOAT_EXP2 = (1.0, 0.693147242, 0.240226522, 0.0555031039, 0.00961769279, 0.00134066434, 0.000155946778)
    FLOAT_LOG1P = (
        *(0.99999994, -0.499994934, 0.333190978, -0.24842982, 0.191060081),
        *(-0.136632472, 0.0782259628, -0.0295052435, 0.00523269456),
    )
    # Taylor series of exp2, and of 2 atanh(s)/s in s^2 <= 1/9, both to 1e-16.
    DOUBLE_EXP2 = tuple(math.log(2) ** k / math.factorial(k) for k in range(14))
    DOUBLE_ATANH = tuple(2 / (2 * k + 1) for k in range(17))

    def __init__(self, builder: ir.IRBuilder, vector: Vector) -> None:
        self.builder = builder
        self.is_float = vector.element is types.float32
        self.element = ir.FloatType() if self.is_float else ir.DoubleType()
        self.lanes = vector.lanes
        self.type = ir.VectorType(self.element, self.lanes)
        self.integers = ir.VectorType(ir.IntType(32 if self.is_float else 64), self.lanes)
        self.mantissa, self.bias = (23, 127) if self.is_float else (52, 1023)

    def constant(self, value: float) -> ir.Constant:
        rounded = float(np.float32(value)) if self.is_float else float(value)
        return ir.Constant(self.type, [ir.Constant(self.element, rounded)] * self.lanes)

    def shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Choose among the lanes of x and, numbered after them, those of y."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_LANE, len(lanes)), list(lanes)))

    def splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(_LANE, 0))
        return self.shuffle(one, undefined, [0] * self.lanes)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``x y + z``, rounded once where the machine can (``llvm.fma`` would call a library where it cannot)."""
        name = f"llvm.fmuladd.v{self.lanes}f{32 if self.is_float else 64}"
        function = get_or_insert_function(self.builder.module, ir.FunctionType(self.type, [self.type] * 3), name)
        return self.builder.call(function, (x, y, z))

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """By Horner's rule; the constant term comes first."""
        total = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            total = self.fma(total, x, self.constant(coefficient))
        return total

    def exp2_product(self, x: ir.Value, y: ir.Value, low: float = 0.0) -> ir.Value:
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
        log2_e = 1.4426950408889634
        rounded = float(np.float32(log2_e)) if self.is_float else log2_e
        return self.exp2_product(
            x, self.constant(rounded), 1.925963033500e-08 if self.is_float else 2.0355273740931033e-17
        )

    def softplus(self, z: ir.Value) -> tuple[ir.Value, ir.Value]:
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
        return b.fadd(b.select(negative, zero, z), log1p), sigmoid

    def sum_lanes(self, rows: list[ir.Value]) -> ir.Value:
        """Lane ``i`` of the result is the sum of all lanes of ``rows[i]``, for 16 vectors.

        Each step halves the number of vectors: of two, it adds the halves of the first into the lanes whose number
        lacks the bit ``half``, those of the second into the others.
        """
        half = LANES // 2
        while half:
            stay = [lane + LANES * bool(lane & half) for lane in range(LANES)]
            swap = [(lane ^ half) + LANES * bool(lane & half) for lane in range(LANES)]
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [self.builder.fadd(self.shuffle(x, y, stay), self.shuffle(x, y, swap)) for x, y in pairs]
            half //= 2
        return rows[0]

    def transpose(self, rows: list[ir.Value]) -> list[ir.Value]:
        """The columns of a square of 16 vectors."""
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
        return rows


# What kernels call.


def _arithmetic(symbol: Callable[..., Any], instruction: str) -> None:
    @type_callable(symbol)
    def typing(context: Any) -> Callable[[Any, Any], Any]:
        return lambda x, y: x if isinstance(x, Vector) and x == y else None

    @lower_builtin(symbol, Vector, Vector)
    def lowering(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return getattr(builder, instruction)(*values)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


def _element(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
    return builder.gep(pointer, [ir.IntType(64)(index) if isinstance(index, int) else index])


def _load(builder: ir.IRBuilder, formulas: _Formulas, pointer: ir.Value, index: ir.Value | int) -> ir.Value:
    address = builder.bitcast(_element(builder, pointer, index), formulas.type.as_pointer())
    return builder.load(address, align=4 if formulas.is_float else 8)


def _store(builder: ir.IRBuilder, formulas: _Formulas, pointer: ir.Value, index: ir.Value | int, x: ir.Value) -> None:
    address = builder.bitcast(_element(builder, pointer, index), formulas.type.as_pointer())
    builder.store(x, address, align=4 if formulas.is_float else 8)


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to elements of the type that ``like`` points to."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.inttoptr(values[0], context.get_value_type(like))

    return like(types.int64, like), lower


@intrinsic
def integers(typing: Any, source: Any) -> Any:
    """A pointer to any elements as a pointer to 64-bit integers."""
    result = types.CPointer(types.int64)

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.bitcast(values[0], context.get_value_type(result))

    return result(source), lower


@intrinsic
def integer_field(typing: Any, block: Any, index: Any) -> Any:
    """An integer of a block of 64-bit integers, which is given as a pointer of any type."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.load(_element(builder, builder.bitcast(values[0], ir.IntType(64).as_pointer()), values[1]))

    return types.int64(block, types.int64), lower


@intrinsic
def pointer_field(typing: Any, block: Any, index: Any) -> Any:
    """An address that stands in such a block, as a pointer of the block's type."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        integers = builder.bitcast(values[0], ir.IntType(64).as_pointer())
        return builder.inttoptr(builder.load(_element(builder, integers, values[1])), context.get_value_type(block))

    return block(block, types.int64), lower


@intrinsic
def take_number(typing: Any, source: Any, index: Any) -> Any:
    """Add 1 to an integer and return what it was; no two threads get the same."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.atomic_rmw("add", _element(builder, *values), ir.IntType(64)(1), "monotonic")

    return types.int64(source, types.int64), lower


@intrinsic
def load(typing: Any, source: Any, index: Any) -> Any:
    """16 neighbouring elements."""
    vector = _VECTORS[source.dtype]

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _load(builder, _Formulas(builder, vector), *values)

    return vector(source, types.int64), lower


@intrinsic
def store(typing: Any, target: Any, index: Any, x: Any) -> Any:
    """Write 16 neighbouring elements."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        _store(builder, _Formulas(builder, x), *values)
        return context.get_dummy_value()

    return types.void(target, types.int64, x), lower


@intrinsic
def read(typing: Any, source: Any, index: Any) -> Any:
    """One element."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.load(_element(builder, *values))

    return source.dtype(source, types.int64), lower


@intrinsic
def write(typing: Any, target: Any, index: Any, x: Any) -> Any:
    """Write one element."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        builder.store(values[2], _element(builder, *values[:2]))
        return context.get_dummy_value()

    return types.void(target, types.int64, target.dtype), lower


@intrinsic
def broadcast(typing: Any, source: Any, index: Any) -> Any:
    """One element in all lanes."""
    vector = _VECTORS[source.dtype]

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _Formulas(builder, vector).splat(builder.load(_element(builder, *values)))

    return vector(source, types.int64), lower


@intrinsic
def splat(typing: Any, value: Any, like: Any) -> Any:
    """A number in all lanes of a vector of the elements that ``like`` points to."""
    vector = _VECTORS[like.dtype]

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        number = context.cast(builder, values[0], types.float64, vector.element)
        return _Formulas(builder, vector).splat(number)

    return vector(types.float64, like), lower


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """``x y + z``."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _Formulas(builder, x).fma(*values)

    return x(x, x, x), lower


@intrinsic
def exp2_product(typing: Any, x: Any, y: Any) -> Any:
    """``2^(x y)``."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _Formulas(builder, x).exp2_product(*values)

    return x(x, x), lower


@intrinsic
def softplus_and_slope(typing: Any, z: Any) -> Any:
    """``log(1 + exp(z))`` and its derivative, the sigmoid."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return context.make_tuple(builder, signature.return_type, _Formulas(builder, z).softplus(values[0]))

    return types.UniTuple(z, 2)(z), lower


@intrinsic
def sum_lanes(typing: Any, source: Any, index: Any) -> Any:
    """The sums of each of 16 neighbouring vectors, as one vector."""
    vector = _VECTORS[source.dtype]

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, vector)
        first = _element(builder, *values)
        return formulas.sum_lanes([_load(builder, formulas, first, LANES * i) for i in range(LANES)])

    return vector(source, types.int64), lower


@intrinsic
def transpose(typing: Any, data: Any, index: Any, stride: Any) -> Any:
    """Transpose a square of 16 x 16 elements in place, whose rows are ``stride`` elements apart."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, _VECTORS[data.dtype])
        rows = [builder.add(values[1], builder.mul(values[2], ir.IntType(64)(i))) for i in range(LANES)]
        columns = formulas.transpose([_load(builder, formulas, values[0], row) for row in rows])
        for row, column in zip(rows, columns, strict=True):
            _store(builder, formulas, values[0], row, column)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.int64), lower


@intrinsic
def prefetch(typing: Any, source: Any, index: Any) -> Any:
    """Ask for the cache line of one element."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        byte = ir.IntType(8).as_pointer()
        arguments = [ir.Constant(_LANE, x) for x in (0, 3, 1)]  # to read, into all levels, data
        signature = ir.FunctionType(ir.VoidType(), [byte, *[_LANE] * 3])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), signature)
        builder.call(function, [builder.bitcast(_element(builder, *values), byte), *arguments])
        return context.get_dummy_value()

    return types.void(source, types.int64), lower
