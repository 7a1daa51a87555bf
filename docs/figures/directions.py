"""The four directions in which SS2D reads an image, from the library's own function."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import DIRECTIONS, INK

from kan_mamba_layers.ops.selective_scan.directions import flatten_directions

HEIGHT, WIDTH = 4, 5
GRID = "#d5dae1"
TITLES = ("rows", "columns", "rows, reversed", "columns, reversed")


def directions() -> Figure:
    """A path through the pixels per direction, from a dot to an arrow's head."""
    pixels = torch.arange(HEIGHT * WIDTH).view(1, HEIGHT, WIDTH, 1, 1).expand(-1, -1, -1, 4, -1)
    orders = flatten_directions(pixels)[0, :, :, 0].tolist()  # 4 l
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, order, title, colour in zip(figure.subplots(1, 4), orders, TITLES, DIRECTIONS, strict=True):
        x, y = [p % WIDTH for p in order], [p // WIDTH for p in order]
        for k in range(len(order) - 1):
            jump = abs(x[k + 1] - x[k]) + abs(y[k + 1] - y[k]) > 1
            style = {"lw": 0.8, "ls": (0, (2, 2)), "alpha": 0.6} if jump else {"lw": 2.2}
            axes.plot(x[k : k + 2], y[k : k + 2], color=colour, solid_capstyle="round", **style)
        axes.plot(x[0], y[0], "o", color=colour, markersize=8)
        axes.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2})
        frame(axes, HEIGHT, WIDTH)
        axes.set_title(title, color=INK, fontsize=10)
    return figure


def frame(axes: Axes, height: int, width: int) -> None:
    """Pixels as squares, the first row on top."""
    axes.set_xticks([k - 0.5 for k in range(width + 1)], [])
    axes.set_yticks([k - 0.5 for k in range(height + 1)], [])
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    axes.grid(color=GRID, lw=1.2)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
