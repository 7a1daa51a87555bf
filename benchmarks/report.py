"""Render records as Markdown pages. The build of the documentation does so, and the pages are not kept.

python -m benchmarks report benchmarks/results/*.json --out docs/_benchmarks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser
from benchmarks.gpu import chart, page
from benchmarks.record import GPU_SESSIONS, load, rows_of
from benchmarks.tables import measurements


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a page for each record, and a plot for one of a GPU."""
    parser = make_parser("report", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for file in args.files:
        record = load(file)
        if record.get("kind") == GPU_SESSIONS:
            image = f"{file.stem}-speed.svg"
            text = page.render(record, [image] if chart.plot(record, args.out / image) else [])
        else:
            text = render(record)
        (args.out / f"{file.stem}.md").write_text(text, encoding="utf-8")


def render(record: dict[str, Any]) -> str:
    """The page of a run."""
    return "\n\n".join([environment(record), *measurements(rows_of(record["cases"]))]) + "\n"


def environment(record: dict[str, Any]) -> str:
    """What the figures were measured with."""
    machine, versions, rates = record["machine"], record["versions"], record["limit"]
    on_gpu = record["settings"]["device"] == "cuda"
    where = machine["gpu"]["name"] if on_gpu else f"{machine['cpu']}, {machine['cores']} cores"
    text = f"Measured on {record['date'][:10]}: {where}; {page.libraries(versions)}; "
    text += f"commit {versions['commit'] or 'unknown'}."
    if again := record.get("again"):
        text += f" Some cases were measured twice, again at commit {again['commit']}."
    if rates["elements_per_second"] and any("limit_s" in case for case in record["cases"]):
        what = "exponentials" if on_gpu else "elements of a scan on one core"
        text += f" Limit: {rates['elements_per_second'] / 1e9:.1f} G {what} per second;"
        text += f" a copy moves {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written."
    return text
