"""Scores against a plain double loop, MONAI's own metrics and closed forms; and the script that writes them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDiceMetric
from PIL import Image
from test_inference import write_run
from torch import Tensor, nn

import evaluate as script
from segmentation.checkpoints import Trained
from segmentation.data.demo import demo_items
from segmentation.data.formats import find_items
from segmentation.data.item import Item
from segmentation.data.split import file_hash, read_split, split_items, split_table, write_split
from segmentation.evaluation import Evaluation, count, evaluate, whole_file
from segmentation.surface import TOLERANCE, surface_scores
from segmentation.tasks import Task, get_task

GREY, SPINE = get_task("fetal_head"), get_task("lumbar_spine")
SIDE = 32
Pair = tuple[np.ndarray, np.ndarray]  # prediction and truth, class numbers


class Levels(nn.Module):
    """Reads classes off an image of evenly spaced grey levels, of which the greatest is the last class."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.tensor(float(last)))

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        level = self.last * (x - low) / (high - low).clamp(min=1e-6)
        if self.last == 1:
            return level - 0.5
        return -((level - torch.arange(int(self.last) + 1)[None, :, None, None]) ** 2)


def trained(task: Task) -> Trained:
    return Trained(Levels(len(task.labels)).eval(), task, SIDE, "levels")


def item(task: Task, name: str, pair: Pair, **more: object) -> Item:
    """An item whose image makes `Levels` predict the first mask."""
    prediction, truth = (mask.astype(np.uint8) for mask in pair)
    image = (prediction * (255 // len(task.labels)))[..., None]
    return Item(name, f"subject {name}", lambda: (image, truth), **more)


def random_pairs(task: Task) -> list[Pair]:
    """Blobs; image 1 has no truth, image 2 no prediction, image 3 neither; class L3 is in no image."""
    rng = np.random.default_rng(0)
    values = [k for k in range(len(task.labels) + 1) if k != 3]
    both = rng.choice(values, (2, 6, SIDE // 4, SIDE // 4)).repeat(4, axis=2).repeat(4, axis=3)
    both[0, :, 0, :2] = 0, values[-1]  # so that every image shows the whole scale of grey levels
    both[1, 1] = both[0, 2] = 0
    both[:, 3] = 0
    return list(zip(*both, strict=True))


def loop(prediction: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    counts = dict.fromkeys(("tp", "fp", "fn"), 0)
    for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
        if p and t:
            counts["tp"] += 1
        elif p:
            counts["fp"] += 1
        elif t:
            counts["fn"] += 1
    return counts


def f1(tp: int, fp: int, fn: int) -> float:
    """The harmonic mean of precision and recall."""
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


@pytest.mark.parametrize("task", [GREY, SPINE], ids=lambda task: task.name)
def test_rows_and_scores_equal_the_double_loop(task):
    pairs, spacing = random_pairs(task), (0.5, 1.25)
    items = [item(task, str(k), pair, pixel_size=spacing) for k, pair in enumerate(pairs)]
    evaluation = evaluate(trained(task), items)
    assert [row["id"] for row in evaluation.rows] == [str(k) for k in range(6)]
    assert evaluation.rows[4]["group"] == "subject 4"
    for row, (prediction, truth) in zip(evaluation.rows, pairs, strict=True):
        counts = loop(prediction > 0, truth > 0)
        assert {name: row[name] for name in counts} == counts
        score = f1(**counts)
        score = 1.0 if math.isnan(score) else score
        assert row["dice"] == row["f1"] == pytest.approx(score)
        assert row["iou"] == pytest.approx(score / (2 - score))
        assert row["unit"] == "mm"
        if prediction.any() and truth.any():
            there, back = distances(prediction > 0, truth > 0, spacing)
            assert row["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-6)
            close = (there <= TOLERANCE).sum() + (back <= TOLERANCE).sum()
            assert row["surface_dice"] == pytest.approx(close / (len(there) + len(back)), rel=1e-6)
    diagonal = math.hypot(SIDE * spacing[0], SIDE * spacing[1])
    assert [(row["dice"], row["surface_dice"]) for row in evaluation.rows[1:4]] == [(0, 0), (0, 0), (1, 1)]
    assert [row["hd95"] for row in evaluation.rows[1:4]] == pytest.approx([diagonal, diagonal, 0])

    scores = evaluation.scores()
    assert (scores["images"], scores["unreadable"], scores["unit"]) == (6, 0, "mm")
    for name, summary in scores["per_image"].items():
        values = [row[name] for row in evaluation.rows]
        assert summary["mean"] == pytest.approx(sum(values) / 6)
        assert summary["sd"] == pytest.approx(math.sqrt(sum((v - summary["mean"]) ** 2 for v in values) / 5))
    everything = np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])
    assert scores["pooled"]["dice"] == scores["pooled"]["f1"] == pytest.approx(f1(*loop(*everything).values()))
    assert scores["pooled"]["iou"] == pytest.approx(scores["pooled"]["dice"] / (2 - scores["pooled"]["dice"]))
    if task is GREY:
        assert "classes" not in scores
        return
    means = []
    for number, name in enumerate(task.class_names, start=1):
        parts = [f1(*loop(prediction == number, truth == number).values()) for prediction, truth in pairs]
        assert [row[f"dice_{name}"] for row in evaluation.rows] == [
            None if math.isnan(part) else pytest.approx(part) for part in parts
        ]
        present = [part for part in parts if not math.isnan(part)]
        pooled = f1(*loop(everything[0] == number, everything[1] == number).values())
        if name == "L3":
            assert set(scores["classes"]["L3"]["per_image"].values()) == {None}
            assert set(scores["classes"]["L3"]["pooled"].values()) == {None}
            continue
        means.append(sum(present) / len(present))
        assert scores["classes"][name]["per_image"]["dice"] == pytest.approx(means[-1])
        assert scores["classes"][name]["pooled"]["dice"] == pytest.approx(pooled)
        assert scores["classes"][name]["pooled"]["iou"] == pytest.approx(pooled / (2 - pooled))
    assert scores["mean_of_classes"]["dice"] == pytest.approx(sum(means) / 4)


def test_scores_equal_the_means_of_monai():
    pairs = [pair for k, pair in enumerate(random_pairs(GREY)) if k not in (1, 2, 3)]  # where MONAI has no number
    scores = evaluate(trained(GREY), [item(GREY, str(k), pair) for k, pair in enumerate(pairs)]).scores()
    prediction, truth = (torch.tensor(np.stack(masks))[:, None] for masks in zip(*pairs, strict=True))
    options = {"include_background": True, "reduction": "mean"}
    metrics = {
        "dice": DiceMetric(**options),
        "iou": MeanIoU(**options),
        "hd95": HausdorffDistanceMetric(**options, percentile=95),
        "surface_dice": SurfaceDiceMetric([TOLERANCE], **options),
    }
    assert scores["unit"] == "px"
    for name, metric in metrics.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            metric(prediction, truth)
        assert scores["per_image"][name]["mean"] == pytest.approx(metric.aggregate().item(), rel=1e-6), name


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize(("down", "right"), [(0, 3), (4, 0), (0, 0)])
def test_surfaces_of_a_shifted_square(spacing, down, right):
    """A whole side of the square, a quarter of its outline, lies as far out as the square was shifted."""
    truth = np.zeros((60, 70), bool)
    truth[10:30, 20:40] = True
    prediction = np.roll(truth, (down, right), axis=(0, 1))
    found = surface_scores(prediction, truth, spacing)
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
    disc = (rows - 15.5) ** 2 + (columns - 15.5) ** 2 <= 12**2
    nothing = np.zeros_like(disc)
    known = {"pixel_size": (2.0, 2.0), "circumference": 150.0}
    evaluation = evaluate(
        trained(GREY),
        [
            item(GREY, "both", (disc, disc), **known),
            item(GREY, "both again", (disc, disc), pixel_size=(1.0, 1.0), circumference=70.0),
            item(GREY, "no size", (disc, disc), circumference=150.0),
            item(GREY, "no truth", (disc, disc), pixel_size=(2.0, 2.0)),
            item(GREY, "nothing found", (nothing, disc), **known),
        ],
    )
    both, again, *others = evaluation.rows
    assert both["hc_mm"] == pytest.approx(2 * math.pi * 24, rel=0.02)
    assert both["hc_error_mm"] == both["hc_mm"] - 150
    assert [row["hc_error_mm"] for row in others] == [None] * 3
    assert [row["hc_mm"] is None for row in others] == [True, False, True]
    scores = evaluation.scores()
    errors = [both["hc_error_mm"], again["hc_error_mm"]]
    assert scores["circumference"] == {
        "mean_absolute_error_mm": pytest.approx(np.mean(np.abs(errors))),
        "mean_error_mm": pytest.approx(np.mean(errors)),
        "sd_error_mm": pytest.approx(np.std(errors, ddof=1)),
        "images": 2,
        "no_ellipse": 1,
    }
    assert (scores["unit"], scores["per_image"]["hd95"]) == ("mixed", {"mean": None, "sd": None})


def test_counts_stay_exact_in_large_images():
    truth = np.ones((4100, 4101), bool)  # more pixels than float32 counts
    truth[0, 0] = False
    assert count(np.ones_like(truth), truth) == {"tp": 4100 * 4101 - 1, "fp": 1, "fn": 0}


def test_images_that_cannot_be_read_are_named_and_counted():
    def broken() -> Pair:
        raise ValueError("b.png cannot be read as an image: replace or remove it")

    good = item(GREY, "a", random_pairs(GREY)[0])
    seen = []
    evaluation = evaluate(
        trained(GREY), [good, replace(good, id="b", read=broken)], progress=lambda items: seen.extend(items) or items
    )
    assert [one.id for one in seen] == ["a", "b"]
    assert [row["id"] for row in evaluation.rows] == ["a"]
    reason = "b.png cannot be read as an image: replace or remove it"
    assert evaluation.unreadable == [{"id": "b", "reason": reason}]
    assert (evaluation.scores()["images"], evaluation.scores()["unreadable"]) == (1, 1)
    assert evaluation.scores()["per_image"]["iou"]["sd"] is None
    with pytest.raises(ValueError, match=r"none of 1 images could be read: b\.png"):
        Evaluation([], evaluation.unreadable, ("head",)).scores()


def test_an_interrupt_leaves_the_earlier_file(tmp_path):
    (tmp_path / "a.csv").write_text("earlier")

    def interrupted() -> None:
        with whole_file(tmp_path / "a.csv") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.csv", "earlier")]


def on_data(run: Path, task: str, items: list[Item], data_dir: Path | None = None) -> None:
    """A run folder with a split of `items`."""
    write_run(run, task, "unet", data_dir=None if data_dir is None else str(data_dir))
    items = split_items(items, 0.2, 0.4, seed=0)
    write_split(run / "split.json", split_table(items, [file_hash(one) for one in items]))


def score(run: Path, *flags: str) -> dict:
    return script.main([f"--run={run}", *flags])


def test_a_demo_run_is_scored_on_its_test_subjects(tmp_path, capsys):
    on_data(tmp_path, "lumbar_spine", demo_items(SPINE, 32)[:15])
    scores = score(tmp_path)
    table = {name: row["split"] for name, row in read_split(tmp_path / "split.json").items()}
    out = tmp_path / "evaluation-test"
    assert json.loads((out / "scores.json").read_text()) == scores
    rows = list(csv.DictReader((out / "images.csv").open(newline="")))
    assert [row["id"] for row in rows] == [name for name, side in table.items() if side == "test"]
    assert len(rows) == scores["images"] == 6
    assert (scores["data"], scores["side"], scores["checkpoint"]) == ("demo", "test", "best.ckpt")
    assert set(scores["classes"]) == {"L1", "L2", "L3", "L4", "L5"}
    assert scores["per_image"]["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    printed = capsys.readouterr().out
    for text in ("mean per image (sd)", "pooled over pixels", "HD95 (px)", "surface Dice (2 px)", "L5 Dice", str(out)):
        assert text in printed.replace("\n", ""), text

    assert score(tmp_path, "--side=val")["images"] == 3
    assert score(tmp_path, "--side=all", "--window")["images"] == 15
    assert (tmp_path / "evaluation-all-window" / "scores.json").is_file()
    shutil.copy(tmp_path / "checkpoints" / "best.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    last = script.main([f"--run={tmp_path / 'checkpoints' / 'last.ckpt'}"])
    assert json.loads((tmp_path / "evaluation-test-last" / "scores.json").read_text()) == last
    assert last == {**scores, "checkpoint": "last.ckpt"}
    with pytest.raises(ValueError, match="flips cannot be averaged for lumbar_spine"):
        score(tmp_path, "--flips")


def test_json_is_all_that_is_printed(tmp_path, capsys):
    on_data(tmp_path / "run", "isic2017", demo_items(get_task("isic2017"), 32)[:15])
    scores = score(tmp_path / "run", "--json", "--flips", f"--out={tmp_path / 'scores'}")
    assert json.loads(capsys.readouterr().out) == scores
    assert scores["options"] == ["flips"]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text()) == scores


def test_damaged_and_changed_images_of_a_folder_are_named(tmp_path, folder, capsys):
    data = folder("fetal_head", number=15, size=(40, 56))
    on_data(tmp_path / "run", "fetal_head", find_items(GREY, data), data)
    assert score(tmp_path / "run")["unreadable"] == 0
    table = read_split(tmp_path / "run" / "split.json")
    first, second, *others = [one for one in find_items(GREY, data) if table[one.id]["split"] == "test"]
    first.files[0].write_bytes(first.files[0].read_bytes()[:-60])
    image = Image.open(second.files[0])
    image.putpixel((0, 0), 255 - image.getpixel((0, 0)))
    image.save(second.files[0])
    scores = score(tmp_path / "run")
    assert (scores["images"], scores["unreadable"]) == (len(others), 2)
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"left out: {first.id}: {first.files[0]} cannot be read as an image" in printed
    assert f"left out: {second.id}: image or mask of {second.id!r} changed since the split was written" in printed


def test_another_folder_is_scored_whole_unless_the_run_knows_its_images(tmp_path, folder):
    data = folder("fetal_head", number=15)
    on_data(tmp_path / "run", "fetal_head", find_items(GREY, data), data)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    with pytest.raises(
        ValueError, match=r"9 of 15 images, such as .* trained or validated on: add --split .*split\.json"
    ):
        score(tmp_path / "run", f"--data-dir={moved}")
    split = tmp_path / "run" / "split.json"
    assert score(tmp_path / "run", f"--data-dir={moved}", f"--split={split}")["images"] == 6
    assert score(tmp_path / "run", f"--data-dir={data}")["images"] == 6  # the run's own

    demo = tmp_path / "demo"
    on_data(demo, "fetal_head", demo_items(GREY, 32)[:15])
    scores = score(demo, f"--data-dir={data}")
    assert (scores["images"], scores["side"], scores["split_sha256"]) == (15, "all", None)
    assert (demo / "evaluation-data-all" / "images.csv").is_file()
    with pytest.raises(ValueError, match="side 'test' holds no image: choose another --side"):
        score(demo, f"--data-dir={data}", "--side=test")


def test_other_files_with_the_names_of_training_images_are_pointed_out(tmp_path, folder, capsys):
    data = folder("fetal_head", number=15)
    on_data(tmp_path / "run", "fetal_head", find_items(GREY, data), data)
    enlarged = tmp_path / "enlarged"
    shutil.copytree(data, enlarged)
    for path in enlarged.glob("*/*.png"):
        Image.open(path).resize((60, 70), Image.Resampling.NEAREST).save(path)
    assert score(tmp_path / "run", f"--data-dir={enlarged}")["images"] == 15
    assert "9 of 15 images, such as" in capsys.readouterr().err
