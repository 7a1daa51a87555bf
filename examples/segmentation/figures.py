"""The pictures: cases with their outlines and errors, curves, and Dice against cost. They draw what others computed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import find_boundaries

from segmentation.runs import whole_file

# Classes, told apart on grey and on skin, also by eyes without one of the three kinds of cones (test_pictures.py).
CLASSES = ("#00ffff", "#ffdb00", "#ff006d", "#9292ff", "#dbffb6", "#926d00", "#9200ff", "#b62492")
GOLDEN = 0.618  # of the circle of hues: never comes back to where it was
ERRORS = {"missed": "#3fa7ff", "extra": "#ffb000", "another class": "#e0258a"}
# As in docs/figures/palette.py: ours in its warm colours, the baselines in a cold one and in grey.
NETWORKS = {
    "unet": "#6b7682",
    "unet_pp": "#2d6cb5",
    "km_unet": "#f0a92e",
    "km_unet_pp": "#c8442f",
    "u_kan": "#8fc9a0",
}
FAMILIES = ("km_unet_pp", "km_unet", "u_kan")  # come in several sizes, which are shades of one colour
OTHERS = ("#8a4fb0", "#1d2733", "#b5739d", "#7a8f2a", "#7fb4e6")

PANELS = ("image", "outlines", "difference")
OUTLINES = {"truth": "-", "prediction": "--"}
WIDTH, TALLEST, DPI = 2.3, 1.5, 150  # of a panel: inches, height by width at most, pixels per inch
LINE = 0.22  # inches
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
    """One row per case: the image, both outlines in the colours of the classes, and where the two masks differ."""
    names = {name: class_colour(k) for case in cases for k, name in enumerate(case.class_names, start=1)}
    errors = {kind: colour for kind, colour in ERRORS.items() if kind != "another class" or len(names) > 1}
    keys = [Line2D([], [], color="black", ls=style, lw=1, label=name) for name, style in OUTLINES.items()]
    keys += [Patch(color=colour, label=name) for name, colour in [*names.items(), *errors.items()]]
    columns = 6  # of the legend
    heights = [WIDTH * min(np.divide(*case.truth.shape), TALLEST) + 1.2 * LINE for case in cases]
    heights[0] += LINE
    figure = Figure((3 * WIDTH, sum(heights) - LINE * (len(keys) // -columns)), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    rows = figure.subfigures(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, case in zip(rows, cases, strict=True):
        row.suptitle(case.label, x=0.01, ha="left", size=8, weight="bold", parse_math=False)
        _draw_case(row.subplots(1, 3), case)
    for axis, title in zip(rows[0].axes, PANELS, strict=True):
        axis.set_title(title, size=8)
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
    _save(figure, path)


def _draw_case(axes: Sequence[Axes], case: Case) -> None:
    """The three panels of a case, in about as many pixels as they will have."""
    h, w = case.truth.shape
    scale = DPI * WIDTH * min(1 / w, TALLEST / h)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    masks = case.truth, case.prediction
    shades = picture(case.image, size)
    wrong = mark_errors(shades, *(_resize(mask, size, Image.Resampling.NEAREST) for mask in masks))
    for axis, shown in zip(axes, (shades, shades, wrong), strict=True):
        axis.imshow(shown, interpolation="none")
        axis.set_axis_off()
    x, y = (np.arange(-1, length + 1) for length in size)  # with a border of background, so that outlines are closed
    for number, name in enumerate(case.class_names, start=1):
        line = {"colors": class_colour(number), "linewidths": 0.9}
        for mask, style in zip(masks, OUTLINES.values(), strict=True):
            inside = np.pad(_resize((mask == number) * np.uint8(255), size, Image.Resampling.BOX), 1)
            if inside.max() > 127:  # else too little to be seen at this size
                drawn = axes[1].contour(x, y, inside, [127.5], linestyles=style, **line)
                named = drawn.clabel(fmt=lambda _, name=name: name, fontsize=6, inline=False) if style == "-" else []
                for text in named:
                    text.set(path_effects=[withStroke(linewidth=1.2, foreground="black")], rotation=0)
    axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())


def mark_errors(shades: Shades, truth: Classes, found: Classes) -> Shades:
    """The picture in grey, its wrong pixels in the colour of their error."""
    shown = np.asarray(Image.fromarray(shades).convert("L").convert("RGB")).copy()
    shown[(truth > 0) & (found == 0)] = _bytes(ERRORS["missed"])
    shown[(truth == 0) & (found > 0)] = _bytes(ERRORS["extra"])
    shown[(truth != found) & (truth > 0) & (found > 0)] = _bytes(ERRORS["another class"])
    return shown


def overlay(image: NDArray[Any], classes: Classes) -> Shades:
    """The image (h w c) in colours (h w 3) with the inner contour of every class."""
    shown = picture(image, (image.shape[1], image.shape[0])).copy()
    for number in np.unique(classes[classes > 0]):
        shown[find_boundaries(classes == number, mode="inner")] = _bytes(class_colour(number))
    return shown


def picture(image: NDArray[Any], size: tuple[int, int]) -> Shades:
    """Three bytes per pixel (h w 3) of an image (h w c); more than 8 bits from their least to greatest value."""
    values = image.astype(np.float32)
    if image.dtype != np.uint8:
        values -= values.min()
        values *= 255 / (values.max() or 1)
    return _resize(values.astype(np.uint8).repeat(3 // image.shape[2], axis=2), size, Image.Resampling.BILINEAR)


def draw_curves(path: Path, histories: Mapping[str, Sequence[pd.DataFrame]], loss: str) -> None:
    """Loss, by its name, and IoU per epoch: a line per variant (mean over seeds) in a band over all its seeds."""
    figure, colours = Figure(figsize=(10, 6.6), layout="constrained"), network_colours(histories)
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
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
    _save_with_legend(figure, path)


def curve(histories: Sequence[pd.DataFrame], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Epochs (e) that all seeds reached, and the values (seeds e) of one column."""
    length = min(len(history) for history in histories)
    values = np.stack([history[name].to_numpy(float)[:length] for history in histories])
    return np.arange(1, length + 1), values


def draw_cost(path: Path, frame: pd.DataFrame) -> None:
    """Dice of every network against its parameters and its time per epoch; bars: deviation over seeds.

    `frame`: a row per network, by name, with parameters, seconds_per_epoch, dice and sd_seeds (NaN for one seed).
    """
    figure, colours = Figure(figsize=(10, 4.5), layout="constrained"), network_colours(frame.index)
    axes = figure.subplots(1, 2, sharey=True)
    costs = {"parameters (millions)": frame["parameters"] / 1e6, "seconds per epoch": frame["seconds_per_epoch"]}
    for axis, (label, cost) in zip(axes, costs.items(), strict=True):
        for name, dice, deviation in frame[["dice", "sd_seeds"]].fillna(0.0).itertuples():
            axis.errorbar(cost[name], dice, deviation, fmt="o", color=colours[name], capsize=2, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Dice (mean per image)")
    _save_with_legend(figure, path)


def class_colour(number: int) -> str:
    """The colour of class `number` = 1, 2, ... in every picture; there is one for any number of classes."""
    if number <= len(CLASSES):
        return CLASSES[number - 1]
    return to_hex(tuple(hsv_to_rgb((GOLDEN * number % 1, 0.55, 0.95))))


def network_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, no two alike: networks that are known by name keep theirs whatever stands beside them."""
    others, seen, colours = count(), Counter[str](), {}
    for name in names:
        family = next((known for known in FAMILIES if name.startswith(known)), name)
        base = NETWORKS.get(family) or OTHERS[next(others) % len(OTHERS)]
        share = 0.6 ** ((seen[base] + 1) // 2)  # of the colour itself, in a mixture with white and black in turn
        colours[name] = to_hex(tuple(share * np.array(to_rgb(base)) + (1 - share) * (seen[base] % 2)))
        seen[base] += 1
    return colours


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int], how: Image.Resampling) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize(size, how))


def _bytes(colour: str) -> NDArray[np.float64]:
    return np.array(to_rgb(colour)) * 255


def _save_with_legend(figure: Figure, path: Path) -> None:
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as draft:
        figure.savefig(draft, dpi="figure")
