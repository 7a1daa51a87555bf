"""Ellipses: the fetal head is annotated as one, and its circumference is what obstetricians read off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes
from skimage.measure import EllipseModel, find_contours, label

LEAST_POINTS = 6  # five determine an ellipse: one more shows whether it is one


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
        """Ramanujan's second formula, off by less than 1e-9 of the length where a < 2 b, by 4e-4 at worst."""
        ratio = ((self.a - self.b) / (self.a + self.b)) ** 2
        return float(np.pi * (self.a + self.b) * (1 + 3 * ratio / (10 + np.sqrt(4 - 3 * ratio))))

    def radii(self, rows: NDArray[np.floating], columns: NDArray[np.floating]) -> NDArray[np.float64]:
        """How far out points lie: 0 at the centre, 1 on the ellipse."""
        down, right = rows - self.row, columns - self.column
        along = down * np.cos(self.angle) + right * np.sin(self.angle)
        across = right * np.cos(self.angle) - down * np.sin(self.angle)
        return np.hypot(along / self.a, across / self.b)

    def fill(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """The pixels (h w) whose centre is inside; what leaves the frame is cut off."""
        rows, columns = np.ogrid[: size[0], : size[1]]
        return self.radii(rows, columns) <= 1


def fit_ellipse(points: NDArray) -> Ellipse:
    """The ellipse with the least squared algebraic distance to points (n 2), each (row, column).

    The points may cover a part of the outline only. scikit-image solves it directly (Halir and Flusser 1998), in a
    frame where the points have mean 0 and deviation 1.
    """
    if len(points) < LEAST_POINTS:
        raise ValueError(f"{len(points)} points determine no ellipse: it takes {LEAST_POINTS}")
    with np.errstate(all="ignore"):  # points on a line divide by zero on their way to the refusal below
        model = EllipseModel.from_estimate(np.asarray(points, np.float64))
    if not model:
        raise ValueError(f"no ellipse fits the {len(points)} points: {model}")
    ellipse = Ellipse(*(float(value) for value in (*model.center, *model.axis_lengths, model.theta)))
    if not (np.isfinite([ellipse.row, ellipse.column, ellipse.a]).all() and ellipse.b > 0):
        raise ValueError(f"no ellipse fits the {len(points)} points: they lie on a line")
    return ellipse


def head_circumference(mask: NDArray, pixel_size: tuple[float, float]) -> float | None:
    """Circumference in mm of the ellipse through the outline of the largest part of a mask (h w); None without one.

    The outline runs half-way between the pixels inside and those outside, where the edge is on average. It ends where
    the mask meets the border of the image, so a head that leaves the frame is measured whole. `pixel_size` is
    (mm from row to row, mm from column to column); the fit is done in millimetres, for pixels need not be square.
    """
    parts = label(mask > 0)
    if not parts.any():
        return None
    largest = parts == np.bincount(parts[parts > 0]).argmax()
    outline = find_contours(binary_fill_holes(largest).astype(np.float64), 0.5)
    points = np.concatenate([np.empty((0, 2)), *outline])  # n 2
    try:
        return fit_ellipse(points * pixel_size).circumference()
    except ValueError:
        return None
