"""Segmenter: a model together with the preprocessing of its images, from arrays to labels."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kan_mamba_layers._check import check_int
from kan_mamba_layers.layers.module import evaluating
from kan_mamba_layers.models.factory import from_pretrained
from kan_mamba_layers.models.model import Model, store
from kan_mamba_layers.models.pretrained import folder_of
from kan_mamba_layers.models.storage import read_settings
from kan_mamba_layers.ops.backend import Backend

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_WINDOWS_AT_ONCE = 4
_MOST_CLASSES = 255
_MODES = ("L", "LA", "RGB", "RGBA", "I", "F")  # of images of Pillow
_ROUNDING = 8  # steps of a floating-point type: a channel that spans no more is constant
_CONSTANT = 1e-6  # deviation of a channel between 0 and 1
_FAINTEST = 1e-3  # weight of a window at its corners


class Segmenter:
    r"""Label every pixel of an image with a model that was trained on squares of one size.

    The image is resized to a square (bilinear, antialiased), each channel gets mean 0 and deviation 1, and the logits
    are resized to the size of the image (bilinear). With :math:`z` these logits,

    .. math::
        p = \sigma(z) \text{ for one class}, \qquad
        p = \mathrm{softmax}(z) \text{ for several, the background first.}

    Depth, scale and offset of the image do not matter, to the precision of float64. A model of one channel sees the
    luma of a colour image, one of three channels sees a grey image three times; an alpha channel is dropped.

    Args:
        model: from ``b in_channels h w`` to logits of one class, or of the background and two or more classes. It is
            put in evaluation mode. Each call runs it in that mode, on its own device, and then restores the mode that
            it was in; while it is trained on, call from one thread at a time.
        classes: names of the classes that are not background, at most 255; pixels of the first are labelled 1.
        size: side of the squares.
        in_channels: 1 for grey images, 3 for colour.
        flip_axes: axes along which the model's training flipped images: -2 up and down, -1 left and right.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from kan_mamba_layers import create_model
        >>> model = create_model("km_unet_pp_tiny", in_channels=1)
        >>> segmenter = Segmenter(model, ["head"], size=64, in_channels=1, flip_axes=[-1])
        >>> image = np.zeros((67, 50), np.uint16)
        >>> segmenter(image).shape, segmenter.probabilities(image, flips=True).shape
        ((67, 50), (1, 67, 50))
    """

    def __init__(
        self, model: nn.Module, classes: Sequence[str], *, size: int, in_channels: int, flip_axes: Sequence[int] = ()
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; see create_model")
        is_sequence = isinstance(classes, (list, tuple, np.ndarray)) and len(classes) > 0
        if not is_sequence or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes must be a sequence of names, got {classes!r}; pass e.g. ['lesion']")
        if len(classes) > _MOST_CLASSES:
            raise ValueError(
                f"classes must be at most {_MOST_CLASSES}, for labels of 8 bits, got {len(classes)}; join some"
            )
        check_int("size", size, 2)
        check_int("in_channels", in_channels, 1)
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 (grey) or 3 (colour), got {in_channels!r}; pass one of them")
        if not isinstance(flip_axes, (Sequence, np.ndarray)):
            raise TypeError(f"flip_axes must be a sequence of axes, got {flip_axes!r}; pass e.g. [-1]")
        if list(flip_axes) not in ([], [-2], [-1], [-2, -1], [-1, -2]):
            raise ValueError(f"flip_axes may hold -2 (up and down) and -1 (left and right), got {flip_axes!r}")
        self.model = model.eval()
        self.classes = tuple(map(str, classes))
        self.size = int(size)
        self.in_channels = int(in_channels)
        self.flip_axes = tuple(map(int, flip_axes))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, backend: Backend | None = None) -> "Segmenter":
        """Load weights that this library brings, or a folder that :meth:`save_pretrained` wrote.

        Args:
            name: one of :func:`list_pretrained`, or the folder. A ``Path`` is always a folder.
            backend: another backend than the stored one.

        Raises:
            FileNotFoundError: there are no such weights and no such folder, or one of its files is missing.
            ValueError: the folder holds no segmenter, its files are damaged, or ``name`` is one of
                :func:`list_pretrained` and also a folder that holds a model.
        """
        folder = folder_of(name)
        return cls(from_pretrained(folder, backend=backend), **read_settings(folder))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Store the model and the settings, see :meth:`KMUNetPP.save_pretrained`.

        Args:
            folder: created if it does not exist.
            dtype: of the stored parameters, such as ``torch.float16``; None for their own.

        Raises:
            TypeError: the model is not of this library, or ``dtype`` is not a floating-point type.
            ValueError: a parameter is too large for ``dtype``, or the model has other parameters
                than a new one of the same arguments.
        """
        if not isinstance(self.model, Model):
            raise TypeError(f"model is a {type(self.model).__name__}, which is not of this library; use torch.save")
        settings = {name: getattr(self, name) for name in ("classes", "size", "in_channels", "flip_axes")}
        store(self.model, folder, dtype, settings)

    def __call__(self, image: Any, *, flips: bool = False, windows: bool = False) -> NDArray[np.uint8]:
        """Return the label of every pixel, ``(h, w)``: 0 for background, 1 for the first class.

        Args:
            image: see :meth:`probabilities`.
            flips: see :meth:`probabilities`.
            windows: see :meth:`probabilities`.
        """
        p = self._probabilities(image, flips, windows)  # k h w
        labels = p[0] > 0.5 if len(p) == 1 else p.argmax(dim=0)
        return labels.to("cpu", torch.uint8).numpy()

    def probabilities(self, image: Any, *, flips: bool = False, windows: bool = False) -> NDArray[np.float32]:
        """Return the probabilities of every pixel, ``(k, h, w)``: of one class, or of the background and all classes.

        Args:
            image: array ``(h, w)``, ``(h, w, 1)``, ``(h, w, 3)`` or ``(h, w, 4)`` of any size, of integers or finite
                floating-point numbers, or an image of Pillow.
            flips: whether to average the probabilities over the flips used in training.
            windows: whether to apply the model to overlapping windows of the unresized image.

        Raises:
            TypeError: the image holds no real numbers.
            ValueError: the image has another shape or values that are not finite, or ``flips`` is set for a model
                whose training knew none.
        """
        return self._probabilities(image, flips, windows).cpu().numpy()

    @staticmethod
    def to_square(image: NDArray[Any], size: int) -> Tensor:  # h w c -> c size size
        """Resize an image to a square, bilinear and antialiased, as float32.

        Bytes become 0 to 1; other values are stretched in each channel from their least to their greatest.

        Args:
            image: array ``(h, w, c)``.
            size: side of the square.
        """
        return F.interpolate(_unit(image)[None], size=(size, size), mode="bilinear", antialias=True)[0]

    @torch.no_grad()
    def _probabilities(self, image: Any, flips: bool, windows: bool) -> Tensor:  # k h w
        if flips and not self.flip_axes:
            raise ValueError("flips=True, but this model's training flipped no image; leave flips out")
        pixels = _with_channels(_pixels(image), self.in_channels)  # h w c
        x = _unit(pixels) if windows else self.to_square(pixels, self.size)
        x = _normalise(x)[None].to(self._like())  # 1 c h w
        axes = self.flip_axes if flips else ()
        subsets = [subset for number in range(len(axes) + 1) for subset in itertools.combinations(axes, number)]
        probabilities = []
        with evaluating(self.model):
            for subset in subsets:
                view = x.flip(subset)
                logits = self._blended(view) if windows else self._resized(view, pixels.shape[:2])
                p = logits.sigmoid() if len(logits) == 1 else logits.softmax(dim=0)
                probabilities.append(p.flip(subset))
        return torch.stack(probabilities).mean(dim=0)

    def _resized(self, x: Tensor, own: tuple[int, ...]) -> Tensor:  # 1 c size size -> k h w
        """Logits at the size of the image.

        Logits are resized, not probabilities: they run nearly straight across an outline, so that their zero is met to
        a fraction of a pixel, whereas a saturated sigmoid is a step, whose middle is half-way between two pixels.
        """
        return F.interpolate(self._logits(x), size=own, mode="bilinear")[0]

    def _blended(self, x: Tensor) -> Tensor:  # 1 c h w -> k h w
        """Logits of windows of half overlap, with weights that fall off like a Gaussian of an eighth of the window.

        A smaller image is padded with zeros, its mean.
        """
        size, own = self.size, x.shape[2:]
        before = [max(size - length, 0) // 2 for length in own]
        after = [max(size - length, 0) - first for length, first in zip(own, before, strict=True)]
        x = F.pad(x, (before[1], after[1], before[0], after[0]))
        height, width = x.shape[2:]
        corners = list(itertools.product(_starts(height, size), _starts(width, size)))
        t = torch.arange(size, device=x.device, dtype=torch.float32) - (size - 1) / 2
        bell = torch.exp(-(t**2) / (2 * (size / 8) ** 2))  # size
        weight = torch.outer(bell, bell).clamp(min=_FAINTEST)  # size size
        total = torch.zeros(self._num_logits, height, width, device=x.device, dtype=torch.float32)
        weights = torch.zeros(height, width, device=x.device, dtype=torch.float32)
        for first in range(0, len(corners), _WINDOWS_AT_ONCE):
            together = corners[first : first + _WINDOWS_AT_ONCE]
            batch = torch.cat([x[..., i : i + size, j : j + size] for i, j in together])  # n c size size
            for (i, j), logits in zip(together, self._logits(batch), strict=True):
                total[:, i : i + size, j : j + size] += weight * logits
                weights[i : i + size, j : j + size] += weight
        return (total / weights)[:, before[0] : before[0] + own[0], before[1] : before[1] + own[1]]

    def _logits(self, x: Tensor) -> Tensor:  # b c size size -> b k size size
        logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 4:
            kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise TypeError(f"model must return logits (b, k, h, w), got {kind}; wrap it so that it does")
        if logits.shape[1] != self._num_logits:
            raise ValueError(
                f"model returns {logits.shape[1]} logits, but {len(self.classes)} classes need {self._num_logits}: one "
                "for one class, else one for each and one for the background; pass other classes, or another model"
            )
        return logits.float()

    def _like(self) -> Tensor:
        """A tensor on the device and in the dtype of the model's images."""
        return next(self.model.parameters(), torch.empty(0, device="cpu"))

    @property
    def _num_logits(self) -> int:
        return 1 if len(self.classes) == 1 else 1 + len(self.classes)


def _pixels(image: Any) -> NDArray[Any]:  # h w c
    """The image as an array, or an error that says what is wrong with it."""
    mode = getattr(image, "mode", None)
    if isinstance(mode, str) and mode not in _MODES and not mode.startswith("I;16"):
        raise TypeError(
            f"image has Pillow's mode {mode!r}, whose values are neither grey levels nor colours; convert it to RGB"
        )
    pixels = np.asarray(image.getchannel(0) if mode == "LA" else image)
    if pixels.dtype.kind not in "uif" or isinstance(image, Tensor):
        kind = "a torch.Tensor" if isinstance(image, Tensor) else f"an array of {pixels.dtype}"
        raise TypeError(f"image must be an array of integers or floating-point numbers, got {kind}; convert it")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"image must have shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), got {np.shape(image)}; "
            "move its channels to the end"
        )
    if not pixels.size:
        raise ValueError(f"image has no pixels, its shape is {np.shape(image)}; leave it out")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("image holds values that are not finite; replace them")
    return pixels[..., :3]


def _with_channels(pixels: NDArray[Any], channels: int) -> NDArray[Any]:  # h w c -> h w channels
    """Grey as three equal channels, colour as its luma."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, axis=2)
    luma = pixels @ np.array(_LUMA)  # h w
    return (luma.round() if pixels.dtype.kind in "ui" else luma).astype(pixels.dtype)[..., None]


def _unit(pixels: NDArray[Any]) -> Tensor:  # h w c -> c h w
    """Bytes as 0 to 1, other values stretched in each channel from their least to their greatest."""
    if pixels.dtype == np.uint8:
        unit = pixels / 255.0
    else:
        step = np.finfo(pixels.dtype).eps if pixels.dtype.kind == "f" else 0.0
        pixels = pixels.astype(np.float64) / 2  # halves, whose differences are finite
        low, high = pixels.min((0, 1)), pixels.max((0, 1))  # c
        is_constant = high - low <= _ROUNDING * step * np.maximum(abs(low), abs(high))
        unit = (pixels - low) / np.where(is_constant, np.inf, high - low)
    return torch.from_numpy(np.moveaxis(unit, 2, 0).astype(np.float32, order="C"))


def _normalise(x: Tensor) -> Tensor:  # c h w
    """Mean 0 and deviation 1 in each channel; one that is constant, but for rounding, becomes 0."""
    x = x - x.mean((1, 2), keepdim=True)
    deviation = x.std((1, 2), keepdim=True, correction=0)
    return torch.where(deviation > _CONSTANT, x / deviation, 0.0)


def _starts(length: int, size: int) -> list[int]:
    """Where windows of half overlap begin, the last at the border."""
    return [*range(0, length - size, size // 2), length - size]
