"""Ellipses: exact and least-squares fits, refusals, HC18's own circumferences, heads cut by the frame."""

from __future__ import annotations

import csv
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares

from segmentation.data.ellipse import Ellipse, fit_ellipse, head_circumference

HC18 = Path("data", "native", "hc18")


def outline(ellipse: Ellipse, number: int = 200, share: float = 1.0) -> np.ndarray:
    """Points (n 2) on the first `share` of an ellipse."""
    angle = np.linspace(0, 2 * np.pi * share, number, endpoint=False)
    along, across = ellipse.a * np.cos(angle), ellipse.b * np.sin(angle)
    down = ellipse.row + along * np.cos(ellipse.angle) - across * np.sin(ellipse.angle)
    right = ellipse.column + along * np.sin(ellipse.angle) + across * np.cos(ellipse.angle)
    return np.stack([down, right], axis=1)


def random_ellipse(seed: int) -> Ellipse:
    """As a fetal head lies in an image of 540x800 pixels."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(60, 160)
    row, column = rng.uniform([249, 299], [251, 301])
    return Ellipse(row, column, a, a * rng.uniform(0.65, 0.95), rng.uniform(0, np.pi))


def published(shared: Path) -> dict[str, tuple[float, float, np.ndarray]]:
    """Pixel size, head circumference and outline of HC18's images."""
    root = shared / HC18
    if not root.is_dir():
        pytest.skip(f"no HC18 files at {root}")
    with (root / "training_set_pixel_size_and_HC.csv").open() as stream:
        rows = [(Path(name).stem, float(pixel), float(length)) for name, pixel, length in list(csv.reader(stream))[1:]]
    files = {name: root / "training_set" / f"{name}_Annotation.png" for name, _, _ in rows}
    return {name: (pixel, length, np.asarray(Image.open(files[name]))) for name, pixel, length in rows}


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.51, 0.1, 1e-9])
def test_circumference_is_the_length_of_a_polygon_with_many_corners(ratio):
    ellipse = Ellipse(3, 4, 50, 50 * ratio, 0.3)
    corners = outline(ellipse, 400_000)
    length = np.hypot(*(corners - np.roll(corners, 1, axis=0)).T).sum()
    assert ellipse.circumference() == pytest.approx(length, rel=1e-9)


def far_off(found: Ellipse, truth: Ellipse) -> float:
    """The largest error of centre and axes, and of the long axis' direction, in parts of the ellipse."""
    errors = [found.row - truth.row, found.column - truth.column, found.a - truth.a, found.b - truth.b]
    turn = np.sin(found.angle - truth.angle) * (1 - truth.b / truth.a)  # a circle has no direction
    return max(np.abs(errors) / truth.a) + abs(turn)


@pytest.mark.parametrize("size", [0.03, 1.0, 200.0, 1e5])
@pytest.mark.parametrize("ratio", [1.0, 0.999, 0.7, 0.1])
def test_fit_finds_the_ellipse_that_its_points_lie_on(size, ratio):
    rng = np.random.default_rng(0)
    for angle in (0, 0.3, np.pi / 2, 2.5):
        for distance in (0, 1, 100):
            truth = Ellipse(*rng.normal(0, distance * size, 2), size, ratio * size, angle)
            for number, share in ((6, 1.0), (200, 1.0), (60, 0.6)):
                assert far_off(fit_ellipse(outline(truth, number, share)), truth) < 1e-9
    distant = replace(truth, row=truth.row + 1e6 * size, column=truth.column + 1e6 * size)
    assert far_off(fit_ellipse(outline(truth, 60) + 1e6 * size), distant) < 1e-7


def design(points: np.ndarray) -> np.ndarray:
    """The six terms of a conic at points (n 2)."""
    x, y = points.T
    return np.stack([x**2, x * y, y**2, x, y, np.ones_like(x)], axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_fit_of_scattered_points_minimises_the_algebraic_distance(seed):
    """No conic with 4ac - b² = 1 that a search finds from there on is better."""
    rng = np.random.default_rng(seed)
    points = outline(random_ellipse(seed), 80, share=rng.uniform(0.5, 1)) + rng.normal(0, 4, (80, 2))
    middle, scale = points.mean(0), np.std(points - points.mean(0))
    terms = design((points - middle) / scale)
    found = np.linalg.svd(design((outline(fit_ellipse(points), 12) - middle) / scale))[2][-1]
    found *= np.sign(found[0]) / np.sqrt(4 * found[0] * found[2] - found[1] ** 2)

    def distances(free: np.ndarray) -> np.ndarray:
        a, b, *others = free
        return terms @ [a, b, (1 + b**2) / (4 * a), *others]

    better = least_squares(distances, np.delete(found, 2), xtol=1e-14, ftol=1e-14, gtol=1e-14)
    assert better.x == pytest.approx(np.delete(found, 2), rel=1e-5, abs=1e-5)


def test_fit_takes_complex_eigenvectors(monkeypatch):
    """As NumPy 2.5 returns them, even where all are real."""
    truth, eig = random_ellipse(1), np.linalg.eig
    monkeypatch.setattr(np.linalg, "eig", lambda matrix: tuple(part.astype(complex) for part in eig(matrix)))
    found = fit_ellipse(outline(truth))
    assert far_off(found, truth) < 1e-9
    assert all(type(value) is float for value in astuple(found))


@pytest.mark.parametrize("seed", range(3))
def test_radii_grow_in_proportion_and_the_filled_ellipse_has_its_area(seed):
    ellipse = random_ellipse(seed)
    points, centre = outline(ellipse), np.array([ellipse.row, ellipse.column])
    for factor in (0.0, 0.5, 1.0, 3.0):
        assert np.allclose(ellipse.radii(*(centre + factor * (points - centre)).T), factor)
    mask = ellipse.fill((540, 800))
    assert mask.sum() == pytest.approx(np.pi * ellipse.a * ellipse.b, rel=2e-3)
    assert np.argwhere(mask).mean(0) == pytest.approx([ellipse.row, ellipse.column], abs=0.05)
    assert np.array_equal(ellipse.fill((200, 310)), mask[:200, :310])


def test_angle_turns_from_down_to_right():
    steep = Ellipse(100, 100, 80, 30, 0).fill((200, 200))
    assert (np.ptp(np.argwhere(steep), axis=0) == [160, 60]).all()
    slanted = np.argwhere(Ellipse(100, 100, 80, 30, np.pi / 4).fill((200, 200))) - 100
    assert (slanted[:, 0] * slanted[:, 1]).mean() > 0


def test_published_circumferences_are_reproduced(shared):
    """Of the outlines to 0.05 mm, and of the filled ellipses to 0.05 mm, also of the three that leave the frame."""
    open_ones = 0
    for name, (pixel, length, drawn) in published(shared).items():
        ellipse = fit_ellipse(np.argwhere(drawn))
        mask = ellipse.fill(drawn.shape)
        assert ellipse.circumference() * pixel == pytest.approx(length, abs=0.05), name
        assert head_circumference(mask, (pixel, pixel)) == pytest.approx(length, abs=0.05), name
        open_ones += mask[[0, -1]].any() or mask[:, [0, -1]].any()
    assert open_ones == 3


@pytest.mark.parametrize("outside", [0.0, 0.1, 0.2, 0.33])
def test_heads_that_leave_the_frame_keep_their_circumference(outside):
    for seed, turn in enumerate((np.asarray, np.flipud, np.transpose)):
        truth = random_ellipse(seed)
        top = round(np.quantile(outline(truth, 4000)[:, 0], outside))
        mask = turn(truth.fill((540, 800))[top if outside else 0 :])
        assert head_circumference(mask, (0.2, 0.2)) == pytest.approx(0.2 * truth.circumference(), rel=3e-3)


def test_pixels_need_not_be_square():
    """The same head seen with pixels half as high, or half as wide."""
    head = Ellipse(100, 130, 80, 60, 0.7)
    whole = np.argwhere(np.ones((400, 520)))
    for rows, columns in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5)):
        seen = head.radii(whole[:, 0] * rows, whole[:, 1] * columns).reshape(400, 520) <= 1
        assert head_circumference(seen, (rows, columns)) == pytest.approx(head.circumference(), rel=1e-3)


def test_only_the_largest_part_counts_and_its_holes_do_not():
    head = Ellipse(100, 130, 80, 60, 0.7)
    mask = head.fill((220, 260))
    alone = head_circumference(mask, (1, 1))
    mask[90:110, 120:140] = False
    mask[:12, :12] = True
    assert head_circumference(mask, (1, 1)) == alone
    assert head_circumference(mask.astype(np.uint8) * 255, (1, 1)) == alone


Y, X = np.mgrid[:540, :800]
NO_HEADS = {
    "empty": np.zeros((9, 9)),
    "all": np.ones((9, 9)),
    "diagonal": np.eye(9)[:2],
    "pixel": np.arange(81).reshape(9, 9) == 40,
    "corner": X + Y < 200,
    "line": (Y == 200) & (X > 100) & (X < 600),
    "half": Y < 270,
    "half, edge bent up": 270 + 3 * np.sin(X / 800 * np.pi) > Y,
    "half, edge of a circle": np.hypot(Y + 5000, X - 400) < 5300,
    "half, wavy edge": 270 + 5 * np.sin(X / 40) > Y,
    "rectangle": (abs(Y - 250) < 50) & (abs(X - 400) < 200),
    "angle": (Y > 100) & (X > 100) & (np.minimum(Y, X) < 200) & (np.maximum(Y, X) < 500),
    "crescent": (np.hypot(Y - 270, X - 400) < 150) & (np.hypot(Y - 270, X - 460) > 130),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_masks_that_are_no_head_have_no_circumference(name):
    assert head_circumference(NO_HEADS[name], (0.15, 0.15)) is None
    assert head_circumference(NO_HEADS[name].T, (0.15, 0.3)) is None


@pytest.mark.parametrize("seed", range(3))
def test_rough_heads_that_leave_the_frame_are_still_heads(seed):
    truth, rng = random_ellipse(seed), np.random.default_rng(seed)
    rough = gaussian_filter(rng.standard_normal((540, 800)), 8)
    mask = (truth.radii(Y, X) - 1) * truth.b + 3 * rough / rough.std() < 0
    top = round(np.quantile(outline(truth, 4000)[:, 0], 0.25))
    for seen in (mask, mask[top:]):
        assert head_circumference(seen, (0.2, 0.2)) == pytest.approx(0.2 * truth.circumference(), rel=0.06)


LINE = np.linspace(0, 1, 40)[:, None]
ARM = np.linspace(-2, 2, 40)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.ones((5, 2)), "5 points determine no ellipse: it takes 6"),
        (np.ones((40, 2)), "no ellipse fits the 40 points: they lie on a line"),
        (np.arange(40).repeat(2).reshape(40, 2), "they lie on a line"),
        (LINE * [0.3, 0.7] + [1e6, -3], "they lie on a line"),
        (np.array([[0, 0], [5, 5], [0, 5], [5, 0]] * 3), "no ellipse fits the 12 points: they determine none"),
        (np.concatenate([LINE * [0, 1], LINE * [0, 1] + [1, 0]]), "they determine none"),
        (np.stack([ARM**2, ARM], 1), "they determine none"),
        (np.full((9, 2), np.nan), "SVD did not converge"),
    ],
    ids=["few", "one point", "diagonal", "far line", "square", "parallel lines", "parabola", "nan"],
)
def test_points_without_ellipse_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        fit_ellipse(points)


def test_an_ellipse_is_found_even_for_points_on_a_hyperbola():
    ellipse = fit_ellipse(np.stack([np.cosh(ARM), np.sinh(ARM)], 1))
    assert np.isfinite(astuple(ellipse)).all() and ellipse.a >= ellipse.b > 0
