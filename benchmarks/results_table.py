"""Print the Markdown tables of docs/results.md from the metrics.json files of finished runs.

python benchmarks/results_table.py docs/results/*.json
"""

import json
import sys
from pathlib import Path
from typing import Any

TITLES = {"isic2017": "Skin lesions, ISIC 2017", "fetal_head": "Fetal head, HC18", "lumbar_spine": "Lumbar spine"}
SCORES = ("iou", "dice", "f1")


def tables(runs: list[dict[str, Any]]) -> str:
    """One table for each task, best mean Dice first, and one of the single vertebrae."""
    parts = []
    for task, title in TITLES.items():
        of_task = sorted((run for run in runs if run["task"] == task), key=_dice, reverse=True)
        if not of_task:
            continue
        counts, subjects, size = (of_task[0][name] for name in ("images", "subjects", "image_size"))
        parts += [
            f"### {title}",
            f"Training on {counts['train']} images of {subjects['train']} subjects, validation on {counts['val']} "
            f"images of {subjects['val']} other subjects, {size}x{size} pixels, "
            f"{of_task[0]['epochs']} epochs.",
            _table(of_task),
        ]
        if "classes" in of_task[0]["metrics"]:
            parts.append(_class_table(of_task))
    return "\n\n".join(parts)


def _dice(run: dict[str, Any]) -> float:
    return run["metrics"]["per_image"]["dice"]


def _table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| model | parameters | per image: IoU | Dice | F1 | pooled: IoU | Dice | F1 | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        scores = [run["metrics"][kind][score] for kind in ("per_image", "pooled") for score in SCORES]
        cells = " | ".join(f"{score:.3f}" for score in scores)
        lines.append(f"| `{run['model']}` | {run['parameters']:,} | {cells} | {run['seconds'] / 60:.0f} |")
    return "\n".join(lines)


def _class_table(runs: list[dict[str, Any]]) -> str:
    names = list(runs[0]["metrics"]["classes"])
    lines = ["| Dice per image of | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for run in runs:
        dice = [run["metrics"]["classes"][name]["per_image"]["dice"] for name in names]
        lines.append(f"| `{run['model']}` | " + " | ".join(f"{value:.3f}" for value in dice) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables([json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]))
