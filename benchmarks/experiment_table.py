"""The tables of docs/results.md, from the results.json of experiments.

python benchmarks/experiment_table.py docs/results/experiments/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = "| model | IoU | Dice | pooled Dice | HD95 | surface Dice | against `unet`: Dice, 95 % interval | minutes |"


def table(results: dict[str, Any]) -> str:
    """One experiment: what was trained on what, and a row per network, scored on the test images."""
    images, subjects = results["data"]["images"], results["data"]["subjects"]
    sides = ", ".join(
        f"{name} {images[side]} images of {subjects[side]} subjects"
        for side, name in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    lines = [f"### {results['title'].capitalize()}", "", f"{sides.capitalize()}; seeds {results['seeds']}.", ""]
    lines += [HEAD, "|---|" + "---:|" * (HEAD.count("|") - 2)]
    lines += [_row(name, variant, results) for name, variant in results["variants"].items()]
    for title, rows in (
        ("head circumference", _circumference),
        ("Dice per image of", _classes),
    ):
        if found := rows(results):
            lines += ["", f"| {title} | " + " | ".join(found[0]) + " |", "|---|" + "---:|" * len(found[0])]
            lines += [f"| `{name}` | " + " | ".join(cells) + " |" for name, cells in found[1].items()]
    return "\n".join(lines)


def _row(name: str, variant: dict[str, Any], results: dict[str, Any]) -> str:
    scores, unit = variant["per_image"], results["unit"]
    difference = results["differences"].get(name)
    against = "" if difference is None else "{mean:+.3f}, {low:+.3f} to {high:+.3f}".format(**difference)
    cells = [f"{scores[score]['mean']:.3f}" for score in ("iou", "dice")]
    cells += [f"{variant['pooled']['dice']['mean']:.3f}", f"{scores['hd95']['mean']:.1f} {unit}"]
    cells += [f"{scores['surface_dice']['mean']:.3f}", against, f"{variant['cost']['minutes']:.0f}"]
    return f"| `{name}` | " + " | ".join(cells) + " |"


def _circumference(results: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]] | None:
    rows = {
        name: [f"{errors['absolute_error_mm']['mean']:.2f} mm", f"{errors['no_ellipse']:.0f}"]
        for name, variant in results["variants"].items()
        if (errors := variant.get("circumference"))
    }
    return (["mean absolute error", "images without an ellipse"], rows) if rows else None


def _classes(results: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]] | None:
    rows = {}
    for name, variant in results["variants"].items():
        if "classes" in variant:
            means = [variant["classes"][label]["mean"] for label in results["classes"]]
            rows[name] = [*(f"{mean:.3f}" for mean in means), f"{sum(means) / len(means):.3f}"]
    return ([*results["classes"], "mean"], rows) if rows else None


if __name__ == "__main__":
    print("\n\n".join(table(json.loads(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:]))
