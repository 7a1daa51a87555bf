"""Ellipses: the fetal head is annotated as one, and its circumference is what obstetricians read off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes
from scipy.special import ellipe
from skimage.measure import find_contours, label

LEAST_POINTS = 6  # five determine an ellipse: one more shows whether it is one
LEAST_IOU = 0.85  # of a mask and its ellipse: rough heads that leave the frame reach 0.9, a rectangle 0.82


@dataclass(frozen=True)
class Ellipse:
    """Centre and half axes a >= b; `angle` turns from downwards (rows) to rightwards (columns) up to a, in radians.

    The centre of the first pixel is (0, 0). The unit is that of the points it was fitted to: pixels, or millimetres.
    """

    row: float
    column: float
    a: float
    b: float
    angle: float

    def circumference(self) -> float:
        return float(4 * self.a * ellipe(1 - (self.b / self.a) ** 2))

    def radii(self, rows: NDArray, columns: NDArray) -> NDArray[np.float64]:
        """How far out points lie: 0 at the centre, 1 on the ellipse."""
        down, right = rows - self.row, columns - self.column
        along = down * np.cos(self.angle) + right * np.sin(self.angle)
        across = right * np.cos(self.angle) - down * np.sin(self.angle)
        return np.hypot(along / self.a, across / self.b)

    def fill(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """The pixels (h w) whose centre is inside; what leaves the frame is cut off."""
        return self.radii(*np.ogrid[: size[0], : size[1]]) <= 1


def fit_ellipse(points: NDArray) -> Ellipse:
    """The ellipse with the least squared algebraic distance to points (n 2), each (row, column).

    The points may cover a part of the outline only. Solved directly (Halir and Flusser 1998, after Fitzgibbon 1996), in
    a frame where the points have mean 0 and deviation 1: ax² + bxy + cy² + dx + ey + f = 0 with 4ac - b² > 0.
    """
    if len(points) < LEAST_POINTS:
        raise ValueError(f"{len(points)} points determine no ellipse: it takes {LEAST_POINTS}")
    middle = np.mean(points, axis=0)
    scale = max(np.std(points - middle), np.finfo(np.float64).tiny)
    x, y = ((points - middle) / scale).T
    if np.linalg.matrix_rank(np.stack([x, y]), tol=1e-7 * len(points) ** 0.5) < 2:
        raise ValueError(f"no ellipse fits the {len(points)} points: they lie on a line")
    quadratic, linear = np.stack([x**2, x * y, y**2], axis=1), np.stack([x, y, np.ones_like(x)], axis=1)  # n 3
    best = np.linalg.lstsq(linear, quadratic, rcond=None)[0]
    rest = quadratic - linear @ best
    bound = np.array([[0, 0, 0.5], [0, -1, 0], [0.5, 0, 0]])  # the inverse of the matrix of 4ac - b²
    vectors = np.linalg.eig(bound @ rest.T @ rest)[1].real  # since NumPy 2.5 of complex type, whatever they hold
    a, b, c = (vectors * np.sign(vectors[0]))[:, np.argmax(4 * vectors[0] * vectors[2] - vectors[1] ** 2)]
    d, e, f = -best @ (a, b, c)
    conic = np.array([[2 * a, b], [b, 2 * c]])
    curvature, axes = np.linalg.eigh(conic)
    centre = -np.linalg.solve(conic, (d, e)) if curvature[0] > 1e-12 * curvature[1] else np.full(2, np.nan)
    squares = -(2 * f + centre @ (d, e)) / curvature  # of the half axes, the longer first
    if not squares[1] > 0:
        raise ValueError(f"no ellipse fits the {len(points)} points: they determine none")
    (row, column), (long, short) = middle + centre * scale, np.sqrt(squares) * scale
    return Ellipse(*map(float, (row, column, long, short, np.arctan2(*axes[::-1, 0]) % np.pi)))


def head_circumference(mask: NDArray, pixel_size: tuple[float, float]) -> float | None:
    """Circumference in mm of the ellipse through the outline of the largest part of a mask (h w); None without one.

    There is none either where that part is no head: no half axis is longer than the diagonal of the image, and in the
    image the ellipse and the part have at least `LEAST_IOU` of their area in common.
    The outline runs half-way between the pixels inside and those outside, where the edge is on average. It ends where
    the mask meets the border of the image, so a head that leaves the frame is measured whole. `pixel_size` is
    (mm from row to row, mm from column to column); the fit is done in millimetres, for pixels need not be square.
    """
    parts = label(mask > 0)
    if not parts.any():
        return None
    largest = binary_fill_holes(parts == np.bincount(parts[parts > 0]).argmax())
    points = np.concatenate([np.empty((0, 2)), *find_contours(largest.astype(np.float64), 0.5)])  # n 2
    try:
        ellipse = fit_ellipse(points * pixel_size)
    except ValueError:
        return None
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    inside = ellipse.radii(rows * pixel_size[0], columns * pixel_size[1]) <= 1
    is_head = (inside & largest).sum() >= LEAST_IOU * (inside | largest).sum()
    too_long = ellipse.a > np.hypot(*np.multiply(mask.shape, pixel_size))
    return ellipse.circumference() if is_head and not too_long else None
