"""The tables of docs/results.md, from the results.json of experiments and ablations.

python -m benchmarks experiment_table docs/results/*/*.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table

BASELINE_OF_ABLATIONS = "full"
HEAD = ("model", "IoU", "Dice", "pooled Dice", "HD95", "surface Dice", "against `unet`: Dice, 95 % interval", "minutes")


def main(files: Sequence[str]) -> None:
    """Print the tables of files."""
    print("\n\n".join(tables(json.loads(Path(name).read_text(encoding="utf-8"))) for name in files))


def tables(results: dict[str, Any]) -> str:
    """One experiment, what was trained on what and a row per network; or one ablation, a row per variant."""
    if results["baseline"] == BASELINE_OF_ABLATIONS:
        return ablation(results)
    images, subjects = results["data"]["images"], results["data"]["subjects"]
    sides = ", ".join(
        f"{name} {images[side]} images of {subjects[side]} subjects"
        for side, name in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    parts = [f"### {results['title'].capitalize()}", f"{sides.capitalize()}; seeds {results['seeds']}."]
    parts.append(_table(HEAD, {name: _row(name, variant, results) for name, variant in results["variants"].items()}))
    parts += filter(None, (_circumference(results), _classes(results)))
    return "\n\n".join(parts)


def ablation(results: dict[str, Any]) -> str:
    """Dice of every variant, its difference from the full network, and its cost."""
    several = len(results["classes"]) > 1
    head = ["variant", "Dice", *(["mean of classes"] if several else [])]
    rows = {}
    for name, variant in results["variants"].items():
        cost = variant["cost"]
        means = [_over_seeds(variant["mean_of_classes"])] if several else []
        figures = [_against(name, results), f"{cost['parameters']:,}", f"{cost['seconds_per_epoch']:.1f}"]
        rows[name] = [_over_seeds(variant["per_image"]["dice"]), *means, *figures]
    return _table([*head, "against `full`, 95 % interval", "parameters", "s an epoch"], rows)


def _table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    return table(head, [[f"`{name}`", *cells] for name, cells in rows.items()], len(head) - 1)


def _row(name: str, variant: dict[str, Any], results: dict[str, Any]) -> list[str]:
    scores = variant["per_image"]
    cells = [_over_seeds(scores[score]) for score in ("iou", "dice")]
    cells += [f"{variant['pooled']['dice']['mean']:.3f}", f"{scores['hd95']['mean']:.1f} {results['unit']}"]
    return [
        *cells,
        f"{scores['surface_dice']['mean']:.3f}",
        _against(name, results),
        f"{variant['cost']['minutes']:.0f}",
    ]


def _against(name: str, results: dict[str, Any]) -> str:
    difference = results["differences"].get(name)
    return "" if difference is None else "{mean:+.3f}, {low:+.3f} to {high:+.3f}".format(**difference)


def _over_seeds(score: dict[str, Any]) -> str:
    """The mean, and where there are several seeds the standard deviation over them."""
    return f"{score['mean']:.3f}" + ("" if score["sd_seeds"] is None else f" ± {score['sd_seeds']:.3f}")


def _circumference(results: dict[str, Any]) -> str:
    rows = {
        name: [f"{errors['absolute_error_mm']['mean']:.2f} mm", f"{errors['no_ellipse']:.0f}"]
        for name, variant in results["variants"].items()
        if (errors := variant.get("circumference"))
    }
    return _table(["head circumference", "mean absolute error", "images without an ellipse"], rows) if rows else ""


def _classes(results: dict[str, Any]) -> str:
    rows = {
        name: [_over_seeds(score) for score in (*map(variant["classes"].get, classes), variant["mean_of_classes"])]
        for classes in [results["classes"]]
        for name, variant in results["variants"].items()
        if "classes" in variant
    }
    return _table(["Dice per image of", *results["classes"], "mean"], rows) if rows else ""
