"""The picture of edge functions: small multiples on a common vertical scale."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kan_mamba_layers.layers._edges import EdgeLayer

MAX_PANELS = 36
_MAX_COLUMNS = 9
_COLOURS = {"curve": "#0b5394", "base": "#b45f06", "grid": "#eef1f6", "knots": "#7f8794", "zero": "#c4c9d2"}
# Points of a curve, and how far it goes on beyond the grid, in widths of the grid.
_POINTS = 400
_BEYOND = 0.15


@torch.no_grad()
def figure(layer: "EdgeLayer", edges: list[tuple[int, ...]] | None) -> "Figure":
    """Draw the given edges in their order or, for None, all or the largest."""
    try:
        from matplotlib.figure import Figure  # not pyplot, whose state is the user's
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib, which is not installed (pip install 'kan-mamba-layers[plot]')"
        ) from error
    count, per_output = layer.base_weight.numel(), layer.base_weight[0].numel()
    if edges is not None:
        columns = _columns(len(edges))
    elif count <= MAX_PANELS:
        edges = _indices(layer, torch.arange(count))
        columns = per_output if per_output <= _MAX_COLUMNS else _columns(count)  # one row for each output
    else:
        edges = _indices(layer, layer.edge_sizes().flatten().topk(MAX_PANELS).indices)
        columns = _columns(MAX_PANELS)
    rows = math.ceil(len(edges) / columns)
    one_grid = bool((layer.grid == layer.grid[0]).all())
    fig = Figure(figsize=(1 + 1.5 * max(columns, 3), 1.2 + 1.35 * rows), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False, sharex=one_grid, sharey=True).flatten()
    for n, panel in enumerate(panels):
        if n < len(edges):
            _draw(panel, layer, edges[n])
            panel.tick_params(labelbottom=not one_grid or n + columns >= len(edges))
        else:
            panel.set_axis_off()
    fig.supxlabel("input", fontsize=9)
    fig.supylabel("added to the output", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return fig


def _draw(panel: "Axes", layer: "EdgeLayer", edge: tuple[int, ...]) -> None:
    feature = layer._edge_feature(edge)
    knots = layer.grid[feature, layer.spline_order : -layer.spline_order]  # g+1
    low, high = knots[0].item(), knots[-1].item()
    beyond = _BEYOND * (high - low)
    x = torch.linspace(low - beyond, high + beyond, _POINTS, dtype=knots.dtype, device=knots.device)
    base = layer.base_weight[edge].to(x.dtype) * layer.base_activation(x)
    panel.axvspan(low, high, color=_COLOURS["grid"], linewidth=0, label="grid")
    panel.vlines(
        _list(knots),
        0,
        0.05,
        transform=panel.get_xaxis_transform(),
        color=_COLOURS["knots"],
        linewidth=0.8,
        label="knots",
    )
    panel.axhline(0, color=_COLOURS["zero"], linewidth=0.6)
    panel.plot(
        _list(x), _list(base), color=_COLOURS["base"], linewidth=0.9, linestyle="--", zorder=3, label="base part"
    )
    panel.plot(
        _list(x), _list(layer.edge_function(x, edge)), color=_COLOURS["curve"], linewidth=1.6, label="edge function"
    )
    place = f" {list(edge[2:])}" if len(edge) > 2 else ""
    panel.set_title(f"{feature} → {edge[0]}{place}", fontsize=8, pad=3)
    panel.tick_params(labelsize=7, length=2, width=0.6)
    panel.locator_params(nbins=4)
    panel.margins(x=0)
    for spine in panel.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color(_COLOURS["knots"])


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _indices(layer: "EdgeLayer", flat: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.stack(torch.unravel_index(flat.cpu(), layer.base_weight.shape), 1).tolist()]


def _list(x: Tensor) -> list[float]:
    return x.double().tolist()
