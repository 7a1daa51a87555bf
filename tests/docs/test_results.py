"""The figures of docs/results.md are those of the recorded runs beside it."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def recorded(folder: Path) -> list[dict]:
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    assert runs
    return runs


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "lr-1e-3"], ids=lambda folder: folder.name)
def test_tables_are_made_of_the_recorded_runs(folder):
    tables = runpy.run_path(str(ROOT / "benchmarks" / "results_table.py"))["tables"](recorded(folder))
    assert tables in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("label", "model"),
    [("`km_unet_pp_tiny`", "km_unet_pp_tiny"), ("U-Net (", "unet"), ("U-Net++ (", "unet_pp")],
)
def test_the_readme_shows_the_recorded_dice(label, model):
    dice = {run["task"]: run["metrics"]["per_image"]["dice"] for run in recorded(RESULTS) if run["model"] == model}
    figures = " | ".join(f"{dice[task]:.3f}" for task in ("isic2017", "fetal_head", "lumbar_spine"))
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if figures in line]
    assert len(rows) == 1
    assert rows[0].startswith(f"| {label}")
