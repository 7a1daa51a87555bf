"""The records of measurements: JSON with a line for each row, and the rows for tables and figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SCHEMA = 2
GPU_SESSIONS = "gpu sessions"  # the kind of a record that `gpu_report` writes
DIGITS = 4  # of a number
LINE = 240  # characters
URL = re.compile(r"\b\w[\w+.-]*://\S+")
# A slash at the start of a word, or behind a compiler's flag; the name of a file of a known kind is kept.
PATH = re.compile(r"(?:(?<![\w.)\]>/-])|(?<=-[IL]))~?/[\w.+@~-]+(?:/[\w.+@~-]*)*")
FILE = re.compile(r"[^/]+\.(?:py|c|cpp|cu|h|so|o|ptx|cubin|json|jsonl|xml|txt|log|tar)$")


def load(file: Path) -> dict[str, Any]:
    """A record, if it is of this version of the format."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{file.name} has schema {record.get('schema')!r}, expected {SCHEMA}; measure again")
    return record


def save(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record without paths, and with numbers of a few digits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_lines(clean(record)) + "\n", encoding="utf-8")


def rows_of(cases: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row for each case, mode and candidate."""
    rows = []
    for case in cases:
        shared = {name: value for name, value in case.items() if name != "rows"}
        for kept in case["rows"]:
            errors = {name: float(error) for name, error in kept.get("errors", {}).items()}  # JSON holds no infinity
            rows.append({**shared, "status": "ok", "reason": "", **kept, "errors": errors})
    return rows


def times(row: Mapping[str, Any]) -> list[float]:
    """The median, and that of the second run where there was one."""
    return [row["median_s"], *([row["again_s"]] if "again_s" in row else [])]


def clean(value: Any) -> Any:
    """The same without addresses and paths, and with numbers of a few digits that JSON can hold."""
    if isinstance(value, str):
        return PATH.sub(lambda path: kept[0] if (kept := FILE.search(path[0])) else "PATH", URL.sub("URL", value))
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def _lines(value: Any, indent: str = "") -> str:
    """JSON in which a value that fits into a line stands on one."""
    line = json.dumps(value, allow_nan=False)
    if len(line) <= LINE or not isinstance(value, (dict, list)):
        return line
    inner = f"{indent} "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
    else:
        parts = [_lines(item, inner) for item in value]
    body = f",\n{inner}".join(parts)
    return f"{line[0]}\n{inner}{body}\n{indent}{line[-1]}"
