"""The walks through an image: the first two directions of each kind, from the library's own tables."""

from collections.abc import Sequence
from itertools import pairwise

from directions import frame
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import DIRECTIONS, INK

from kan_mamba_layers import walks as library

HEIGHT, WIDTH = 8, 8
SUBGRID = 16  # pixels of the first one, which alone is drawn in full
KINDS = {
    "snake": library.snake(HEIGHT, WIDTH),
    "diagonal": library.diagonal(HEIGHT, WIDTH),
    "windows, size 4": library.windows(HEIGHT, WIDTH, 4),
    "strided, step 2": library.strided(HEIGHT, WIDTH, 2),
    "hilbert": library.hilbert(HEIGHT, WIDTH),
}


def walks() -> Figure:
    """A column per kind; its other two directions are these reversed."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for column, (title, found) in zip(figure.subplots(2, len(KINDS)).T, KINDS.items(), strict=True):
        for axes, order, colour in zip(column, found.orders[:2].tolist(), DIRECTIONS, strict=False):
            _draw(axes, order, colour, SUBGRID if title.startswith("strided") else len(order))
        column[0].set_title(title, color=INK, fontsize=10)
    return figure


def _draw(axes: Axes, order: Sequence[int], colour: str, shown: int) -> None:
    """Steps of one or two pixels, also diagonal ones, in full as long as positions are shown; the others dashed."""
    points = [(p % WIDTH, p // WIDTH) for p in order]
    jumps: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    gap = (float("nan"), float("nan"))
    for time, (a, b) in enumerate(pairwise(points), 1):
        near = time < shown and abs(a[0] - b[0]) + abs(a[1] - b[1]) <= 2
        (steps if near else jumps).extend((a, b, gap))
    axes.plot(*zip(*steps or [gap], strict=True), color=colour, lw=1.8, solid_capstyle="round")
    axes.plot(*zip(*jumps or [gap], strict=True), color=colour, lw=0.7, ls=(0, (2, 2)), alpha=0.6)
    axes.plot(*points[0], "o", color=colour, markersize=6)
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8})
    frame(axes, HEIGHT, WIDTH)
