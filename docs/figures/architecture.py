"""KMUNet and the grid of KMUNetPP, drawn from models: their blocks, channels and the sizes of an example's maps."""

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from palette import CONTEXT, CONV, INK, KAN, QUIET

from kan_mamba_layers import KMUNet, KMUNetPP, create_model

Place = tuple[float, int]

SIZE = 256  # pixels of the example
WIDTH, HEIGHT = 1.5, 0.62  # of a node
COLOURS = {"conv": CONV, "KAN": KAN, "context": CONTEXT}
LEGEND = {"conv": "convolutions", "KAN": "KAN stage", "context": "context block: SS2D, then EMA"}


def km_unet() -> Figure:
    """The encoder going down on the left, the decoder coming up on the right, a skip at every level."""
    model = create_model("km_unet_small")
    figure, axes = _canvas(9, 5.6)
    depth = len(model.widths) - 1
    sizes = dict(_level_sizes(model))
    for i, width in enumerate(model.widths):
        kinds = ["KAN" if _has_kan(model.encoder[i]) else "conv", *["context"] * (i < len(model.encoder_context))]
        _node(axes, 0, i, kinds, f"{width} channels\n{sizes[i]}")
        if i > 0:
            _arrow(axes, (0, i - 1), (0, i), down=True)
        if i < depth:
            kinds = [*["KAN"] * (str(i) in model.decoder_kan_stages), "context"]
            x = 4.4
            _node(axes, x, i, kinds, f"{width} channels\n{sizes[i]}")
            _arrow(axes, (0, i), (x, i), label="+")
    _arrow(axes, (0, depth), (4.4, depth - 1), label="up")
    for i in range(depth - 1, 0, -1):
        _arrow(axes, (4.4, i), (4.4, i - 1), down=True)
    _ends(axes, 4.4, 0, model.config["in_channels"], model.config["num_classes"])
    axes.set(xlim=(-2.3, 6.8), ylim=(-depth - 0.5, 0.5))
    return _with_legend(figure, axes, "KMUNet")


def km_unet_pp() -> Figure:
    """The triangle of nodes X[i, j]: level i, column j; each node takes all nodes to its left and one below."""
    model = create_model("km_unet_pp_small")
    figure, axes = _canvas(10.5, 6.2)
    sizes, step = dict(_level_sizes(model)), 2.15
    for i, j in _nodes(model):
        name = f"{i}_{j}"
        kinds = ["KAN" if _has_kan(model.encoder[i]) else "conv"] if j == 0 else ["KAN"] * (name in model.kan)
        has_context = name in model.context and not isinstance(model.context[name], torch.nn.Identity)
        kinds = [*kinds, *["context"] * has_context] or ["conv"]
        _node(axes, j * step, i, kinds, f"X[{i}, {j}]" + (f"   {model.widths[i]}\n{sizes[i]}" if j == 0 else ""))
        if j == 0 and i > 0:
            _arrow(axes, (0, i - 1), (0, i), down=True)
        if j > 0:
            _arrow(axes, ((j - 1) * step, i + 1), (j * step, i), up=True)
            _arrow(axes, ((j - 1) * step, i), (j * step, i))
            for k in range(j - 1):
                _arc(axes, k * step, j * step, i)
    last = len(model.widths) - 1
    _ends(axes, last * step, 0, model.config["in_channels"], model.config["num_classes"])
    skip = (-WIDTH / 4, HEIGHT / 2), (last * step + 1.75, 0.45)
    axes.add_patch(
        FancyArrowPatch(*skip, arrowstyle="-|>", mutation_scale=9, color=QUIET, connectionstyle="arc3,rad=-.17")
    )
    axes.text(last * step / 2, 1.32, f"first level before pooling, {SIZE} x {SIZE}", ha="center", color=QUIET)
    axes.set(xlim=(-2.3, last * step + 2.4), ylim=(-last - 0.5, 1.6))
    return _with_legend(figure, axes, "KMUNetPP")


def _nodes(model: KMUNetPP) -> Iterator[tuple[int, int]]:
    depth = len(model.widths) - 1
    return ((i, j) for j in range(depth + 1) for i in range(depth + 1 - j))


def _has_kan(module: torch.nn.Module) -> bool:
    return any(type(part).__name__ == "KANStage" for part in module.modules())


def _level_sizes(model: KMUNet | KMUNetPP) -> list[tuple[int, str]]:
    """The sizes of the levels' maps, of an image of `SIZE` pixels."""
    found: list[tuple[int, str]] = []

    def note(level: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            after = output[1] if isinstance(output, tuple) else output  # before and after pooling
            found.append((level, f"{after.shape[2]} x {after.shape[3]}"))

        return hook

    hooks = [stage.register_forward_hook(note(i)) for i, stage in enumerate(model.encoder)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, model.config["in_channels"], SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return found


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    return figure, axes


def _node(axes: Axes, x: float, level: int, kinds: list[str], text: str) -> None:
    """A box with one field per block."""
    y, part = -level, WIDTH / len(kinds)
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    outline = FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=.07", fc="none", ec="none")
    axes.add_patch(outline)
    for number, kind in enumerate(kinds):
        field = Rectangle((corner[0] + number * part, corner[1]), part, HEIGHT, fc=COLOURS[kind], ec="none")
        axes.add_patch(field)
        field.set_clip_path(outline)
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK, linespacing=1.35)


def _arrow(axes: Axes, start: Place, end: Place, *, down: bool = False, up: bool = False, label: str = "") -> None:
    """From a node at ``(x, level)`` to another."""
    (x0, i0), (x1, i1) = start, end
    a, b = [x0, -i0], [x1, -i1]
    if down:
        a[1] += (-1 if i1 > i0 else 1) * HEIGHT / 2
        b[1] -= (-1 if i1 > i0 else 1) * HEIGHT / 2
    elif up or i0 != i1:
        a[0], b[0], b[1] = a[0] + WIDTH / 2 * (0.8 if up else 1), b[0] - WIDTH / 2 * 0.8, b[1] - HEIGHT / 2
        a[1] += HEIGHT / 2 if up else 0
    else:
        a[0], b[0] = a[0] + WIDTH / 2, b[0] - WIDTH / 2
    axes.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=9, color=QUIET, shrinkA=1, shrinkB=1))
    if label:
        axes.text((a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + 0.08, label, ha="center", va="bottom", color=QUIET)


def _arc(axes: Axes, x0: float, x1: float, level: int) -> None:
    """A connection over the nodes between."""
    a, b = (x0 + WIDTH / 4, -level + HEIGHT / 2), (x1 - WIDTH / 4, -level + HEIGHT / 2)
    bend = f"arc3,rad=-{0.09 + 0.012 * (x1 - x0):.3f}"
    axes.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=8, color="#c3c9d1", connectionstyle=bend))


def _ends(axes: Axes, x: float, level: int, channels: int, classes: int) -> None:
    style = {"ha": "center", "va": "center", "fontsize": 8.5, "color": INK}
    axes.text(-1.75, 0, f"image\n{channels} channels\n{SIZE} x {SIZE}", **style)
    axes.add_patch(FancyArrowPatch((-1.3, 0), (-WIDTH / 2, 0), arrowstyle="-|>", mutation_scale=9, color=QUIET))
    axes.text(x + 1.75, -level, f"logits\n{classes} class{'es' * (classes > 1)}\n{SIZE} x {SIZE}", **style)
    end = (x + WIDTH / 2, -level), (x + 1.3, -level)
    axes.add_patch(FancyArrowPatch(*end, arrowstyle="-|>", mutation_scale=9, color=QUIET))


def _with_legend(figure: Figure, axes: Axes, title: str) -> Figure:
    handles = [Patch(color=COLOURS[kind], label=text) for kind, text in LEGEND.items()]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9)
    axes.set_title(title, loc="left", fontweight="bold")
    return figure
