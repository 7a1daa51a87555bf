"""From images of any size to probabilities at that size, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segmentation.data.datamodule import ImageSet
from segmentation.data.demo import demo_items
from segmentation.data.pixels import to_input, to_target
from segmentation.inference import flip_axes, probabilities, to_classes_map
from segmentation.tasks import get_task

ODD = (37, 53)
GREY, SKIN, SPINE = get_task("fetal_head"), get_task("isic2017"), get_task("lumbar_spine")


class Known(nn.Module):
    """Always answers with the same logits (k s s)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.repeat(len(x), 1, 1, 1)


def picture(size: tuple[int, int] = ODD, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels)).astype(np.uint8)


def pointwise(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 1), nn.Tanh(), nn.Conv2d(4, classes, 1)).eval()


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
    found = probabilities(Known(logits).eval(), SPINE, picture(size), 32)
    expected = np.stack([enlarge(plane.double().numpy(), size) for plane in logits])  # 6 h w
    torch.testing.assert_close(found, torch.tensor(expected).softmax(dim=0).float(), rtol=1e-4, atol=1e-6)
    if size == (32, 32):
        torch.testing.assert_close(found, logits.softmax(dim=0), rtol=0, atol=0)
    assert (to_classes_map(found) == expected.argmax(axis=0)).mean() > 0.999


def test_a_straight_contour_stays_where_it_is_at_any_size():
    """Logits that rise along the row are 0 at 0.3 of the width; interpolated probabilities would be 0.5 elsewhere."""
    x = (torch.arange(32) + 0.5) / 32
    found = probabilities(Known(40 * (x - 0.3).expand(1, 32, 32)).eval(), GREY, picture((45, 201)), 32)
    centres = (np.arange(201) + 0.5) / 201
    assert (to_classes_map(found) == (centres > 0.3)).all()


@pytest.mark.parametrize("size", [ODD, (20, 70), (100, 64), (15, 17)])
@pytest.mark.parametrize("task", [GREY, SKIN, SPINE], ids=lambda task: task.name)
def test_windows_of_a_pointwise_network_equal_its_whole_image(task, size):
    image, network = picture(size, task.in_channels), pointwise(task.in_channels, task.num_classes)
    logits = network(normalised(image))[0].detach()
    expected = logits.sigmoid() if task.num_classes == 1 else logits.softmax(dim=0)
    torch.testing.assert_close(probabilities(network, task, image, 32, window=True), expected, rtol=1e-4, atol=1e-5)


def test_windows_see_the_image_at_its_own_resolution():
    """The mean over 3 x 3 pixels, which a squashed image does not have."""
    network = nn.Conv2d(1, 1, 3, padding=1, bias=False).eval()
    nn.init.constant_(network.weight, 1 / 9)
    image = picture((50, 90))
    inner = probabilities(network, GREY, image, 64, window=True)[:, 1:-1, 1:-1].logit()
    expected = network(normalised(image))[0, :, 1:-1, 1:-1]
    assert (inner - expected).abs().mean() < 0.02  # but at the borders of the windows, where the blend is faint
    squashed = probabilities(network, GREY, image, 64)[:, 1:-1, 1:-1].logit()
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
    found = probabilities(Known(logits).eval(), GREY, picture((40, 70)), 32, window=True)
    torch.testing.assert_close(found[0], torch.tensor(total / weights).sigmoid().float(), rtol=1e-4, atol=1e-5)


def test_images_smaller_than_a_window_are_padded_with_their_mean():
    seen, image, network = [], picture((15, 40)), pointwise(1, 1)
    network.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    assert probabilities(network, GREY, image, 32, window=True).shape == (1, 15, 40)
    expected = torch.zeros(1, 32, 40)
    expected[:, 8:23] = normalised(image)[0]
    torch.testing.assert_close(torch.stack(seen), torch.stack([expected[..., :32], expected[..., 8:]]))


@pytest.mark.parametrize("window", [False, True])
def test_flips_change_nothing_for_a_network_without_direction(window):
    image, network = picture((40, 48), 3), pointwise(3, 1)
    plain, averaged = (probabilities(network, SKIN, image, 32, window=window, flips=flips) for flips in (False, True))
    torch.testing.assert_close(averaged, plain, rtol=1e-4, atol=1e-5)


def test_flips_average_the_probabilities_of_the_flips_that_training_knows():
    logits = 3 * torch.randn(1, 32, 32)
    p = logits.sigmoid()
    assert (flip_axes(SKIN, 32), flip_axes(GREY, 32)) == ((-2, -1), (-1,))
    skin = probabilities(Known(logits).eval(), SKIN, picture((32, 32), 3), 32, flips=True)
    torch.testing.assert_close(skin, (p + p.flip(1) + p.flip(2) + p.flip(1, 2)) / 4)
    head = probabilities(Known(logits).eval(), GREY, picture((32, 32)), 32, flips=True)
    torch.testing.assert_close(head, (p + p.flip(2)) / 2)


@pytest.mark.parametrize("window", [False, True])
def test_depth_scale_and_offset_of_the_file_do_not_matter(window):
    image, network = picture(), pointwise(1, 1)
    expected = probabilities(network, GREY, image, 32, window=window)
    for other in (image.astype(np.uint16) * 257, image.astype(np.float32) * 0.01 - 3):
        found = probabilities(network, GREY, other, 32, window=window)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_network_sees_what_it_saw_in_training():
    item = demo_items(SKIN, 48)[0]
    image, mask = item.read()
    seen = []
    network = pointwise(3, 1)
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    probabilities(network, SKIN, image, 32)
    trained_on = ImageSet(SKIN, [item], to_input(image, 32).half()[None], to_target(mask, 32)[None], training=False)
    torch.testing.assert_close(seen[0][0], trained_on[0]["image"], rtol=0, atol=0.01)  # half precision
