"""Image files, read without losing anything: in their own depth, upright, and no colour taken for a class."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

try:
    import SimpleITK as sitk
except ImportError:  # `require_simpleitk` says so where it is needed
    sitk = None

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in Pillow
BLACK = 32  # a colour whose channels all lie below
DEEP_COLOURS = re.compile("(RGB[AX]?|LA);16[BLN]")  # Pillow's words for 16 bits per channel, of which it keeps 8


def read_image(path: Path, channels: int) -> Pixels:
    """Pixels (h w c) of a grey (c = 1) or colour (c = 3) image file in its own depth, 8 or 16 bits; alpha is dropped.

    The image is turned upright as its EXIF orientation says. Grey files give three equal channels where colour is
    wanted, and colour files their luma where grey is wanted.
    """
    pixels = to_pixels(_open(path)[1], path)  # h w c
    if channels == 3 and pixels.shape[2] == 1:
        return pixels.repeat(3, axis=2)
    if channels == 1 and pixels.shape[2] == 3:
        return (pixels @ LUMA).round().astype(pixels.dtype)[..., None]
    return pixels


def read_values(path: Path) -> NDArray[np.integer]:
    """Pixel values (h w) of a mask, upright: its greys, also of a palette or RGB; of a palette in colours the indices.

    The indices of a grey palette tell nothing: a quantised mask may well begin with white.
    """
    image, pixels = _open(path)
    if image.has_transparency_data:
        low, high = image.convert("RGBA").getchannel("A").getextrema()
        if low != high:
            raise ValueError(f"{path} is a mask with an alpha channel that varies: save it without alpha")
    if image.mode == "P":
        palette, indices = np.reshape(image.getpalette("RGB"), (-1, 3)), np.asarray(image)  # n 3, h w
        if (palette != palette[:, :1]).any():
            darkest = pixels[indices > 0].max(axis=1).min(initial=BLACK)
            if darkest < BLACK <= palette[0].max():
                raise ValueError(f"{path} is a mask with a palette in which black is not colour 0: save it in greys")
            return indices
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"{path} is a mask in colours: save it as grey values or palette indices, one per class")
    return to_values(pixels[..., 0], path)


def _open(path: Path) -> tuple[Image.Image, NDArray]:
    """An image, upright as its EXIF orientation says, and its pixels (h w c) in their own depth without alpha.

    Pillow keeps 8 bits of colours, or of grey with alpha, that have 16: those are read with SimpleITK.
    """
    with (
        named(path, "read as an image", OSError, SyntaxError, TypeError, ValueError),
        named(path, "read", Image.DecompressionBombError, fix="scale it down, for this is Pillow's limit"),
        path.open("rb") as stream,  # given a path, Pillow 13 maps a TIFF with an orientation into memory the wrong way
    ):
        image = Image.open(stream)
        is_deep = any(DEEP_COLOURS.search(str(tile[3])) for tile in image.tile)
        pages = getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF", "WEBP", "PNG") else 1
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image.load()
        image = ImageOps.exif_transpose(image)
    if pages > 1:
        raise ValueError(f"{path} holds {pages} images: save each in a file of its own")
    if is_deep and is_turned:
        raise ValueError(f"{path} has 16 bits per colour and an EXIF orientation: save it upright, without EXIF")
    if is_deep:
        require_simpleitk()
        with named(path, "read as an image", RuntimeError, fix="save it without alpha"):
            pixels = np.atleast_3d(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
        return image, pixels[..., : 3 if pixels.shape[2] > 2 else 1]
    if not image.mode.startswith(("I", "F")):
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        return image, np.atleast_3d(np.asarray(image.convert(mode)))
    return image, np.asarray(image)[..., None]


def require_simpleitk() -> None:
    """Say that SimpleITK is missing; most images need none."""
    if sitk is None:
        raise ImportError("volumes and images of 16 bits per colour need SimpleITK: python -m pip install SimpleITK")


def to_pixels(values: NDArray, path: Path) -> Pixels:
    """Values of an image in their own depth: 8 or 16 bits where they allow it, else float32."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind in "ui" and values.min() >= 0 and values.max() <= 65535:
        return values.astype(np.uint16)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} holds values that are not finite: replace or remove it")
    return values.astype(np.float32)


def to_values(values: NDArray, path: Path) -> NDArray[np.integer]:
    """Values of a mask; whole numbers may be stored as fractions."""
    if values.dtype.kind in "ui":
        return values
    if not (values == values.round()).all():
        raise ValueError(f"{path} holds fractions: a mask needs whole numbers, one per class")
    return values.astype(np.int64)


def check_sizes(size: Sequence[int], image_path: Path, mask_size: Sequence[int], mask_path: Path) -> None:
    """Refuse a mask of another size, (width, height) or (width, height, depth), than its image."""
    if tuple(size) != tuple(mask_size):
        found, wanted = ("x".join(map(str, sides)) for sides in (mask_size, size))
        turned = " (turned as its EXIF orientation says)" if tuple(size) == tuple(mask_size)[::-1] else ""
        raise ValueError(f"{mask_path} is {found} but its image {image_path} is {wanted}{turned}: save both alike")


@contextmanager
def named(path: Path, trouble: str, *errors: type[Exception], fix: str = "replace or remove it") -> Iterator[None]:
    """Errors of a reader as one that names the file, what could not be done with it, and how to mend that."""
    try:
        yield
    except errors as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise ValueError(f"{path} cannot be {trouble} ({reason}): {fix}") from error


def to_target(mask: NDArray[np.uint8], size: int) -> Tensor:
    """Class numbers (1 size size) of a mask (h w), squashed to a square."""
    return torch.tensor(np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)))[None]
