"""The pictures: sizes, colours that mean one thing each, errors pixel by pixel, and names that are all legible."""

from __future__ import annotations

import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from skimage.color import rgb2lab

from segmentation import figures, palette
from segmentation.figures import Case, curve, draw_cases, draw_cost, draw_curves, draw_history, overlay, picture

DOCS = Path(__file__).resolve().parents[2] / "docs" / "figures" / "palette.py"
# Machado, Oliveira and Fernandes (2009): what eyes without red, green or blue cones make of linear RGB.
BLIND = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def least_difference(colours: list[str], cones: np.ndarray) -> float:
    """The smallest distance (CIE 1976) of two of the colours as such eyes see them."""
    shades = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4) @ cones.T
    linear = linear.clip(0, 1)
    seen = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return min(np.linalg.norm(a - b) for a, b in combinations(rgb2lab(seen[None])[0], 2))


def bytes_of(colour: str) -> np.ndarray:
    return (np.array(to_rgb(colour)) * 255).round().astype(np.uint8)


def count(pixels: np.ndarray, colour: str) -> int:
    """How many pixels (h w 3) have exactly this colour."""
    return int((pixels == bytes_of(colour)).all(axis=-1).sum())


def squares(number: int, size: int = figures.WIDTH) -> np.ndarray:
    """A mask (h w) with `number` classes, one square each."""
    mask, side = np.zeros((size, size), np.uint8), size // 5
    for k in range(number):
        top, left = k // 4 * side + 8, k % 4 * side + 8
        mask[top : top + side // 2, left : left + side // 2] = k + 1
    return mask


def panels(path: Path, size: int = figures.WIDTH) -> list[np.ndarray]:
    """The three panels (h w 3) of the first case."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    top = figures.MARGIN + 2 * figures.LINE
    lefts = (figures.MARGIN + (size + figures.GAP) * column for column in range(3))
    return [sheet[top : top + size, left : left + size] for left in lefts]


@pytest.fixture
def sheets(monkeypatch) -> list[Figure]:
    """The figures that a test draws, in whose place empty files are written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **more: drawn.append(self) or path.touch())
    return drawn


def texts_of(axis: Axes) -> list[Text]:
    """The texts on some axes, none of which hides another."""
    texts = [text for text in axis.texts if text.get_text()]
    assert not any(a.overlaps(b) for a, b in combinations([text.get_window_extent() for text in texts], 2))
    return texts


class TestPalette:
    def test_classes_have_one_colour_each_for_any_eyes(self):
        colours = [palette.class_colour(number) for number in range(1, 41)]
        assert len(set(colours)) == 40
        assert colours[:8] == list(palette.CLASSES)
        for cones in (np.eye(3), *map(np.array, BLIND.values())):
            assert least_difference(colours[:8], cones) > 30
            assert least_difference([palette.MISSED, palette.EXTRA, palette.MISTAKEN], cones) > 30

    def test_networks_keep_their_colours(self):
        known = {"unet": "unet", "unet_pp": "unet_pp", "km_unet_tiny": "km_unet", "km_unet_pp_base": "km_unet_pp"}
        colours = palette.network_colours(["full", *known, "u_kan_tiny", "use_kan=false"])
        assert {name: colours[name] for name in known} == {name: palette.NETWORKS[kind] for name, kind in known.items()}
        assert colours["u_kan_tiny"] == palette.NETWORKS["u_kan"]
        many = palette.network_colours([f"km_unet_{n}" for n in range(6)] + [f"variant {n}" for n in range(20)])
        assert len(set(many.values())) == 26
        assert least_difference(list(palette.NETWORKS.values()), np.eye(3)) > 30

    def test_the_figures_of_the_documentation_agree(self):
        docs = runpy.run_path(str(DOCS))
        assert palette.NETWORKS["km_unet_pp"] == docs["OURS"]
        assert palette.NETWORKS["unet_pp"] in docs["DIRECTIONS"]
        assert palette.NETWORKS["u_kan"] == docs["CONTEXT"]
        assert docs["INK"] == figures.INK


class TestCases:
    def test_wrong_pixels_are_shown_one_by_one(self, tmp_path):
        truth = squares(3)
        found = np.roll(truth, (3, 5), (0, 1))
        found[truth == 2] = 3
        image = np.random.default_rng(0).integers(0, 200, (*truth.shape, 3), dtype=np.uint8)
        draw_cases(tmp_path / "cases.png", [Case("case", image, truth, found, ["a", "b", "c"])])
        shown, outlines, difference = panels(tmp_path / "cases.png")
        assert (shown == image).all()
        assert 0 < (outlines != image).any(axis=-1).mean() < 0.1
        kinds = {
            palette.MISSED: (truth > 0) & (found == 0),
            palette.EXTRA: (truth == 0) & (found > 0),
            palette.MISTAKEN: (truth > 0) & (found > 0) & (truth != found),
        }
        assert all(count(difference, colour) == wrong.sum() > 0 for colour, wrong in kinds.items())
        right = truth == found
        grey = np.asarray(Image.fromarray(image).convert("L"))[..., None].repeat(3, axis=-1)
        assert (difference[right] == grey[right]).all()

    @pytest.mark.parametrize("number", [1, 5, 10])
    def test_every_class_is_outlined_in_its_colour_and_named(self, tmp_path, sheets, monkeypatch, number):
        truth, names = squares(number), [f"L{k}" for k in range(1, number + 1)]
        draw_cases(tmp_path / "cases.png", [Case("case", 0 * truth[..., None], truth, truth, names)])
        monkeypatch.undo()
        sheets[0].savefig(tmp_path / "cases.png")
        colours = [palette.class_colour(k) for k in range(1, number + 1)]
        assert all(count(panels(tmp_path / "cases.png")[1], colour) > 50 for colour in colours)
        texts = texts_of(sheets[0].axes[1])
        assert [(text.get_text(), text.get_color()) for text in texts] == list(zip(names, colours, strict=True))

    def test_rows_follow_the_proportions_of_their_images(self, tmp_path):
        def drawn(*sizes: tuple[int, int]) -> tuple[int, int]:
            masks = [np.zeros((h, w), np.uint8) for w, h in sizes]
            draw_cases(tmp_path / "cases.png", [Case("a name", mask[..., None], mask, mask, ["x"]) for mask in masks])
            return Image.open(tmp_path / "cases.png").size

        wide, square, tall = drawn((400, 100)), drawn((200, 200)), drawn((100, 400))
        full, low = figures.WIDTH, figures.WIDTH // 4
        assert square[1] - wide[1] == full - low
        assert drawn((400, 100), (200, 200)) == (square[0], square[1] + low + figures.LINE + figures.GAP)
        assert wide[0] == square[0] == 3 * full + 2 * figures.GAP + 2 * figures.MARGIN > tall[0]

    def test_masks_that_touch_the_border_or_are_empty(self, tmp_path):
        full, empty = np.ones((50, 60), np.uint8), np.zeros((50, 60), np.uint8)
        image = np.full((50, 60, 1), 9, np.uint16)
        draw_cases(
            tmp_path / "cases.png", [Case("a", image, full, empty, ["x"]), Case("b", image, empty, empty, ["x"])]
        )
        assert count(panels(tmp_path / "cases.png")[2], palette.MISSED) > 50_000


def test_an_overlay_has_the_inner_contours_of_all_classes():
    mask = squares(10, 100)
    image = np.full((100, 100, 1), 7, np.uint8)
    shown = overlay(image, mask)
    for number in range(1, 11):
        inner = np.argwhere(mask == number)[1:-1]
        edge = np.argwhere(mask == number)[[0, -1]]
        assert abs(shown[tuple(edge.T)].astype(int) - bytes_of(palette.class_colour(number))).max() <= 1
        assert (shown[tuple(inner.mean(axis=0).astype(int))] == 7).all()
    assert (shown[mask == 0] == 7).all()


def test_deep_images_are_shown_from_their_least_to_their_greatest_value():
    deep = np.array([[[1000], [3000]]], dtype=np.uint16)
    assert picture(deep, (2, 1)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    with np.errstate(all="raise"):
        assert picture(np.full((1, 2, 1), 7, np.float32), (2, 1)).max() == 0
    assert picture(np.full((1, 2, 3), 7, np.uint8), (2, 1)).tolist() == [[[7, 7, 7], [7, 7, 7]]]


def test_curves_end_with_the_seed_that_stopped_first(tmp_path):
    histories = [pd.DataFrame({"loss": values}) for values in ([3.0, 2.0, 1.0], [5.0, 4.0])]
    reached, values = curve(histories, "loss")
    assert reached.tolist() == [1, 2]
    assert values.tolist() == [[3, 2], [5, 4]]

    columns = {f"{side}/{score}": [0.9, 0.5] for side in ("train", "val") for score in ("loss", "iou")}
    history = pd.DataFrame({"epoch": [1, 2], **columns})
    draw_history(tmp_path / "run.png", history, "ce")
    draw_curves(tmp_path / "curves.png", {"unet": [history], "km_unet_pp_tiny": [history, history[:1]]}, "ce")
    shown = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert count(shown, palette.NETWORKS["unet"]) > 100
    assert min(Image.open(tmp_path / "run.png").size) > 300


@pytest.mark.parametrize("number", [1, 4, 17])
def test_every_name_stands_free_beside_its_point(tmp_path, sheets, number):
    rng = np.random.default_rng(0)
    columns = {"parameters": 520_000, "seconds_per_epoch": rng.uniform(4, 5, number)}
    columns |= {"dice": rng.uniform(0.86, 0.88, number), "sd_seeds": [np.nan, *[0.004] * (number - 1)]}
    names = [f"some_setting={n}" for n in range(number)]
    draw_cost(tmp_path / "cost.png", pd.DataFrame(columns, index=names))
    for axis in sheets[0].axes:
        texts = texts_of(axis)
        assert [text.get_text() for text in texts] == names
        boxes = [text.get_window_extent() for text in texts]
        assert all(axis.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
        assert axis.get_legend() is None
