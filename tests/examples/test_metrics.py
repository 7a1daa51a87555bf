"""Metrics against a plain double loop over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from segmentation.metrics import SegmentationMetrics, predicted_classes

NAMES = ("L1", "L2", "L3")


def score(pairs: list[tuple[np.ndarray, np.ndarray]], label: int | None) -> dict[str, float]:
    """IoU, Dice and F1 over all pixels of the pairs; label None is foreground. NaN where nothing is there."""
    tp = fp = fn = 0
    for prediction, truth in pairs:
        for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
            p, t = (p > 0, t > 0) if label is None else (p == label, t == label)
            tp, fp, fn = tp + (p and t), fp + (p and not t), fn + (t and not p)
    if tp + fp + fn == 0:
        return dict.fromkeys(("iou", "dice", "f1"), math.nan)
    precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    return {"iou": tp / (tp + fp + fn), "dice": 2 * tp / (2 * tp + fp + fn), "f1": f1}


@pytest.fixture
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Random masks; image 1 has no truth, image 2 no prediction, image 3 neither; label 3 is in no image."""
    rng = np.random.default_rng(0)
    both = rng.integers(0, 3, (2, 6, 5, 7))
    both[1, 1] = both[0, 2] = 0
    both[:, 3] = 0
    return list(zip(*both, strict=True))


def measure(pairs: list[tuple[np.ndarray, np.ndarray]], names: tuple[str, ...], order: list[list[int]]) -> dict:
    metrics = SegmentationMetrics(names)
    for batch in order:
        prediction, truth = (torch.tensor(np.stack([pairs[k][side] for k in batch]))[:, None] for side in (0, 1))
        metrics.update(prediction, truth.float(), torch.tensor(batch))
    return metrics.compute()


def test_equals_the_double_loop(pairs):
    scores = measure(pairs, NAMES, [[0, 1, 2, 3], [4, 5]])
    singles = [score([pair], None) for pair in pairs]
    singles[3] = dict.fromkeys(singles[3], 1.0)  # empty truth, empty prediction
    for name in ("iou", "dice", "f1"):
        assert scores["per_image"][name] == pytest.approx(np.mean([single[name] for single in singles]), abs=1e-6)
        assert scores["pooled"][name] == pytest.approx(score(pairs, None)[name], abs=1e-6)
        for label, part in enumerate(NAMES[:2], start=1):
            present = [value for pair in pairs if not math.isnan(value := score([pair], label)[name])]
            assert len(present) < len(pairs)
            assert scores["classes"][part]["per_image"][name] == pytest.approx(np.mean(present), abs=1e-6)
            assert scores["classes"][part]["pooled"][name] == pytest.approx(score(pairs, label)[name], abs=1e-6)


def test_dice_is_f1_and_follows_from_iou_when_pooled(pairs):
    scores = measure(pairs, NAMES, [[0, 1, 2, 3, 4, 5]])
    for part in ("per_image", "pooled"):
        assert scores[part]["dice"] == scores[part]["f1"]
    iou = scores["pooled"]["iou"]
    assert scores["pooled"]["dice"] == pytest.approx(2 * iou / (1 + iou))


def test_a_class_that_never_occurs_scores_none(pairs):
    scores = measure(pairs, NAMES, [[0, 1, 2, 3, 4, 5]])
    assert set(scores["classes"]["L3"]["per_image"].values()) == {None}
    assert set(scores["classes"]["L3"]["pooled"].values()) == {None}


def test_a_binary_task_has_no_classes(pairs):
    binary = [(prediction > 0, truth > 0) for prediction, truth in pairs]
    scores = measure(binary, ("lesion",), [[0, 1, 2, 3, 4, 5]])
    assert set(scores) == {"per_image", "pooled"}
    assert scores["pooled"]["iou"] == pytest.approx(score(binary, 1)["iou"])


def test_repeated_images_count_once(pairs):
    """Several processes get equal shares by repeating images."""
    assert measure(pairs, NAMES, [[0, 3, 5, 1], [2, 4, 0, 3]]) == measure(pairs, NAMES, [[0, 1, 2, 3, 4, 5]])


def test_pooled_counts_stay_exact_beyond_float32():
    metrics = SegmentationMetrics(("head",))
    for index in range(20):
        truth = torch.ones(1, 1, 1024, 1025)
        truth[..., 0, 0] = 0
        metrics.update(torch.ones_like(truth), truth, torch.tensor([index]))
    pixels = 1024 * 1025
    assert metrics.compute()["pooled"]["iou"] == pytest.approx((pixels - 1) / pixels, rel=1e-12)


def test_predicted_classes():
    logits = torch.tensor([[-1.0, 2.0], [3.0, 1.0]])
    assert predicted_classes(logits[None, None]).tolist() == [[[[0, 1], [1, 1]]]]
    assert predicted_classes(logits.T[None, :, :, None]).tolist() == [[[[1], [0]]]]
