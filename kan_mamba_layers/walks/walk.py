"""The class of walks, what two of them have in common, and the tables of the positions they visit."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kan_mamba_layers._check import check_int, check_sizes
from kan_mamba_layers.walks.cache import TableCache
from kan_mamba_layers.walks.keys import DIRECTIONS, table_of

_KEPT = 32  # sets of walks
_TABLES = TableCache(most_bytes=2**30)  # by walks and device


class Table:
    """Orders of a user, checked to be permutations; equal if they are the same."""

    def __init__(self, orders: NDArray[np.int32]) -> None:  # k l
        with torch.inference_mode(False):  # or a later call could not save it for its gradient
            self.orders = torch.from_numpy(orders)
        self.digest = hashlib.blake2b(repr(orders.shape).encode() + orders.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.orders.numpy(),)


class Part(NamedTuple):
    """A walk of this library by its name and what it takes besides the sizes, or orders of a user."""

    name: str
    parameters: tuple[int, ...] = ()
    table: Table | None = None


def _directions_of(part: Part) -> int:
    """How many orders it has; a function, since PyTorch 2.4 compiles no property of a NamedTuple."""
    return DIRECTIONS[part.name] if part.table is None else part.table.orders.shape[0]


class Walks:
    """Orders in which the positions of a grid are visited, one for each direction of a scan.

    The functions of :mod:`kan_mamba_layers.walks` make them. They cannot be changed; two are equal if they were made
    the same way, or from the same orders. ``a + b`` has the directions of both. Tables are made when they are first
    needed, and kept for the next call, 1 GiB of them at most.

    Attributes:
        grid: the sizes of the grid.
        orders: the positions in the order of each direction, ``k l``, counted from 0 with the last dimension of the
            grid fastest: an int64 tensor on the CPU, a new one each time.

    Example:
        >>> from kan_mamba_layers import walks
        >>> both = walks.snake(2, 3) + walks.diagonal(2, 3)
        >>> both, len(both)
        (walks.snake(2, 3) + walks.diagonal(2, 3), 8)
        >>> both.orders[0].tolist()
        [0, 1, 2, 5, 4, 3]
    """

    def __init__(self, grid: tuple[int, ...], parts: tuple[Part, ...]) -> None:
        self._grid = grid
        self._parts = parts

    @property
    def grid(self) -> tuple[int, ...]:
        return self._grid

    @property
    def parts(self) -> tuple[Part, ...]:
        """What ``+`` has joined."""
        return self._parts

    @property
    def is_cross(self) -> bool:
        """Whether these are the four directions of ``cross``, which need no table."""
        return len(self._parts) == 1 and self._parts[0].name == "cross"

    @property
    def orders(self) -> Tensor:  # k l
        return self.on(torch.device("cpu")).to(torch.int64)

    def on(self, device: torch.device) -> Tensor:  # k l
        """The table on a device, int32: one tensor for all calls, not to be written to."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            return self.made_on(device)  # so that a second trace, which checks the first, makes it too
        return _TABLES.get((self, device), lambda: self.made_on(device))

    def made_on(self, device: torch.device) -> Tensor:  # k l
        """A table of its own on a device, int32."""
        with torch.inference_mode(False):  # or a later call could not save it for its gradient
            table = torch.from_numpy(self._table()).to(device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will read it too
        return table

    def _table(self) -> NDArray[np.int32]:  # k l
        grid = self._grid
        return np.concatenate(
            [
                table_of(part.name, grid, part.parameters) if part.table is None else part.table.orders.numpy()
                for part in self._parts
            ]
        )

    def __len__(self) -> int:
        return sum(_directions_of(part) for part in self._parts)

    def __add__(self, other: object) -> "Walks":
        if not isinstance(other, Walks):
            return NotImplemented
        if other.grid != self.grid:
            raise ValueError(
                f"walks of one set visit one grid, got {self!r} of {self.grid} and {other!r} of {other.grid}; "
                "make both with the same sizes"
            )
        return make(self._grid, self._parts + other._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Walks) and self._grid == other._grid and self._parts == other._parts

    def __hash__(self) -> int:
        return hash((self._grid, self._parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self._grid, self._parts)

    def __copy__(self) -> "Walks":
        return self

    def __deepcopy__(self, memo: Any) -> "Walks":
        return self

    def __repr__(self) -> str:
        return " + ".join(self._called(part) for part in self._parts)

    def _called(self, part: Part) -> str:
        if part.table is not None:
            count, length = part.table.orders.shape
            return f"walks.from_order(<{count} x {length}>, grid={self._grid})"
        parameters = [part.parameters] if part.name == "windows" else part.parameters
        return f"walks.{part.name}({', '.join(map(str, (*self._grid, *parameters)))})"


def make(grid: tuple[int, ...], parts: tuple[Part, ...]) -> Walks:
    """The walks that were made before, if they are still kept."""
    if torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in grid):
        return Walks(grid, parts)
    return _kept(grid, parts)


@lru_cache(maxsize=_KEPT)
def _kept(grid: tuple[int, ...], parts: tuple[Part, ...]) -> Walks:
    return Walks(grid, parts)


def library_walks(name: str, sizes: dict[str, int], parameters: tuple[int, ...] = ()) -> Walks:
    """A walk of this library through a grid of the given sizes."""
    return make(tuple(checked_size(letter, size) for letter, size in sizes.items()), (Part(name, parameters),))


def checked_size(name: str, value: Any) -> int:
    """A positive integer, or one of a compiler's symbols for it."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # type: ignore[attr-defined]
        value = int(value)  # a trace has one table
    check_int(name, value, 1)
    return value if torch.compiler.is_compiling() else int(value)  # int() would ask a compiler for the number


def walks_along(order: Any, grid: Sequence[int] | None) -> Walks:
    """Walks along orders of a user."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "walks.from_order checks the values of an order, which compiled code does not know; make the walks outside"
        )
    table = np.atleast_2d(_integers(order))
    if table.ndim != 2 or not table.size:
        raise ValueError(
            f"order must have shape l or k l, and positions, got {table.shape}; pass one row per direction"
        )
    length = table.shape[1]
    if grid is None:
        grid = (length,)
    check_sizes("grid", grid, 1, 8)
    sizes = tuple(map(int, grid))
    if prod(sizes) != length:
        raise ValueError(f"order visits {length} positions and grid={sizes} has {prod(sizes)}; pass the grid's sizes")
    for k, row in enumerate(table):
        _check_permutation(f"order[{k}]", row)
    return make(sizes, (Part("from_order", (), Table(np.array(table, np.int32))),))


def _integers(order: Any) -> NDArray[Any]:
    array = order.detach().cpu().numpy() if isinstance(order, Tensor) else np.asarray(order)
    if array.dtype.kind not in "iu":
        raise TypeError(f"order must hold integers, got {array.dtype}; pass positions such as [2, 0, 1]")
    return array


def _check_permutation(name: str, row: NDArray[Any]) -> None:
    last = len(row) - 1
    if row.min() < 0 or row.max() > last:
        wrong = row[(row < 0) | (row > last)][0]
        raise ValueError(f"{name} is no permutation of 0 ... {last}: it holds {wrong}; number positions from 0")
    visits = np.bincount(row, minlength=len(row))
    if (visits != 1).any():
        position = int(np.argmax(visits != 1))
        raise ValueError(
            f"{name} is no permutation of 0 ... {last}: it holds {position} {visits[position]} times; "
            "visit every position once"
        )
