"""The report's numbers and words on constructed rows: intervals, spreads, verdicts, and no claim beyond them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmentation.comparison import (
    bootstrap_interval,
    cases,
    circumference,
    difference,
    multiply_adds,
    over_seeds,
    pooled,
    printed_scores,
)
from segmentation.experiment import Finished, Run, Variant
from segmentation.figures import curve, picture
from segmentation.networks import build_network
from segmentation.page import table, write_page
from segmentation.prose import budget, difference_sentence, printed_note
from segmentation.wording import count, epochs, interval, listed, plus_minus, seeds

SUBJECTS, IMAGES = 40, 120


def finished(dice: np.ndarray, seed: int = 0, subjects: int = SUBJECTS) -> Finished:
    """A run that scored these values, image by image."""
    rows = [{"id": f"{n}", "group": f"s{n % subjects}", "dice": float(value)} for n, value in enumerate(dice)]
    return Finished(Run(Variant("v", "unet"), seed, Path("run")), {}, [], rows, {})


@pytest.fixture
def base() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 0.9, IMAGES)


def test_a_known_difference_lies_in_its_interval(base):
    noise = np.random.default_rng(1).normal(0, 0.02, IMAGES)
    found = difference([finished(base + 0.05 + noise)], [finished(base)])
    assert found["mean"] == pytest.approx(0.05 + noise.mean())
    assert 0 < found["low"] < 0.05 < found["high"] < 0.1
    assert (found["verdict"], found["images"], found["subjects"]) == ("above", IMAGES, SUBJECTS)
    mirrored = difference([finished(base)], [finished(base + 0.05 + noise)])
    assert mirrored["verdict"] == "below"
    assert [mirrored["low"], mirrored["high"]] == pytest.approx([-found["high"], -found["low"]], abs=1e-3)


def test_identical_rows_differ_by_exactly_nothing(base):
    found = difference([finished(base)], [finished(base)])
    assert [found["mean"], found["low"], found["high"], found["verdict"]] == [0, 0, 0, "none"]


def test_noise_alone_is_no_difference(base):
    noise = np.random.default_rng(2).normal(0, 0.1, IMAGES)
    found = difference([finished(base + noise - noise.mean())], [finished(base)])
    assert found["low"] < 0 < found["high"]
    assert found["verdict"] == "none"


def test_the_interval_is_that_of_drawing_subjects():
    values, groups = np.array([0.0, 0.0, 0.0, 1.0]), ["a", "a", "a", "b"]
    assert bootstrap_interval(values, groups) == (0.0, 1.0)  # both subjects twice: one sample in four each
    assert bootstrap_interval(values, ["a"] * 4) is None

    means = np.random.default_rng(3).normal(0, 1, 200)  # one value each: the textbook interval of a mean
    low, high = bootstrap_interval(means, [str(n) for n in range(200)])
    error = 1.96 * means.std() / np.sqrt(200)
    assert [low, high] == pytest.approx([means.mean() - error, means.mean() + error], abs=0.012)
    doubled = bootstrap_interval(np.repeat(means, 5), [str(n // 5) for n in range(1000)])
    assert doubled == pytest.approx((low, high), abs=1e-9)  # copies of an image add nothing


def test_differences_are_paired_by_image_and_seed(base):
    mine = [finished(base + 0.1, 0), finished(base + 0.3, 1), finished(base + 9.0, 5)]
    theirs = [finished(base, 1), finished(base, 0)]
    theirs[0].images.reverse()
    found = difference(mine, theirs)
    assert found["seeds"] == [0, 1]
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([0.2] * 3)
    assert difference(mine[2:], theirs) is None


def test_means_and_deviations():
    first, second = np.array([0.2, 0.4]), np.array([0.5, 0.9])
    assert over_seeds([first, second]) == pytest.approx(
        {"mean": 0.5, "sd_seeds": np.std([0.3, 0.7], ddof=1), "sd_images": (first.std(ddof=1) + second.std(ddof=1)) / 2}
    )
    assert over_seeds([first])["sd_seeds"] is None
    assert over_seeds([]) == {"mean": None, "sd_seeds": None, "sd_images": None}
    rows = [{"tp": 8.0, "fp": 0.0, "fn": 2.0}, {"tp": 0.0, "fp": 4.0, "fn": 0.0}]
    assert [pooled(rows, score) for score in ("iou", "dice", "f1")] == pytest.approx([8 / 14, 16 / 22, 16 / 22])


def test_cases_and_circumference():
    rows = [{"id": str(n), "dice": value} for n, value in enumerate((0.5, 0.1, 0.9, 0.7, 0.3))]
    found = {case: row["id"] for case, row in cases(rows).items()}
    assert found == {"best": "2", "median": "0", "worst": "1"}

    known = {"unit": "mm", "hc_true_mm": 100.0}
    heads = [
        {**known, "hc_error_mm": 2.0},
        {**known, "hc_error_mm": -4.0},
        {**known, "hc_error_mm": None},
        {"unit": "px", "hc_true_mm": 90.0, "hc_error_mm": None},
    ]
    errors = circumference([heads])
    assert (errors["images"], errors["no_ellipse"]) == (3, 1)
    assert (errors["absolute_error_mm"]["mean"], errors["error_mm"]["mean"]) == (3, -1)


def test_multiply_adds_grow_with_the_pixels():
    network = build_network("unet", 1, 1).eval()
    assert multiply_adds(network, 1, 64) == 4 * multiply_adds(network, 1, 32) > 0


def test_printed_figures_belong_to_a_kind_of_network():
    assert printed_scores("isic2017", "km_unet_pp_tiny")["dice"] == 0.83
    assert printed_scores("isic2017", "km_unet_base")["dice"] == 0.81
    assert printed_scores("lumbar_spine", "unet")["dice"] == 0.86
    assert printed_scores("isic2017", "unet_pp") is None


def results(sd: float | None = None, **more) -> dict:
    """What the sentences below need of an experiment's numbers."""
    variant = {
        "per_image": {"dice": {"mean": 0.8, "sd_seeds": sd}},
        "epochs": [4, 4],
        "printed": None,
        "cost": {"parameters": 30_000_000},
    }
    return {
        "baseline": "a",
        "variants": {"a": variant, "b": {**variant}},
        "seeds": [0],
        "image_size": 256,
        "device": ["cpu, 2 threads"],
        **more,
    }


def say(base: np.ndarray, shift: float | np.ndarray, sd: float | None = None, subjects: int = SUBJECTS) -> str:
    runs = [finished(base + shift, subjects=subjects)], [finished(base, subjects=subjects)]
    return difference_sentence(results(sd), "b", difference(*runs))


def test_a_sentence_says_no_more_than_its_interval(base):
    where = "(on 120 images of 40 subjects, 1 seed)"
    assert say(base, 0.05) == f"`b` is above `a`: +0.050 Dice, +0.050 to +0.050 {where}."
    assert say(base, -0.05) == f"`b` is below `a`: -0.050 Dice, -0.050 to -0.050 {where}."
    assert say(base, 0.0) == f"No difference seen between `b` and `a`: +0.000 Dice, +0.000 to +0.000 {where}."
    assert say(base, 0.05, sd=0.06).endswith("That is less than the deviation over seeds (0.060).")
    assert "one subject gives no interval" in say(base, 0.05, subjects=1)
    assert "above" not in say(base, 0.05, subjects=1)


def test_a_small_budget_is_named():
    assert budget(results()).startswith("Trained on a CPU at 256x256 for 4 epochs: a small budget (4 epochs, 1 seed).")
    full = results(seeds=[0, 1, 2], device=["cuda"])
    for variant in full["variants"].values():
        variant["epochs"] = [60]
    assert budget(full) == ""


def test_printed_figures_that_contradict_themselves_are_named():
    numbers = results()
    assert printed_note(numbers) == ""
    numbers["variants"]["a"]["printed"] = printed_scores("fetal_head", "km_unet")
    assert "0.24 and 0.67 are not" in printed_note(numbers)


def test_short_pieces_of_text():
    assert plus_minus({"mean": 0.81234, "sd_seeds": 0.0149}) == "0.812 ± 0.015"
    assert plus_minus({"mean": 0.81234, "sd_seeds": None}) == "0.812"
    assert plus_minus({"mean": None, "sd_seeds": None}) == "n/a"
    assert interval({"low": -0.01, "high": 0.02}) == "-0.010 to +0.020"
    assert [count(1, "seed"), count(2, "seed")] == ["1 seed", "2 seeds"]
    assert [listed(["a"]), listed(["a", "b", "c"])] == ["a", "a, b and c"]
    assert [seeds([4]), seeds([0, 1])] == ["one seed (4)", "each of 2 seeds (0, 1)"]
    assert epochs({"variants": {"a": {"epochs": [3, 7]}, "b": {"epochs": [9]}}}) == "3 to 9 epochs"


def test_curves_end_with_the_seed_that_stopped_first():
    histories = [[{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}], [{"loss": 5.0}, {"loss": 4.0}]]
    reached, values = curve(histories, "loss")
    assert reached.tolist() == [1, 2]
    assert values.tolist() == [[3, 2], [5, 4]]


def test_deep_images_are_shown_from_their_least_to_their_greatest_value():
    deep = np.array([[[1000], [3000]]], dtype=np.uint16)
    assert picture(deep, (2, 1)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    with np.errstate(all="raise"):
        assert picture(np.full((1, 2, 1), 7, np.float32), (2, 1)).max() == 0
    assert picture(np.full((1, 2, 3), 7, np.uint8), (2, 1)).tolist() == [[[7, 7, 7], [7, 7, 7]]]


def test_a_page_escapes_its_words(tmp_path):
    write_page(tmp_path, "# a < b\n\n" + table(["name", "n"], [["`<script>`", "1"]], "caption") + "\n")
    page = (tmp_path / "report.html").read_text()
    assert "<title>a &lt; b</title>" in page
    assert "<script>" not in page
    assert "<code>&lt;script&gt;</code>" in page
