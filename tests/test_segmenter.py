"""From images of any kind and size to labels at that size, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kan_mamba_layers import Segmenter, create_model

ODD = (37, 53)


class Known(nn.Module):
    """Always answers with the same logits (k s s)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.repeat(len(x), 1, 1, 1)


def grey(network: nn.Module, size: int = 32) -> Segmenter:
    return Segmenter(network, ["head"], size=size, in_channels=1, flip_axes=[-1])


def skin(network: nn.Module, size: int = 32) -> Segmenter:
    return Segmenter(network, ["lesion"], size=size, in_channels=3, flip_axes=[-2, -1])


def spine(network: nn.Module, size: int = 32) -> Segmenter:
    return Segmenter(network, ["L1", "L2", "L3", "L4", "L5"], size=size, in_channels=1)


TASKS: dict[Callable[..., Segmenter], tuple[int, int]] = {grey: (1, 1), skin: (3, 1), spine: (1, 6)}


def picture(size: tuple[int, int] = ODD, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels)).astype(np.uint8)


def pointwise(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 1), nn.Tanh(), nn.Conv2d(4, classes, 1)).eval()


def found(segmenter: Segmenter, image: np.ndarray, **how: bool) -> Tensor:
    return torch.from_numpy(segmenter.probabilities(image, **how))


def normalised(image: np.ndarray) -> Tensor:
    """1 c h w, mean 0 and deviation 1 in each channel."""
    values = image.astype(np.float64)
    values = (values - values.mean((0, 1))) / values.std((0, 1))
    return torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]


def enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear values (h w) between pixel centres, pixel by pixel."""
    (h, w), (height, width) = values.shape, size
    done = np.empty(size)
    for i in range(height):
        for j in range(width):
            y, x = max((i + 0.5) * h / height - 0.5, 0.0), max((j + 0.5) * w / width - 0.5, 0.0)
            top, left = int(y), int(x)
            low, right = min(top + 1, h - 1), min(left + 1, w - 1)
            above = values[top, left] * (1 - (x - left)) + values[top, right] * (x - left)
            below = values[low, left] * (1 - (x - left)) + values[low, right] * (x - left)
            done[i, j] = above * (1 - (y - top)) + below * (y - top)
    return done


@pytest.mark.parametrize("size", [(32, 32), ODD, (19, 70), (90, 21)])
def test_a_known_map_comes_back_at_the_size_of_the_image(size):
    logits = torch.randn(6, 32, 32)
    p = found(spine(Known(logits)), picture(size))
    expected = np.stack([enlarge(plane.double().numpy(), size) for plane in logits])  # 6 h w
    torch.testing.assert_close(p, torch.tensor(expected).softmax(dim=0).float(), rtol=1e-4, atol=1e-6)
    if size == (32, 32):
        torch.testing.assert_close(p, logits.softmax(dim=0), rtol=0, atol=0)
    assert (spine(Known(logits))(picture(size)) == expected.argmax(axis=0)).mean() > 0.999


def test_a_straight_contour_stays_where_it_is_at_any_size():
    """Logits that rise along the row are 0 at 0.3 of the width; interpolated probabilities would be 0.5 elsewhere."""
    x = (torch.arange(32) + 0.5) / 32
    labels = grey(Known(40 * (x - 0.3).expand(1, 32, 32)))(picture((45, 201)))
    centres = (np.arange(201) + 0.5) / 201
    assert (labels == (centres > 0.3)).all()


@pytest.mark.parametrize("size", [ODD, (20, 70), (100, 64), (15, 17)])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_windows_of_a_pointwise_network_equal_its_whole_image(task, size):
    channels, classes = TASKS[task]
    image, network = picture(size, channels), pointwise(channels, classes)
    logits = network(normalised(image))[0].detach()
    expected = logits.sigmoid() if classes == 1 else logits.softmax(dim=0)
    torch.testing.assert_close(found(task(network), image, windows=True), expected, rtol=1e-4, atol=1e-5)


def test_windows_see_the_image_at_its_own_resolution():
    """The mean over 3 x 3 pixels, which a squashed image does not have."""
    network = nn.Conv2d(1, 1, 3, padding=1, bias=False).eval()
    nn.init.constant_(network.weight, 1 / 9)
    image = picture((50, 90))
    inner = found(grey(network, 64), image, windows=True)[:, 1:-1, 1:-1].logit()
    expected = network(normalised(image))[0, :, 1:-1, 1:-1]
    assert (inner - expected).abs().mean() < 0.02  # but at the borders of the windows, where the blend is faint
    squashed = found(grey(network, 64), image)[:, 1:-1, 1:-1].logit()
    assert (squashed - expected).abs().mean() > 0.1


def test_windows_overlap_by_half_and_fade_towards_their_borders():
    """A network that answers the same in every window, blended by hand: a Gaussian of an eighth of the window."""
    logits = torch.randn(1, 32, 32)
    x = np.arange(32) - 15.5
    bell = np.exp(-(x**2) / (2 * 4**2))
    weight = np.maximum(np.outer(bell, bell), 1e-3)
    total, weights = np.zeros((40, 70)), np.zeros((40, 70))
    for top in (0, 8):  # steps of 16, the last window at the border
        for left in (0, 16, 32, 38):
            total[top : top + 32, left : left + 32] += weight * logits[0].numpy()
            weights[top : top + 32, left : left + 32] += weight
    p = found(grey(Known(logits)), picture((40, 70)), windows=True)
    torch.testing.assert_close(p[0], torch.tensor(total / weights).sigmoid().float(), rtol=1e-4, atol=1e-5)


def test_images_smaller_than_a_window_are_padded_with_their_mean():
    seen, image, network = [], picture((15, 40)), pointwise(1, 1)
    network.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    assert found(grey(network), image, windows=True).shape == (1, 15, 40)
    expected = torch.zeros(1, 32, 40)
    expected[:, 8:23] = normalised(image)[0]
    torch.testing.assert_close(torch.stack(seen), torch.stack([expected[..., :32], expected[..., 8:]]))


@pytest.mark.parametrize("windows", [False, True])
def test_flips_change_nothing_for_a_network_without_direction(windows):
    image, network = picture((40, 48), 3), pointwise(3, 1)
    plain, averaged = (found(skin(network), image, windows=windows, flips=flips) for flips in (False, True))
    torch.testing.assert_close(averaged, plain, rtol=1e-4, atol=1e-5)


def test_flips_average_the_probabilities_of_the_flips_that_training_knows():
    logits = 3 * torch.randn(1, 32, 32)
    p = logits.sigmoid()
    lesion = found(skin(Known(logits)), picture((32, 32), 3), flips=True)
    torch.testing.assert_close(lesion, (p + p.flip(1) + p.flip(2) + p.flip(1, 2)) / 4)
    head = found(grey(Known(logits)), picture((32, 32)), flips=True)
    torch.testing.assert_close(head, (p + p.flip(2)) / 2)


@pytest.mark.parametrize("windows", [False, True])
def test_depth_scale_and_offset_of_the_image_do_not_matter(windows):
    image, network = picture(), pointwise(1, 1)
    expected = found(grey(network), image, windows=windows)
    signed = image / 127.5 - 1
    for other in (
        image.astype(np.uint16) * 257,
        image.astype(np.float32) * 0.01 - 3,
        signed * 1e-300,
        signed * 1.7e308,
    ):
        p = found(grey(network), other, windows=windows)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype, windows):
    segmenter = grey(pointwise(1, 1))
    expected = segmenter.probabilities(picture(), windows=windows)
    torch.set_default_dtype(dtype)
    try:
        p = segmenter.probabilities(picture(), windows=windows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert p.dtype == np.float32 and np.array_equal(p, expected)


def test_squares_are_those_of_pillow():
    """Antialiased bilinear, of images that shrink and that grow."""
    for size in ((256, 256), (150, 333), ODD, (1, 9)):
        image = picture(size, 3)
        planes = [Image.fromarray(plane.astype(np.float32) / 255) for plane in np.moveaxis(image, 2, 0)]
        expected = np.stack([plane.resize((48, 48), Image.Resampling.BILINEAR) for plane in planes])
        torch.testing.assert_close(Segmenter.to_square(image, 48), torch.from_numpy(expected), rtol=0, atol=5e-6)


def test_values_of_every_depth_keep_their_steps():
    for dtype, low, high in ((np.uint8, 0, 255), (np.uint16, 100, 4100), (np.float32, -3, 5), (np.int64, -9999, 9)):
        image = np.linspace(low, high, 40 * 40).reshape(40, 40, 1).astype(dtype)
        values = Segmenter.to_square(image, 40)
        assert values.shape == (1, 40, 40)
        assert torch.allclose(values.flatten(), torch.linspace(0, 1, 1600), atol=1 / 255)
        assert len(values.half().unique()) >= (256 if dtype == np.uint8 else 1000)
    assert Segmenter.to_square(np.full((9, 9, 3), 7, np.uint16), 32).abs().max() == 0


@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.float64])
def test_grey_and_colour_and_alpha(depth):
    """A grey image is three equal channels, a colour image its luma, and alpha changes nothing."""
    scale = 257 if depth == np.uint16 else 1
    image = (picture(channels=4).astype(np.float64) * scale).astype(depth)
    colour, one = image[..., :3], image[..., :1]
    three = skin(pointwise(3, 1))
    assert (three(one) == three(one[..., 0])).all() and (three(one) == three(one.repeat(3, 2))).all()
    assert (three(image) == three(colour)).all()
    single = grey(pointwise(1, 1))
    luma = colour @ [0.299, 0.587, 0.114]
    expected = found(single, luma.round().astype(depth) if depth != np.float64 else luma)
    torch.testing.assert_close(found(single, image), expected, rtol=0, atol=1e-6)
    if depth == np.uint8:
        rounded = np.asarray(Image.fromarray(colour).convert("L"), np.int64)
        assert (abs(rounded - luma.round()) <= 1).all()
        assert (three(Image.fromarray(colour)) == three(colour)).all()
        grey_alpha = Image.merge("LA", [Image.fromarray(image[..., 0]), Image.new("L", image.shape[1::-1], 7)])
        assert (single(grey_alpha) == single(image[..., 0])).all()


def test_a_constant_image_is_all_zeros():
    seen = []
    network = pointwise(1, 1)
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for image in (np.full(ODD, 7, np.uint8), np.zeros(ODD), np.full(ODD, 1e30)):
        grey(network)(image)
        assert seen.pop().abs().max() == 0


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 40, 50)), ValueError, r"image must have shape .* got \(3, 40, 50\); move its channels"),
        (np.zeros((2, 40, 50, 3)), ValueError, "image must have shape"),
        (np.zeros((0, 5)), ValueError, r"image has no pixels, its shape is \(0, 5\)"),
        (np.full((4, 4), math.nan), ValueError, "image holds values that are not finite"),
        (np.zeros((4, 4), bool), TypeError, "got an array of bool"),
        (np.zeros((4, 4), complex), TypeError, "array of complex128"),
        (torch.zeros(4, 4), TypeError, "image must be an array .* got a torch.Tensor"),
        ("image.png", TypeError, "image must be an array"),
        (None, TypeError, "image must be an array"),
        (
            Image.new("P", (4, 4)),
            TypeError,
            "image has Pillow's mode 'P', .* neither grey levels nor colours",
        ),
        (Image.new("CMYK", (4, 4)), TypeError, "image has Pillow's mode 'CMYK'"),
        (Image.new("LAB", (4, 4)), TypeError, "image has Pillow's mode 'LAB'"),
        (Image.new("La", (4, 4)), TypeError, "image has Pillow's mode 'La'"),
        (Image.new("1", (4, 4)), TypeError, "image has Pillow's mode '1'"),
    ],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        grey(pointwise(1, 1))(image)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "unet"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"classes": "head"}, TypeError, "classes must be a sequence of names, got 'head'"),
        ({"classes": []}, TypeError, "classes must be a sequence of names"),
        ({"size": 1}, ValueError, "size must be at least 2"),
        ({"in_channels": 2}, ValueError, "in_channels must be 1 .* got 2"),
        ({"in_channels": True}, TypeError, "in_channels must be an integer, got True"),
        ({"flip_axes": -1}, TypeError, "flip_axes must be a sequence of axes, got -1"),
        ({"flip_axes": None}, TypeError, "flip_axes must be a sequence of axes, got None"),
        ({"flip_axes": "h"}, ValueError, "flip_axes may hold -2 .* got 'h'"),
        ({"flip_axes": [None, -1]}, ValueError, "flip_axes may hold -2"),
        ({"flip_axes": [1]}, ValueError, "flip_axes may hold -2"),
        ({"flip_axes": [-1, -1]}, ValueError, "flip_axes may hold -2"),
    ],
)
def test_wrong_settings_are_refused(changes, error, message):
    settings: dict[str, Any] = {"model": pointwise(1, 1), "classes": ["head"], "size": 32, "in_channels": 1}
    with pytest.raises(error, match=message):
        Segmenter(**(settings | changes))


@pytest.mark.parametrize("windows", [False, True])
def test_a_model_that_is_trained_on_answers_as_in_evaluation(windows):
    model = create_model("km_unet_pp_tiny", in_channels=1, deep_supervision=True)
    segmenter, image = grey(model, 64), picture()
    before = segmenter.probabilities(image, windows=windows)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    model.encoder[0].eval()
    modes = [module.training for module in model.modules()]
    assert np.array_equal(segmenter.probabilities(image, windows=windows), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("answer", "kind"), [(lambda x: [x], "a list"), (lambda x: {"out": x}, "a dict"), (lambda x: x[0], r"shape \(1,")]
)
def test_a_model_that_returns_no_logits_is_refused(answer, kind):
    class Other(nn.Module):  # without parameters, too
        def forward(self, x: Tensor) -> Any:
            return answer(x)

    with pytest.raises(TypeError, match=rf"model must return logits \(b, k, h, w\), got {kind}"):
        grey(Other())(picture())


def test_names_of_classes_may_be_an_array():
    assert Segmenter(pointwise(1, 3), np.array(["a", "b"]), size=32, in_channels=1).classes == ("a", "b")


@pytest.mark.parametrize("windows", [False, True])
def test_a_model_of_other_classes_is_refused(windows):
    with pytest.raises(ValueError, match="model returns 2 logits, but 1 classes need 1: one for one class"):
        grey(pointwise(1, 2))(picture(), windows=windows)


def test_flips_that_training_did_not_know_are_refused():
    with pytest.raises(ValueError, match="flips=True, but this model's training flipped no image"):
        spine(pointwise(1, 6))(picture(), flips=True)


def test_a_stored_segmenter_answers_the_same(tmp_path):
    model = create_model("km_unet_pp_tiny", in_channels=1, num_classes=6)
    before = Segmenter(model, ["L1", "L2", "L3", "L4", "L5"], size=64, in_channels=1)
    before.save_pretrained(tmp_path / "whole")
    after = Segmenter.from_pretrained(tmp_path / "whole")
    assert (after.classes, after.size, after.in_channels, after.flip_axes) == (before.classes, 64, 1, ())
    assert (after.probabilities(picture()) == before.probabilities(picture())).all()
    before.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = Segmenter.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert abs(half.probabilities(picture()) - before.probabilities(picture())).max() < 0.01
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-4), (torch.bfloat16, 2e-3), (torch.float64, 1e-6)])
def test_a_model_of_another_dtype_answers_within_its_rounding(dtype, error, windows):
    model = create_model("km_unet_pp_tiny", in_channels=1).eval()
    expected = grey(model).probabilities(picture(), windows=windows)
    found = grey(model.to(dtype)).probabilities(picture(), windows=windows)
    assert found.dtype == np.float32 and abs(found - expected).max() < error


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model is a Sequential, which is not of this library"):
        grey(pointwise(1, 1)).save_pretrained(tmp_path)
    model = create_model("km_unet_pp_tiny", in_channels=1)
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch\.dtype, got torch\.int8"):
        grey(model).save_pretrained(tmp_path, dtype=torch.int8)
    with torch.no_grad():
        next(model.parameters()).fill_(1e5)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16 cannot hold encoder"):
        grey(model).save_pretrained(tmp_path, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model without classes and size"):
        Segmenter.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither one of list_pretrained"):
        Segmenter.from_pretrained("nowhere")


def test_labels_hold_every_class() -> None:
    names = [f"class {n}" for n in range(256)]
    with pytest.raises(ValueError, match=r"classes must be at most 255.* got 256"):
        Segmenter(torch.nn.Conv2d(1, 257, 1), names, size=8, in_channels=1)
    assert Segmenter(torch.nn.Conv2d(1, 256, 1), names[1:], size=np.int64(8), in_channels=np.int64(1)).size == 8


def test_channels_of_several_units_keep_their_values() -> None:
    """As of CT beside PET: every channel is stretched by itself, so the depth of one does not take that of another."""
    image = np.random.default_rng(0).random((40, 30, 3))
    segmenter = Segmenter.from_pretrained("skin_lesion")
    wanted = segmenter.probabilities(image)
    scaled = image * [1e-3, 1.0, 1e6] + [5.0, 0.0, -1e5]
    assert np.abs(segmenter.probabilities(scaled) - wanted).max() <= 1e-6
    assert torch.allclose(Segmenter.to_square(scaled, 16), Segmenter.to_square(image, 16), rtol=0, atol=1e-6)
    flat = np.full((40, 30, 3), 0.1, np.float32)
    noisy = flat + np.float32(1e-8) * np.random.default_rng(0).integers(0, 2, flat.shape).astype(np.float32)
    assert (noisy != flat).any()
    assert np.array_equal(segmenter.probabilities(noisy), segmenter.probabilities(flat)), "rounding is no image"
