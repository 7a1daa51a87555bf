"""Walks: the orders in which the scans of an image or a volume visit its positions.

Each function makes the walks of one kind for a grid of given sizes, and gives the same object for the same arguments as
long as it is kept (the last 32 are). :func:`~kan_mamba_layers.cross_selective_scan` takes them. Positions count from 0,
with the last dimension of the grid fastest.
"""

from collections.abc import Sequence
from typing import Any

from kan_mamba_layers._check import check_sizes
from kan_mamba_layers.walks.walk import Walks, checked_size, library_walks, walks_along

__all__ = [
    "Walks",
    "bidirectional",
    "cross",
    "diagonal",
    "from_order",
    "hilbert",
    "snake",
    "strided",
    "volume",
    "windows",
]


def cross(h: int, w: int) -> Walks:
    """Visit an image row by row, column by column, and both reversed: the four directions of VMamba.

    This is what the scan does without walks. It computes these positions and reads no table.

    Args:
        h: height of the image.
        w: width of the image.

    Returns:
        Walks of 4 directions.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.

    Example:
        >>> cross(2, 3).orders.tolist()
        [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]

    References:
        Liu et al., VMamba, arXiv 2401.10166, section 4.2.
    """
    return library_walks("cross", {"h": h, "w": w})


def bidirectional(l: int) -> Walks:
    """Visit a sequence from its first position and from its last.

    Args:
        l: length of the sequence.

    Returns:
        Walks of 2 directions through a grid of one dimension.

    Raises:
        TypeError: ``l`` is not an integer.
        ValueError: ``l`` is less than 1.

    Example:
        >>> bidirectional(4).orders.tolist()
        [[0, 1, 2, 3], [3, 2, 1, 0]]

    References:
        Zhu et al., Vision Mamba, arXiv 2401.09417, section 3.3.
    """
    return library_walks("bidirectional", {"l": l})


def snake(h: int, w: int) -> Walks:
    """Visit the rows in turn to the right and to the left, so that each step goes to a neighbour; columns likewise.

    The other two directions are these reversed.

    Args:
        h: height of the image.
        w: width of the image.

    Returns:
        Walks of 4 directions.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.

    Example:
        >>> snake(2, 3).orders.tolist()
        [[0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5], [3, 4, 5, 2, 1, 0], [5, 2, 1, 4, 3, 0]]

    References:
        Yang et al., PlainMamba, arXiv 2403.17695 (continuous 2D scanning).
    """
    return library_walks("snake", {"h": h, "w": w})


def diagonal(h: int, w: int) -> Walks:
    """Visit diagonal after diagonal: those that go down to the left, from the upper left corner; those that go down to
    the right, from the upper right corner; and both reversed.

    Args:
        h: height of the image.
        w: width of the image.

    Returns:
        Walks of 4 directions.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.

    Example:
        >>> diagonal(2, 3).orders.tolist()
        [[0, 1, 3, 2, 4, 5], [2, 1, 5, 0, 4, 3], [5, 4, 2, 3, 1, 0], [3, 4, 0, 5, 1, 2]]

    References:
        Zhao et al., RS-Mamba, arXiv 2404.02668 (omnidirectional selective scan).
    """
    return library_walks("diagonal", {"h": h, "w": w})


def windows(h: int, w: int, size: int | Sequence[int]) -> Walks:
    """Visit window after window, by rows of windows, and row by row inside; by columns likewise; and both reversed.

    Windows at the lower and at the right border are smaller where ``size`` does not divide the image.

    Args:
        h: height of the image.
        w: width of the image.
        size: height and width of a window; one number for both.

    Returns:
        Walks of 4 directions.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is less than 1, or ``size`` has more or fewer than two numbers.

    Example:
        >>> windows(2, 4, 2).orders[:2].tolist()
        [[0, 1, 4, 5, 2, 3, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7]]

    References:
        Huang et al., LocalMamba, arXiv 2403.09338 (local scan).
    """
    if isinstance(size, Sequence):
        check_sizes("size", size, 2, 2)
        rows, columns = size
    else:
        rows = columns = size
    return library_walks("windows", {"h": h, "w": w}, (checked_size("size", rows), checked_size("size", columns)))


def strided(h: int, w: int, step: int) -> Walks:
    """Visit every ``step``-th pixel of every ``step``-th row, then the pixels to the right of those, and so on.

    The ``step * step`` subgrids follow one another by rows, and each is visited row by row. The second direction does
    the same by columns, the other two are these reversed.

    Args:
        h: height of the image.
        w: width of the image.
        step: distance of two neighbours of a subgrid.

    Returns:
        Walks of 4 directions.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is less than 1.

    Example:
        >>> strided(2, 4, 2).orders[:2].tolist()
        [[0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 4, 6, 1, 3, 5, 7]]

    References:
        Pei et al., EfficientVMamba, arXiv 2403.09977 (efficient 2D scanning), whose directions visit one
        subgrid each.
    """
    return library_walks("strided", {"h": h, "w": w}, (checked_size("step", step),))


def hilbert(h: int, w: int) -> Walks:
    """Visit the pixels along a Hilbert curve, along that of the transposed image, and along both reversed.

    The curve is generalised to rectangles of any size. Every step goes to a neighbour, and pixels that are near on the
    curve are near in the image.

    Args:
        h: height of the image.
        w: width of the image.

    Returns:
        Walks of 4 directions.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.

    Example:
        >>> hilbert(2, 4).orders[0].tolist()
        [0, 4, 5, 1, 2, 6, 7, 3]

    References:
        Červený, gilbert (github.com/jakubcerveny/gilbert), for the generalised curve; Tang et al., FractalMamba, arXiv
        2405.14480, for scans along it.
    """
    return library_walks("hilbert", {"h": h, "w": w})


def volume(d: int, h: int, w: int) -> Walks:
    """Visit a volume along three orders of its axes and along these reversed.

    From the slowest axis to the fastest the orders are ``d h w``, ``h w d`` and ``w d h``, so that each axis is the
    fastest once.

    Args:
        d: depth of the volume.
        h: height of the volume.
        w: width of the volume.

    Returns:
        Walks of 6 directions through a grid of three dimensions.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.

    Example:
        >>> volume(2, 2, 2).orders[:3].tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7], [0, 2, 4, 6, 1, 3, 5, 7]]

    References:
        Xing et al., SegMamba, arXiv 2401.13560, which adds one order between slices to those along them.
    """
    return library_walks("volume", {"d": d, "h": h, "w": w})


def from_order(order: Any, grid: Sequence[int] | None = None) -> Walks:
    """Visit the positions in given orders.

    Args:
        order: a tensor, an array or a sequence of integers, ``l`` for one direction or ``k l`` for several. Each row is
            a permutation of ``0 ... l - 1``.
        grid: the sizes of the grid, whose product is ``l``; by default ``(l,)``.

    Returns:
        Walks of ``k`` directions.

    Raises:
        RuntimeError: it is called inside compiled code, which does not know the values of an order.
        TypeError: ``order`` does not hold integers.
        ValueError: a row is no permutation, or a shape does not fit.

    Example:
        >>> from_order([[0, 1, 3, 2], [2, 3, 1, 0]], grid=(2, 2))
        walks.from_order(<2 x 4>, grid=(2, 2))
    """
    return walks_along(order, grid)
