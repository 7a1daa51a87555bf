"""The pictures: colours that mean one thing each, errors pixel by pixel, every class and network in the legend."""

from __future__ import annotations

import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from skimage.color import rgb2lab

from segmentation import figures
from segmentation.figures import (
    CLASSES,
    ERRORS,
    NETWORKS,
    Case,
    class_colour,
    curve,
    draw_cases,
    draw_cost,
    draw_curves,
    network_colours,
    overlay,
    picture,
)

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


def squares(number: int, size: int) -> np.ndarray:
    """A mask (h w) with `number` classes, one square each."""
    mask, side = np.zeros((size, size), np.uint8), size // 5
    for k in range(number):
        top, left = k // 4 * side + 8, k % 4 * side + 8
        mask[top : top + side // 2, left : left + side // 2] = k + 1
    return mask


@pytest.fixture
def sheets(monkeypatch) -> list[Figure]:
    """The figures that a test draws, in whose place empty files are written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **more: drawn.append(self) or path.touch())
    return drawn


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_classes_have_one_colour_each_for_any_eyes():
    colours = [class_colour(number) for number in range(1, 41)]
    assert len(set(colours)) == 40
    assert colours[:8] == list(CLASSES)
    for cones in (np.eye(3), *map(np.array, BLIND.values())):
        assert least_difference(colours[:8], cones) > 30
        assert least_difference(list(ERRORS.values()), cones) > 30


def test_networks_keep_their_colours_which_are_those_of_the_documentation():
    known = {"unet": "unet", "unet_pp": "unet_pp", "km_unet_tiny": "km_unet", "km_unet_pp_base": "km_unet_pp"}
    colours = network_colours(["full", *known, "u_kan_tiny", "use_kan=false"])
    assert {name: colours[name] for name in known} == {name: NETWORKS[kind] for name, kind in known.items()}
    assert colours["u_kan_tiny"] == NETWORKS["u_kan"]
    many = network_colours([f"km_unet_{n}" for n in range(6)] + [f"variant {n}" for n in range(20)])
    assert len(set(many.values())) == 26
    assert least_difference(list(NETWORKS.values()), np.eye(3)) > 30
    docs = runpy.run_path(str(DOCS))
    assert (NETWORKS["km_unet_pp"], NETWORKS["u_kan"]) == (docs["OURS"], docs["CONTEXT"])
    assert NETWORKS["unet_pp"] in docs["DIRECTIONS"]


def test_cases_show_wrong_pixels_one_by_one_and_classes_in_their_colours(tmp_path, sheets):
    size = round(figures.WIDTH * figures.DPI)  # of a panel, so that nothing is resized
    truth, names = squares(10, size), [f"L{k}" for k in range(1, 11)]
    found = np.roll(truth, (3, 5), (0, 1))
    found[truth == 2] = 3
    image = np.random.default_rng(0).integers(0, 200, (*truth.shape, 3), dtype=np.uint8)
    draw_cases(tmp_path / "cases.png", [Case("$case$", image, truth, found, names)])
    (row,) = sheets[0].subfigs
    shown, outlines, difference = row.axes
    assert row.get_suptitle() == "$case$"
    assert [axis.get_title() for axis in row.axes] == list(figures.PANELS)
    assert legend_of(sheets[0]) == ["truth", "prediction", *names, *ERRORS]
    assert all((axis.images[0].get_array() == image).all() for axis in (shown, outlines))
    drawn = difference.images[0].get_array()
    kinds = {
        "missed": (truth > 0) & (found == 0),
        "extra": (truth == 0) & (found > 0),
        "another class": (truth > 0) & (found > 0) & (truth != found),
    }
    for kind, wrong in kinds.items():
        assert wrong.any()
        assert ((abs(drawn - bytes_of(ERRORS[kind]).astype(int)) <= 1).all(axis=-1) == wrong).all(), kind
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    assert (drawn == grey)[truth == found].all()
    lines = {
        (to_hex(line.get_edgecolor()[0]), line.get_linestyle()[0][1] is None): line for line in outlines.collections
    }
    assert lines.keys() == {(class_colour(k), solid) for k in range(1, 11) for solid in (True, False)}
    for k in (1, 10):  # half a pixel around the truth
        corners = lines[class_colour(k), True].get_paths()[0].get_extents()
        rows, columns = np.nonzero(truth == k)
        assert corners.extents == pytest.approx(
            [columns.min() - 0.5, rows.min() - 0.5, columns.max() + 0.5, rows.max() + 0.5]
        )


def test_cases_follow_the_proportions_of_their_images_and_outlines_are_closed(tmp_path):
    def drawn(*sizes: tuple[int, int]) -> tuple[int, int]:
        full = [np.ones((h, w), np.uint8) for w, h in sizes]
        cases = [Case("a name", 9 * mask[..., None].astype(np.uint16), mask, 0 * mask, ["x"]) for mask in full]
        draw_cases(tmp_path / "cases.png", cases)
        return Image.open(tmp_path / "cases.png").size

    wide, square = drawn((400, 100)), drawn((200, 200))
    panel, line = figures.DPI * figures.WIDTH, figures.DPI * 1.2 * figures.LINE
    assert square[1] - wide[1] == pytest.approx(panel * 3 / 4, abs=2)
    assert drawn((400, 100), (200, 200))[1] == pytest.approx(square[1] + panel / 4 + line, abs=2)
    assert wide[0] == square[0] == round(3 * panel)
    pixels = np.asarray(Image.open(tmp_path / "cases.png").convert("RGB"))
    missed = (abs(pixels.astype(int) - bytes_of(ERRORS["missed"])) <= 1).all(axis=-1)
    assert missed.mean() > 0.15  # of two panels in six, and what is around


def test_an_overlay_has_the_inner_contours_of_all_classes():
    mask = squares(10, 100)
    image = np.full((100, 100, 1), 7, np.uint8)
    shown = overlay(image, mask)
    for number in range(1, 11):
        inner = np.argwhere(mask == number)[1:-1]
        edge = np.argwhere(mask == number)[[0, -1]]
        assert abs(shown[tuple(edge.T)].astype(int) - bytes_of(class_colour(number))).max() <= 1
        assert (shown[tuple(inner.mean(axis=0).astype(int))] == 7).all()
    assert (shown[mask == 0] == 7).all()


def test_deep_images_are_shown_from_their_least_to_their_greatest_value():
    deep = np.array([[[1000], [3000]]], dtype=np.uint16)
    assert picture(deep, (2, 1)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    with np.errstate(all="raise"):
        assert picture(np.full((1, 2, 1), 7, np.float32), (2, 1)).max() == 0
    assert picture(np.full((1, 2, 3), 7, np.uint8), (2, 1)).tolist() == [[[7, 7, 7], [7, 7, 7]]]


def test_curves_end_with_the_seed_that_stopped_first(tmp_path, sheets):
    histories = [pd.DataFrame({"loss": values}) for values in ([3.0, 2.0, 1.0], [5.0, 4.0])]
    reached, values = curve(histories, "loss")
    assert reached.tolist() == [1, 2]
    assert values.tolist() == [[3, 2], [5, 4]]
    columns = {f"{side}/{score}": [0.9, 0.5] for side in ("train", "val") for score in ("loss", "iou")}
    history = pd.DataFrame({"epoch": [1, 2], **columns})
    draw_curves(tmp_path / "curves.png", {"unet": [history], "km_unet_pp_tiny": [history, history[:1]]}, "ce")
    assert legend_of(sheets[0]) == ["unet", "km_unet_pp_tiny"]
    titles = [axis.get_title() for axis in sheets[0].axes]
    assert titles[:2] == ["loss (ce), training", "loss (ce), validation"]
    lines = [line.get_xydata().tolist() for line in sheets[0].axes[3].lines]
    assert lines == [[[1, 0.9], [2, 0.5]], [[1, 0.9]]]


def test_every_network_has_its_point_and_its_name(tmp_path, sheets):
    names = [f"some_setting={n}" for n in range(17)]
    columns = {"parameters": 520_000, "seconds_per_epoch": 4.0, "dice": np.linspace(0.86, 0.88, 17)}
    columns["sd_seeds"] = [np.nan, *[0.004] * 16]
    draw_cost(tmp_path / "cost.png", pd.DataFrame(columns, index=names))
    assert legend_of(sheets[0]) == names
    points = [line.get_xydata()[0] for line in sheets[0].axes[0].lines if line.get_marker() == "o"]
    assert np.allclose(points, [[0.52, dice] for dice in columns["dice"]])
