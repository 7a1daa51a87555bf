"""The figures of docs/results.md are those of the recorded runs beside it."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_made_of_the_recorded_runs():
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]
    assert runs
    tables = runpy.run_path(str(ROOT / "benchmarks" / "results_table.py"))["tables"](runs)
    assert tables in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
