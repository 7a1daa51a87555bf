"""The synthetic demo: deterministic, any size, the declared labels, several images a subject."""

from __future__ import annotations

import numpy as np
import pytest

from segmentation.data.demo import DEMOS, IMAGES_PER_SUBJECT, draw, subject_of
from segmentation.tasks import get_task

tasks = pytest.mark.parametrize("task", [get_task(name) for name in DEMOS], ids=DEMOS)


@tasks
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (101, 16)])
def test_sizes_modes_and_labels(task, size):
    for index in range(4):
        image, mask = draw(task.name, 0, index, size)
        assert (image.height, image.width) == mask.shape == size
        assert image.mode == ("RGB" if task.in_channels == 3 else "L")
        assert set(np.unique(mask)) <= set(range(1 + len(task.labels)))


@tasks
def test_is_a_pure_function_of_task_seed_and_index(task):
    image, mask = draw(task.name, 3, 5, (48, 48))
    again = draw(task.name, 3, 5, (48, 48))
    assert np.array_equal(image, again[0]) and np.array_equal(mask, again[1])
    for seed, index in ((3, 4), (4, 5)):
        assert not np.array_equal(image, draw(task.name, seed, index, (48, 48))[0])


@tasks
def test_the_object_is_there_and_does_not_fill_the_image(task):
    share = [(draw(task.name, 0, index, (48, 48))[1] > 0).mean() for index in range(20)]
    assert 0.02 < min(share) < max(share) < 0.6


def test_spine_shows_five_vertebrae_in_order():
    for index in range(6):
        mask = draw("lumbar_spine", 0, index, (64, 64))[1]
        heights = [np.nonzero(mask == label)[0].mean() for label in range(1, 6)]
        assert heights == sorted(heights)


def test_some_heads_leave_the_frame_and_some_do_not():
    masks = [draw("fetal_head", 0, index, (48, 48))[1] for index in range(40)]
    cut = [mask[:, 0].any() or mask[:, -1].any() for mask in masks]
    assert 0 < sum(cut) < len(cut) / 2


def test_a_subject_has_several_images():
    groups = [subject_of(index) for index in range(4 * IMAGES_PER_SUBJECT)]
    assert len(set(groups)) == 4
    assert all(groups.count(group) == IMAGES_PER_SUBJECT for group in groups)


def test_a_task_without_a_demo():
    with pytest.raises(ValueError, match="task 'liver' has no demo: choose one of isic2017"):
        draw("liver", 0, 0, (64, 64))
