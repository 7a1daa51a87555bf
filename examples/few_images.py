"""How many images of one's own does fine-tuning need, beside training from nothing?

    python examples/few_images.py --folder DIR --split kan_mamba_layers/weights/breast_lesion/split.json

Trains km_unet_pp_tiny on 10, 30 and 100 breast ultrasound images, once from the weights of fetal heads and once from
none, for 150, 225 and 276 steps, and scores both on the test images of the split. What is done already is not done
again.
"""

import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jsonargparse import auto_cli

from segmentation import runs
from segmentation.console import mistakes_in_one_line
from segmentation.data.split import Table, read_split, write_split

STARTS = ("fetal_head", "nothing")
STEPS = 300
BATCH = 8
VALIDATION = 12  # images, as few as somebody with few images can spare


def few_images(
    folder: Path,
    split: Path,
    task: str = "breast_lesion",
    numbers: tuple[int, ...] = (10, 30, 100),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = Path("runs", "few_images"),
) -> dict[str, dict[int, list[float]]]:
    """Train, score, draw out/curve.png, and return the mean Dice of test images of every start, number and seed.

    Args:
        folder: the images.
        split: their split.json; training images are drawn from its training side, whole subjects at a time.
        task: task of the images.
        numbers: numbers of training images, at most, of whole subjects.
        seeds: each draws other images, another order and other first weights.
        out: folder of the runs, `lab.py compare out/30` sets them against each other.
    """
    table = read_split(split)
    parts = {(seed, number): draw(table, number, seed) for seed in seeds for number in numbers}
    found: dict[str, dict[int, list[float]]] = {start: {number: [] for number in numbers} for start in STARTS}
    out.mkdir(parents=True, exist_ok=True)
    for (seed, number), drawn in parts.items():
        part = out / f"{number}-seed{seed}.json"
        if part.exists() and read_split(part) != drawn:
            raise ValueError(f"out {str(out)!r} holds trainings on other images: give another folder")
        write_split(part, drawn)
        epochs = STEPS // math.ceil(number / BATCH)
        for start in STARTS:
            run = out / str(number) / f"{start}-seed{seed}"
            scores = run / "test" / "scores.json"
            if not scores.exists():
                fit = [f"--run={run}", "--resume", f"--data.task={task}", f"--data.folder={folder}"]
                fit += [f"--data.split={part}", f"--seed_everything={seed}"]
                fit += [f"--trainer.max_epochs={epochs}", f"--data.batch_size={BATCH}"]
                run_lab("fit", *fit, *([] if start == "nothing" else [f"--model.pretrained={start}"]))
                run_lab("test", f"--run={run}")
            found[start][number].append(runs.read_json(scores)["per_image"]["dice"]["mean"])
    draw_curve(out / "curve.png", found)
    return found


def run_lab(*arguments: str) -> None:
    """A command of the lab, which says itself what is wrong."""
    ended = subprocess.run([sys.executable, str(Path(__file__).with_name("lab.py")), *arguments], check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def draw(table: Table, number: int, seed: int) -> Table:
    """The test side of a split, with at most `number` of its training and a few of its validation images.

    Subjects are taken whole.
    """
    chosen = {key: row for key, row in table.items() if row["split"] == "test"}
    for side, wanted in (("train", number), ("val", VALIDATION)):
        rows = {key: row for key, row in table.items() if row["split"] == side}
        sizes = Counter(row["group"] for row in rows.values())
        if not sizes or min(sizes.values()) > wanted or len(rows) < wanted:
            raise ValueError(
                f"numbers {number}: {wanted} images of the {side} side of the split are needed, which has {len(rows)}, "
                f"{min(sizes.values(), default=0)} or more of a subject; give another number, or another split"
            )
        for group in random.Random(seed).sample(sorted(sizes), len(sizes)):
            if sizes[group] <= wanted:
                wanted -= sizes[group]
                chosen |= {key: row for key, row in rows.items() if row["group"] == group}
    return chosen


def draw_curve(path: Path, found: dict[str, dict[int, list[float]]]) -> None:
    """The mean of the seeds, and each of them as a dot."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for start, scores in found.items():
        [line] = axes.plot(list(scores), [np.mean(dice) for dice in scores.values()], label=f"from {start}")
        for number, dice in scores.items():
            axes.plot([number] * len(dice), dice, ".", color=line.get_color())
    axes.set(xscale="log", xlabel="training images", ylabel="Dice on test images")
    axes.set_xticks(list(next(iter(found.values()))), map(str, next(iter(found.values()))))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    with mistakes_in_one_line():
        auto_cli(few_images, as_positional=False)
