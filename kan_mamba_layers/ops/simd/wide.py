"""Vectors of several times 16 lanes, tuples of them, and choices lane by lane, for Numba kernels.

Sizes that must be known when a kernel is compiled travel as types: a kernel is given a vector, whose lanes say how many
elements it takes at a time, and a tuple of vectors, whose length says how many it keeps in registers.
"""

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from kan_mamba_layers.ops.simd.vector import _VECTORS, LANES, Vector, _element, _Formulas, _load


def vector_registers(bits: int) -> int:
    """How many vectors of 16 elements of so many bits this machine's registers hold."""
    machine = llvm.get_process_triple()
    features = {} if machine.startswith(("arm", "aarch64")) else llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 32 * 512 // (LANES * bits)
    if features.get("avx"):
        return 16 * 256 // (LANES * bits)
    return (16 if features else 32) * 128 // (LANES * bits)


@intrinsic(prefer_literal=True)
def zeros(typing: Any, like: Any, lanes: Any) -> Any:
    """A vector of so many lanes, of the elements that ``like`` points to."""
    vector = Vector(like.dtype, lanes.literal_value)

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _Formulas(builder, vector).constant(0.0)

    return vector(like, lanes), lower


@intrinsic(prefer_literal=True)
def several(typing: Any, x: Any, count: Any) -> Any:
    """A tuple that holds a vector so many times, or as many times as another tuple holds its own."""
    result = types.UniTuple(x, count.count if isinstance(count, types.UniTuple) else count.literal_value)

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return context.make_tuple(builder, result, [values[0]] * result.count)

    return result(x, count), lower


@intrinsic
def lanes_of(typing: Any, x: Any) -> Any:
    """How many lanes a vector has."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return ir.IntType(64)(x.lanes)

    return types.int64(x), lower


@intrinsic
def advance(typing: Any, source: Any, index: Any) -> Any:
    """A pointer so many elements further on."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _element(builder, *values)

    return source(source, types.int64), lower


@intrinsic
def load_as(typing: Any, like: Any, source: Any, index: Any) -> Any:
    """As many neighbouring elements as ``like`` has lanes."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _load(builder, _Formulas(builder, like), *values[1:])

    return like(like, source, types.int64), lower


@intrinsic
def spread(typing: Any, like: Any, source: Any, index: Any) -> Any:
    """One element in all lanes of a vector such as ``like``."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return _Formulas(builder, like).splat(builder.load(_element(builder, *values[1:])))

    return like(like, source, types.int64), lower


@intrinsic
def add_rows(typing: Any, total: Any, rows: Any, row: Any, factors: Any, factor: Any, counted: Any) -> Any:
    """``total`` plus neighbouring rows times factors that are ``LANES`` apart; as many as ``counted`` has."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, total)
        result, rows, row, factors, factor, _ = values
        for k in range(counted.count):
            line = _load(builder, formulas, rows, builder.add(row, ir.IntType(64)(k * total.lanes)))
            result = formulas.fma(line, _spread(builder, formulas, factors, factor, k), result)
        return result

    return total(total, rows, types.int64, factors, types.int64, counted), lower


@intrinsic
def add_multiples(typing: Any, totals: Any, x: Any, factors: Any, factor: Any) -> Any:
    """Each of a tuple of vectors plus ``x`` times a factor of its own; the factors are ``LANES`` apart."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, x)
        _, x_value, factors, factor = values
        sums = []
        for k in range(totals.count):
            total = builder.extract_value(values[0], k)
            sums.append(formulas.fma(x_value, _spread(builder, formulas, factors, factor, k), total))
        return context.make_tuple(builder, totals, sums)

    return totals(totals, x, factors, types.int64), lower


@intrinsic
def without_first(typing: Any, vectors: Any, x: Any) -> Any:
    """A tuple of vectors without its first, and with ``x`` after its last."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        others = [builder.extract_value(values[0], k) for k in range(1, vectors.count)]
        return context.make_tuple(builder, vectors, [*others, values[1]])

    return vectors(vectors, x), lower


def _spread(builder: ir.IRBuilder, formulas: _Formulas, factors: ir.Value, factor: ir.Value, k: int) -> ir.Value:
    place = builder.add(factor, ir.IntType(64)(k * LANES))
    return formulas.splat(builder.load(_element(builder, factors, place)))


@intrinsic
def fold(typing: Any, x: Any) -> Any:
    """The sum of the parts of 16 lanes."""
    narrow = _VECTORS[x.element]

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, x)
        undefined = ir.Constant(formulas.type, ir.Undefined)
        parts = range(0, x.lanes, LANES)
        total, *others = (formulas.shuffle(values[0], undefined, range(at, at + LANES)) for at in parts)
        for part in others:
            total = builder.fadd(total, part)
        return total

    return narrow(x), lower


@intrinsic
def where_less(typing: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """``a`` where ``x < y``, else ``b``; where one is NaN, ``b``."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.select(builder.fcmp_ordered("<", *values[:2]), *values[2:])

    return x(x, x, x, x), lower


@intrinsic
def floor(typing: Any, x: Any) -> Any:
    """The largest integer that is not above."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, x)
        name = f"llvm.floor.v{x.lanes}f{32 if formulas.is_float else 64}"
        return builder.call(
            get_or_insert_function(builder.module, ir.FunctionType(formulas.type, [formulas.type]), name), values
        )

    return x(x), lower


@intrinsic
def sigmoid(typing: Any, x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, x)
        one = formulas.constant(1.0)
        negative = builder.fcmp_ordered("<", values[0], formulas.constant(0.0))
        e = formulas.exp(builder.select(negative, values[0], builder.fneg(values[0])))
        return builder.fdiv(builder.select(negative, e, one), builder.fadd(one, e))

    return x(x), lower


@intrinsic
def write_integers(typing: Any, target: Any, index: Any, x: Any) -> Any:
    """Write whole numbers as integers of the size of an element."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        formulas = _Formulas(builder, x)
        address = builder.bitcast(_element(builder, *values[:2]), formulas.integers.as_pointer())
        builder.store(builder.fptosi(values[2], formulas.integers), address, align=4 if formulas.is_float else 8)
        return context.get_dummy_value()

    return types.void(target, types.int64, x), lower


@intrinsic
def read_integer(typing: Any, source: Any, index: Any) -> Any:
    """Such an integer."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        width = ir.IntType(32 if source.dtype is types.float32 else 64)
        number = builder.load(builder.bitcast(_element(builder, *values), width.as_pointer()))
        return number if width.width == 64 else builder.sext(number, ir.IntType(64))

    return types.int64(source, types.int64), lower


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set, of an integer that is not 0."""

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), lower
