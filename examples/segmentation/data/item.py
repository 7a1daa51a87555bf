"""What a data set consists of: items, and how one image and one mask are read from disk without losing anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.data import simpleitk as sitk
from segmentation.tasks import Task

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in Pillow
DEEP_COLOURS = re.compile("(RGB[AX]?|LA);16[BLN]")  # Pillow's words for 16 bits a channel, of which it keeps 8


@dataclass(frozen=True)
class Item:
    """One image with its mask, not read yet: `read()` gives pixels (h w c) and class numbers (h w)."""

    id: str
    group: str  # the subject
    read: Callable[[], tuple[Pixels, NDArray[np.uint8]]]
    split: str = ""  # "train", "val" or "test" where the data set itself says so
    files: tuple[Path, ...] = ()  # what `read` opens
    pixel_size: tuple[float, float] | None = None  # mm from row to row and from column to column
    circumference: float | None = None  # mm, the head's, as the data set gives it


def read_pair(task: Task, image_path: Path, mask_path: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c) with the task's channels, and its mask (h w), pixel values turned into classes 1, 2, ..."""
    image, values = read_image(image_path, task.in_channels), read_values(mask_path)
    check_sizes(image, image_path, values, mask_path)
    return image, to_classes(values, task.labels, mask_path)


def check_sizes(image: Pixels, image_path: Path, mask: NDArray, mask_path: Path) -> None:
    """Refuse a mask (h w) of another size than its image (h w c)."""
    if mask.shape != image.shape[:2]:
        (h, w), (height, width) = mask.shape, image.shape[:2]
        raise ValueError(
            f"{mask_path} is {w}x{h} but its image {image_path} is {width}x{height}: save both in the same size"
        )


def read_image(path: Path, channels: int) -> Pixels:
    """Pixels (h w c) of a grey (c = 1) or colour (c = 3) image file in its own depth, 8 or 16 bits; alpha is dropped.

    Grey files give three equal channels where colour is wanted, and colour files their luma where grey is wanted.
    """
    image = _open(path)
    if image.mode.startswith("I"):
        pixels = _sixteen_bits(np.asarray(image), path)
    elif any(DEEP_COLOURS.search(str(tile[3])) for tile in _raw_modes(path)):
        pixels = _sixteen_bit_colours(path)
    elif image.mode == "F":
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{path} holds values that are not finite: replace or remove it")
    else:
        pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    pixels = np.atleast_3d(pixels)  # h w c
    if channels == 3 and pixels.shape[2] == 1:
        return pixels.repeat(3, axis=2)
    if channels == 1 and pixels.shape[2] == 3:
        return (pixels @ LUMA).round().astype(pixels.dtype)[..., None]
    return pixels


def read_values(path: Path) -> NDArray[np.integer]:
    """Pixel values (h w) of a mask: of a palette the indices, not the colours; of a grey picture in RGB its grey."""
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if not (values == values.round()).all():
            raise ValueError(f"{path} holds fractions: a mask needs whole numbers, one a class")
        return values.astype(np.int64)
    if image.mode in ("1", "L", "P"):
        return np.asarray(image.convert("L") if image.mode == "1" else image)
    colours = np.asarray(image.convert("RGB"))  # h w 3
    if (colours != colours[..., :1]).any():
        raise ValueError(f"{path} is a mask in colours: save it as grey values or palette indices, one a class")
    return colours[..., 0]


def to_classes(values: NDArray[np.integer], labels: dict[int, str], path: Path) -> NDArray[np.uint8]:
    """Class numbers 0, 1, 2, ... of mask values. A mask of one class may use 1 or 255 for it."""
    known = [0, *labels]
    present = np.unique(values).tolist()
    if len(labels) == 1 and set(present) <= {0, 1}:
        return values.astype(np.uint8)
    if odd := [value for value in present if value not in known]:
        allowed = ", ".join(f"{value} ({name})" for value, name in labels.items())
        raise ValueError(f"{path} holds the value {odd[0]}, which is no label: allowed are 0 (background), {allowed}")
    classes = np.zeros(values.shape, np.uint8)
    for number, value in enumerate(labels, start=1):
        classes[values == value] = number
    return classes


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        image.load()
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
    if pages > 1:
        raise ValueError(f"{path} holds {pages} images: save each in a file of its own")
    return image


def _raw_modes(path: Path) -> list[tuple]:
    """How the file itself stores its pixels; Pillow forgets it once the image is loaded."""
    with Image.open(path) as image:
        return list(image.tile)


def _sixteen_bits(values: NDArray[np.integer], path: Path) -> NDArray[np.uint16]:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{path} holds values outside 0 ... 65535: save it with 16 bits a pixel")
    return values.astype(np.uint16)


def _sixteen_bit_colours(path: Path) -> NDArray[np.uint16]:
    """Pixels (h w c) of which Pillow would keep 8 bits: colours, or grey with alpha, which is dropped."""
    try:
        pixels = np.atleast_3d(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} cannot be read as an image ({reason}): save it without alpha") from error
    return pixels[..., : 3 if pixels.shape[2] > 2 else 1]
