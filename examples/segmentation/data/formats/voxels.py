"""Volumes on disk (.mha, .nii, .nii.gz): read whole or not at all, and once for all the slices of a volume."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data import simpleitk as sitk
from segmentation.data.item import Item, Pixels
from segmentation.tasks import Task

CHUNK = 1 << 22  # bytes
Loader = Callable[..., tuple[Pixels, NDArray[np.integer]]]  # files to image (s h w c) and mask values (s h w)
Classes = Callable[[NDArray], NDArray[np.uint8]]  # mask values to class numbers
Voxels = dict[str, tuple[range, ...]]  # by class, the voxel values in volumes that number every bone
_reading = Lock()


def slice_items(
    task: Task,
    name: str,
    group: str,
    files: tuple[Path, ...],
    values: NDArray[np.integer],
    classes: Classes,
    loader: Loader,
    pixel_size: tuple[float, float] | None = None,
) -> list[Item]:
    """An item `<name>_<slice>` for each slice of mask values (s h w) that holds a class; `loader` reads it later."""
    return [
        Item(
            f"{name}_{index:03d}",
            group,
            partial(read_slice, task.in_channels, loader, files, index, classes),
            files=files,
            pixel_size=pixel_size,
        )
        for index in np.flatnonzero(classes(values).any(axis=(1, 2))).tolist()
    ]


def presets(task: Task, known: dict[str, Voxels], folder: Path) -> Voxels:
    """The voxel values of the task's classes."""
    if task.name not in known:
        raise ValueError(f"{folder} holds volumes of the spine: task {task.name!r} is not one of {', '.join(known)}")
    return known[task.name]


def number(values: NDArray[np.integer], ranges: Voxels) -> NDArray[np.uint8]:
    """Class numbers 1, 2, ... of voxel values; what belongs to no class is background."""
    classes = np.zeros(values.shape, np.uint8)
    for k, parts in enumerate(ranges.values(), start=1):
        for part in parts:
            classes[(values >= part.start) & (values < part.stop)] = k
    return classes


def read_slice(
    channels: int, loader: Loader, files: tuple[Path, ...], index: int, classes: Classes
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Slice `index` of what `loader(*files)` gives: image (h w channels), and class numbers (h w) of its mask values.

    A grey volume gives equal channels.
    """
    with _reading:  # threads that want slices of one volume wait for it, instead of each reading it
        image, values = _load(loader, files)
    image = image[index]  # h w c
    return image.repeat(channels // image.shape[2], axis=2), classes(values[index])


@lru_cache(maxsize=4)
def _load(loader: Loader, files: tuple[Path, ...]) -> tuple[Pixels, NDArray[np.integer]]:
    return loader(*files)


def read_header(path: Path) -> sitk.ImageFileReader:
    """Size, spacing and direction of a volume of three dimensions, without its voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    _attempt(path, reader.ReadImageInformation)
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{path} has {reader.GetDimension()} dimensions and {reader.GetNumberOfComponents()} value(s) a voxel: "
            "save it as a volume of three dimensions with one value a voxel"
        )
    spacing, direction = reader.GetSpacing(), np.reshape(reader.GetDirection(), (3, 3))
    if not min(spacing) > 0 or not abs(np.linalg.det(direction)) > 0.1:
        raise ValueError(f"{path} has the spacing {spacing} and the direction {direction.tolist()}: repair its header")
    return reader


def read_volume(path: Path) -> sitk.Image:
    """A volume, all of it: SimpleITK itself fills what a damaged or half-copied file lacks with zeros."""
    reader = read_header(path)
    if path.name.lower().endswith(".mha"):
        image = _attempt(path, reader.Execute)
        _check_mha(path, sitk.GetArrayViewFromImage(image).nbytes)
        return image
    _check_nifti(path, reader)
    return _attempt(path, reader.Execute)


def check_same_size(image: sitk.ImageFileReader, image_path: Path, mask: sitk.Image, mask_path: Path) -> None:
    """Refuse a mask of another size than its image."""
    if image.GetSize() != mask.GetSize():
        sizes = ["x".join(map(str, volume.GetSize())) for volume in (mask, image)]
        raise ValueError(
            f"{mask_path} is {sizes[0]} but its image {image_path} is {sizes[1]}: both must be of one size"
        )


def slice_axis(size: tuple[int, ...], spacing: tuple[float, ...]) -> int:
    """The axis from slice to slice: one that is flat, else that of the largest spacing, else the shortest."""
    return max(range(3), key=lambda axis: (size[axis] == 1, round(spacing[axis], 3), -size[axis], axis))


def as_stored(image: sitk.Image) -> sitk.Image:
    """The volume with its slices along the last axis, its rows and columns as the file has them."""
    across = slice_axis(image.GetSize(), image.GetSpacing())
    return sitk.PermuteAxes(image, [*(axis for axis in range(3) if axis != across), across])


def is_silent(volume: sitk.Image | sitk.ImageFileReader) -> bool:
    """Whether a header has the direction and origin that programs write when they know of none."""
    return tuple(volume.GetDirection()) == (1, 0, 0, 0, 1, 0, 0, 0, 1) and not any(volume.GetOrigin())


def orientation(volume: sitk.Image | sitk.ImageFileReader) -> str:
    """Where the three axes of a volume point, e.g. "LPS": to the left, the back and the head."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.GetDirection())


def sagittal(volume: sitk.Image) -> sitk.Image:
    """A volume with its columns to the back, its rows to the feet and its slices to the side, in the file's order."""
    if is_silent(volume):
        return as_stored(volume)
    side = next(letter for letter in orientation(volume) if letter in "LR")
    return sitk.DICOMOrient(volume, f"PI{side}")


def to_pixels(values: NDArray, path: Path) -> Pixels:
    """Voxels in their own depth: 8 or 16 bits where their values allow it, else float32."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind in "ui" and values.min() >= 0 and values.max() <= 65535:
        return values.astype(np.uint16)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} holds values that are not finite: replace or remove it")
    return values.astype(np.float32)


def to_values(values: NDArray, path: Path) -> NDArray[np.integer]:
    """Mask values of voxels; whole numbers may be stored as fractions."""
    if values.dtype.kind in "ui":
        return values
    if not (values == values.round()).all():
        raise ValueError(f"{path} holds fractions: a mask needs whole numbers, one a class")
    return values.astype(np.int32)


def _attempt(path: Path, read: Callable[[], Any]) -> Any:
    """What `read()` gives, with an error that names the file."""
    try:
        return read()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} cannot be read as a volume ({reason}): replace or remove it") from error


def _check_nifti(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse a file that ends before its last voxel, or that does not unpack as it was packed."""
    voxels = int(np.prod(reader.GetSize())) * int(reader.GetMetaData("bitpix")) // 8
    start = int(float(reader.GetMetaData("vox_offset")))
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            length = sum(map(len, iter(partial(stream.read, CHUNK), b"")))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): replace or remove it") from error
    if length < start + voxels:
        raise ValueError(f"{path} ends after {length} of {start + voxels} bytes: replace or remove it")


def _check_mha(path: Path, voxels: int) -> None:
    """Refuse compressed voxels that do not unpack as they were packed; SimpleITK itself refuses short files."""
    with path.open("rb") as stream:
        head = stream.read(CHUNK)
        start = re.search(rb"ElementDataFile\s*=\s*LOCAL\s*?\n", head)
        if not start or not re.search(rb"CompressedData\s*=\s*True", head[: start.start()], re.IGNORECASE):
            return
        size = re.search(rb"CompressedDataSize\s*=\s*(\d+)", head[: start.start()])
        stream.seek(start.end())
        packed = stream.read(int(size[1]) if size else -1)
    unpack = zlib.decompressobj()
    try:
        length = len(unpack.decompress(packed))
    except zlib.error as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): replace or remove it") from error
    if not unpack.eof or length < voxels:
        raise ValueError(f"{path} unpacks to {length} of {voxels} bytes: replace or remove it")
