"""Walks as keys: a walk visits the positions of a grid in the order of their keys.

A key is arithmetic on the coordinates of a position, so it works on NumPy's arrays and on tensors alike, also where the
sizes of the grid are symbols of an exporter. No two positions share a key.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_mamba_layers.walks.hilbert import hilbert_curve

Array = Any  # of integers, NumPy's or PyTorch's: coordinates of all positions, l

# Directions of each walk; the second half reverses the first.
DIRECTIONS = {"bidirectional": 2, "cross": 4, "snake": 4, "diagonal": 4, "windows": 4, "strided": 4, "hilbert": 4}
DIRECTIONS |= {"volume": 6}


def keys_of(name: str, grid: Sequence[int], parameters: Sequence[int], coordinates: Sequence[Array]) -> list[Array]:
    """The keys of the directions that are not reversed, from the coordinates of all positions along each dimension."""
    if name == "bidirectional":
        return list(coordinates)
    if name == "volume":
        (d, h, w), (a, i, j) = grid, coordinates
        return [(a * h + i) * w + j, (i * w + j) * d + a, (j * d + a) * h + i]
    if name == "hilbert":
        raise ValueError("walks.hilbert has no arithmetic for sizes that vary; use fixed sizes, or take another walk")
    (h, w), (i, j) = grid, coordinates
    if name == "diagonal":
        return [_diagonals(i, j, h, w), _diagonals(i, w - 1 - j, h, w)]
    along_rows = _ALONG_ROWS[name]
    return [along_rows(i, j, h, w, *parameters), along_rows(j, i, w, h, *parameters[::-1])]


def table_of(name: str, grid: Sequence[int], parameters: Sequence[int]) -> NDArray[np.int32]:  # k l
    """The position that each direction visits at each time."""
    length = int(np.prod(grid, dtype=np.int64))
    if length > np.iinfo(np.int32).max:
        raise ValueError(f"a grid of {tuple(grid)} has {length} positions, more than 2**31 - 1; use a smaller one")
    if name == "hilbert":
        forwards = [hilbert_curve(*grid), _transposed(hilbert_curve(*grid[::-1]), *grid)]
    else:
        longest = {"windows": grid, "strided": (max(grid),)}.get(name, ())  # longer ones give the same order
        parameters = [min(number, max(1, most)) for number, most in zip(parameters, longest, strict=True)]
        coordinates = list(np.indices(grid).reshape(len(grid), -1))
        forwards = [key.argsort() for key in keys_of(name, grid, parameters, coordinates)]
    return np.stack([*forwards, *(order[::-1] for order in forwards)]).astype(np.int32)


def _transposed(order: NDArray[np.int64], h: int, w: int) -> NDArray[np.int64]:
    """An order of the transposed grid, of ``w`` rows, in the positions of the grid."""
    return order % h * w + order // h


def _rows(i: Array, j: Array, h: int, w: int) -> Array:
    return i * w + j


def _snake(i: Array, j: Array, h: int, w: int) -> Array:
    return i * w + j + i % 2 * (w - 1 - 2 * j)


def _diagonals(i: Array, j: Array, h: int, w: int) -> Array:
    return (i + j) * h + i


def _windows(i: Array, j: Array, h: int, w: int, p: int, q: int) -> Array:
    window = i // p * ((w + q - 1) // q) + j // q
    return (window * p + i % p) * q + j % q


def _strided(i: Array, j: Array, h: int, w: int, step: int) -> Array:
    return (i % step * step + j % step) * (h * w) + i * w + j


_ALONG_ROWS: dict[str, Callable[..., Array]] = {
    "cross": _rows,
    "snake": _snake,
    "windows": _windows,
    "strided": _strided,
}
