"""What a GPU day came to: a JSON file to keep, a page with tables and a plot, and the failures by kernel.

    python -m benchmarks gpu_report DIR --name h100

DIR is what `gpu_day` wrote. This writes benchmarks/results/gpu-h100.json, docs/benchmarks/gpu-h100.md and
docs/benchmarks/gpu-h100-speed.svg. docs/benchmarks.md shows the page by

    ```{include} benchmarks/gpu-h100.md
    :relative-images:
    :heading-offset: 1
    ```

A rehearsal on a CPU measures nothing; its report says so, and is written only where --results and --docs tell.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import make_parser
from benchmarks.gpu import page
from benchmarks.gpu.chart import plot
from benchmarks.gpu.summary import summarise

RESULTS, DOCS = Path("benchmarks/results"), Path("docs/benchmarks")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the three files and print what has to be known first."""
    args = _parser().parse_args(arguments)
    day = summarise(args.folder, args.name)
    if day["device"] == "cpu" and None in (args.results, args.docs):
        raise SystemExit("this was a rehearsal on a CPU and holds no measurements: give --results DIR and --docs DIR")
    results, docs = args.results or RESULTS, args.docs or DOCS
    for folder in (results, docs):
        folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{args.name}"
    (results / f"{stem}.json").write_text(json.dumps(day, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    image = f"{stem}-speed.svg"
    images = [image] if plot(day, docs / image) else []
    (docs / f"{stem}.md").write_text(page.render(day, images), encoding="utf-8")
    print(page.terminal(day))


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a file's name: use letters, digits, - and _")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("gpu_report", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what gpu_day wrote")
    parser.add_argument("--name", type=_name, required=True, help="of the GPU, in the names of the files")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"of the JSON file, by default {RESULTS}")
    parser.add_argument("--docs", type=Path, metavar="DIR", help=f"of the page and the plot, by default {DOCS}")
    return parser
