"""Draw edge functions: one small panel each, on a common vertical scale."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    AnyFigure: TypeAlias = Figure | SubFigure

MAX_PANELS = 36
_MAX_COLUMNS = 9
_COLOURS = {"curve": "#0b5394", "base": "#b45f06", "grid": "#eef1f6", "knots": "#7f8794", "zero": "#c4c9d2"}
# Points per curve, and how far a curve goes beyond the grid, in widths of the grid.
_POINTS = 400
_BEYOND = 0.15


class Curve(NamedTuple):
    """One edge function, sampled."""

    title: str
    knots: Tensor  # g+1
    x: Tensor  # points
    base: Tensor  # points
    value: Tensor  # points


def sample_points(knots: Tensor) -> Tensor:  # g+1 -> points
    """Equally spaced points on the knots' interval and a little beyond it."""
    low, high = knots[0].item(), knots[-1].item()
    beyond = _BEYOND * (high - low)
    return torch.linspace(low - beyond, high + beyond, _POINTS, dtype=knots.dtype, device=knots.device)


def draw(curves: Sequence[Curve], per_row: int | None, figure: "AnyFigure | None", *, same_grid: bool) -> "AnyFigure":
    """Draw the curves row by row, in a square if ``per_row`` is None or too many; ``same_grid`` shares the x axis."""
    try:
        from matplotlib.figure import Figure, FigureBase  # avoid pyplot's global state
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib, which is not installed (pip install matplotlib, or -e '.[plot]' in a checkout)"
        ) from error
    if not isinstance(figure, FigureBase | None):
        raise TypeError(f"figure must be a matplotlib figure, got {type(figure).__name__}; pass one, or None")
    square = math.ceil(math.sqrt(len(curves)))
    columns = square if per_row is None or per_row > _MAX_COLUMNS else per_row
    rows = math.ceil(len(curves) / columns)
    fig = figure or Figure(figsize=(1 + 1.5 * max(columns, 3), 1.2 + 1.35 * rows), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False, sharex=same_grid, sharey=True).flatten()
    for n, panel in enumerate(panels):
        if n < len(curves):
            _draw_curve(panel, curves[n])
            panel.tick_params(labelbottom=not same_grid or n + columns >= len(curves))
        else:
            panel.set_axis_off()
    fig.supxlabel("input", fontsize=9)
    fig.supylabel("added to the output", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return fig


def _draw_curve(panel: "Axes", curve: Curve) -> None:
    knots, x, base, value = (_list(v) for v in curve[1:])
    panel.axvspan(knots[0], knots[-1], color=_COLOURS["grid"], linewidth=0, label="grid")
    across = panel.get_xaxis_transform()
    panel.vlines(knots, 0, 0.05, transform=across, color=_COLOURS["knots"], linewidth=0.8, label="knots")
    panel.axhline(0, color=_COLOURS["zero"], linewidth=0.6)
    panel.plot(x, base, color=_COLOURS["base"], linewidth=0.9, linestyle="--", zorder=3, label="base part")
    panel.plot(x, value, color=_COLOURS["curve"], linewidth=1.6, label="edge function")
    panel.set_title(curve.title, fontsize=8, pad=3)
    panel.tick_params(labelsize=7, length=2, width=0.6)
    panel.locator_params(nbins=4)
    panel.margins(x=0)
    for spine in panel.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color(_COLOURS["knots"])


def _list(x: Tensor) -> list[float]:
    return x.double().tolist()
