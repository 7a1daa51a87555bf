"""What a data set consists of: items, and how one image and one mask are read from disk without losing anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from segmentation.data import simpleitk
from segmentation.tasks import Task

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in Pillow
BLACK = 32  # a colour whose channels all lie below
DEEP_COLOURS = re.compile("(RGB[AX]?|LA);16[BLN]")  # Pillow's words for 16 bits per channel, of which it keeps 8


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
    own_group: bool = False  # the data set names no subject: the image is one by itself
    cut: tuple[str, str] = ("", "")  # of a volume: `voxels.Cut`

    @classmethod
    def of_files(cls, read: Callable, task: Task, id: str, *files: Path, group: str = "", **facts: Any) -> Item:
        """The item that `read(task, *files)` reads; without a `group` it is a subject of its own."""
        return cls(id, group or id, partial(read, task, *files), files=files, own_group=not group, **facts)


def read_pair(task: Task, image_path: Path, mask_path: Path) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c) with the task's channels, and its mask (h w), pixel values turned into classes 1, 2, ..."""
    image, values = read_raw(task.in_channels, image_path, mask_path)
    return image, to_classes(values, task.labels, mask_path, task.mask_threshold)


def read_layers(
    numbers: Sequence[int], task: Task, image_path: Path, *mask_paths: Path
) -> tuple[Pixels, NDArray[np.uint8]]:
    """An image (h w c) and class numbers (h w): `numbers[k]` where mask k is not 0; later masks lie over earlier."""
    image, *masks = read_raw(task.in_channels, image_path, *mask_paths)
    classes = np.zeros(image.shape[:2], np.uint8)
    for number, values, path in zip(numbers, masks, mask_paths, strict=True):
        label = {255: task.class_names[number - 1]}
        classes[to_classes(values, label, path, task.mask_threshold) > 0] = number
    return image, classes


def read_raw(channels: int, image_path: Path, *mask_paths: Path) -> tuple[Any, ...]:
    """An image (h w c), and the values (h w) of its masks, all of one size."""
    image, masks = read_image(image_path, channels), [read_values(path) for path in mask_paths]
    for values, path in zip(masks, mask_paths, strict=True):
        check_sizes(image.shape[1::-1], image_path, values.shape[::-1], path)
    return image, *masks


def check_sizes(size: Sequence[int], image_path: Path, mask_size: Sequence[int], mask_path: Path) -> None:
    """Refuse a mask of another size, (width, height) or (width, height, depth), than its image."""
    if tuple(size) != tuple(mask_size):
        found, wanted = ("x".join(map(str, sides)) for sides in (mask_size, size))
        turned = " (turned as its EXIF orientation says)" if tuple(size) == tuple(mask_size)[::-1] else ""
        raise ValueError(
            f"{mask_path} is {found} but its image {image_path} is {wanted}{turned}: save both in the same size"
        )


def read_image(path: Path, channels: int) -> Pixels:
    """Pixels (h w c) of a grey (c = 1) or colour (c = 3) image file in its own depth, 8 or 16 bits; alpha is dropped.

    The image is turned upright as its EXIF orientation says. Grey files give three equal channels where colour is
    wanted, and colour files their luma where grey is wanted.
    """
    image, is_deep = _open(path)
    if is_deep:
        pixels = _sixteen_bit_colours(path)
    elif image.mode.startswith(("I", "F")):
        pixels = to_pixels(np.asarray(image), path)
    else:
        pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    pixels = np.atleast_3d(pixels)  # h w c
    if channels == 3 and pixels.shape[2] == 1:
        return pixels.repeat(3, axis=2)
    if channels == 1 and pixels.shape[2] == 3:
        return (pixels @ LUMA).round().astype(pixels.dtype)[..., None]
    return pixels


def read_values(path: Path) -> NDArray[np.integer]:
    """Pixel values (h w) of a mask, upright: its greys, also of a palette or RGB; of a palette in colours the indices.

    The indices of a grey palette tell nothing: a quantised mask may well begin with white.
    """
    image, is_deep = _open(path)
    if image.has_transparency_data:
        low, high = image.convert("RGBA").getchannel("A").getextrema()
        if low != high:
            raise ValueError(f"{path} is a mask with an alpha channel that varies: save it without alpha")
    if image.mode.startswith(("I", "F")):
        return to_values(np.asarray(image), path)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode == "P":
        palette, indices = np.reshape(image.getpalette("RGB"), (-1, 3)), np.asarray(image)  # n 3, h w
        if (palette != palette[:, :1]).any():
            darkest = np.asarray(image.convert("RGB"))[indices > 0].max(axis=1).min(initial=BLACK)
            if darkest < BLACK <= palette[0].max():
                raise ValueError(
                    f"{path} is a mask with a palette in which black is not colour 0, the background: save it as grey "
                    "values, one per class"
                )
            return indices
    colours = _sixteen_bit_colours(path) if is_deep else np.asarray(image.convert("RGB"))  # h w c
    if (colours != colours[..., :1]).any():
        raise ValueError(f"{path} is a mask in colours: save it as grey values or palette indices, one per class")
    return colours[..., 0]


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


def to_classes(
    values: NDArray[np.integer], labels: dict[int, str], path: Path, threshold: int | None = None
) -> NDArray[np.uint8]:
    """Class numbers 0, 1, 2, ... of mask values. Of one class these may be 1 or 255, or all above a threshold."""
    if threshold is not None and len(labels) > 1:
        raise ValueError(f"data.mask_threshold is for masks of one class, and {path} has {', '.join(labels.values())}")
    if threshold is not None:
        return (values > threshold).astype(np.uint8)
    if len(labels) == 1 and np.isin(values, (0, 1)).all():
        return values.astype(np.uint8)
    allowed = ", ".join(f"{value} ({name})" for value, name in labels.items())
    greys = "; for masks with greys, as JPEG leaves them, give --data.mask_threshold 127" if len(labels) == 1 else ""
    check_values(values, [0, *labels], path, f", which is no label: allowed are 0 (background), {allowed}{greys}")
    classes = np.zeros(values.shape, np.uint8)
    for number, value in enumerate(labels, start=1):
        classes[values == value] = number
    return classes


def check_values(values: NDArray, known: Sequence[int], path: Path, remark: str) -> None:
    """Refuse a mask that holds a value which is not among the `known`."""
    if odd := sorted(set(np.unique(values).tolist()) - set(known)):
        raise ValueError(f"{path} holds the value {odd[0]}{remark}")


@contextmanager
def named(path: Path, trouble: str, *errors: type[Exception], fix: str = "replace or remove it") -> Iterator[None]:
    """Errors of a reader as one that names the file, what could not be done with it, and how to mend that."""
    try:
        yield
    except errors as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise ValueError(f"{path} cannot be {trouble} ({reason}): {fix}") from error


def _open(path: Path) -> tuple[Image.Image, bool]:
    """An image, and whether the file has colours of 16 bits, which Pillow forgets once it is loaded."""
    with (
        named(path, "read as an image", OSError, SyntaxError, TypeError, ValueError),
        named(path, "read", Image.DecompressionBombError, fix="scale it down, for this is Pillow's limit"),
        path.open("rb") as stream,  # given a path, Pillow 13 maps a TIFF with an orientation into memory the wrong way
    ):
        image = Image.open(stream)
        is_deep = any(DEEP_COLOURS.search(str(tile[3])) for tile in image.tile)
        pages = getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF", "WEBP") else 1
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image.load()
        upright = ImageOps.exif_transpose(image)
    if pages > 1:
        raise ValueError(f"{path} holds {pages} images: save each in a file of its own")
    if is_deep and turned:
        raise ValueError(f"{path} has 16 bits per colour and an EXIF orientation: save it upright, without EXIF")
    return upright, is_deep


def _sixteen_bit_colours(path: Path) -> NDArray[np.uint16]:
    """Pixels (h w c) of which Pillow would keep 8 bits: colours, or grey with alpha, which is dropped."""
    with named(path, "read as an image", RuntimeError, fix="save it without alpha"):
        pixels = np.atleast_3d(simpleitk.GetArrayFromImage(simpleitk.ReadImage(str(path))))
    return pixels[..., : 3 if pixels.shape[2] > 2 else 1]


def to_input(image: Pixels, size: int) -> Tensor:
    """Values (c size size) of an image (h w c), squashed to a square; bytes become 0 ... 1, deeper pixels are
    stretched from their least to their greatest value."""
    low, high = (0.0, 255.0) if image.dtype == np.uint8 else np.float32([image.min(), image.max()])
    scale = max(high - low, np.finfo(np.float32).tiny)
    planes = (Image.fromarray((plane.astype(np.float32) - low) / scale) for plane in np.moveaxis(image, 2, 0))
    return torch.from_numpy(np.stack([plane.resize((size, size), Image.Resampling.BILINEAR) for plane in planes]))


def to_target(mask: NDArray[np.uint8], size: int) -> Tensor:
    """Class numbers (1 size size) of a mask (h w), squashed to a square."""
    return torch.tensor(np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)))[None]
