"""How one image and one mask are read: no depth is lost, no colour taken for a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from segmentation.data.item import read_image, read_layers, read_pair, read_values, to_classes, to_pixels
from segmentation.tasks import get_task

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
DEEP = GREY.astype(np.uint16) * 200
BITS = np.where(GREY > 127, 255, 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "pixels", "channels", "expected"),
    [("L", GREY, 1, GREY), ("L", GREY, 3, GREY), ("I;16", DEEP, 1, DEEP), ("RGB", GREY, 1, GREY), ("LA", GREY, 1, GREY),
     ("RGBA", GREY, 3, GREY), ("P", GREY, 3, GREY), ("1", BITS, 1, BITS), ("F", GREY / np.float32(4), 1, GREY / 4)],
)  # fmt: skip
def test_images_keep_their_depth(tmp_path, mode, pixels, channels, expected):
    path = tmp_path / "image.tif"
    image = Image.fromarray(pixels)
    (image if image.mode == mode else image.convert(mode)).save(path)
    found = read_image(path, channels)
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, expected[..., None].repeat(channels, 2))


def test_colours_of_sixteen_bits_are_not_cut_to_eight(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 4, 3)).astype(np.uint16)
    path = tmp_path / "image.png"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=True), str(path))
    assert np.array_equal(read_image(path, 3), pixels)
    assert read_image(path, 1).dtype == np.uint16


def test_whole_numbers_of_more_than_sixteen_bits_become_fractions():
    values = np.array([[70000, -1]], np.int32)
    assert (to_pixels(values, Path("a.tif")) == values).all()
    assert to_pixels(values, Path("a.tif")).dtype == np.float32
    with pytest.raises(ValueError, match=r"a\.tif holds values that are not finite: replace or remove it"):
        to_pixels(np.array([[np.inf]]), Path("a.tif"))


def test_masks_in_colours_are_refused_and_grey_ones_in_colour_files_read(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(GREY).convert("RGB").save(path)
    assert np.array_equal(read_values(path), GREY)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    with pytest.raises(ValueError, match=r"mask.png is a mask in colours: save it as grey values"):
        read_values(path)


def test_masks_stored_as_fractions(tmp_path):
    path = tmp_path / "mask.tif"
    Image.fromarray(GREY.astype(np.float32)).save(path)
    assert np.array_equal(read_values(path), GREY) and read_values(path).dtype.kind == "i"
    Image.fromarray(GREY + np.float32(0.5)).save(path)
    with pytest.raises(ValueError, match=r"mask.tif holds fractions: a mask needs whole numbers"):
        read_values(path)


@pytest.mark.parametrize("kind", ["1", "P", "L"])
def test_masks_of_one_bit_and_of_palettes_hold_labels_not_colours(tmp_path, kind):
    Image.fromarray(GREY).save(tmp_path / "image.png")
    mask = Image.fromarray(BITS)
    if kind == "P":
        mask.putpalette([255, 0, 0, *(0, 255, 0) * 255])
    (mask.convert("1") if kind == "1" else mask).save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == kind
    image, classes = read_pair(get_task("fetal_head"), tmp_path / "image.png", tmp_path / "mask.png")
    assert np.array_equal(classes, BITS // 255) and np.array_equal(image[..., 0], GREY)


def test_later_masks_lie_over_earlier_ones(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("image", "first", "second")]
    for path, pixels in zip(paths, (GREY, np.full_like(GREY, 255), BITS), strict=True):
        Image.fromarray(pixels).save(path)
    for numbers in ((1, 2), (3, 1)):
        classes = read_layers(numbers, get_task("spine_structures"), *paths)[1]
        assert np.array_equal(classes, np.where(BITS, numbers[1], numbers[0]))


def test_a_mask_of_one_class_may_use_one_or_255():
    for value in (1, 255):
        assert to_classes(np.array([[0, value]]), {255: "lesion"}, Path("mask.png")).tolist() == [[0, 1]]
    allowed = r"mask.png holds the value 1, .* allowed are 0 \(background\), 255 \(lesion\)"
    with pytest.raises(ValueError, match=allowed):
        to_classes(np.array([[0, 1, 255]]), {255: "lesion"}, Path("mask.png"))
