"""The vector functions of the Numba kernels one by one, in both precisions, against NumPy in higher precision."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
from numba import cfunc, njit, types

from kan_mamba_layers.ops.simd import vector
from kan_mamba_layers.ops.simd.vector import LANES
from ops.simd.build import EPS, LONG, Array, both, built, callable_from_c, relative

SMALLEST_POWER = {np.float32: -126, np.float64: -1022}  # 2 to this power is the smallest normal number
LARGEST_POWER = {np.float32: 128, np.float64: 1024}  # 2 to this power overflows

# Kernels that read memory at `a` and write to `out`.


def run_exp2(a, out, count):
    for i in range(0, count, LANES):
        vector.store(out, i, vector.exp2_product(vector.load(a, i), vector.load(a, count + i)))


def run_softplus(a, out, count):
    for i in range(0, count, LANES):
        value, slope = vector.softplus_and_slope(vector.load(a, i))
        vector.store(out, i, value)
        vector.store(out, count + i, slope)


def run_arithmetic(a, out, count):
    x, y, z = vector.load(a, 0), vector.load(a, count), vector.load(a, 2 * count)
    vector.store(out, 0, x + y)
    vector.store(out, LANES, x - y)
    vector.store(out, 2 * LANES, x * y)
    vector.store(out, 3 * LANES, vector.fma(x, y, z))


def run_copy(a, out, index):
    vector.store(out, index, vector.load(a, index))


def run_elements(a, out, index):
    vector.write(out, index, vector.read(a, index + 1))
    vector.store(out, index + 1, vector.broadcast(a, index))
    vector.store(out, index + 1 + LANES, vector.splat(0.1, a))
    vector.prefetch(a, index)


def run_sum_lanes(a, out, index):
    vector.store(out, 0, vector.sum_lanes(a, index))


def run_transpose(a, out, stride):
    vector.transpose(out, 3, stride)


def run_pointers(a, out, count):
    vector.write(vector.pointer(vector.read(vector.integers(a), 0), out), count, 1.0)


def exp2_product(x: Any, y: Any, dtype: type) -> Array:
    x, y = np.broadcast_arrays(np.asarray(x, dtype), np.asarray(y, dtype))
    padded = np.zeros((2, -(-x.size // LANES) * LANES), dtype)
    padded[0, : x.size], padded[1, : x.size] = x.ravel(), y.ravel()
    out = np.full(padded.shape[1], np.nan, dtype)
    built(run_exp2, dtype)(padded, out, len(out))
    return out[: x.size].reshape(x.shape)


def softplus_and_slope(z: Array) -> tuple[Array, Array]:
    dtype = z.dtype.type
    padded = np.zeros(-(-z.size // LANES) * LANES, dtype)
    padded[: z.size] = z
    out = np.full((2, len(padded)), np.nan, dtype)
    built(run_softplus, dtype)(padded, out, len(padded))
    return out[0, : z.size], out[1, : z.size]


def numbers(dtype: type, low: float, high: float) -> st.SearchStrategy[Array]:
    width = 32 if dtype is np.float32 else 64
    element = st.floats(float(dtype(low)), float(dtype(high)), width=width)
    return st.lists(element, min_size=1, max_size=40).map(lambda values: np.array(values, dtype))


# Relative errors of the polynomials, plus a few roundings.
EXP2_BOUND = {np.float32: 2e-7, np.float64: 4e-16}
SOFTPLUS_BOUND = {np.float32: (3e-7, 3.5e-7), np.float64: (1e-15, 1e-15)}  # of the value and of the slope


class TestExp2:
    @both
    def test_every_power_is_a_power_of_two(self, dtype: type) -> None:
        powers = np.arange(SMALLEST_POWER[dtype], LARGEST_POWER[dtype])
        assert np.array_equal(exp2_product(powers, 1, dtype), np.ldexp(dtype(1), powers))

    @both
    def test_dense(self, dtype: type) -> None:
        low, high = SMALLEST_POWER[dtype] + 0.5, LARGEST_POWER[dtype] - 0.5
        for bounds in ((-1, 1), (-30, 2), (low, high)):
            x = np.linspace(*bounds, 200_000).astype(dtype)
            assert relative(exp2_product(x, 1, dtype), np.exp2(x.astype(LONG))) <= EXP2_BOUND[dtype]

    @both
    def test_the_product_is_not_rounded(self, dtype: type) -> None:
        """On machines with a fused multiply-add; elsewhere the rounding of the product enters, times ln 2."""
        draw = np.random.default_rng(0)
        x, y = draw.uniform(0, 10, 100_000).astype(dtype), draw.uniform(-10, 0, 100_000).astype(dtype)
        product = x.astype(LONG) * y.astype(LONG)
        error = relative(exp2_product(x, y, dtype), np.exp2(product))
        assert error <= EXP2_BOUND[dtype] + 0.7 * EPS[dtype] * 100 * (not fused())
        if fused() and dtype is np.float32:
            assert relative(np.exp2((x * y).astype(LONG)), np.exp2(product)) > 4 * EXP2_BOUND[dtype]

    @both
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_huge_products(self, dtype: type, sign: int) -> None:
        """Beyond the range of the exponent, up to products that overflow themselves, the result is 0 or infinity."""
        x = np.concatenate([np.logspace(np.log10(LARGEST_POWER[dtype] + 1), 30, 5000), [np.inf]]).astype(dtype)
        for factor in (1.0, 1e-3, 1e3):
            big = x[x.astype(LONG) * factor > LARGEST_POWER[dtype]]
            expected = np.full_like(big, np.inf if sign > 0 else 0.0)
            assert np.array_equal(exp2_product(big, sign * factor, dtype), expected)
            assert np.array_equal(exp2_product(-big, -sign * factor, dtype), expected)
        huge = np.full(3, np.finfo(dtype).max)
        assert np.array_equal(exp2_product(huge, sign * huge, dtype), np.full(3, np.inf if sign > 0 else 0.0))

    @both
    def test_edges_of_the_range(self, dtype: type) -> None:
        smallest, largest = SMALLEST_POWER[dtype], LARGEST_POWER[dtype]
        below = np.linspace(smallest - 60, smallest - 0.51, 1000)
        assert np.array_equal(exp2_product(below, 1, dtype), np.zeros(1000)), "denormal results are flushed to 0"
        assert np.isposinf(exp2_product([largest, largest + 0.3, largest + 1, largest + 5.5], 1, dtype)).all()
        # Within half a power of the edges the rounding of the exponent decides: the value, or 0 or infinity.
        at_bottom = np.linspace(smallest - 0.5, smallest, 1000).astype(dtype)
        value = exp2_product(at_bottom, 1, dtype)
        expected = np.exp2(at_bottom.astype(LONG))
        assert ((value == 0) | (np.abs(value - expected) <= 2e-6 * expected)).all()
        at_top = np.linspace(largest - 0.5, largest, 1000, endpoint=False).astype(dtype)
        value, expected = exp2_product(at_top, 1, dtype), np.exp2(at_top.astype(LONG))
        assert (np.isposinf(value) | (np.abs(value - expected) <= 2e-6 * expected)).all()

    @both
    def test_special_values(self, dtype: type) -> None:
        inf, nan, tiny = np.inf, np.nan, np.finfo(dtype).smallest_subnormal
        assert np.array_equal(exp2_product([0, -0.0, 0, 5, tiny, -tiny], [7, 3, -9, 0, 1, 1], dtype), np.ones(6))
        assert np.isnan(exp2_product([nan, nan, 1, inf, 0], [1, nan, nan, 0, -inf], dtype)).all()
        assert np.array_equal(exp2_product([-inf, inf, inf, -inf], [1, -2, 3, -4], dtype), [0, 0, inf, inf])

    @both
    @settings(max_examples=300)
    @given(data=st.data())
    def test_any_product(self, dtype: type, data: st.DataObject) -> None:
        x = data.draw(numbers(dtype, -1e30, 1e30))
        y = data.draw(numbers(dtype, -1e3, 1e3))[0]
        value, product = exp2_product(x, y, dtype).astype(LONG), x.astype(LONG) * LONG(y)
        inside = (product > SMALLEST_POWER[dtype]) & (product < LARGEST_POWER[dtype] - 0.5)
        expected = np.exp2(product[inside])
        allowed = EXP2_BOUND[dtype] + 0.7 * EPS[dtype] * np.abs(product[inside]) * (not fused())
        assert (np.abs(value[inside] - expected) <= allowed * expected).all()
        assert (value[product > LARGEST_POWER[dtype]] == np.inf).all()
        assert (value[product < SMALLEST_POWER[dtype] - 0.51] == 0).all()


class TestSoftplus:
    @staticmethod
    def expected(z: Array) -> tuple[Array, Array]:
        z = z.astype(LONG)
        e = np.exp(-np.abs(z))
        return np.maximum(z, 0) + np.log1p(e), np.where(z < 0, e, 1) / (1 + e)

    def check(self, z: Array) -> None:
        results = zip(softplus_and_slope(z), self.expected(z), SOFTPLUS_BOUND[z.dtype.type], strict=True)
        for actual, expected, bound in results:
            assert relative(actual, expected) <= bound

    @both
    @pytest.mark.parametrize("reach", [0.01, 1, 20, 87])
    def test_dense(self, dtype: type, reach: float) -> None:
        self.check(np.linspace(-reach, reach, 200_001).astype(dtype))

    @both
    def test_far_out(self, dtype: type) -> None:
        """softplus(z) is z for large z and 0 where it is too small for a float; no slope is NaN."""
        z = np.concatenate([np.linspace(20, 100, 5000), np.logspace(2, 30, 2000)]).astype(dtype)
        above, slope_above = softplus_and_slope(z)
        self.check(z)
        assert np.array_equal(above[z > 40], z[z > 40])
        assert (slope_above[z > 40] == 1).all()
        below, slope_below = softplus_and_slope(-z)
        for actual, expected in zip((below, slope_below), self.expected(-z), strict=True):
            normal = expected >= 2 * np.finfo(dtype).smallest_normal
            assert relative(actual[normal], expected[normal]) <= max(SOFTPLUS_BOUND[dtype])
            assert (actual[~normal] >= 0).all() and (actual[~normal] <= 4 * np.finfo(dtype).smallest_normal).all()

    @both
    def test_special_values(self, dtype: type) -> None:
        value, slope = softplus_and_slope(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], dtype))
        assert np.isposinf(value[0]) and value[1] == 0 and np.isnan(value[2]) and np.isnan(slope[2])
        assert slope[0] == 1 and slope[1] == 0
        assert relative(value[3:], np.log(LONG(2))) <= max(SOFTPLUS_BOUND[dtype])
        assert relative(slope[3:], LONG(0.5)) <= max(SOFTPLUS_BOUND[dtype])

    @both
    @given(data=st.data())
    def test_anywhere(self, dtype: type, data: st.DataObject) -> None:
        self.check(data.draw(numbers(dtype, -85, 100)))


@cache
def fused() -> bool:
    """Whether this machine multiplies and adds with a single rounding."""
    a, out = np.zeros((3, LANES), np.float64), np.zeros((4, LANES))
    a[0], a[1], a[2] = 1 + 2.0**-30, 1 + 2.0**-30, -(1 + 2.0**-29)
    built(run_arithmetic, np.float64)(a, out, LANES)
    return bool((out[3] == 2.0**-60).all())


class TestArithmetic:
    @both
    @settings(max_examples=60)
    @given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1.0, 1e15]))
    def test_sum_difference_product_fma(self, dtype: type, seed: int, scale: float) -> None:
        a = (np.random.default_rng(seed).standard_normal((3, LANES)) * scale).astype(dtype)
        out = np.zeros((4, LANES), dtype)
        built(run_arithmetic, dtype)(a, out, LANES)
        x, y, z = a
        assert np.array_equal(out[0], x + y)
        assert np.array_equal(out[1], x - y)
        assert np.array_equal(out[2], x * y)
        wide = x.astype(LONG) * y.astype(LONG) + z.astype(LONG)
        terms = np.abs(x * y).astype(LONG) + np.abs(z)
        assert (np.abs(out[3] - wide) <= 2 * EPS[dtype] * terms + np.finfo(dtype).smallest_subnormal).all()


class TestMemory:
    @both
    @pytest.mark.parametrize("index", range(0, 20))
    def test_loads_and_stores_at_any_element(self, dtype: type, index: int) -> None:
        """Addresses need no alignment beyond the size of an element."""
        a, out = np.arange(64, dtype=dtype), np.full(64, -1, dtype)
        built(run_copy, dtype)(a, out, index)
        expected = np.full(64, -1, dtype)
        expected[index : index + LANES] = a[index : index + LANES]
        assert np.array_equal(out, expected)

    @both
    def test_read_write_broadcast_splat(self, dtype: type) -> None:
        a, out = np.arange(64, dtype=dtype) / 3, np.full(64, -1, dtype)
        built(run_elements, dtype)(a, out, 5)
        assert out[5] == a[6] and (out[6:22] == a[5]).all() and (out[22:38] == dtype(0.1)).all()
        assert (out[:5] == -1).all() and (out[38:] == -1).all()

    @both
    def test_addresses_in_memory_become_pointers(self, dtype: type) -> None:
        target = np.zeros(8, dtype)
        address = np.array([target.ctypes.data], np.int64)
        built(run_pointers, dtype)(address.view(dtype), target.copy(), 3)
        assert np.array_equal(target, np.eye(8, dtype=dtype)[3])


class TestAcrossLanes:
    @both
    @settings(max_examples=60)
    @given(seed=st.integers(0, 2**31), index=st.integers(0, 7))
    @example(seed=0, index=0)
    def test_sum_lanes(self, dtype: type, seed: int, index: int) -> None:
        draw = np.random.default_rng(seed)
        a, out = draw.standard_normal(index + LANES**2 + 1).astype(dtype), np.zeros(LANES, dtype)
        built(run_sum_lanes, dtype)(a, out, index)
        square = a[index : index + LANES**2].reshape(LANES, LANES).astype(LONG)
        assert (np.abs(out - square.sum(1)) <= 4 * EPS[dtype] * np.abs(square).sum(1)).all(), "a tree of four additions"

    @both
    def test_sums_of_small_integers_are_exact(self, dtype: type) -> None:
        a = np.random.default_rng(0).integers(-1000, 1000, (LANES, LANES)).astype(dtype)
        out = np.zeros(LANES, dtype)
        built(run_sum_lanes, dtype)(a, out, 0)
        assert np.array_equal(out, a.sum(1))

    @both
    @pytest.mark.parametrize("stride", [16, 17, 32, 45])
    def test_transpose(self, dtype: type, stride: int) -> None:
        """In place, at any stride, without changing anything outside the square."""
        out = np.arange(3 + stride * LANES, dtype=dtype)
        expected = out.copy()
        square = np.lib.stride_tricks.as_strided(expected[3:], (LANES, LANES), (stride * out.itemsize, out.itemsize))
        square[:] = square.T.copy()
        built(run_transpose, dtype)(out[:1].copy(), out, stride)
        assert np.array_equal(out, expected)
        built(run_transpose, dtype)(out[:1].copy(), out, stride)
        assert np.array_equal(out, np.arange(3 + stride * LANES, dtype=dtype)), "transposing twice is the identity"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_take_every_number_once(threads: int) -> None:
    per_thread = 20_000

    @njit(nogil=True)
    def take(counter, taken, count):
        for i in range(count):
            vector.write(taken, i, vector.fetch_increment(counter, 1))

    pointer = types.CPointer(types.int64)

    @cfunc(types.void(pointer, pointer, types.int64))
    def entry(counter, taken, count):
        take(counter, taken, count)

    counter, taken = np.array([-7, 0, -7]), np.full((threads, per_thread), -1)

    function = callable_from_c(entry)

    def work(row: Array) -> None:
        function(counter.ctypes.data, row.ctypes.data, per_thread)

    workers = [threading.Thread(target=work, args=(row,)) for row in taken]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(60)
    assert np.array_equal(np.sort(taken, None), np.arange(threads * per_thread))
    assert (np.diff(taken, axis=1) > 0).all(), "ascending within each thread"
    assert counter.tolist() == [-7, threads * per_thread, -7]
