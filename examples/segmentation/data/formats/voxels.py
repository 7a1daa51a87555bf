"""Volumes on disk (.mha, .nii, .nii.gz): read whole or not at all, and cut into slices."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segmentation.data.pixels import Pixels, check_sizes, named, require_simpleitk, sitk, to_pixels, to_values

# How a volume is cut into slices. Where their columns and rows point, such as "PI", to the back and the feet, or ""
# where no header tells. Then how voxels with a silent header are laid: STORED, TURNED, or "" where that is not known.
Cut = tuple[str, str]
FindCut = Callable[..., Cut]  # of a mask and the paths of its images and of itself
SAGITTAL, STORED, TURNED = "PI", "as stored", "turned over"
AXES = dict(zip("LRPASI", "xxyyzz", strict=True))


def read_stack(find_cut: FindCut, *files: Path) -> tuple[Pixels, NDArray[np.integer]]:
    """Image (s h w c) of one volume per channel, and mask values (s h w) of the last file."""
    values, _, (plane, way) = read_mask(find_cut, *files)
    cuts = [(plane, way or STORED)]  # a channel with a silent header is laid as it is stored
    channels = [to_pixels(sitk.GetArrayFromImage(lay(read_volume(path), cuts, path)), path) for path in files[:-1]]
    return np.stack(channels, axis=3), values


def read_channels(files: Sequence[Path]) -> list[sitk.Image]:
    """The volumes that are the channels of one case, all of the first one's size and laid as its header says."""
    first, *others = volumes = [read_volume(path) for path in files]
    for volume, path in zip(others, files[1:], strict=True):
        check_sizes(first.GetSize(), files[0], volume.GetSize(), path)
        _check_place(volume, path, first, files[0])
        copy_place(first, volume)
    return volumes


def read_mask(find_cut: FindCut, *files: Path) -> tuple[NDArray[np.integer], tuple[float, float], Cut]:
    """Mask values (s h w) of the last file, the size of a pixel in mm (row to row, column to column), and the cut.

    The mask lies where the header of its first image says; its size and axes must be those of all images.
    """
    *image_paths, path = files
    mask, headers = read_volume(path), [read_header(image) for image in image_paths]
    for header, image in zip(headers, image_paths, strict=True):
        check_sizes(header.GetSize(), image, mask.GetSize(), path)
        _check_place(mask, path, header, image)
    copy_place(headers[0], mask)
    cut = find_cut(mask, *files)
    laid = lay(mask, [cut], path)
    return to_values(sitk.GetArrayFromImage(laid), path), laid.GetSpacing()[1::-1], cut


def read_header(path: Path) -> sitk.ImageFileReader:
    """Size, spacing and direction of a volume of three dimensions, without its voxels."""
    require_simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with named(path, "read as a volume", RuntimeError):
        reader.ReadImageInformation()
    dimensions, values = reader.GetDimension(), reader.GetNumberOfComponents()
    if (dimensions, values) != (3, 1):
        found = f"{dimensions} dimensions and {values} value(s) per voxel"
        raise ValueError(f"{path} has {found}: save it as a volume of three dimensions with one value per voxel")
    spacing, direction = reader.GetSpacing(), np.reshape(reader.GetDirection(), (3, 3))
    if not min(spacing) > 0 or not abs(np.linalg.det(direction)) > 0.1:
        raise ValueError(f"{path} has the spacing {spacing} and the direction {direction.tolist()}: repair its header")
    return reader


def read_volume(path: Path) -> sitk.Image:
    """A volume, all of it: SimpleITK itself fills what a damaged or half-copied file lacks with zeros."""
    reader = read_header(path)
    with named(path, "read as a volume", RuntimeError):
        image = reader.Execute()
    with named(path, "unpacked", OSError, EOFError, zlib.error):
        content = path.read_bytes()
        if path.name.lower().endswith(".mha"):
            needed, found = sitk.GetArrayViewFromImage(image).nbytes, _length_in_mha(content)
        else:
            needed = int(np.prod(reader.GetSize())) * int(reader.GetMetaData("bitpix")) // 8
            found = len(gzip.decompress(content) if path.name.lower().endswith(".gz") else content)
            found -= int(float(reader.GetMetaData("vox_offset")))
    if found is not None and found < needed:
        raise ValueError(f"{path} holds {found} of {needed} bytes of voxels: replace or remove it")
    return image


def _length_in_mha(content: bytes) -> int | None:
    """Bytes of compressed voxels, unpacked; None where they are not compressed, for SimpleITK refuses short files."""
    head, *voxels = re.split(rb"ElementDataFile\s*=\s*LOCAL\s*?\n", content, maxsplit=1)
    if not voxels or not re.search(rb"CompressedData\s*=\s*True", head, re.IGNORECASE):
        return None
    size = re.search(rb"CompressedDataSize\s*=\s*(\d+)", head)
    return len(zlib.decompress(voxels[0][: int(size[1]) if size else None]))


def copy_place(header: sitk.ImageFileReader | sitk.Image, volume: sitk.Image) -> None:
    """Give a volume the spacing, origin and direction of a header."""
    volume.SetSpacing(header.GetSpacing())
    volume.SetOrigin(header.GetOrigin())
    volume.SetDirection(header.GetDirection())


def _check_place(mask: sitk.Image, path: Path, header: sitk.ImageFileReader | sitk.Image, image_path: Path) -> None:
    """Refuse a mask along other axes than its image, and warn of one in another place, as far as their headers say."""
    is_known, ways = not (is_silent(mask) or is_silent(header)), [orientation(volume) for volume in (mask, header)]
    if is_known and ways[0] != ways[1]:
        raise ValueError(f"{path} is laid {ways[0]} but its image {image_path} {ways[1]}: store both the same way")
    corners = np.array(list(product(*((0, size - 1) for size in header.GetSize()))))  # 8 3

    def place(volume: sitk.Image | sitk.ImageFileReader) -> NDArray:
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


def is_silent(volume: sitk.Image | sitk.ImageFileReader) -> bool:
    """Whether a header has the direction and origin that programs write when they know of none."""
    return tuple(volume.GetDirection()) == (1, 0, 0, 0, 1, 0, 0, 0, 1) and not any(volume.GetOrigin())


def orientation(volume: sitk.Image | sitk.ImageFileReader) -> str:
    """Where the three axes of a volume point, e.g. "LPS": to the left, the back and the head."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.GetDirection())


def as_stored(image: sitk.Image) -> sitk.Image:
    """The volume with its slices along the last axis, its rows and columns as the file has them.

    The axis from slice to slice is one that is flat, else that of the largest spacing, else the shortest.
    """
    size, spacing = image.GetSize(), image.GetSpacing()
    across = max(range(3), key=lambda axis: (size[axis] == 1, round(spacing[axis], 3), -size[axis], axis))
    return sitk.PermuteAxes(image, [*(axis for axis in range(3) if axis != across), across])


def cut_as_stored(volume: sitk.Image, *files: Path) -> Cut:
    """The cut that leaves slices `as_stored`."""
    return ("", STORED) if is_silent(volume) else (orientation(as_stored(volume))[:2], "")


def one_cut(paths: Sequence[Path]) -> FindCut:
    """The cut that leaves slices `as_stored`, but of volumes with equal spacings, all in the plane of most of them.

    By their sizes alone, these would be cut across now one axis and now another.
    """
    planes = Counter(plane for path in paths if (plane := _plane_of_equal_spacings(read_header(path))))
    return partial(_cut, min(planes, key=lambda plane: (-planes[plane], plane), default=""))


def _cut(plane: str, volume: sitk.Image, *files: Path) -> Cut:
    return (plane, "") if _plane_of_equal_spacings(volume) else cut_as_stored(volume)


def _plane_of_equal_spacings(volume: sitk.Image | sitk.ImageFileReader) -> str:
    """Where columns and rows point across the shortest axis; "" if spacing or a flat axis decides, or none is known."""
    size, spacing = volume.GetSize(), [round(width, 3) for width in volume.GetSpacing()]
    if is_silent(volume) or 1 in size or spacing.count(max(spacing)) < 2:
        return ""
    widest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
    across = min(widest, key=lambda axis: (size[axis], -axis))
    return "".join(letter for axis, letter in enumerate(orientation(volume)) if axis != across)


def lay(volume: sitk.Image, cuts: Sequence[Cut], path: Path) -> sitk.Image:
    """A volume in slices as other volumes were cut, most of them in the first of the `cuts`; without any, as stored.

    Slices are in the order of the file. A volume whose header is silent is laid as all other such volumes were.
    """
    if not cuts:
        return as_stored(volume)
    if is_silent(volume):
        ways = {way for _, way in cuts if way}
        if len(ways) != 1:
            raise ValueError(
                f"{path} does not say how it lies (direction and origin), nor do the images of the training tell how "
                "to turn it: store it with its direction and origin"
            )
        return sitk.Flip(as_stored(volume), (False, ways == {TURNED}, False))
    planes = [plane for plane, _ in cuts if plane]
    if not planes or cut_as_stored(volume)[0] in planes:
        return as_stored(volume)
    plane = planes[0]
    across = next(letter for letter in orientation(volume) if AXES[letter] not in {AXES[other] for other in plane})
    return sitk.DICOMOrient(volume, plane + across)
