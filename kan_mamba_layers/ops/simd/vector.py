"""Vectors as values of Numba kernels, with arithmetic, loads and stores.

Kernels address memory by typed pointers, made from an integer address, and by indices counted in elements. Sizes that
must be known when a kernel is compiled travel as types: a vector's number of lanes says how many elements a kernel
takes at a time, and a tuple's length how many vectors it keeps in registers.
"""

import operator
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, type_callable

from kan_mamba_layers.ops.simd.lanes import INT64, LANES, Lanes, Vector, vector_registers

__all__ = ["LANES", "Vector", "vector_registers"]

_INTEGERS = types.CPointer(types.int64)


def _instruction(result: Callable[..., types.Type], *, literal: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that builds instructions callable from kernels.

    ``result`` gives the type of what it returns from the types of its arguments. It is given a builder for the vectors
    in question, then its arguments. Numbers among them are converted: integers to 64 bits, others to the element type.
    """

    def decorate(build: Callable[..., Any]) -> Any:
        @wraps(build)
        def define(typing: Any, *arguments: Any) -> Any:
            returned = result(*arguments)
            vector = next((x for x in (returned, *arguments) if isinstance(x, Vector)), None)
            dtypes = (x.dtype for x in arguments if hasattr(x, "dtype"))
            element, lanes = (vector.element, vector.lanes) if vector else (next(dtypes, types.int64), LANES)

            def lower(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
                built = build(Lanes(builder, element, lanes), *values)
                if isinstance(returned, types.UniTuple):
                    vectors = built if isinstance(built, list) else [built] * returned.count
                    return context.make_tuple(builder, returned, vectors)
                return context.get_dummy_value() if built is None else built

            return returned(*(_converted(x, element) for x in arguments)), lower

        return intrinsic(prefer_literal=literal)(define)

    return decorate


def _converted(argument: types.Type, element: types.Type) -> types.Type:
    if isinstance(argument, types.Literal) or not isinstance(argument, types.Number):
        return argument
    return types.int64 if isinstance(argument, types.Integer) else element


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


# What kernels call: the type of the result from those of the arguments, and how it is built. Vectors have 16 lanes, or,
# where a vector comes first, as many as that one.

offset = _instruction(lambda source, index: source)(Lanes.at)
read = _instruction(lambda source, index: source.dtype)(Lanes.read)
write = _instruction(lambda target, index, x: types.void)(Lanes.write)
load = _instruction(lambda source, index: Vector(source.dtype))(Lanes.load)
store = _instruction(lambda target, index, x: types.void)(Lanes.store)
broadcast = _instruction(lambda source, index: Vector(source.dtype))(Lanes.broadcast)
splat = _instruction(lambda value, like: Vector(like.dtype))(lambda lanes, value, like: lanes.splat(value))
fma = _instruction(lambda x, y, z: x)(Lanes.fma)
exp2_product = _instruction(lambda x, y: x)(Lanes.exp2_product)
softplus_and_slope = _instruction(lambda z: types.UniTuple(z, 2))(Lanes.softplus_and_slope)
sigmoid = _instruction(lambda x: x)(Lanes.sigmoid)
floor = _instruction(lambda x: x)(Lanes.floor)
where_less = _instruction(lambda x, y, a, b: x)(Lanes.where_less)
sum_lanes = _instruction(lambda source, index: Vector(source.dtype))(Lanes.sum_lanes)
transpose = _instruction(lambda data, index, stride: types.void)(Lanes.transpose)


@_instruction(lambda address, like: types.CPointer(like.dtype))
def pointer(lanes: Lanes, address: ir.Value, like: ir.Value) -> ir.Value:
    """An address as a pointer to elements of the type that ``like`` points to."""
    return lanes.builder.inttoptr(address, lanes.element.as_pointer())


@_instruction(lambda source: _INTEGERS)
def integers(lanes: Lanes, source: ir.Value) -> ir.Value:
    """A pointer to any elements as a pointer to 64-bit integers."""
    return lanes.builder.bitcast(source, INT64.as_pointer())


@_instruction(lambda source: types.int64)
def is_present(lanes: Lanes, source: ir.Value) -> ir.Value:
    """Whether an address is not 0."""
    return lanes.builder.ptrtoint(source, INT64)


@_instruction(lambda source, index: types.int64)
def read_integer(lanes: Lanes, source: ir.Value, index: ir.Value) -> ir.Value:
    """An integer of the size of an element."""
    width = ir.IntType(lanes.bits)
    number = lanes.builder.load(lanes.builder.bitcast(lanes.at(source, index), width.as_pointer()))
    return number if lanes.bits == 64 else lanes.builder.sext(number, INT64)


@_instruction(lambda target, index, x: types.void)
def write_integers(lanes: Lanes, target: ir.Value, index: ir.Value, x: ir.Value) -> None:
    """Write a vector of whole numbers as such integers."""
    lanes.store(target, index, lanes.builder.fptosi(x, lanes.integers))


@_instruction(lambda counter, index: types.int64)
def fetch_increment(lanes: Lanes, counter: ir.Value, index: ir.Value) -> ir.Value:
    """Add 1 to an integer atomically, and return what it was."""
    return lanes.builder.atomic_rmw("add", lanes.at(counter, index), INT64(1), "monotonic")


@_instruction(lambda source, index: types.void)
def prefetch(lanes: Lanes, source: ir.Value, index: ir.Value) -> None:
    """Prefetch the cache line of one element."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    options = [number(x) for x in (0, 3, 1)]  # to read, into all levels, data
    signature = ir.FunctionType(ir.VoidType(), [byte, *[number] * 3])
    function = lanes.builder.module.declare_intrinsic("llvm.prefetch", (byte,), signature)
    lanes.builder.call(function, [lanes.builder.bitcast(lanes.at(source, index), byte), *options])


@_instruction(lambda mask: types.int64)
def lowest_bit(lanes: Lanes, mask: ir.Value) -> ir.Value:
    """Number of the lowest bit that is set, of an integer other than 0."""
    return lanes.builder.cttz(mask, ir.IntType(1)(1))


@_instruction(lambda like, source, index: like)
def load_as(lanes: Lanes, like: ir.Value, source: ir.Value, index: ir.Value) -> ir.Value:
    """As many neighbouring elements as ``like`` has lanes."""
    return lanes.load(source, index)


@_instruction(lambda like, source, index: like)
def broadcast_as(lanes: Lanes, like: ir.Value, source: ir.Value, index: ir.Value) -> ir.Value:
    """One element in all lanes of a vector such as ``like``."""
    return lanes.broadcast(source, index)


@_instruction(lambda like, lanes: Vector(like.dtype, lanes.literal_value), literal=True)
def zeros(lanes: Lanes, like: ir.Value, count: ir.Value) -> ir.Value:
    """``count`` lanes of zeros, of the element type that ``like`` points to."""
    return lanes.constant(0.0)


@_instruction(lambda x: types.int64)
def lanes_of(lanes: Lanes, x: ir.Value) -> ir.Value:
    """Number of lanes of a vector."""
    return INT64(lanes.lanes)


@_instruction(lambda x: Vector(x.element))
def reduce_lanes(lanes: Lanes, x: ir.Value) -> ir.Value:
    """The sum of the 16-lane parts of a vector."""
    total, *others = (lanes.shuffle(x, x, range(i, i + LANES)) for i in range(0, x.type.count, LANES))
    for part in others:
        total = lanes.builder.fadd(total, part)
    return total


def _repeated(x: Vector, count: types.Type) -> types.UniTuple:
    return types.UniTuple(x, count.count if isinstance(count, types.UniTuple) else count.literal_value)


@_instruction(_repeated, literal=True)
def tuple_of(lanes: Lanes, x: ir.Value, count: ir.Value) -> ir.Value:
    """A tuple that repeats a vector, ``count`` times or as often as the tuple ``count`` is long."""
    return x


@_instruction(lambda vectors, x: vectors)
def shift_left(lanes: Lanes, vectors: ir.Value, x: ir.Value) -> list[ir.Value]:
    """A tuple of vectors without its first, and with ``x`` after its last."""
    return [*(lanes.builder.extract_value(vectors, k) for k in range(1, vectors.type.count)), x]


@_instruction(lambda total, rows, row, factors, factor, counted: total)
def add_rows(
    lanes: Lanes, total: ir.Value, rows: ir.Value, row: ir.Value, factors: ir.Value, factor: ir.Value, counted: ir.Value
) -> ir.Value:
    """``total`` plus neighbouring rows times factors that are ``LANES`` apart, one per vector of ``counted``."""
    rows, factors = lanes.at(rows, row), lanes.at(factors, factor)
    for k in range(counted.type.count):
        line = lanes.load(rows, k * lanes.lanes)
        total = lanes.fma(line, lanes.broadcast(factors, k * LANES), total)
    return total


@_instruction(lambda totals, x, factors, factor: totals)
def add_multiples(lanes: Lanes, totals: ir.Value, x: ir.Value, factors: ir.Value, factor: ir.Value) -> list[ir.Value]:
    """Each of a tuple of vectors plus ``x`` times a factor of its own; the factors are ``LANES`` apart."""
    factors, vectors = lanes.at(factors, factor), range(totals.type.count)
    multiples = [lanes.broadcast(factors, k * LANES) for k in vectors]
    return [lanes.fma(x, multiples[k], lanes.builder.extract_value(totals, k)) for k in vectors]
