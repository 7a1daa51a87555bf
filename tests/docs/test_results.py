"""The figures of docs/results.md are those of the recorded runs beside it."""

import json
from pathlib import Path

from benchmarks.experiment_table import tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def recorded(folder: Path) -> list[dict]:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    assert runs
    return runs


def test_the_tables_are_those_of_the_recorded_results():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for kind, side in (("experiments", "test"), ("recipe", "val"), ("ablation", "val")):
        for results in recorded(RESULTS / kind):
            assert tables(results) in text
            assert results["side"] == side


def test_the_readme_shows_the_dice_of_the_experiments():
    found = {results["task"]: results["variants"] for results in recorded(RESULTS / "experiments")}
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for model in ("unet", "unet_pp", "km_unet_tiny", "km_unet_pp_tiny"):
        rows = [found[task].get(model) for task in sorted(found)]
        dice = ["not run" if row is None else f"{row['per_image']['dice']['mean']:.3f}" for row in rows]
        assert f"| `{model}` | {' | '.join(dice)} |" in lines
