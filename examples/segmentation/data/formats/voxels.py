"""Volumes on disk (.mha, .nii, .nii.gz): read whole or not at all, and once for all the slices of a volume."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from segmentation.data import simpleitk
from segmentation.data.item import Item, Pixels, check_sizes, named, to_pixels, to_values
from segmentation.tasks import Task

CHUNK = 1 << 22  # bytes
Loader = Callable[..., tuple[Pixels, NDArray[np.integer]]]  # files to image (s h w c) and mask values (s h w)
Classes = Callable[[NDArray], NDArray[np.uint8]]  # mask values to class numbers
Voxels = dict[str, tuple[range, ...]]  # by class, the voxel values in volumes that number every bone
# How a volume is cut into slices. Where their columns and rows point, such as "PI", to the back and the feet, or ""
# where no header tells. Then how voxels with a silent header are laid: STORED, TURNED, or "" where that is not known.
Cut = tuple[str, str]
SAGITTAL, STORED, TURNED = "PI", "as stored", "turned over"
AXES = dict(zip("LRPASI", "xxyyzz", strict=True))
_reading = Lock()


def slice_items(
    task: Task, name: str, files: tuple[Path, ...], loader: Loader, values: NDArray, classes: Classes, **facts: object
) -> list[Item]:
    """An item `<name>_<slice>` for each slice of mask values (s h w) that holds a class; `loader` reads it later."""
    return [
        Item.of_files(partial(read_slice, loader, classes, index), task, f"{name}_{index:03d}", *files, **facts)
        for index in np.flatnonzero(classes(values).any(axis=(1, 2))).tolist()
    ]


def read_slice(
    loader: Loader, classes: Classes, index: int, task: Task, *files: Path
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Slice `index` of what `loader(*files)` gives: image (h w c), and class numbers (h w) of its mask values.

    A grey volume gives as many equal channels as the task has.
    """
    with _reading:  # threads that want slices of one volume wait for it, instead of each reading it
        image, values = _load(loader, files)
    image = image[index]  # h w c
    return image.repeat(task.in_channels // image.shape[2], axis=2), classes(values[index])


@lru_cache(maxsize=4)
def _load(loader: Loader, files: tuple[Path, ...]) -> tuple[Pixels, NDArray[np.integer]]:
    return loader(*files)


def classes_of(task: Task, known: dict[str, Voxels], folder: Path) -> Classes:
    """What turns voxel values into the task's classes 1, 2, ...; what belongs to no class is background."""
    if task.name not in known:
        raise ValueError(f"{folder} holds volumes of the spine: task {task.name!r} is not one of {', '.join(known)}")
    if task.mask_threshold is not None:
        raise ValueError(f"{folder} holds volumes that number every bone: leave data.mask_threshold out")
    return partial(_number, tuple(known[task.name].values()))


def _number(ranges: tuple[tuple[range, ...], ...], values: NDArray[np.integer]) -> NDArray[np.uint8]:
    classes = np.zeros(values.shape, np.uint8)
    for number, part in ((k, part) for k, parts in enumerate(ranges, start=1) for part in parts):
        classes[(values >= part.start) & (values < part.stop)] = number
    return classes


def read_header(path: Path) -> simpleitk.ImageFileReader:
    """Size, spacing and direction of a volume of three dimensions, without its voxels."""
    reader = simpleitk.ImageFileReader()
    reader.SetFileName(str(path))
    with named(path, "read as a volume", RuntimeError):
        reader.ReadImageInformation()
    if (reader.GetDimension(), reader.GetNumberOfComponents()) != (3, 1):
        raise ValueError(
            f"{path} has {reader.GetDimension()} dimensions and {reader.GetNumberOfComponents()} value(s) per voxel: "
            "save it as a volume of three dimensions with one value per voxel"
        )
    spacing, direction = reader.GetSpacing(), np.reshape(reader.GetDirection(), (3, 3))
    if not min(spacing) > 0 or not abs(np.linalg.det(direction)) > 0.1:
        raise ValueError(f"{path} has the spacing {spacing} and the direction {direction.tolist()}: repair its header")
    return reader


def read_volume(path: Path) -> simpleitk.Image:
    """A volume, all of it: SimpleITK itself fills what a damaged or half-copied file lacks with zeros."""
    reader, is_mha = read_header(path), path.name.lower().endswith(".mha")
    if not is_mha:
        _check_nifti(path, reader)
    with named(path, "read as a volume", RuntimeError):
        image = reader.Execute()
    if is_mha:
        _check_mha(path, simpleitk.GetArrayViewFromImage(image).nbytes)
    return image


def read_mask(path: Path, *image_paths: Path) -> simpleitk.Image:
    """A mask with the spacing, origin and direction of its first image; its size and axes must be those of all."""
    mask, headers = read_volume(path), [read_header(image) for image in image_paths]
    for header, image in zip(headers, image_paths, strict=True):
        check_sizes(header.GetSize(), image, mask.GetSize(), path)
        _check_place(mask, path, header, image)
    copy_place(headers[0], mask)
    return mask


def copy_place(header: simpleitk.ImageFileReader, volume: simpleitk.Image) -> None:
    """Give a volume the spacing, origin and direction of a header."""
    volume.SetSpacing(header.GetSpacing())
    volume.SetOrigin(header.GetOrigin())
    volume.SetDirection(header.GetDirection())


def _check_place(mask: simpleitk.Image, path: Path, header: simpleitk.ImageFileReader, image_path: Path) -> None:
    """Refuse a mask along other axes than its image, and warn of one in another place, as far as their headers say."""
    is_known, ways = not (is_silent(mask) or is_silent(header)), [orientation(volume) for volume in (mask, header)]
    if is_known and ways[0] != ways[1]:
        raise ValueError(
            f"{path} is laid {ways[0]} but its image {image_path} {ways[1]}: store both with the same axes"
        )
    corners = np.array(list(product(*((0, size - 1) for size in header.GetSize()))))  # 8 3

    def place(volume: simpleitk.Image | simpleitk.ImageFileReader) -> NDArray:
        axes = np.reshape(volume.GetDirection(), (3, 3)) * volume.GetSpacing()
        return corners @ axes.T + volume.GetOrigin() if is_known else corners * volume.GetSpacing()

    voxels = np.linalg.norm(place(mask) - place(header), axis=1).max() / min(header.GetSpacing())
    says_nothing = is_silent(mask) and set(mask.GetSpacing()) == {1.0}
    if voxels > 0.5 and not says_nothing:
        warnings.warn(
            f"{path} lies up to {voxels:.3g} voxels beside its image {image_path}, as their headers say (origin, "
            "spacing, direction): it is laid on the image voxel by voxel",
            stacklevel=2,
        )


def to_arrays(laid: simpleitk.Image, path: Path) -> tuple[NDArray[np.integer], tuple[float, float]]:
    """Mask values (s h w) of a volume laid in slices, and the size of a pixel in mm, (row to row, column to column)."""
    return to_values(simpleitk.GetArrayFromImage(laid), path), laid.GetSpacing()[1::-1]


def as_stored(image: simpleitk.Image) -> simpleitk.Image:
    """The volume with its slices along the last axis, its rows and columns as the file has them.

    The axis from slice to slice is one that is flat, else that of the largest spacing, else the shortest.
    """
    size, spacing = image.GetSize(), image.GetSpacing()
    across = max(range(3), key=lambda axis: (size[axis] == 1, round(spacing[axis], 3), -size[axis], axis))
    return simpleitk.PermuteAxes(image, [*(axis for axis in range(3) if axis != across), across])


def is_silent(volume: simpleitk.Image | simpleitk.ImageFileReader) -> bool:
    """Whether a header has the direction and origin that programs write when they know of none."""
    return tuple(volume.GetDirection()) == (1, 0, 0, 0, 1, 0, 0, 0, 1) and not any(volume.GetOrigin())


def orientation(volume: simpleitk.Image | simpleitk.ImageFileReader) -> str:
    """Where the three axes of a volume point, e.g. "LPS": to the left, the back and the head."""
    return simpleitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.GetDirection())


def cut_of(volume: simpleitk.Image) -> Cut:
    """How `as_stored` cuts a volume."""
    return ("", STORED) if is_silent(volume) else (orientation(as_stored(volume))[:2], "")


def lay(volume: simpleitk.Image, cuts: Sequence[Cut], path: Path) -> simpleitk.Image:
    """A volume in slices as other volumes were cut, most of them in the first of the `cuts`; without any sagittally.

    Slices are in the order of the file. A volume whose header is silent is laid as all other such volumes were.
    """
    if is_silent(volume):
        ways = {way for _, way in cuts if way}
        if len(ways) != 1:
            raise ValueError(
                f"{path} does not say how it lies (direction and origin), nor do the images of the training tell how "
                "to turn it: store it with its direction and origin"
            )
        return simpleitk.Flip(as_stored(volume), (False, ways == {TURNED}, False))
    planes = [plane for plane, _ in cuts if plane]
    if cuts and (not planes or cut_of(volume)[0] in planes):
        return as_stored(volume)
    plane = planes[0] if planes else SAGITTAL
    across = next(letter for letter in orientation(volume) if AXES[letter] not in {AXES[other] for other in plane})
    return simpleitk.DICOMOrient(volume, plane + across)


def read_pixels(path: Path, cut: Cut) -> Pixels:
    """The voxels of a volume (s h w) in slices."""
    return to_pixels(simpleitk.GetArrayFromImage(lay(read_volume(path), [cut], path)), path)


def _check_nifti(path: Path, reader: simpleitk.ImageFileReader) -> None:
    """Refuse a file that ends before its last voxel, or that does not unpack as it was packed."""
    voxels = int(np.prod(reader.GetSize())) * int(reader.GetMetaData("bitpix")) // 8
    needed = int(float(reader.GetMetaData("vox_offset"))) + voxels
    with (
        named(path, "unpacked", OSError, EOFError, zlib.error),
        gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream,
    ):
        length = sum(map(len, iter(partial(stream.read, CHUNK), b"")))
    if length < needed:
        raise ValueError(f"{path} ends after {length} of {needed} bytes: replace or remove it")


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
    with named(path, "unpacked", zlib.error):
        length = len(unpack.decompress(packed))
    if not unpack.eof or length < voxels:
        raise ValueError(f"{path} unpacks to {length} of {voxels} bytes: replace or remove it")
