"""Pictures of the edges of KANLinear and KANConv2d."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from kan_layers import grouped_convolution, on_nonuniform_knots, with_large_splines

from helpers import assert_close, fresh_process, says
from kan_mamba_layers import KANLinear

pytest.importorskip("matplotlib")


def titles(figure) -> list[str]:
    return [panel.get_title() for panel in figure.axes if panel.axison]


def test_all_edges_of_a_small_layer_one_row_per_output() -> None:
    layer = with_large_splines(features=(3, 2))
    figure = layer.plot()
    assert titles(figure) == ["0 → 0", "1 → 0", "2 → 0", "0 → 1", "1 → 1", "2 → 1"]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 3)
    for panel, edge in zip(figure.axes, np.ndindex(2, 3), strict=True):
        curve = next(line for line in panel.lines if line.get_label() == "edge function")
        x, y = (torch.tensor(v, dtype=torch.float64) for v in (curve.get_xdata(), curve.get_ydata()))
        assert x[0] < -1.1 and x[-1] > 1.1, "a little beyond the grid"
        assert_close(f"{edge}", y, layer.edge_function(x, edge), 1e-5)
        (ticks,) = [c for c in panel.collections if c.get_label() == "knots"]
        assert_close("knots", np.array([s[0, 0] for s in ticks.get_segments()]), layer.grid[edge[1], 3:-3], 1e-6)


def test_the_largest_edges_of_a_large_layer() -> None:
    layer = with_large_splines(features=(20, 10))
    order = layer.edge_sizes().flatten().argsort(descending=True)[:36].tolist()
    assert titles(layer.plot()) == [f"{n % 20} → {n // 20}" for n in order]


def test_chosen_edges() -> None:
    figure = with_large_splines().plot([(5, 7), (0, 1), (2, 2)])
    assert titles(figure) == ["7 → 5", "1 → 0", "2 → 2"]
    figure = grouped_convolution().plot([(3, 1, 2, 0)])
    assert titles(figure) == ["3 → 3 [2, 0]"]


@pytest.mark.parametrize("same", [True, False])
def test_features_on_one_grid_share_the_axis(same: bool) -> None:
    layer = with_large_splines(features=(3, 2)) if same else on_nonuniform_knots(features=(3, 2))
    first, second = layer.plot().axes[:2]
    assert first.get_shared_x_axes().joined(first, second) is same


def test_into_a_given_figure() -> None:
    from matplotlib.figure import Figure

    layer, page = with_large_splines(features=(3, 2)), Figure(layout="constrained")
    for part in page.subfigures(1, 2):
        assert layer.plot([(1, 0), (0, 2)], part) is part
        assert titles(part) == ["0 → 1", "2 → 0"]
    assert len(page.axes) == 4
    page.draw_without_rendering()
    with pytest.raises(TypeError, match=says("figure must", "str", "pass")):
        layer.plot(figure="edges.png")


@pytest.mark.parametrize("make", [on_nonuniform_knots, grouped_convolution, lambda: with_large_splines().bfloat16()])
def test_writes_a_picture(make, tmp_path) -> None:
    make().plot().savefig(tmp_path / "edges.png")
    assert (tmp_path / "edges.png").read_bytes().startswith(b"\x89PNG")


def test_leaves_pyplot_and_the_layer_alone() -> None:
    printed = fresh_process(
        "import sys, torch\n"
        "from kan_mamba_layers import KANLinear\n"
        "layer = KANLinear(3, 2)\n"
        "print('matplotlib' in sys.modules)\n"
        "figure = layer.plot()\n"
        "print(type(figure).__name__, 'matplotlib.pyplot' in sys.modules, layer.training)\n"
    )
    assert printed.split() == ["False", "Figure", "False", "True"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=says("plot", "matplotlib", "pip install", r"-e .\.\[plot\]. in a checkout")):
        KANLinear(3, 2).plot()
