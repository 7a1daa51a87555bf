"""Synthetic images of three tasks: drawn with NumPy and Pillow, so everything runs with no download.

`draw(task, seed, index, size)` is a pure function of its arguments. Three consecutive indices show one subject: they
share what belongs to the person (skin tone, size of the head, shape of the spine) and differ in what belongs to the
picture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from segmentation.data.item import Item
from segmentation.data.pixels import Pixels
from segmentation.tasks import Task

Array = NDArray[np.floating]
Rng = np.random.Generator

IMAGES_PER_SUBJECT = 3


def draw(task: str, seed: int, index: int, size: tuple[int, int]) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Image number `index` of the demo of `task` and its mask of class numbers, both of `size` = (height, width)."""
    if task not in _PAINTERS:
        raise ValueError(f"task {task!r} has no demo: choose one of {', '.join(DEMOS)}, or give a folder of images")
    kind = list(_PAINTERS).index(task)
    subject = np.random.default_rng([seed, kind, 0, index // IMAGES_PER_SUBJECT])
    picture = np.random.default_rng([seed, kind, 1, index])
    image, mask = _PAINTERS[task](subject, picture, size)
    return Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)), mask.astype(np.uint8)


def demo_items(task: Task, size: int, number: int = 120, seed: int = 0) -> list[Item]:
    """The demo of `task`: `number` square images of `size` pixels."""
    return [Item(f"demo_{k:04d}", subject_of(k), partial(_read, task, seed, k, size)) for k in range(number)]


def _read(task: Task, seed: int, index: int, size: int) -> tuple[Pixels, NDArray[np.uint8]]:
    image, mask = draw(task.name, seed, index, (size, size))
    return np.atleast_3d(np.asarray(image)), mask  # h w c, h w


def subject_of(index: int) -> str:
    """The subject (group) that image number `index` belongs to."""
    return f"subject_{index // IMAGES_PER_SUBJECT:03d}"


def _plane(size: tuple[int, int]) -> tuple[Array, Array]:
    """Coordinates (y, x) of the pixel centres: the shorter side spans [-1, 1]."""
    h, w = size
    unit = min(h, w) / 2
    return np.meshgrid((np.arange(h) + 0.5 - h / 2) / unit, (np.arange(w) + 0.5 - w / 2) / unit, indexing="ij")


def _noise(rng: Rng, size: tuple[int, int], cells: float, octaves: int = 4) -> Array:
    """Fractal noise, mean 0 and deviation 1: white noise on ever finer grids (first `cells` a side), enlarged."""
    h, w = size
    total = np.zeros(size)
    for octave in range(octaves):
        grid = [max(2, round(cells * 2**octave * side / min(h, w))) for side in size]
        coarse = Image.fromarray(rng.standard_normal(grid).astype(np.float32))
        total += np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC)) * 0.55**octave
    return (total - total.mean()) / total.std()


def _blur(x: Array, radius: float) -> Array:
    """Gaussian blur of values in [0, 1]."""
    image = Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) / 255


def _step(x: Array, softness: float) -> Array:
    """Smooth step from 0 (x << 0) to 1 (x >> 0)."""
    return 1 / (1 + np.exp(-(x / softness).clip(-30, 30)))


def _mix(a: Array, b: Array, weight: Array) -> Array:
    """`a` where weight is 0, `b` where it is 1; weight (h w) also mixes colours (h w 3) or (3,)."""
    weight = weight[..., None] if np.ndim(a) == 3 else weight
    return a * (1 - weight) + b * weight


def _lesion(subject: Rng, picture: Rng, size: tuple[int, int]) -> tuple[Array, NDArray[np.bool_]]:
    """A pigmented lesion on textured skin, some hairs, now and then the dark corners of a dermatoscope."""
    y, x = _plane(size)
    skins = np.array([[0.89, 0.70, 0.64], [0.80, 0.68, 0.74], [0.76, 0.80, 0.86], [0.83, 0.66, 0.52]])
    skin = skins[subject.integers(4)]
    dark, light = np.array([0.20, 0.12, 0.12]), np.array([0.54, 0.34, 0.26])
    depth = subject.uniform(0.65, 0.95)

    skin = skin + subject.normal(0, 0.02, 3) + picture.normal(0, 0.015, 3)
    image = np.ones((*size, 3)) * skin
    image += _noise(picture, size, 3)[..., None] * 0.02 + _noise(picture, size, 30, 2)[..., None] * 0.012
    image += (_noise(picture, size, 4)[..., None] * [0.0, 0.015, 0.01]).clip(-0.05, 0.05)

    centre, turn = picture.uniform(-0.22, 0.22, 2), picture.uniform(0, np.pi)
    dy, dx = y - centre[0], x - centre[1]
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    radius, flat = subject.uniform(0.3, 0.62) * picture.uniform(0.85, 1.15), subject.uniform(0.65, 1.0)
    angle, distance = np.arctan2(v / flat, u), np.hypot(u, v / flat)
    waves = sum(picture.normal(0, 0.16 / k) * np.cos(k * angle + picture.uniform(0, 6.3)) for k in range(2, 8))
    border = radius * (1 + waves.clip(-0.4, 0.4)) + _noise(picture, size, 8, 3) * 0.018 - distance
    mask = border > 0

    pigment = (0.5 + 0.28 * _noise(picture, size, 5) + 0.45 * (border / radius - 0.3)).clip(0, 1)
    pigment += 0.3 * np.exp(-np.abs(_noise(picture, size, 16, 1)) / 0.25) - 0.12  # pigment network: ridges of noise
    colour = _mix(np.ones((*size, 3)) * light, dark, pigment.clip(0, 1))
    image = _mix(image, colour, depth * _step(border, picture.uniform(0.012, 0.05)))

    if picture.random() < 0.6:
        hairs = _hairs(picture, size, picture.integers(2, 12))
        image = _mix(image, np.array([0.16, 0.12, 0.12]), 0.85 * hairs)
    if picture.random() < 0.25:
        image *= _step(picture.uniform(1.05, 1.3) - np.hypot(y, x), 0.03)[..., None]
    lamp = 1.05 - 0.13 * np.hypot(y, x) ** 2
    return image * lamp[..., None] + picture.normal(0, 0.008, image.shape), mask


def _hairs(rng: Rng, size: tuple[int, int], number: int) -> Array:
    """Thin curved strokes (quadratic Bezier curves), drawn four times as large and reduced."""
    h, w = size
    canvas = Image.new("L", (4 * w, 4 * h))
    pen = ImageDraw.Draw(canvas)
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(number):
        start = rng.uniform(0, 1, 2)
        end = start + rng.normal(0, 0.45, 2)
        bend = (start + end) / 2 + rng.normal(0, 0.15, 2)
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        pen.line([(px * 4 * w, py * 4 * h) for px, py in curve], fill=255, width=max(1, round(min(h, w) / 40)))
    return np.asarray(canvas.resize((w, h), Image.Resampling.BOX)) / 255


def _head(subject: Rng, picture: Rng, size: tuple[int, int]) -> tuple[Array, NDArray[np.bool_]]:
    """A fetal head in an ultrasound fan: bright elliptical skull, dark fluid, speckle; it may leave the frame."""
    y, x = _plane(size)
    reach_y, reach_x = np.abs(y).max(), np.abs(x).max()
    apex = -reach_y - subject.uniform(1.6, 2.6)
    beam, depth = np.arctan2(x, y - apex), np.hypot(x, y - apex) / (reach_y - apex)
    opening = np.arctan2(reach_x, reach_y - apex) * subject.uniform(1.0, 1.15)
    fan = (np.abs(beam) < opening) & (depth < 1.0)

    radius = subject.uniform(0.38, 0.66)
    flat, turn = subject.uniform(0.7, 0.85), picture.uniform(0, np.pi)
    centre = np.array([picture.uniform(-0.2, 0.3), picture.uniform(-0.25, 0.25)])
    if picture.random() < 0.2:  # the head leaves the frame
        centre[1] = np.sign(centre[1]) * (reach_x - 0.75 * radius)
    dy, dx = y - centre[0], x - centre[1]
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    distance = np.hypot(u, v / flat) / radius  # 1 on the skull
    mask = distance < 1

    tissue = 0.33 + 0.09 * _noise(picture, size, 3) + 0.05 * np.sin(9 * depth * np.pi + _noise(picture, size, 2))
    fluid = _step(picture.uniform(1.25, 1.6) + 0.16 * _noise(picture, size, 2) - distance, 0.05)
    echo = _mix(tissue, 0.05, fluid)
    brain = 0.17 + 0.06 * _noise(picture, size, 6)
    for side in (-1, 1):  # choroid plexus
        blob = ((u / radius + 0.1) / 0.45) ** 2 + ((v / radius - side * 0.36 * flat) / 0.2) ** 2
        brain = brain + 0.2 * _step(1 - blob, 0.25)
    brain = brain + 0.4 * np.exp(-((v / radius / 0.03) ** 2)) * (np.abs(u / radius) < 0.8)  # midline
    echo = _mix(echo, brain, _step(1 - distance, 0.02))

    facing = np.abs(np.cos(np.arctan2(v / flat**2, u) + turn - np.pi / 2 + beam))  # the beam hits the bone squarely
    bone = (0.3 + 0.7 * facing) * (0.85 + 0.25 * _noise(picture, size, 5)).clip(0.15, 1.3)
    echo = echo + 0.8 * bone * np.exp(-(((distance - 0.965) * radius / 0.03) ** 2))

    gain = picture.uniform(0.8, 1.15) * (1.15 - 0.45 * depth)
    grain = _blur(picture.exponential(0.28, size), max(0.6, min(size) / 200))
    speckle = 0.35 + 0.65 * grain / grain.mean()
    return _blur(echo * gain * speckle, min(size) / 300) * fan, mask


def _spine(subject: Rng, picture: Rng, size: tuple[int, int]) -> tuple[Array, NDArray[np.uint8]]:
    """A sagittal lumbar spine: vertebrae L1 = 1 ... L5 = 5 with discs, canal and fat; T12 and S1 are unlabelled."""
    y, x = _plane(size)
    pitch = subject.uniform(0.27, 0.31)  # from vertebra to vertebra
    bend, tilt = subject.uniform(0.12, 0.28), subject.uniform(-0.05, 0.1)
    shift = picture.uniform([-0.08, -0.12], [0.08, 0.12])
    bone, disc = subject.uniform(0.28, 0.5), subject.uniform(0.1, 0.85)
    width = subject.uniform(0.16, 0.19)

    def column(at: Array | float) -> Array | float:
        """x of the middle of the column at height `at`: the lordosis, forward at L4, back at the sacrum."""
        return shift[1] + tilt * at - bend * np.exp(-(((at - 0.5) / 0.6) ** 2)) + 0.25 * bend

    behind = x - column(y - shift[0])
    soft = 0.2 + 0.04 * _noise(picture, size, 3) + 0.03 * _noise(picture, size, 20, 2)
    image = soft * _step(behind + 0.75, 0.2) + 0.05 * _noise(picture, size, 5).clip(0, 2) * (behind < 0)
    muscle = 0.34 + 0.07 * _noise(picture, size, 7)
    image = _mix(image, muscle, _step(behind - 0.33, 0.02))
    for level in range(-2, 8):  # spinous processes
        at = (level - 2.4) * pitch + shift[0]
        process = ((behind - 0.47 - 0.02 * level) / 0.14) ** 2 + ((y - at - 0.25 * (behind - 0.4)) / (0.3 * pitch)) ** 2
        image = _mix(image, bone * 0.95, 0.75 * _step(1 - process, 0.15))
    canal = np.exp(-(((behind - width - 0.075) / 0.055) ** 4))
    image = _mix(image, np.clip(disc + 0.25, 0.5, 0.9), 0.9 * canal)
    fat = _step(behind - 0.7 + 0.04 * np.cos(2 * y), 0.02) * _step(0.86 - behind + 0.06 * np.sin(3 * y), 0.015)
    image = _mix(image, 0.75, fat) * _step(0.9 - behind + 0.06 * np.sin(3 * y), 0.012)

    mask = np.zeros(size, np.uint8)
    for level in range(-1, 8):  # 0 = T12, 1..5 = L1..L5, 6 = S1
        at = (level - 3) * pitch
        lean = np.arctan((column(at + 0.01) - column(at - 0.01)) / 0.02) + picture.normal(0, 0.03)
        scale = (1 + 0.035 * (level - 3)) * picture.uniform(0.96, 1.04)
        if level > 5:  # the sacrum turns back and tapers
            lean, scale = lean + 0.35 * (level - 5), scale * (1 - 0.14 * (level - 5))
        dy, dx = y - at - shift[0], x - column(at) - (0.06 * (level - 5) if level > 5 else 0)
        along, across = dy * np.cos(lean) + dx * np.sin(lean), dx * np.cos(lean) - dy * np.sin(lean)
        a, b = across / (width * scale), along / (0.385 * pitch * scale)
        waist = 1 - 0.1 * (1 - b.clip(-1, 1) ** 2), 1 - 0.12 * (1 - a.clip(-1, 1) ** 2)  # concave walls and end plates
        body = 1 - (np.abs(a / waist[0]) ** 6 + np.abs(b / waist[1]) ** 6) ** (1 / 6)
        gap = 1 - (np.abs(a / 1.02) ** 4 + np.abs((b - 1.3) / 0.34) ** 4) ** (1 / 4)
        if level < 6:
            image = _mix(image, disc + 0.05 * _noise(picture, size, 20, 2), _step(gap, 0.06))
        marrow = bone + 0.035 * _noise(picture, size, 12, 3)
        image = _mix(image, 0.1 + 0.2 * bone, 0.7 * _step(body + 0.09, 0.03))  # dark cortical bone
        image = _mix(image, marrow, _step(body, 0.03))
        if 1 <= level <= 5:
            mask[body > 0] = level

    field = np.exp(0.35 * picture.normal() * x + 0.2 * picture.normal() * y)  # receive coil
    image = _blur(image * field * picture.uniform(0.8, 1.2), min(size) / 300)
    return image + picture.normal(0, picture.uniform(0.01, 0.035), size), mask


_PAINTERS: dict[str, Callable[[Rng, Rng, tuple[int, int]], tuple[Array, NDArray]]] = {
    "isic2017": _lesion,
    "fetal_head": _head,
    "lumbar_spine": _spine,
}

DEMOS = tuple(_PAINTERS)  # the tasks that have a demo
