"""Measure the ops, layers and models: the error first, then time and memory, all candidates of a case side by side.

python -m benchmarks run                             # ops at batch 1, blocks and models: minutes
python -m benchmarks run --quick                     # few small cases: less than a minute
python -m benchmarks run ops-b8 scaling --out FILE.json
python -m benchmarks run ops --cases 'cross-b1-*' --threads 1 2 --peers-path mamba_ssm=PATH vmamba=PATH
python -m benchmarks run kan --peers-path efficient_kan=PATH fast_kan=PATH pykan=PATH
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import kan_layers, limit, machine
from benchmarks.candidates import MODES, Candidate, Mode, backends, baselines, on_backend, whole
from benchmarks.cases import CASES, QUICK, SUITES, Case
from benchmarks.command import make_parser, peer_path
from benchmarks.measure import (
    Checker,
    allocated_peak,
    call_of,
    error_limit,
    peak_bytes,
    quartiles,
    saved_bytes,
    seconds_of_one,
    time_in_rounds,
)
from benchmarks.peers import peers
from benchmarks.record import SCHEMA, Row, save
from benchmarks.tables import mebibytes, three_digits

SHARED = ("case", "suite", "sizes", "axis", "device", "dtype", "threads")  # by all rows of a case
KEPT = ("candidate", "mode", "reason", "median_s", "quartiles_s", "peak_bytes", "saved_bytes")  # of a row
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_SHARE = 0.6  # of the main memory, that a candidate may need
# The time of a case that is checked in part is estimated in proportion to its size, fixed costs included, and can be
# several times too long. Up to this many times the limit, a call is timed instead.
DOUBTED = 10


@dataclass(frozen=True)
class Options:
    """How a run measures."""

    device: str = "cpu"
    dtype: str = "float32"
    candidates: str = "*"
    rounds: int = 7
    budget: float = 1.0  # seconds of samples, for each candidate and mode
    longest: float = 5.0  # seconds that one call may take
    memory: bool = True
    modes: tuple[Mode, ...] = MODES
    whole: bool = False  # all of a layer or model on each backend, and no other candidates
    peers: Sequence[tuple[str, str]] = ()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and write the results."""
    args = _parser().parse_args(arguments)
    options = Options(**{name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__})
    if args.quick:
        options = replace(options, rounds=3, budget=0.3, longest=1.0, memory=False)
    cases = select(args.suites, args.cases, args.quick, args.device)
    if not cases:
        raise SystemExit(f"no case for {args.device!r} matches --cases {args.cases!r}; see --list")
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    measure(cases, args.threads, options, args.out)


def select(suites: Iterable[str], pattern: str = "*", quick: bool = False, device: str = "cpu") -> list[Case]:
    """The cases of the suites whose names match, and that are for the device."""
    wanted = set(suites) or {"ops", "blocks", "models"}
    found = [c for c in (QUICK if quick else CASES) if c.suite in wanted and fnmatch.fnmatch(c.name, pattern)]
    return [case for case in found if case.device in ("", device)]


def measure(cases: Sequence[Case], threads: Sequence[int], options: Options, out: Path | None = None) -> None:
    """Measure the limit and every case, with every number of threads; `out` is written anew after each case."""
    torch.set_num_threads(1)
    rates, measured = limit.measure(options.device), []
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": {
            "device": options.device,
            "rounds": options.rounds,
            "budget_s": options.budget,
            "longest_s": options.longest,
        },
    }
    for count in threads:
        for case in cases:
            torch.set_num_threads(count)
            of_case = replace(options, dtype=case.dtype or options.dtype)
            candidates = candidates_of(case, of_case)
            if not candidates:
                continue
            measured.append(measure_case(case, candidates, of_case))
            for row in measured[-1]:
                print(f"{case.name:34} t{count} {line(row)}", flush=True)
            rates = limit.faster(rates, limit.measure(options.device))
            if out is not None:  # all limits anew, since a busy machine can hide its true rate
                save(out, {**record, "limit": rates, "cases": [pack(rows, rates) for rows in measured]})
    if not measured:
        raise SystemExit(f"no candidate of these cases matches --candidates {options.candidates!r}")


def pack(rows: Sequence[Row], rates: limit.Rates) -> dict[str, Any]:
    """What a record keeps of the rows of a case, with the least time of the forward pass of a scan."""
    first = rows[0]
    case = Case(first["case"], first["suite"], first["op"], first["sizes"])
    least = limit.seconds(case, rates, first["device"], first["threads"], DTYPES[first["dtype"]].itemsize)
    kept = [{name: row[name] for name in KEPT if row.get(name) not in (None, "")} for row in rows]
    for short, row in zip(kept, rows, strict=True):
        short |= {"status": row["status"]} if row["status"] != "ok" else {}
        if errors := row.get("errors"):
            gradients = [error for name, error in errors.items() if name != "output"]
            short["errors"] = {"output": errors["output"], **({"gradients": max(gradients)} if gradients else {})}
    shared = {name: first[name] for name in SHARED if first[name] != ""}
    return {**shared, **({"limit_s": least} if least else {}), "rows": kept}


def candidates_of(case: Case, options: Options) -> list[Candidate]:
    """Our backends, the one that "auto" takes first, then the textbook forms and the peers."""
    if options.whole and case.op != "kan_linear":
        found = whole(case)
    elif case.op == "kan_linear":
        found = kan_layers.layers(case, options.device, DTYPES[options.dtype], dict(options.peers))
    else:
        found = backends(case, options.device, DTYPES[options.dtype]) + baselines(case)
        found += peers(case, options.device, dict(options.peers))
    return [c for c in found if fnmatch.fnmatch(c.name, options.candidates)]


def ground_truth(case: Case) -> Candidate:
    """What is computed in float64 to compare with; the tests compare `chunked` with the recurrence."""
    return kan_layers.TEXTBOOK if case.op == "kan_linear" else on_backend(case, "chunked")


def measure_case(
    case: Case, candidates: Sequence[Candidate], options: Options, checker: Checker | None = None
) -> list[Row]:
    """One row for each mode and candidate."""
    dtype = DTYPES[options.dtype]
    checker = checker or Checker(case, options.device, dtype, ground_truth(case))
    rows: list[Row] = []
    for mode in options.modes:
        of_mode = {c.name: _examine(c, case, mode, checker, options) for c in candidates}
        bounds = {c.name: c.bind(case, options.device, dtype) for c in candidates if of_mode[c.name]["status"] == "ok"}
        calls = {name: call_of(bound, mode) for name, bound in bounds.items()}
        samples = time_in_rounds(calls, options.device, options.rounds, options.budget)
        for name, bound in bounds.items():
            of_mode[name]["quartiles_s"] = quartiles(samples[name])
            of_mode[name]["median_s"] = of_mode[name]["quartiles_s"][1]
            if mode == "training":
                of_mode[name]["saved_bytes"] = saved_bytes(bound)
            if options.memory and options.device == "cuda":
                of_mode[name]["peak_bytes"] = allocated_peak(bound, mode)
        timed = list(bounds)
        del bounds, calls
        if options.memory and options.device != "cuda":
            for name in timed:
                of_mode[name]["peak_bytes"] = _peak_elsewhere(case, name, mode, options)
        rows += of_mode.values()
    return rows


def _examine(candidate: Candidate, case: Case, mode: Mode, checker: Checker, options: Options) -> Row:
    """The row of a candidate before its times: whether it may be timed, and its errors."""
    row: Row = {
        "case": case.name,
        "suite": case.suite,
        "op": case.op,
        "sizes": case.sizes,
        "axis": case.axis,
        "device": options.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "candidate": candidate.name,
        "mode": mode,
        "status": "ok",
        "reason": "",
    }
    main_memory = machine.memory_bytes() if options.device == "cpu" else None
    memory = MEMORY_SHARE * main_memory if main_memory else float("inf")
    if reason := candidate.skip_reason(case, mode, memory):
        return row | {"status": "not measured" if candidate.absent else "not run", "reason": reason}
    try:
        return row | _checked(candidate, case, mode, checker, options)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        print(f"{candidate.name} on {case.name}: {error}", file=sys.stderr)
        return row | {"status": "failed", "reason": type(error).__name__}


def _checked(candidate: Candidate, case: Case, mode: Mode, checker: Checker, options: Options) -> Row:
    """The errors, and the status and the reason of what is wrong or too slow to be timed."""
    dtype, longest = DTYPES[options.dtype], options.longest
    allowed = error_limit(case, mode, dtype)
    scale = case.elements / checker.case.elements
    errors, seconds = checker.errors(candidate, mode, longest / scale)
    found: Row = {"error_limit": allowed, "errors": errors}
    if not all(error <= allowed for error in errors.values()):
        worst = max(errors, key=lambda name: errors[name])
        return found | {"status": "wrong", "reason": f"not timed: relative error {errors[worst]:.1e} of {worst}"}
    seconds *= scale
    measured = checker.case == case
    if not measured and longest < seconds <= DOUBTED * longest:
        seconds = seconds_of_one(call_of(candidate.bind(case, options.device, dtype), mode), options.device, longest)
        measured = True
    if seconds > longest:
        told = "not timed (a call took {:.2g} s)" if measured else "not run (an estimated {:.2g} s per call)"
        return found | {"status": "not run", "reason": told.format(seconds)}
    return found


def line(row: Row) -> str:
    """A row for the screen."""
    head = f"{row['mode']:9} {row['candidate']:28}"
    if row["status"] != "ok":
        return f"{head} {row['reason'] or row['status']}"
    low, middle, high = (three_digits(1e3 * seconds) for seconds in row["quartiles_s"])
    text = f"{head} {middle} ms ({low} to {high})  error {max(row['errors'].values()):.0e}"
    sizes = {"peak": row.get("peak_bytes"), "saved": row.get("saved_bytes")}
    return text + "".join(f"  {what} {mebibytes(n)} MiB" for what, n in sizes.items() if n is not None)


def _peak_elsewhere(case: Case, candidate: str, mode: Mode, options: Options) -> int | None:
    """Peak memory above the inputs, measured in a fresh process; None if that process fails."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_here, case, candidate, mode, options, torch.get_num_threads()).result()
        except Exception as error:  # whatever ends it, even the system for want of memory
            print(f"{candidate} on {case.name}: {error!r}"[:500], file=sys.stderr)
            return None


def _peak_here(case: Case, candidate: str, mode: Mode, options: Options, threads: int) -> int:
    torch.set_num_threads(threads)
    chosen = next(c for c in candidates_of(case, options) if c.name == candidate)
    return peak_bytes(chosen, case, mode, DTYPES[options.dtype])


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("run", __doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", choices=[[], *SUITES], help=f"of {', '.join(SUITES)}")
    parser.add_argument("--cases", default="*", metavar="PATTERN", help="names of cases, as in a shell")
    parser.add_argument("--candidates", default="*", metavar="PATTERN", help="names of candidates, as in a shell")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--quick", action="store_true", help="few small cases, few rounds, no memory")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], metavar="N")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the maps; parameters are float32")
    parser.add_argument(
        "--rounds", type=int, default=Options.rounds, metavar="N", help="in which candidates take turns"
    )
    parser.add_argument("--budget", type=float, default=Options.budget, metavar="S", help="seconds for each candidate")
    parser.add_argument("--longest", type=float, default=Options.longest, metavar="S", help="seconds of one call")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    parser.add_argument("--peers-path", dest="peers", nargs="+", type=peer_path, default=[], metavar="NAME=PATH")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser
