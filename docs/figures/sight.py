"""What untrained models and layers see of a drawn image: effective receptive fields, and a scan as attention."""

import numpy as np
import torch
from directions import TITLES
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from palette import DIRECTIONS, HEAT, INK
from torch import Tensor

from kan_mamba_layers import create_model, effective_receptive_field, scan_attention

Array = NDArray[np.float64]

SIZE = 96  # pixels of the images
SEEDS = range(4)  # one network and one image each
SHOWN = 2
DECADES = 4  # of the colours of a receptive field
PLAIN = {"use_ss2d": False, "use_ema": False, "use_kan": False}
MODELS = {
    "convolutions": PLAIN,
    "convolutions and EMA": {**PLAIN, "use_ema": True},
    "convolutions and SS2D": {**PLAIN, "use_ss2d": True},
    "km_unet_tiny": {},
}
PIXELS = ((24, 22), (36, 40))  # of the map of half the size: in the lesion and on the skin
TINT_DECADES = 3


def receptive_fields() -> Figure:
    """The field of the central logit of untrained models that differ in their blocks alone."""
    figure = Figure(figsize=(11, 2.75), layout="constrained")
    first, *panels = figure.subplots(1, 1 + len(MODELS))
    _picture(first, lesion(SIZE, SHOWN))
    first.set_title("one of the images", fontsize=10)
    _mark(first, (SIZE // 2, SIZE // 2), "white")
    for axes, (name, options) in zip(panels, MODELS.items(), strict=True):
        field = np.mean([_field(seed, options) for seed in SEEDS], 0)
        shown = axes.imshow(field / field.max(), cmap=HEAT, norm=LogNorm(10.0**-DECADES, 1), interpolation="none")
        _frame(axes)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"half in {half_side(field)} x {half_side(field)} pixels", fontsize=9)
    bar = figure.colorbar(shown, ax=panels, pad=0.01, aspect=26, shrink=0.86)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, length=2)
    return figure


def attention() -> Figure:
    """Where the first scan of an untrained model takes two pixels of its output from: in all, and by direction."""
    image = lesion(SIZE, SHOWN)
    shares = scan_shares(image)
    small = image.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean((1, 3))
    figure = Figure(figsize=(11, 4), layout="constrained")
    rows = figure.subplots(len(PIXELS), 2 + len(TITLES))
    for (first, *panels), pixel, of_pixel in zip(rows, PIXELS, shares, strict=True):
        _picture(first, image)
        _mark(first, (2 * pixel[0] + 0.5, 2 * pixel[1] + 0.5), "white")
        for axes, share, colour in zip(panels, of_pixel, (INK, *DIRECTIONS), strict=True):
            _picture(axes, tinted(small, share, colour))
            _mark(axes, pixel, colour)
    for axes, name in zip(rows[0], ("image", "all directions", *TITLES), strict=True):
        axes.set_title(name, fontsize=10)
    return figure


def scan_shares(image: Array) -> Array:  # h w 3 -> q 1+k h/2 w/2
    """Mean absolute weights of all pixels for `PIXELS`, in the sum of the directions and in each; 0 for themselves."""
    torch.manual_seed(0)
    model = create_model("km_unet_tiny").eval()
    scan, inputs = model.encoder_context[0].ss2d, []
    hook = scan.register_forward_pre_hook(lambda layer, given: inputs.extend(given))
    with torch.no_grad():
        model(standardised(image))
    hook.remove()
    height, width = inputs[0].shape[1:3]
    M = scan_attention(scan, inputs[0], PIXELS)[0]  # k d q l
    shares = torch.cat([M.sum(0, keepdim=True), M]).abs().mean(1).transpose(0, 1)  # q 1+k l
    for of_pixel, (row, column) in zip(shares, PIXELS, strict=True):
        of_pixel[:, row * width + column] = 0
    return shares.unflatten(-1, (height, width)).double().numpy()


def half_side(field: Array) -> int:
    """The side of the square around the centre that holds half of a square field."""
    size = len(field)
    side = np.abs(np.arange(size) - size // 2)
    distance = np.maximum.outer(side, side)
    return 2 * int(next(r for r in range(size) if field[distance <= r].sum() >= field.sum() / 2)) + 1


def tinted(image: Array, share: Array, colour: str) -> Array:  # h w 3, h w
    """The image, pale and grey, under a colour that covers it in proportion to the logarithm of the share."""
    grey = 0.55 + 0.45 * image.mean(-1, keepdims=True)
    depth = 1 + np.log10(np.maximum(share / share.max(), 1e-9)) / TINT_DECADES
    return grey + np.clip(depth, 0, 1)[..., None] * (to_rgb(colour) - grey)


def standardised(image: Array) -> Tensor:  # h w 3 -> 1 3 h w
    x = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
    return (x - x.mean()) / x.std()


def _field(seed: int, options: dict[str, bool]) -> Array:
    torch.manual_seed(seed)
    return effective_receptive_field(create_model("km_unet_tiny", **options), standardised(lesion(SIZE, seed))).numpy()


def _picture(axes: Axes, image: Array) -> None:
    axes.imshow(np.round(255 * image).astype(np.uint8), interpolation="none")
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.6)


def _mark(axes: Axes, pixel: tuple[float, float], colour: str) -> None:
    """A ring around a pixel."""
    axes.plot(
        pixel[1], pixel[0], "o", markersize=7, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.4
    )


def lesion(size: int, seed: int) -> Array:  # h w 3
    """A skin lesion under a dermoscope, drawn: uneven skin, a ragged border, darker spots, a few hairs."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    angle, radius = np.arctan2(y - 0.02, x + 0.03), np.hypot(1.15 * (y - 0.02), x + 0.03)
    border = 0.25 + sum(rng.normal(0, 0.05 / m) * np.cos(m * angle + rng.uniform(0, 7)) for m in range(1, 8))
    inside = 1 / (1 + np.exp((radius - border) / 0.012))
    pigment = inside * (0.62 + 0.9 * clouds(size, 5, rng) + 0.5 * clouds(size, 14, rng))
    skin = 1 + 0.10 * clouds(size, 3, rng) + 0.06 * clouds(size, 24, rng)
    hairs = np.zeros_like(x)
    for _ in range(3):
        slope, bend, start = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(-0.4, 0.4)
        across = y - start - slope * x - bend * x**2
        hairs = np.maximum(hairs, np.exp(-((across * size / 0.9) ** 2)))
    light = 1 - 0.5 * (x**2 + y**2)
    tones = np.array([0.93, 0.72, 0.62]) - pigment[..., None] * np.array([0.45, 0.50, 0.47])
    return np.clip(tones * (skin * light * (1 - 0.6 * hairs))[..., None], 0, 1)


def clouds(size: int, waves: int, rng: np.random.Generator) -> Array:
    """Smooth noise of mean 0 and deviation 0.3, with about so many waves across the image."""
    spectrum = np.fft.fft2(rng.standard_normal((size, size)))
    frequency = size * np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    noise = np.fft.ifft2(spectrum * np.exp(-((frequency / waves) ** 2))).real
    return 0.3 * noise / noise.std()
