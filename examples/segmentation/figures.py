"""The pictures: cases with their outlines and errors, curves, and Dice against cost. They draw what others computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
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
from segmentation.runs import whole_file

DPI = 200
WIDTH, HEIGHT = 340, 512  # pixels of a panel, at most
GAP, MARGIN = 8, 10  # pixels: between panels, around all
LINE, LETTER, KEY = 34, 13, 190  # pixels: of a line of text, of a letter, of an entry of the legend
# Where a name may stand around its point: pixels away from it, and angles, the nearest and most usual ones first.
RADII = (10, 20, 32, 46, 62, 80, 100, 125, 150, 180, 210)
ANGLES = tuple(np.pi / 8 * n for n in (0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11))
INK = "#1d2733"
ERRORS = {"missed": MISSED, "extra": EXTRA, "another class": MISTAKEN}
PANELS = ("image", "outlines", "difference")
SCORES = {"loss": "loss", "iou": "IoU (mean per image)"}
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
    class_names: Sequence[str]  # of the classes 1, 2, ...


def draw_cases(path: Path, cases: Sequence[Case]) -> None:
    """One row per case: the image, both outlines with the names of the classes, and where the two masks differ."""
    lines = {"truth": "-", "prediction": "--"}
    keys: list[Artist] = [Line2D([], [], color=INK, lw=1, ls=style, label=name) for name, style in lines.items()]
    kinds = {kind for case in cases for kind, pixels in _errors(case.truth, case.prediction).items() if pixels.any()}
    keys += [Patch(color=colour, label=kind) for kind, colour in ERRORS.items() if kind in kinds]

    sizes = [_panel_size(case.truth) for case in cases]
    width = max(3 * max(w for w, _ in sizes) + 2 * GAP, LETTER * max(len(case.label) for case in cases)) + 2 * MARGIN
    columns = max(1, min(len(keys), width // KEY))  # of the legend
    height = sum(h + LINE + GAP for _, h in sizes) + LINE * (1 - len(keys) // -columns) + 2 * MARGIN
    figure, top = Figure((width / DPI, height / DPI), dpi=DPI), MARGIN + LINE
    words: dict[str, Any] = {"size": 7, "color": INK, "va": "center", "parse_math": False}
    for case, (w, h) in zip(cases, sizes, strict=True):
        figure.text(MARGIN / width, 1 - (top + LINE / 2) / height, case.label, weight="bold", **words)
        top += LINE + h
        lefts = [MARGIN + (w + GAP) * column for column in range(3)]
        row = [figure.add_axes((left / width, 1 - top / height, w / width, h / height)) for left in lefts]
        _draw_case(row, case, (w, h))
        if case is cases[0]:
            for left, title in zip(lefts, PANELS, strict=True):
                figure.text((left + w / 2) / width, 1 - (MARGIN + LINE / 2) / height, title, ha="center", **words)
        top += GAP
    sizing: dict[str, Any] = {"fontsize": 7, "borderpad": 0.2, "handlelength": 2, "columnspacing": 1.2}
    figure.legend(handles=keys, loc="lower center", ncols=columns, frameon=False, **sizing)
    with whole_file(path) as draft:
        figure.savefig(draft, pil_kwargs={"optimize": True})


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


def draw_curves(path: Path, histories: Mapping[str, Sequence[pd.DataFrame]], loss: str) -> None:
    """Loss, by its name, and IoU per epoch: a line per variant (mean over seeds) in a band over all its seeds."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    grid, colours = figure.subplots(2, 2, sharex=True, sharey="row"), network_colours(histories)
    for axis, (score, side) in zip(grid.flat, product(SCORES, SIDES), strict=True):
        for name, group in histories.items():
            epochs, values = curve(group, f"{side}/{score}")
            few = "." if len(epochs) < 3 else None
            axis.plot(epochs, values.mean(axis=0), color=colours[name], label=name, marker=few)
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colours[name], alpha=0.15, lw=0)
        axis.set_title(f"{SCORES[score]}{f' ({loss})' if score == 'loss' else ''}, {SIDES[side]}")
        axis.grid(alpha=0.3)
    for axis in grid[1]:
        axis.set_xlabel("epoch")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=110)


def curve(histories: Sequence[pd.DataFrame], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Epochs (e) that all seeds reached, and the values (seeds e) of one column."""
    length = min(len(history) for history in histories)
    values = np.stack([history[name].to_numpy(float)[:length] for history in histories])
    return np.arange(1, length + 1), values


def draw_history(path: Path, history: pd.DataFrame, loss: str) -> None:
    """Loss, by its name, and IoU per epoch of one run, training and validation."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (score, title) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        for side, label in SIDES.items():
            axis.plot(history["epoch"], history[f"{side}/{score}"], marker=".", label=label)
        axis.set(xlabel="epoch", title=f"{title} ({loss})" if score == "loss" else title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=110)


def draw_cost(path: Path, frame: pd.DataFrame) -> None:
    """Dice of every network against its parameters and its time per epoch; bars: deviation over seeds.

    `frame`: a row per network, by name, with parameters, seconds_per_epoch, dice and sd_seeds (NaN for one seed).
    """
    frame = frame.assign(millions=frame["parameters"] / 1e6, sd=frame["sd_seeds"].fillna(0.0))
    figure = Figure(figsize=(10, 4 + 0.1 * len(frame)), dpi=110, layout="constrained")
    grid, colours = figure.subplots(1, 2, sharey=True), network_colours(frame.index)
    columns = {"millions": "parameters (millions)", "seconds_per_epoch": "seconds per epoch"}
    for axis, (column, label) in zip(grid, columns.items(), strict=True):
        for name, row in frame.iterrows():
            bar = {"yerr": row["sd"], "elinewidth": 1, "capsize": 2} if row["sd"] else {}
            axis.errorbar(row[column], row["dice"], fmt="o", markersize=6, color=colours[name], **bar)
        axis.set_xlabel(label)
        axis.margins(x=0.2, y=0.2)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    grid[0].set_ylabel("Dice (mean per image)")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes stay where they are while the names look for free places
    for axis, column in zip(grid, columns, strict=True):
        _write_names(axis, frame[[column, "dice", "sd"]], colours)
    with whole_file(path) as draft:
        figure.savefig(draft)


def _write_names(axis: Axes, points: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Each name (points: x, y, half a bar) as near to its point as leaves other names, points and bars free."""
    bars = np.outer(points["sd"], (0.0, 1.0))
    low, high = (axis.transData.transform(points.iloc[:, :2].to_numpy() + sign * bars) for sign in (-1, 1))
    taken = [Bbox([[x - 5, y - 5], [x + 5, top + 5]]) for (x, y), (_, top) in zip(low, high, strict=True)]
    for name, (x, y), place in zip(points.index, (low + high) / 2, points.iloc[:, :2].to_numpy(), strict=True):
        text = axis.text(place[0], place[1], name, size=8, color=INK, ha="center", va="center", parse_math=False)
        w, h = text.get_window_extent().size
        for radius, angle in product(RADII, ANGLES):
            right, up = np.cos(angle) * (radius + w / 2), np.sin(angle) * (radius + h / 2)
            box = Bbox.from_bounds(x + right - w / 2, y + up - h / 2, w, h)
            inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        text.set_position(tuple(axis.transData.inverted().transform((x + right, y + up))))
        if radius > RADII[0]:
            line = {"arrowstyle": "-", "lw": 0.5, "color": colours[name], "shrinkA": 0, "shrinkB": 0}
            end = np.clip((x, y), box.min, box.max)  # the nearest point of the name
            axis.annotate("", place, end, textcoords="figure pixels", arrowprops=line)


def _panel_size(mask: Classes) -> tuple[int, int]:
    """Width and height of a panel in the image's own proportions."""
    h, w = mask.shape
    scale = min(WIDTH / w, HEIGHT / h)
    return max(1, round(w * scale)), max(1, round(h * scale))


def _errors(truth: Classes, found: Classes) -> dict[str, NDArray[np.bool_]]:
    """The wrong pixels (h w) of a prediction, by kind."""
    return {
        "missed": (truth > 0) & (found == 0),
        "extra": (truth == 0) & (found > 0),
        "another class": (truth != found) & (truth > 0) & (found > 0),
    }


def _draw_case(row: Sequence[Axes], case: Case, size: tuple[int, int]) -> None:
    """The three panels of a case, whose axes have as many pixels as `size`, the width and height, says."""
    masks = (case.truth, case.prediction)
    truth, found = (np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks)
    shades = picture(case.image, size)
    wrong = np.asarray(Image.fromarray(shades).convert("L").convert("RGB")).copy()
    for kind, pixels in _errors(truth, found).items():
        wrong[pixels] = np.array(to_rgb(ERRORS[kind])) * 255
    for axis, shown in zip(row, (shades, shades, wrong), strict=True):
        axis.imshow(shown, aspect="auto", interpolation="none")
        axis.set_axis_off()
    outlines = {
        (number, style): _outlines(mask == number, size)
        for number in range(1, len(case.class_names) + 1)
        for mask, style in zip(masks, ("-", (0, (3, 2))), strict=True)
    }
    for (number, style), lines in outlines.items():
        for line in lines:
            row[1].plot(line[:, 1], line[:, 0], color=class_colour(number), linestyle=style, linewidth=0.9)
    named = {number: np.concatenate(lines) for (number, _), lines in reversed(outlines.items()) if lines}
    edged: dict[str, Any] = {"size": 7, "ha": "center", "va": "center", "parse_math": False}
    edged["path_effects"] = [withStroke(linewidth=1, foreground="black")]
    every = np.concatenate([line for lines in outlines.values() for line in lines] or [np.zeros((0, 2))])
    taken: list[Bbox] = []
    for number, points in sorted(named.items()):
        box = _free_box(points, every, taken, LETTER * len(case.class_names[number - 1]), size)
        name, colour = case.class_names[number - 1], class_colour(number)
        row[1].text((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, name, color=colour, **edged)
        taken.append(box)
    row[1].set(xlim=(-0.5, size[0] - 0.5), ylim=(size[1] - 0.5, -0.5))


def _outlines(mask: NDArray[np.bool_], size: tuple[int, int]) -> list[NDArray[np.float64]]:
    """The contours (points yx) of a mask in a picture of this size, closed at its border too."""
    shades = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX), np.float64)
    return [line - 1 for line in find_contours(np.pad(shades, 1), 127.5)]


def _free_box(
    points: NDArray[np.float64], every: NDArray[np.float64], taken: Sequence[Bbox], long: float, size: tuple[int, int]
) -> Bbox:
    """Right, left, below or above a contour (points yx): where a name hides least of `every` contour and no name."""
    (w, h), tall, pad = size, 0.75 * LINE, 0.25 * LINE
    y, x = points.T
    corners = (
        (x.max() + pad, y[x.argmax()] - tall / 2),
        (x.min() - pad - long, y[x.argmin()] - tall / 2),
        (x[y.argmax()] - long / 2, y.max() + pad),
        (x[y.argmin()] - long / 2, y.min() - pad - tall),
    )
    bounds = [(np.clip(left, 0, w - long), np.clip(low, 0, h - tall)) for left, low in corners]
    boxes = [Bbox.from_bounds(left, low, long, tall) for left, low in bounds]
    hidden = [np.count_nonzero(((box.min < every[:, ::-1]) & (every[:, ::-1] < box.max)).all(axis=1)) for box in boxes]
    names = [sum(box.overlaps(other) for other in taken) for box in boxes]
    return boxes[min(range(4), key=lambda n: (names[n], hidden[n]))]
