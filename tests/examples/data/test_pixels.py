"""How one image and one mask are read: no depth is lost, no colour taken for a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.layouts import colours, save_deep
from segmentation.data.item import read_files, to_classes
from segmentation.data.pixels import read_image, read_values, to_pixels, to_target
from segmentation.prediction import predict_case, read_pixel_sizes
from segmentation.tasks import get_task

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
DEEP = GREY.astype(np.uint16) * 200
FLAT = np.full((3, 4), 77, np.uint8)
BITS = np.where(GREY > 127, 255, 0).astype(np.uint8)
FLOATS = GREY / np.float32(4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ending", "mode", "pixels"),
    [("png", "L", GREY), ("JPG", "L", FLAT), ("bmp", "RGB", GREY), ("png", "RGBA", GREY), ("tif", "LA", GREY),
     ("png", "P", GREY), ("png", "1", BITS), ("tif", "1", BITS), ("png", "I;16", DEEP), ("TIF", "I;16", DEEP),
     ("PNG", "deep", DEEP), ("tif", "deep", DEEP), ("tiff", "F", FLOATS)],
)  # fmt: skip
def test_images_keep_their_depth(tmp_path, ending, mode, pixels, channels):
    """Of equal channels: grey and colour tasks both get them in the depth of the file."""
    path = tmp_path / f"image.{ending}"
    if mode == "deep":
        save_deep(path, np.dstack([pixels] * 3))
    else:
        image = Image.fromarray(pixels)
        (image if image.mode == mode else image.convert(mode)).save(path)
    found = read_image(path, channels)
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, pixels[..., None].repeat(channels, 2))


@pytest.mark.parametrize("deep", [False, True])
def test_colours_are_kept_or_become_their_luma(tmp_path, deep):
    path, pixels = tmp_path / "image.png", colours(0)
    save_deep(path, pixels * np.uint16(257)) if deep else Image.fromarray(pixels).save(path)
    factor = 257 if deep else 1
    assert np.array_equal(read_image(path, 3), pixels * np.uint16(factor))
    luma = read_image(path, 1)
    assert luma.dtype == (np.uint16 if deep else np.uint8)
    assert abs(luma[..., 0] / factor - np.asarray(Image.fromarray(pixels).convert("L"))).max() <= 1


def test_whole_numbers_of_more_than_sixteen_bits_become_fractions():
    values = np.array([[70000, -1]], np.int32)
    assert (to_pixels(values, Path("a.tif")) == values).all()
    assert to_pixels(values, Path("a.tif")).dtype == np.float32
    with pytest.raises(ValueError, match=r"a\.tif holds values that are not finite: replace or remove it"):
        to_pixels(np.array([[np.inf]]), Path("a.tif"))


LEFT = np.where(np.arange(48) < 12, 255, 0).astype(np.uint8)[None].repeat(64, 0)  # as a person sees it: 64 48


def save_turned(path: Path, pixels: np.ndarray, orientation: int) -> None:
    """Pixels as they are seen, stored as a camera does that is held in one of eight ways."""
    methods = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = image.transpose(Image.Transpose(methods[orientation])) if orientation > 1 else image
    image.save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_images_and_masks_are_read_as_they_are_seen(tmp_path, orientation, ending):
    photo, mask = tmp_path / f"photo.{ending}", tmp_path / "mask.png"
    save_turned(photo, LEFT // 2, orientation)
    save_turned(mask, LEFT, orientation if ending == "png" else 1)
    image, classes = read_files(get_task("fetal_head"), photo, mask)
    assert np.array_equal(classes, LEFT // 255)
    assert abs(image[..., 0].astype(int) - LEFT // 2).max() <= 9
    assert np.array_equal(predict_case([photo], get_task("fetal_head"), lambda x: x[..., 0]).classes, image[..., 0])


def test_a_mask_as_the_camera_stored_it_is_refused_with_the_reason(tmp_path):
    save_turned(tmp_path / "photo.jpg", LEFT, 6)
    Image.fromarray(LEFT.T).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"is 64x48 but its image .* is 48x64 \(turned as its EXIF orientation says\)"):
        read_files(get_task("fetal_head"), tmp_path / "photo.jpg", tmp_path / "mask.png")


def test_deep_colours_with_an_orientation_are_refused(tmp_path, monkeypatch):
    save_deep(tmp_path / "photo.png", colours(0))
    monkeypatch.setattr(Image.Image, "getexif", lambda image: {ExifTags.Base.Orientation: 6})
    with pytest.raises(ValueError, match=r"photo.png has 16 bits per colour and an EXIF orientation: save it upright"):
        read_image(tmp_path / "photo.png", 3)


def test_huge_images_are_told_apart_from_broken_ones(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match=r"image.png cannot be read \(Image size .*scale it down.*Pillow's limit"):
        read_image(tmp_path / "image.png", 1)


COLOURED = Image.fromarray(BITS)
COLOURED.putpalette([255, 0, 0, *(0, 255, 0) * 255])
ADAPTIVE = {"palette": Image.Palette.ADAPTIVE}
RED = np.dstack([BITS, BITS // 8, BITS // 8])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY).convert("RGB"), GREY),
        (Image.fromarray(BITS).convert("1"), BITS),
        (Image.fromarray(DEEP), DEEP),
        (Image.fromarray(GREY.astype(np.float32)), GREY),
        (Image.fromarray(GREY.astype(np.int32)), GREY),
        (COLOURED, BITS),
        (Image.fromarray(BITS).convert("RGB").quantize(2), BITS),
        (Image.fromarray(BITS).convert("RGB").convert("P", **ADAPTIVE), BITS),
        (Image.fromarray(BITS).convert("P"), BITS),
        (Image.fromarray(GREY).quantize(16), GREY),
        (Image.fromarray(BITS).convert("LA"), BITS),
        (Image.fromarray(BITS).convert("RGBA"), BITS),
        (Image.new("RGB", (4, 3), (255, 0, 0)), "is a mask in colours: save it as grey values"),
        (Image.fromarray(GREY + np.float32(0.5)), "holds fractions: a mask needs whole numbers"),
        (Image.fromarray(RED).quantize(2), "is a mask with a palette in which black is not colour 0"),
        (Image.fromarray(RED).convert("P", **ADAPTIVE), "is a mask with a palette in which black is not colour 0"),
        (Image.fromarray(np.dstack([BITS, BITS])), "is a mask with an alpha channel that varies: save it without"),
        (Image.fromarray(np.dstack([255 + 0 * BITS] * 3 + [BITS])), "with an alpha channel that varies"),
        (Image.fromarray(np.dstack([0 * BITS] * 3 + [BITS])), "with an alpha channel that varies"),
    ],
)
def test_masks_are_read_right_or_refused(tmp_path, image, expected):
    path = tmp_path / ("mask.tif" if image.mode in ("F", "I", "I;16") else "mask.png")
    image.save(path)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"mask\.\w+ .*{expected}"):
            read_values(path)
    else:
        assert np.array_equal(read_values(path), expected) and read_values(path).dtype.kind in "iu"


def test_masks_in_colour_files_of_sixteen_bits_keep_their_values(tmp_path):
    save_deep(tmp_path / "mask.png", (BITS // 255)[..., None].repeat(3, 2))
    assert np.array_equal(read_values(tmp_path / "mask.png"), BITS // 255)


def test_later_masks_lie_over_earlier_ones(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("image", "first", "second")]
    for path, pixels in zip(paths, (GREY, np.full_like(GREY, 255), BITS), strict=True):
        Image.fromarray(pixels).save(path)
    task = get_task("spine_structures")
    for numbers in ((1, 2), (3, 1)):
        labels = [{255: task.class_names[number - 1]} for number in numbers]
        classes = read_files(task, *paths, labels=labels)[1]
        assert np.array_equal(classes, np.where(BITS, numbers[1], numbers[0]))


def test_a_mask_of_one_class_may_use_one_or_255():
    for value in (1, 255):
        assert to_classes(np.array([[0, value]]), {255: "lesion"}, Path("mask.png")).tolist() == [[0, 1]]
    allowed = r"mask.png holds the value 1, .* allowed are 0 \(background\), 255 \(lesion\)"
    with pytest.raises(ValueError, match=allowed):
        to_classes(np.array([[0, 1, 255]]), {255: "lesion"}, Path("mask.png"))


def test_targets_keep_their_classes():
    target = to_target(np.repeat(np.arange(6, dtype=np.uint8), 10)[None].repeat(30, 0), 64)
    assert target.shape == (1, 64, 64)
    assert target.unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_pixel_sizes_are_found_by_the_stems_of_files(tmp_path):
    table = tmp_path / "sizes.csv"
    table.write_text("filename,pixel size(mm) \n0_HC.PNG,0.5\n1_HC,0.25\n")
    assert read_pixel_sizes(table) == {"0_HC": 0.5, "1_HC": 0.25}
    table.write_text("filename;pixel size(mm)\n0_HC.png;0.5\n")
    with pytest.raises(ValueError, match=r"begins with 'filename;pixel size\(mm\)', and needs .*separated by commas"):
        read_pixel_sizes(table)
