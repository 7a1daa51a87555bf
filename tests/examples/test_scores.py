"""Scores against a plain double loop and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from segmentation.data.item import Item
from segmentation.scores import (
    OVERLAP,
    RATES,
    TOLERANCE,
    ValidationScores,
    confusion_counts,
    overlap,
    predicted_classes,
    score_image,
    summarise,
    surface_scores,
)
from segmentation.tasks import Task, get_task

GREY, SPINE = get_task("fetal_head"), get_task("lumbar_spine")
SIDE = 32
Pair = tuple[np.ndarray, np.ndarray]  # prediction and truth, class numbers


def random_pairs(task: Task) -> list[Pair]:
    """Blobs; image 1 has no truth, image 2 no prediction, image 3 neither; class L3 is in no image."""
    rng = np.random.default_rng(0)
    values = [k for k in range(len(task.labels) + 1) if k != 3]
    both = rng.choice(values, (2, 6, SIDE // 4, SIDE // 4)).repeat(4, axis=2).repeat(4, axis=3).astype(np.uint8)
    both[1, 1] = both[0, 2] = 0
    both[:, 3] = 0
    return list(zip(*both, strict=True))


def rows_of(task: Task, pairs: list[Pair], **more: object) -> list[dict]:
    items = [Item(str(k), f"subject {k}", lambda: None, **more) for k in range(len(pairs))]
    return [score_image(task, item, *pair) for item, pair in zip(items, pairs, strict=True)]


def loop(prediction: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    counts = dict.fromkeys(("tp", "fp", "fn", "tn"), 0)
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        counts["tp"] += bool(p and t)
        counts["fp"] += bool(p and not t)
        counts["fn"] += bool(t and not p)
        counts["tn"] += not t and not p
    return counts


def f1(tp: int, fp: int, fn: int, tn: int) -> float:
    """The harmonic mean of precision and recall; NaN where nothing is there."""
    if tp + fp + fn == 0:
        return math.nan
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    return 2 * precision * recall / (precision + recall) if tp else 0.0


def edge(mask: np.ndarray) -> np.ndarray:
    """Points (n 2) of a mask with a neighbour, above, below or beside, that is not in it."""
    h, w = mask.shape
    points = []
    for i in range(h):
        for j in range(w):
            around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            if mask[i, j] and not all(0 <= a < h and 0 <= b < w and mask[a, b] for a, b in around):
                points.append((i, j))
    return np.array(points, dtype=float)


def distances(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float]) -> list[np.ndarray]:
    a, b = edge(prediction) * spacing, edge(truth) * spacing
    table = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    return [table.min(axis=1), table.min(axis=0)]


def validate(pairs: list[Pair], names: tuple[str, ...], batches: list[list[int]]) -> dict:
    metric = ValidationScores(names)
    for batch in batches:
        prediction, truth = (torch.tensor(np.stack([pairs[k][side] for k in batch]))[:, None] for side in (0, 1))
        metric.update(prediction, truth.float(), torch.tensor(batch))
    return metric.compute()


@pytest.mark.parametrize("task", [GREY, SPINE], ids=lambda task: task.name)
def test_rows_and_summary_equal_the_double_loop(task):
    pairs, spacing = random_pairs(task), (0.5, 1.25)
    rows = rows_of(task, pairs, pixel_size=spacing)
    assert [(row["id"], row["group"], row["unit"]) for row in rows] == [
        (str(k), f"subject {k}", "mm") for k in range(6)
    ]
    for row, (prediction, truth) in zip(rows, pairs, strict=True):
        counts = loop(prediction > 0, truth > 0)
        assert {name: row[name] for name in counts} == counts
        score = f1(**counts)
        score = 1.0 if math.isnan(score) else score
        assert row["dice"] == row["f1"] == pytest.approx(score)
        assert row["iou"] == pytest.approx(score / (2 - score))
        for name, hit, miss in (("sensitivity", "tp", "fn"), ("specificity", "tn", "fp")):
            wanted = counts[hit] + counts[miss]
            assert row[name] == (counts[hit] / wanted if wanted else None)
        if prediction.any() and truth.any():
            there, back = distances(prediction > 0, truth > 0, spacing)
            assert row["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-6)
            close = (there <= TOLERANCE).sum() + (back <= TOLERANCE).sum()
            assert row["surface_dice"] == pytest.approx(close / (len(there) + len(back)), rel=1e-6)
    diagonal = math.hypot(SIDE * spacing[0], SIDE * spacing[1])
    assert [(row["dice"], row["surface_dice"]) for row in rows[1:4]] == [(0, 0), (0, 0), (1, 1)]
    assert [row["hd95"] for row in rows[1:4]] == pytest.approx([diagonal, diagonal, 0])

    scores = summarise(rows, task.class_names)
    assert scores["unit"] == "mm"
    for name, summary in scores["per_image"].items():
        values = [row[name] for row in rows if row[name] is not None]
        assert len(values) >= 4
        assert summary["mean"] == pytest.approx(sum(values) / len(values))
        assert summary["sd"] == pytest.approx(np.std(values, ddof=1))
    everything = np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])
    assert scores["pooled"]["dice"] == scores["pooled"]["f1"] == pytest.approx(f1(*loop(*everything).values()))
    assert scores["pooled"]["iou"] == pytest.approx(scores["pooled"]["dice"] / (2 - scores["pooled"]["dice"]))
    if task is GREY:
        assert "classes" not in scores
        return
    means = []
    for number, name in enumerate(task.class_names, start=1):
        parts = [f1(*loop(prediction == number, truth == number).values()) for prediction, truth in pairs]
        found = [row[f"dice_{name}"] for row in rows]
        assert found == [None if math.isnan(part) else pytest.approx(part) for part in parts]
        of_class = scores["classes"][name]
        if name == "L3":
            assert {*of_class["per_image"].values(), *of_class["pooled"].values()} == {None}
            continue
        present = [part for part in parts if not math.isnan(part)]
        pooled = f1(*loop(everything[0] == number, everything[1] == number).values())
        means.append(sum(present) / len(present))
        assert of_class["per_image"]["dice"] == pytest.approx(means[-1])
        assert of_class["pooled"]["dice"] == pytest.approx(pooled)
        assert of_class["pooled"]["iou"] == pytest.approx(pooled / (2 - pooled))
    assert scores["mean_of_classes"]["dice"] == pytest.approx(sum(means) / 4)


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3], [4, 5]], [[0, 3, 5, 1], [2, 4, 0, 3]]])
def test_a_validation_set_scores_as_its_images_do(batches):
    """In whatever batches, and each image once: several processes get equal shares by repeating images."""
    pairs = random_pairs(SPINE)
    scores, expected = validate(pairs, SPINE.class_names, batches), summarise(rows_of(SPINE, pairs), SPINE.class_names)
    for part in ("pooled", "classes", "mean_of_classes"):
        assert scores[part] == expected[part]
    assert scores["per_image"] == {name: expected["per_image"][name] for name in OVERLAP + RATES}
    assert scores["empty"] == {"predictions": 2, "truths": 2}


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize(("down", "right"), [(0, 3), (4, 0), (0, 0)])
def test_surfaces_of_a_shifted_square(spacing, down, right):
    """A whole side of the square, a quarter of its outline, lies as far out as the square was shifted."""
    truth = np.zeros((60, 70), bool)
    truth[10:30, 20:40] = True
    found = surface_scores(np.roll(truth, (down, right), axis=(0, 1)), truth, spacing)
    in_rows, in_columns = spacing or (1.0, 1.0)
    assert found["hd95"] == pytest.approx(down * in_rows + right * in_columns)
    if not down and not right:
        assert found["surface_dice"] == 1
    if (down, right, in_columns) == (0, 3, 1):
        # Of the 4 * 20 - 4 points of an outline these lie further than 2 off: the side that was pushed out, 20 points,
        # and of the opposite one the 14 in the middle, which are 3 or more from every other side.
        assert found["surface_dice"] == pytest.approx((76 - 20 - 14) / 76)


def test_head_circumferences_are_compared_where_both_are_known():
    rows, columns = np.ogrid[:SIDE, :SIDE]
    disc = ((rows - 15.5) ** 2 + (columns - 15.5) ** 2 <= 12**2).astype(np.uint8)
    known = {"pixel_size": (2.0, 2.0), "circumference": 150.0}
    found = [
        *rows_of(GREY, [(disc, disc)], **known),
        *rows_of(GREY, [(disc, disc)], pixel_size=(1.0, 1.0), circumference=70.0),
        *rows_of(GREY, [(disc, disc)], circumference=150.0),
        *rows_of(GREY, [(disc, disc)], pixel_size=(2.0, 2.0)),
        *rows_of(GREY, [(np.zeros_like(disc), disc)], **known),
    ]
    both, again, *others = found
    assert both["hc_mm"] == pytest.approx(2 * math.pi * 24, rel=0.02)
    assert both["hc_error_mm"] == both["hc_mm"] - 150
    assert [row["hc_error_mm"] for row in others] == [None] * 3
    assert [row["hc_mm"] is None for row in others] == [True, False, True]
    scores = summarise(found, GREY.class_names)
    errors = [both["hc_error_mm"], again["hc_error_mm"]]
    assert scores["circumference"] == {
        "mean_absolute_error_mm": pytest.approx(np.mean(np.abs(errors))),
        "median_absolute_error_mm": pytest.approx(np.median(np.abs(errors))),
        "mean_error_mm": pytest.approx(np.mean(errors)),
        "sd_error_mm": pytest.approx(np.std(errors, ddof=1)),
        "images": 2,
        "no_ellipse": 1,
    }
    assert (scores["unit"], scores["per_image"]["hd95"]) == ("mixed", {"mean": None, "sd": None})


def test_the_slices_of_a_subject_are_scored_together():
    pairs = random_pairs(GREY)
    rows = [row | {"group": "ab"[k > 3]} for k, row in enumerate(rows_of(GREY, pairs))]
    volumes = [np.stack(masks) for part in (pairs[:4], pairs[4:]) for masks in zip(*part, strict=True)]
    dice = [f1(*loop(*volumes[k : k + 2]).values()) for k in (0, 2)]
    found = summarise(rows, GREY.class_names)["per_subject"]
    assert found == {"dice": pytest.approx({"mean": np.mean(dice), "sd": np.std(dice, ddof=1)}), "subjects": 2}


def test_counts_stay_exact_in_large_images():
    truth = torch.ones(1, 1, 4100, 4101, dtype=torch.uint8)  # more pixels than float32 counts
    truth[..., 0, 0] = 0
    tp, fp, fn, tn = confusion_counts(torch.ones_like(truth), truth, 1)[0, 0].tolist()
    assert (tp, fp, fn, tn) == (4100 * 4101 - 1, 1, 0, 0)
    assert overlap(tp, fp, fn)["iou"] == tp / (tp + 1)


def test_predicted_classes():
    logits = torch.tensor([[-1.0, 2.0], [3.0, 1.0]])
    assert predicted_classes(logits[None, None]).tolist() == [[[[0, 1], [1, 1]]]]
    assert predicted_classes(logits.T[None, :, :, None]).tolist() == [[[[1], [0]]]]
