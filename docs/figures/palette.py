"""Colours and text that all figures share."""

import matplotlib
from matplotlib.colors import LinearSegmentedColormap

INK, QUIET, PALE = "#1d2733", "#8a939e", "#e8ebef"
OURS, OTHERS = "#c8442f", "#b4bbc4"
CONV, KAN, CONTEXT = "#9cc3dd", "#f0c05a", "#8fc9a0"
DIRECTIONS = ("#2d6cb5", "#c8442f", "#2e8b57", "#8a4fb0")
HEAT = LinearSegmentedColormap.from_list("heat", ("#ffffff", KAN, OURS, INK), N=64)  # from nothing to much

STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": PALE,
    "svg.hashsalt": "kan_mamba_layers",  # the same bytes from the same data
    "svg.fonttype": "none",
}


def use_style() -> None:
    """Draw what follows in this style."""
    matplotlib.rcParams.update(STYLE)
