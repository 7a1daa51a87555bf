"""The pictures: cases with their outlines and errors, curves, and Dice against cost. They draw what others computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours
from skimage.segmentation import find_boundaries

from segmentation.palette import EXTRA, MISSED, MISTAKEN, class_colour, network_colours

DPI = 200
WIDTH, HEIGHT = 340, 460  # pixels of a panel, at most
GAP, MARGIN, LINE, LETTER = 8, 10, 34, 13  # pixels: between panels, around all, of a line of text and of one letter
INK = "#1d2733"
ERRORS = {"missed": MISSED, "extra": EXTRA, "another class": MISTAKEN}
PANELS = ("image", "truth and prediction", "difference")
SCORES = {"loss": "loss (Dice + cross-entropy)", "iou": "IoU (mean per image)"}
SIDES = {"train": "training", "val": "validation"}

Classes = NDArray[np.uint8]  # h w, 0 is the background
Shades = NDArray[np.uint8]  # h w 3


@dataclass(frozen=True)
class Case:
    """One image (h w c, of any depth) with the class numbers (h w) of its truth and of a prediction."""

    label: str
    image: NDArray[Any]
    truth: Classes
    prediction: Classes


def draw_cases(path: Path, cases: Sequence[Case], class_names: Sequence[str]) -> None:
    """One row per case: the image, both outlines with the names of the classes, and where the two masks differ."""
    sizes = [_panel_size(case.truth) for case in cases]
    longest = max(len(case.label) for case in cases) * LETTER
    width = max(longest, *(3 * w + 2 * GAP for w, _ in sizes)) + 2 * MARGIN
    height = sum(h + LINE for _, h in sizes) + (len(cases) - 1) * GAP + 2 * LINE + 2 * MARGIN
    figure, kinds, top = Figure((width / DPI, height / DPI), dpi=DPI), set[str](), MARGIN + LINE
    for case, (w, h) in zip(cases, sizes, strict=True):
        label = {"size": 7, "color": INK, "va": "center", "parse_math": False}
        figure.text(MARGIN / width, 1 - (top + LINE / 2) / height, case.label, weight="bold", **label)
        top += LINE + h
        lefts = [MARGIN + (w + GAP) * column for column in range(3)]
        places = [(left / width, 1 - top / height, w / width, h / height) for left in lefts]
        kinds |= _draw_case([figure.add_axes(place, frame_on=False) for place in places], case, class_names, (w, h))
        if case is cases[0]:
            for left, title in zip(lefts, PANELS, strict=True):
                figure.text((left + w / 2) / width, 1 - (MARGIN + LINE / 2) / height, title, ha="center", **label)
        top += GAP
    keys = [Line2D([], [], color=INK, lw=1, ls=ls, label=label) for label, ls in (("truth", "-"), ("prediction", "--"))]
    keys += [Patch(color=colour, label=label) for label, colour in ERRORS.items() if label in kinds]
    legend = {"loc": "lower center", "ncols": len(keys), "borderpad": 0.2, "handlelength": 2, "columnspacing": 1.2}
    figure.legend(handles=keys, frameon=False, fontsize=7, **legend)
    figure.savefig(path, pil_kwargs={"optimize": True})


def overlay(image: NDArray[Any], classes: Classes) -> Shades:
    """The image (h w c) in colours (h w 3) with the inner contour of every class."""
    shown = picture(image, (image.shape[1], image.shape[0])).copy()
    for number in np.unique(classes[classes > 0]):
        shown[find_boundaries(classes == number, mode="inner")] = np.array(to_rgb(class_colour(int(number)))) * 255
    return shown


def picture(image: NDArray[Any], size: tuple[int, int]) -> Shades:
    """Three bytes a pixel (h w 3) of an image (h w c) of any depth; deeper ones from their least to greatest value."""
    values = image.astype(np.float32)
    if image.dtype != np.uint8:
        values -= values.min()
        values *= 255 / (values.max() or 1)
    shades = Image.fromarray(values.astype(np.uint8).repeat(3 // image.shape[2], axis=2))
    return np.asarray(shades.resize(size, Image.Resampling.BILINEAR))


def draw_curves(path: Path, histories: Mapping[str, Sequence[pd.DataFrame]]) -> None:
    """Loss and IoU per epoch: a line per variant (mean over seeds) in a band from the least to the greatest seed."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    grid, colours = figure.subplots(2, 2, sharex=True, sharey="row"), network_colours(histories)
    for axis, (score, side) in zip(grid.flat, product(SCORES, SIDES), strict=True):
        for name, group in histories.items():
            epochs, values = curve(group, f"{side}/{score}")
            few = "." if len(epochs) < 3 else None
            axis.plot(epochs, values.mean(axis=0), color=colours[name], label=name, marker=few)
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colours[name], alpha=0.15, lw=0)
        axis.set_title(f"{SCORES[score]}, {SIDES[side]}")
        axis.grid(alpha=0.3)
    for axis in grid[1]:
        axis.set_xlabel("epoch")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def curve(histories: Sequence[pd.DataFrame], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Epochs (e) that all seeds reached, and the values (seeds e) of one column."""
    length = min(len(history) for history in histories)
    values = np.stack([history[name].to_numpy(float)[:length] for history in histories])
    return np.arange(1, length + 1), values


def draw_history(path: Path, history: pd.DataFrame) -> None:
    """Loss and IoU per epoch of one run, training and validation."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (score, title) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        for side, label in SIDES.items():
            axis.plot(history["epoch"], history[f"{side}/{score}"], marker=".", label=label)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_cost(path: Path, frame: pd.DataFrame) -> None:
    """Dice of every network against its parameters and its time per epoch; bars: deviation over seeds.

    `frame`: a row per network, by name, with parameters, seconds_per_epoch, dice and sd_seeds (NaN for one seed).
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid, colours = figure.subplots(1, 2, sharey=True), network_colours(frame.index)
    places = {"parameters (millions)": frame["parameters"] / 1e6, "seconds per epoch": frame["seconds_per_epoch"]}
    for axis, (label, place) in zip(grid, places.items(), strict=True):
        for name, row in frame.iterrows():
            bar = {"yerr": row["sd_seeds"], "elinewidth": 1, "capsize": 2} if row["sd_seeds"] > 0 else {}
            axis.errorbar(place[name], row["dice"], fmt="o", ms=6, color=colours[str(name)], **bar)
        axis.set_xlabel(label)
        axis.margins(x=0.2, y=0.2)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    grid[0].set_ylabel("Dice (mean per image)")
    figure.draw_without_rendering()  # fixes the axes, so that the names find their places
    for axis, place in zip(grid, places.values(), strict=True):
        _write_names(axis, {str(name): (place[name], frame["dice"][name]) for name in frame.index}, colours)
    figure.savefig(path, dpi=110)


def _panel_size(mask: Classes) -> tuple[int, int]:
    """Width and height of a panel in the image's own proportions."""
    h, w = mask.shape
    scale = min(WIDTH / w, HEIGHT / h)
    return max(1, round(w * scale)), max(1, round(h * scale))


def _draw_case(row: Sequence[Axes], case: Case, class_names: Sequence[str], size: tuple[int, int]) -> set[str]:
    """The three panels of a case, pixel by pixel as large as their axes; returns the kinds of errors in the last."""
    masks = [
        np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in (case.truth, case.prediction)
    ]
    truth, found = masks
    kinds = {
        "missed": (truth > 0) & (found == 0),
        "extra": (truth == 0) & (found > 0),
        "another class": (truth != found) & (truth > 0) & (found > 0),
    }
    shades = picture(case.image, size)
    wrong = np.asarray(Image.fromarray(shades).convert("L").convert("RGB")).copy()
    for kind, pixels in kinds.items():
        wrong[pixels] = np.array(to_rgb(ERRORS[kind])) * 255
    for axis, shown in zip(row, (shades, shades, wrong), strict=True):
        axis.imshow(shown, aspect="auto", interpolation="none")
        axis.set_axis_off()
    taken: list[Bbox] = []
    for number, name in enumerate(class_names, start=1):
        colour, points = class_colour(number), []
        for mask, style in ((case.truth == number, "-"), (case.prediction == number, (0, (3, 2)))):
            for line in _outlines(mask, size):
                row[1].plot(line[:, 1], line[:, 0], color=colour, linestyle=style, linewidth=0.9)
                points.append(line)
        if points:
            _write_class(row[1], name, colour, np.concatenate(points), taken, size)
    row[1].set(xlim=(-0.5, size[0] - 0.5), ylim=(size[1] - 0.5, -0.5))
    return {kind for kind, pixels in kinds.items() if pixels.any()}


def _outlines(mask: NDArray[np.bool_], size: tuple[int, int]) -> list[NDArray[np.float64]]:
    """The contours (points yx) of a mask in a picture of this size, closed at its border too."""
    shades = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX), np.float64)
    return [line - 1 for line in find_contours(np.pad(shades, 1), 127.5)]


def _write_class(
    axis: Axes, name: str, colour: str, points: NDArray[np.float64], taken: list[Bbox], size: tuple[int, int]
) -> None:
    """The name beside a contour (points yx): right, left, below or above it, where it covers least."""
    (w, h), long, tall, pad = size, LETTER * len(name), 0.75 * LINE, 0.25 * LINE
    y, x = points.T
    corners = (
        (x.max() + pad, y[x.argmax()] - tall / 2),
        (x.min() - pad - long, y[x.argmin()] - tall / 2),
        (x[y.argmax()] - long / 2, y.max() + pad),
        (x[y.argmin()] - long / 2, y.min() - pad - tall),
    )
    boxes = [
        Bbox.from_bounds(np.clip(left, 0, w - long), np.clip(low, 0, h - tall), long, tall) for left, low in corners
    ]
    covered = [
        1e6 * sum(box.overlaps(other) for other in taken)
        + np.count_nonzero((box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1))
        for box in boxes
    ]
    box = boxes[int(np.argmin(covered))]
    taken.append(box)
    middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    edge = [withStroke(linewidth=1, foreground="black")]
    axis.text(*middle, name, size=7, color=colour, ha="center", va="center", path_effects=edge, parse_math=False)


def _write_names(axis: Axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Each name as near to its point as leaves all points and other names free, on a thin line where it is far."""
    placed = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform(list(points.values()))]
    for name, place in points.items():
        for radius, (right, up) in product(
            (8, 16, 26, 38, 52, 68, 86), ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
        ):
            text = axis.annotate(
                name,
                place,
                (right * radius, up * radius),
                textcoords="offset points",
                size=8,
                color=INK,
                ha=("center", "left", "right")[right],
                va=("center", "bottom", "top")[up],
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colours[name], "shrinkB": 3} if radius > 8 else None,
                parse_math=False,
            )
            box = text.get_window_extent()
            free = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            if free and not any(box.overlaps(other) for other in placed):
                break
            text.remove()
        placed.append(box)
