"""The record of sessions on a GPU, and their failures by kernel.

    python -m benchmarks gpu_report DIR --name h100

DIR is what `gpu_day` wrote. This writes benchmarks/results/gpu-h100.json, of which `report` makes a page with a plot.
A rehearsal on a CPU measures nothing, and its record is written only to the folder that --results names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import make_parser
from benchmarks.gpu import page
from benchmarks.gpu.summary import summarise
from benchmarks.record import load, save

RESULTS = Path("benchmarks/results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the record and print what has to be known first."""
    parser = make_parser("gpu_report", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what gpu_day wrote")
    parser.add_argument("--name", type=_name, required=True, help="of the GPU, in the name of the file")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"by default {RESULTS}")
    args = parser.parse_args(arguments)
    record = summarise(args.folder, args.name)
    if record["device"] == "cpu" and args.results is None:
        raise SystemExit("this was a rehearsal on a CPU and holds no measurements: give --results DIR")
    file = (args.results or RESULTS) / f"gpu-{args.name}.json"
    save(file, record)
    print(page.terminal(load(file)))


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a file's name: use letters, digits, - and _")
    return text
