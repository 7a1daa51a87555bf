"""Wide vectors, tuples of vectors, lane-wise choices and functions against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
import llvmlite.binding as llvm
from numba import njit

from kan_mamba_layers.ops.simd import vector
from kan_mamba_layers.ops.simd.vector import LANES
from ops.simd.build import EPS, LONG, Array, both, built, relative

WIDTHS = (16, 32, 64)
COUNT = 3  # vectors per tuple
SIGMOID_BOUND = {np.float32: 3e-7, np.float64: 1e-15}

# Kernels that read memory at `a` and write to `out`.


def run_choices(a, out, count):
    for i in range(0, count, LANES):
        x, y = vector.load(a, i), vector.load(a, count + i)
        vector.store(out, i, vector.where_less(x, y, vector.load(a, 2 * count + i), vector.load(a, 3 * count + i)))


def run_functions(a, out, count):
    for i in range(0, count, LANES):
        vector.store(out, i, vector.floor(vector.load(a, i)))
        vector.store(out, count + i, vector.sigmoid(vector.load(a, i)))


def run_quotients(a, out, count):
    vector.store(out, 0, vector.load(a, 0) / vector.load(a, count))


def run_integers(a, out, count):
    for i in range(0, count, LANES):
        vector.write_integers(out, i + 1, vector.load(a, i))
    for i in range(count):
        vector.write(out, count + 1 + i, float(2 * vector.read_integer(out, i + 1)))


def run_advance(a, out, count):
    vector.write(vector.offset(out, count), 2, vector.read(vector.offset(a, count), 1))


def run_lowest_bits(a, out, count):
    for i in range(count):
        vector.write(out, i, float(vector.lowest_bit(vector.read(vector.integers(a), i))))


def wide_kernel(lanes: int) -> Callable[..., None]:
    """Calls every function of wide vectors once; `index` is where they begin in `a`."""

    @njit(error_model="numpy")
    def run(a, out, index, zero):
        width = vector.lanes_of(zero)
        x = vector.load_as(zero, a, index)
        vector.store(out, 0, zero)
        vector.store(out, width, x)
        vector.store(out, 2 * width, vector.broadcast_as(zero, a, index + 5))
        tuple_ = vector.tuple_of(x, COUNT)
        vector.store(out, 3 * width, vector.add_rows(x, a, index + 3, a, index + 7, tuple_))
        sums = vector.add_multiples(vector.tuple_of(x, tuple_), vector.load_as(zero, a, index + 1), a, index)
        for k in range(COUNT):
            vector.store(out, (4 + k) * width, sums[k])
        vector.store(out, (4 + COUNT) * width, vector.reduce_lanes(x))
        vector.write(out, (4 + COUNT) * width + LANES, float(width))

    def kernel(a, out, index):
        run(a, out, index, vector.zeros(a, lanes))

    return kernel


WIDE = {lanes: wide_kernel(lanes) for lanes in WIDTHS}


class TestWideVectors:
    @both
    @pytest.mark.parametrize("lanes", WIDTHS)
    @pytest.mark.parametrize("index", [0, 1, 6])
    def test_everything(self, lanes: int, index: int, dtype: type) -> None:
        """At any element, without touching what lies beside."""
        a = np.random.default_rng(lanes + index).standard_normal(500).astype(dtype)
        out = np.full(9 * 64, -7, dtype)
        built(WIDE[lanes], dtype)(a, out, index)
        size = (4 + COUNT) * lanes
        zero, x, spread, rows, *multiples = out[:size].reshape(-1, lanes)
        own = a[index : index + lanes]
        assert not zero.any() and np.array_equal(x, own) and (spread == a[index + 5]).all()
        lines = np.stack([a[index + 3 + k * lanes :][:lanes] for k in range(COUNT)]).astype(LONG)
        factors = a[index + 7 :: LANES][:COUNT].astype(LONG)
        terms = np.abs(own) + np.abs(factors) @ np.abs(lines)
        assert (np.abs(rows - (own + factors @ lines)) <= 2 * COUNT * EPS[dtype] * terms).all()
        other = a[index + 1 :][:lanes].astype(LONG)
        for k, total in enumerate(multiples):
            factor = LONG(a[index + k * LANES])
            terms = np.abs(own) + np.abs(factor * other)
            assert (np.abs(total - (own + factor * other)) <= 2 * EPS[dtype] * terms).all()
        parts = own.reshape(-1, LANES).astype(LONG)
        folded = out[size : size + LANES]
        assert (np.abs(folded - parts.sum(0)) <= 4 * EPS[dtype] * np.abs(parts).sum(0)).all()
        assert out[size + LANES] == lanes and (out[size + LANES + 1 :] == -7).all()


class TestChoices:
    @both
    def test_where_less(self, dtype: type) -> None:
        """Every pair of special values, including signed zeros: comparing with NaN is always false."""
        special = np.array([-np.inf, -1, -0.0, 0.0, 1e-40, 1, np.inf, np.nan], dtype)
        x, y = (v.ravel() for v in np.meshgrid(special, special))
        a, b = np.arange(64, dtype=dtype), -np.arange(64, dtype=dtype) - 1
        out = np.zeros(64, dtype)
        built(run_choices, dtype)(np.stack([x, y, a, b]), out, 64)
        assert np.array_equal(out, np.where(x < y, a, b))

    @both
    def test_quotient_is_rounded_once(self, dtype: type) -> None:
        draw = np.random.default_rng(0)
        for scale in (1e-30, 1.0, 1e30):
            a = (draw.standard_normal((2, LANES)) * [[scale], [1]]).astype(dtype)
            a[:, :4] = [[1, -1, 0, np.nan], [0, 0, 0, 1]]
            out = np.zeros(LANES, dtype)
            built(run_quotients, dtype)(a, out, LANES)
            with np.errstate(divide="ignore", invalid="ignore"):
                assert np.array_equal(out, a[0] / a[1], equal_nan=True)


class TestFunctions:
    @staticmethod
    def both_of(x: Array) -> tuple[Array, Array]:
        padded = np.zeros(-(-x.size // LANES) * LANES, x.dtype)
        padded[: x.size] = x
        out = np.full((2, len(padded)), np.nan, x.dtype)
        built(run_functions, x.dtype.type)(padded, out, len(padded))
        return out[0, : x.size], out[1, : x.size]

    @both
    def test_floor(self, dtype: type) -> None:
        whole = np.arange(-300, 300).astype(dtype)
        next_to = [np.nextafter(whole, dtype(side)) for side in (-np.inf, np.inf)]
        special = np.array([np.inf, -np.inf, np.nan, -0.0, 1e30, -1e30, 2.0**23 + 1, 2.0**52 + 1, 1e-45], dtype)
        x = np.concatenate([whole, *next_to, special])
        assert np.array_equal(self.both_of(x)[0], np.floor(x), equal_nan=True)

    @both
    @settings(max_examples=60)
    @given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 5.0, 1e6]))
    def test_floor_anywhere(self, dtype: type, seed: int, scale: float) -> None:
        x = (np.random.default_rng(seed).standard_normal(64) * scale).astype(dtype)
        assert np.array_equal(self.both_of(x)[0], np.floor(x))

    @both
    @pytest.mark.parametrize("reach", [0.01, 1, 20, 85])
    def test_sigmoid(self, dtype: type, reach: float) -> None:
        x = np.linspace(-reach, reach, 200_001).astype(dtype)
        assert relative(self.both_of(x)[1], 1 / (1 + np.exp(-x.astype(LONG)))) <= SIGMOID_BOUND[dtype]

    @both
    def test_sigmoid_far_out(self, dtype: type) -> None:
        """0 where the value is too small for a float, at most 1, and NaN only for NaN."""
        x = np.concatenate([np.logspace(2, 30, 2000), [np.inf]]).astype(dtype)
        above, below = self.both_of(x)[1], self.both_of(-x)[1]
        assert (above == 1).all() and (below >= 0).all() and (below[x > 800] == 0).all()
        expected = np.exp(-x.astype(LONG))
        assert (np.abs(below - expected) <= 4 * np.finfo(dtype).smallest_normal + 1e-6 * expected).all()
        assert np.isnan(self.both_of(np.array([np.nan], dtype))[1]).all()
        assert (self.both_of(np.array([0.0, -0.0], dtype))[1] == 0.5).all()


class TestMemory:
    @both
    def test_integers_next_to_numbers(self, dtype: type) -> None:
        """Integers of the width of an element, of both signs, at any element."""
        a = np.concatenate([np.arange(-20, 20), [2.0**22, -(2.0**22), 1000, 99999, 0, 0, -1, 1]]).astype(dtype)
        out = np.full(2 * len(a) + 3, -7, dtype)
        built(run_integers, dtype)(a, out, len(a))
        whole = out[1 : 1 + len(a)].view(np.int32 if dtype is np.float32 else np.int64)
        assert np.array_equal(whole, a.astype(np.int64))
        assert np.array_equal(out[len(a) + 1 : -2], 2 * a)
        assert out[0] == -7 and (out[-2:] == -7).all()

    @both
    def test_advance(self, dtype: type) -> None:
        a, out = np.arange(20, dtype=dtype), np.full(20, -7, dtype)
        built(run_advance, dtype)(a, out, 9)
        expected = np.full(20, -7, dtype)
        expected[11] = 10
        assert np.array_equal(out, expected)

    @both
    def test_lowest_bit(self, dtype: type) -> None:
        draw = np.random.default_rng(0)
        bits = draw.integers(0, 64, 500)
        masks = np.concatenate([2 ** np.arange(64, dtype=np.uint64), np.uint64(1) << bits.astype(np.uint64)])
        masks[64:] |= masks[64:] << draw.integers(0, 63, 500).astype(np.uint64)
        masks[-1] = np.uint64(2**64 - 1)
        out = np.full(len(masks), -1, dtype)
        built(run_lowest_bits, dtype)(masks.view(dtype).copy(), out, len(masks))
        expected = [(int(m) & -int(m)).bit_length() - 1 for m in masks]
        assert np.array_equal(out, np.array(expected, dtype))


def test_registers_hold_whole_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number of 16-lane vectors that fit into 32 registers of 512 bits, 16 of 256, and 32 or 16 of 128."""
    here = vector.vector_registers(32)
    assert here >= 4 and vector.vector_registers(64) == here // 2
    machines = {
        ("x86_64-unknown-linux-gnu", ("avx", "avx2", "avx512f")): 32,
        ("x86_64-unknown-linux-gnu", ("avx", "avx2")): 8,
        ("x86_64-pc-windows-msvc", ("sse2",)): 4,
        ("aarch64-unknown-linux-gnu", ("neon",)): 8,
        ("arm64-apple-darwin22.1.0", ()): 8,
    }
    for (triple, features), expected in machines.items():
        monkeypatch.setattr(llvm, "get_process_triple", lambda triple=triple: triple)
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda features=features: dict.fromkeys(features, True))
        assert vector.vector_registers(32) == expected, triple
