"""Turns functions of the Numba vectors into C functions of NumPy arrays, and measures their results."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import cfunc, njit, types

Array = np.ndarray
LONG = np.longdouble  # more precise than float64 on x86; elsewhere at least as precise
FLOATS = (np.float32, np.float64)
EPS = {np.float32: 2.0**-24, np.float64: 2.0**-53}  # one rounding: half the distance from 1 to the next number

both = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])


def callable_from_c(code: Any) -> Callable[..., None]:
    """Numba's C function of two addresses and a number, called without the GIL."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(code.address)
    function.code = code  # keeps the machine code alive
    return function


@cache
def built(kernel: Callable[..., None], dtype: type) -> Callable[[Array, Array, int], None]:
    """A kernel as a C function of two arrays and a number."""
    element = types.float32 if dtype is np.float32 else types.float64
    signature = types.void(types.CPointer(element), types.CPointer(element), types.int64)
    body = njit(error_model="numpy")(kernel)

    def entry(a, out, number):
        body(a, out, number)

    function = callable_from_c(cfunc(signature, error_model="numpy")(entry))

    def call(a: Array, out: Array, number: int) -> None:
        assert a.dtype == out.dtype == dtype and a.flags.c_contiguous and out.flags.c_contiguous
        function(a.ctypes.data, out.ctypes.data, number)

    return call


def relative(actual: Array, expected: Array) -> float:
    return float(np.max(np.abs(actual.astype(LONG) - expected) / np.abs(expected)))
