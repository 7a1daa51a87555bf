"""A Hilbert curve through a rectangle of any size, whose steps go to neighbours.

A box has a side along and a side across. Its curve begins at (0, 0) and ends at the other end of the side along. It
consists of two or three curves of smaller boxes, turned and moved. Boxes of one size share a curve.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray


def hilbert_curve(h: int, w: int) -> NDArray[np.int64]:  # l
    """The positions of ``h`` rows and ``w`` columns along the curve, which begins at the first one."""
    # With an odd side along and an even side across, the ends would have one colour of a chessboard, which a path of
    # an even number of positions cannot have. So an even side goes along, or the longer one.
    rows_along = h % 2 == 0 if h % 2 != w % 2 else h > w

    @cache
    def curve(m: int, n: int) -> NDArray[np.int64]:  # 2 m*n: along, across
        if n == 1 or m == 1:
            line = np.arange(m * n)
            return np.stack([line, 0 * line] if n == 1 else [0 * line, line])
        if 2 * m > 3 * n:  # two halves
            half = _even_half(m)
            return np.hstack([curve(half, n), np.add(curve(m - half, n), [[half], [0]])])
        half, up = m // 2, _even_half(n)  # across, along, and back across
        return np.hstack(
            [
                curve(up, half)[::-1],
                np.add(curve(m, n - up), [[0], [up]]),
                np.subtract([[m - 1], [up - 1]], curve(up, m - half)[::-1]),
            ]
        )

    along, across = curve(h, w) if rows_along else curve(w, h)
    return along * w + across if rows_along else across * w + along


def _even_half(length: int) -> int:
    """Half of a length, even if there is room."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half
