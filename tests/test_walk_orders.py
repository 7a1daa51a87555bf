"""The orders of walks against loops over pixels; what neighbours and reversals must be; caching, copies, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import says
from kan_mamba_layers import walks
from kan_mamba_layers.walks import walk
from kan_mamba_layers.walks.cache import TableCache

Pixels = list[tuple[int, ...]]
SIZES = st.integers(1, 13)


def rows(h: int, w: int) -> Pixels:
    return [(i, j) for i in range(h) for j in range(w)]


def snake(h: int, w: int) -> Pixels:
    return [(i, j) for i in range(h) for j in (range(w) if i % 2 == 0 else range(w)[::-1])]


def diagonals(h: int, w: int) -> Pixels:
    return [(i, s - i) for s in range(h + w - 1) for i in range(h) if 0 <= s - i < w]


def windows(h: int, w: int, p: int, q: int) -> Pixels:
    corners = [(i, j) for i in range(0, h, p) for j in range(0, w, q)]
    return [(i, j) for a, b in corners for i in range(a, min(a + p, h)) for j in range(b, min(b + q, w))]


def strided(h: int, w: int, step: int) -> Pixels:
    starts = [(a, b) for a in range(step) for b in range(step)]
    return [(i, j) for a, b in starts for i in range(a, h, step) for j in range(b, w, step)]


def swapped(pixels: Pixels) -> Pixels:
    return [(j, i) for i, j in pixels]


# For an image of h rows and w columns and two numbers: walks, and the pixels of their first two directions.
IMAGES: dict[str, Callable[[int, int, int, int], tuple[walks.Walks, Pixels, Pixels]]] = {
    "cross": lambda h, w, p, q: (walks.cross(h, w), rows(h, w), swapped(rows(w, h))),
    "snake": lambda h, w, p, q: (walks.snake(h, w), snake(h, w), swapped(snake(w, h))),
    "diagonal": lambda h, w, p, q: (
        walks.diagonal(h, w),
        diagonals(h, w),
        [(i, w - 1 - j) for i, j in diagonals(h, w)],
    ),
    "windows": lambda h, w, p, q: (
        walks.windows(h, w, (p, q)),
        windows(h, w, p, q),
        swapped(windows(w, h, q, p)),
    ),
    "strided": lambda h, w, p, q: (walks.strided(h, w, p), strided(h, w, p), swapped(strided(w, h, p))),
}


def visited(of: walks.Walks) -> list[Pixels]:
    """The coordinates that each direction visits."""
    return [
        list(zip(*(c.tolist() for c in np.unravel_index(order, of.grid)), strict=True)) for order in of.orders.numpy()
    ]


@pytest.mark.parametrize("name", IMAGES)
@given(h=SIZES, w=SIZES, p=st.integers(1, 5), q=st.integers(1, 5))
@example(h=1, w=13, p=2, q=3)
@example(h=11, w=1, p=3, q=2)
def test_images(name: str, h: int, w: int, p: int, q: int) -> None:
    found, first, second = IMAGES[name](h, w, p, q)
    assert found.grid == (h, w) and len(found) == 4
    assert visited(found) == [first, second, first[::-1], second[::-1]]


@given(d=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5))
def test_volumes(d: int, h: int, w: int) -> None:
    forwards = [
        [(a, i, j) for a in range(d) for i in range(h) for j in range(w)],
        [(a, i, j) for i in range(h) for j in range(w) for a in range(d)],
        [(a, i, j) for j in range(w) for a in range(d) for i in range(h)],
    ]
    found = walks.volume(d, h, w)
    assert len(found) == 6
    assert visited(found) == [*forwards, *(order[::-1] for order in forwards)]


@given(l=st.integers(1, 30))
def test_sequences(l: int) -> None:
    assert walks.bidirectional(l).orders.tolist() == [list(range(l)), list(range(l))[::-1]]


CURVES = {
    (4, 4): "0 1 5 4 8 12 13 9 10 14 15 11 7 6 2 3",
    (2, 6): "0 6 7 1 2 8 9 3 4 10 11 5",
    (7, 5): "0 5 10 11 6 1 2 7 8 3 4 9 14 19 18 13 12 17 22 23 24 29 34 33 28 27 32 31 26 21 16 15 20 25 30",
    (9, 4): "0 1 5 4 8 9 13 12 16 17 21 20 24 25 29 28 32 33 34 35 31 30 26 27 23 22 18 19 15 14 10 11 7 6 2 3",
    (13, 2): "0 2 4 6 8 10 12 14 16 18 20 22 24 25 23 21 19 17 15 13 11 9 7 5 3 1",
}


class TestHilbert:
    @given(h=st.integers(1, 40), w=st.integers(1, 40))
    @example(h=1, w=37)
    @example(h=31, w=2)
    @example(h=3, w=40)
    @example(h=27, w=40)
    def test_every_step_goes_to_a_neighbour(self, h: int, w: int) -> None:
        curve, other, back, other_back = visited(walks.hilbert(h, w))
        assert curve[0] == (0, 0) and set(curve) == set(rows(h, w)) and len(curve) == h * w
        assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(curve))
        assert other == swapped(visited(walks.hilbert(w, h))[0])
        assert back == curve[::-1] and other_back == other[::-1]

    @pytest.mark.parametrize("side", [4, 8, 16])
    def test_it_stays_in_a_quarter_of_a_square(self, side: int) -> None:
        curve = visited(walks.hilbert(side, side))[0]
        for start in range(0, side * side, side * side // 4):
            quarter = np.array(curve[start : start + side * side // 4])
            assert (np.ptp(quarter, axis=0) == side // 2 - 1).all()

    def test_the_curve_itself_stays(self) -> None:
        """Weights that were trained along it would mean little along another, though it were as good."""
        for grid, curve in CURVES.items():
            assert walks.hilbert(*grid).orders[0].tolist() == [int(position) for position in curve.split()]


def test_snakes_step_to_neighbours() -> None:
    for order in visited(walks.snake(5, 6)):
        assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(order))


def test_one_number_is_a_square_window() -> None:
    assert walks.windows(5, 6, 2) is walks.windows(5, 6, (2, 2))


@pytest.mark.parametrize("size", [21, 2**33, 2**62, 2**64])
def test_longer_than_the_image_changes_nothing(size: int) -> None:
    assert np.array_equal(walks.windows(20, 21, size).orders, walks.windows(20, 21, (20, 21)).orders)
    assert np.array_equal(walks.strided(20, 21, size).orders, walks.strided(20, 21, 21).orders)


def test_orders_of_ones_own() -> None:
    order = np.array([3, 1, 0, 2])
    found = [walks.from_order(x, (2, 2)) for x in (order, torch.from_numpy(order), order.tolist(), order[None])]
    assert all(x is found[0] for x in found) and found[0].orders.tolist() == [[3, 1, 0, 2]]
    order[0] = 9
    assert found[0].orders.tolist() == [[3, 1, 0, 2]], "a copy"
    assert walks.from_order([3, 1, 0, 2]).grid == (4,) and walks.from_order([3, 1, 0, 2]) != found[0]


class TestObjects:
    ALL = (
        walks.cross(3, 4),
        walks.bidirectional(5),
        walks.snake(3, 4),
        walks.diagonal(3, 4),
        walks.windows(3, 4, (2, 3)),
        walks.strided(3, 4, 2),
        walks.hilbert(3, 4),
        walks.volume(2, 3, 4),
        walks.snake(3, 4) + walks.hilbert(3, 4),
        walks.from_order([[0, 2, 1], [1, 0, 2]]) + walks.bidirectional(3),
        walks.from_order([[0, 2, 1], [1, 0, 2]]),
        walks.from_order([[0, 2, 1], [2, 1, 0]]),
    )

    @pytest.mark.parametrize("one", ALL, ids=repr)
    def test_copies_are_equal(self, one: walks.Walks) -> None:
        assert copy.deepcopy(one) is one and copy.copy(one) is one
        other = pickle.loads(pickle.dumps(one))
        assert other == one and hash(other) == hash(one) and torch.equal(other.orders, one.orders)
        assert [x == one for x in self.ALL].count(True) == 1

    @pytest.mark.parametrize("one", [w for w in ALL if "from_order" not in repr(w)], ids=repr)
    def test_the_text_makes_them(self, one: walks.Walks) -> None:
        assert eval(repr(one)) == one

    def test_addition_joins_directions(self) -> None:
        a, b = walks.snake(3, 4), walks.diagonal(3, 4)
        assert len(a + b) == 8 and torch.equal((a + b).orders, torch.cat([a.orders, b.orders]))
        with pytest.raises(ValueError, match=says(r"\(3, 4\)", r"\(4, 3\)", "same sizes")):
            a + walks.snake(4, 3)

    def test_a_table_is_made_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[str] = []
        original = walk.table_of
        monkeypatch.setattr(walk, "table_of", lambda name, *others: made.append(name) or original(name, *others))
        cpu = torch.device("cpu")
        tables = {id((walks.snake(17, 3) + walks.hilbert(17, 3)).on(cpu)) for _ in range(5)}
        assert len(tables) == 1 and made == ["snake", "hilbert"]

    def test_few_are_kept(self) -> None:
        for h in range(1, 60):
            walks.snake(h, 1)
        assert walk._kept.cache_info().currsize <= walk._KEPT

    def test_tables_are_kept_up_to_a_number_of_bytes(self) -> None:
        cache = TableCache(most_bytes=100)
        made = [cache.get(name, lambda: torch.zeros(10, dtype=torch.int32)) for name in "abab"]
        assert made[0] is made[2] and made[1] is made[3] and cache.nbytes == 80
        cache.get("a", torch.Tensor)  # used last
        cache.get("c", lambda: torch.zeros(10, dtype=torch.int32))
        assert [name in cache for name in "abc"] == [True, False, True] and cache.nbytes == 80
        large = cache.get("large", lambda: torch.zeros(1000, dtype=torch.int32))
        assert cache.get("large", torch.Tensor) is large and cache.nbytes == 4000, "alone, but kept"

    def test_they_cannot_be_changed(self) -> None:
        one = walks.snake(3, 4)
        one.orders.zero_()
        assert one.orders.any()
        for name in ("grid", "orders"):
            with pytest.raises(AttributeError):
                setattr(one, name, None)


BAD = [
    (lambda: walks.snake(0, 4), ValueError, ("h must be at least 1", "got 0")),
    (lambda: walks.snake(3, 4.0), TypeError, ("w must be an integer", "4.0")),
    (lambda: walks.bidirectional(True), TypeError, ("l must be an integer", "True")),
    (lambda: walks.volume(2, -1, 2), ValueError, ("h must be at least 1", "-1")),
    (lambda: walks.windows(3, 4, 0), ValueError, ("size must be at least 1", "0")),
    (lambda: walks.windows(3, 4, (2, 0)), ValueError, (r"size\[1\] must be at least 1", "0")),
    (lambda: walks.windows(3, 4, (2,)), ValueError, ("size must have 2 entries", "2,")),
    (lambda: walks.windows(3, 4, "2"), TypeError, ("size must be a sequence", "'2'")),
    (lambda: walks.strided(3, 4, 0), ValueError, ("step must be at least 1", "0")),
    (lambda: walks.from_order([0, 1, 1]), ValueError, (r"order\[0\] is no permutation of 0 ... 2", "holds 1 2 times")),
    (lambda: walks.from_order([[0, 1], [2, 0]]), ValueError, (r"order\[1\] is no permutation", "holds 2")),
    (lambda: walks.from_order([0, -1]), ValueError, (r"order\[0\] is no permutation", "-1")),
    (lambda: walks.from_order([0.0, 1.0]), TypeError, ("order must hold integers", "float64")),
    (lambda: walks.from_order(torch.tensor([True, False])), TypeError, ("order must hold integers", "bool")),
    (lambda: walks.from_order(torch.zeros(1, 2, 3).int()), ValueError, ("order must have shape", "1, 2, 3")),
    (lambda: walks.from_order(np.zeros((2, 0), int)), ValueError, ("order must have shape", "2, 0")),
    (lambda: walks.from_order([0, 1, 2], (2, 2)), ValueError, ("order visits 3 positions", r"\(2, 2\) has 4")),
    (lambda: walks.from_order([0], (1,) * 9), ValueError, ("grid must", "8")),
    (lambda: walks.from_order([0, 1, 2], 3), TypeError, ("grid must be a sequence", "3")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "parts"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error, match=says(*parts)):
        call()
