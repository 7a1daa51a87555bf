"""The tables of docs/results.md, from the results.json of experiments and ablations.

python -m benchmarks experiment_table docs/results/*/*.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASELINE_OF_ABLATIONS = "full"
HEAD = "| model | IoU | Dice | pooled Dice | HD95 | surface Dice | against `unet`: Dice, 95 % interval | minutes |"


def table(results: dict[str, Any]) -> str:
    """One experiment, what was trained on what and a row per network; or one ablation, a row per variant."""
    if results["baseline"] == BASELINE_OF_ABLATIONS:
        return ablation(results)
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


def ablation(results: dict[str, Any]) -> str:
    """Dice of every variant, its difference from the full network, and its cost."""
    several = len(results["classes"]) > 1
    head = ["variant", "Dice", *(["mean of classes"] if several else [])]
    head += ["against `full`, 95 % interval", "parameters", "s an epoch"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, variant in results["variants"].items():
        difference = results["differences"].get(name)
        against = "" if difference is None else "{mean:+.3f}, {low:+.3f} to {high:+.3f}".format(**difference)
        cost = variant["cost"]
        cells = [_over_seeds(variant["per_image"]["dice"])]
        cells += [_over_seeds(variant["mean_of_classes"])] if several else []
        cells += [against, f"{cost['parameters']:,}", f"{cost['seconds_per_epoch']:.1f}"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(name: str, variant: dict[str, Any], results: dict[str, Any]) -> str:
    scores, unit = variant["per_image"], results["unit"]
    difference = results["differences"].get(name)
    against = "" if difference is None else "{mean:+.3f}, {low:+.3f} to {high:+.3f}".format(**difference)
    cells = [_over_seeds(scores[score]) for score in ("iou", "dice")]
    cells += [f"{variant['pooled']['dice']['mean']:.3f}", f"{scores['hd95']['mean']:.1f} {unit}"]
    cells += [f"{scores['surface_dice']['mean']:.3f}", against, f"{variant['cost']['minutes']:.0f}"]
    return f"| `{name}` | " + " | ".join(cells) + " |"


def _over_seeds(score: dict[str, Any]) -> str:
    """The mean, and where there are several seeds the standard deviation over them."""
    return f"{score['mean']:.3f}" + ("" if score["sd_seeds"] is None else f" ± {score['sd_seeds']:.3f}")


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
            means = [variant["classes"][label] for label in results["classes"]]
            rows[name] = [*map(_over_seeds, means), _over_seeds(variant["mean_of_classes"])]
    return ([*results["classes"], "mean"], rows) if rows else None


def main(files: Sequence[str]) -> None:
    """Print the tables of files."""
    print("\n\n".join(table(json.loads(Path(name).read_text(encoding="utf-8"))) for name in files))
