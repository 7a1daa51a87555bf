"""Everything that a GPU day came to, from its journals: what is kept of it, and what its page is made from.

Of several sessions the last end of each task counts. Samples are left out, and so are paths, which name machines and
users.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import limit
from benchmarks.cases import Case
from benchmarks.gpu.failures import failures
from benchmarks.gpu.journal import FAILURES, OK, SKIPPED, Journal, Record, ended
from benchmarks.gpu.rules import best_rules
from benchmarks.gpu.sweep import DTYPES
from benchmarks.kan_layers import GEMM
from benchmarks.report import GPU_DAY, SCHEMA

OURS = "triton"
DIGITS = 4  # of a number
SHARED = ("case", "suite", "op", "sizes", "dtype", "device", "threads")  # by all rows of a case
URL = re.compile(r"\b\w[\w+.-]*://\S+")
# A slash at the start of a word, or behind a compiler's flag; the name of a file of a known kind is kept.
PATH = re.compile(r"(?:(?<![\w.)\]>/-])|(?<=-[IL]))~?/[\w.+@~-]+(?:/[\w.+@~-]*)*")
FILE = re.compile(r"[^/]+\.(?:py|c|cpp|cu|h|so|o|ptx|cubin|json|jsonl|xml|txt|log|tar)$")
# Of the counters of one launch, by what their names contain; the first that is there is taken.
COUNTERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "time": (("gpu__time_duration.sum",),),
    "issue active, %": (("issue_active", "pct"), ("inst_issued", "pct"), ("issue_active",)),
    "XU pipe, %": (("pipe_xu", "pct_of_peak_sustained_active"), ("pipe_xu", "pct")),
    "FMA pipe, %": (("pipe_fma_cycles", "pct"), ("pipe_fma.", "pct"), ("pipe_fma", "pct")),
    "DRAM, %": (("dram_throughput", "pct"), ("dram__throughput", "pct"), ("dram__bytes", "pct")),
    "L1 hits, %": (("l1tex__t_sector_hit_rate",), ("l1tex", "hit_rate")),
    "L2 hits, %": (("lts__t_sector_hit_rate",), ("lts", "hit_rate")),
    "occupancy, %": (("warps_active", "pct"),),
    "registers a thread": (("launch__registers_per_thread",), ("registers_per_thread",)),
}


def summarise(folder: Path, name: str) -> dict[str, Any]:
    """The content of `gpu-NAME.json`."""
    records = {part: Journal(folder / f"{part}.jsonl").records() for part in _CONTENT}
    records = {part: found for part, found in records.items() if found}
    begun = sorted((r for found in records.values() for r in found if r["event"] == "session"), key=lambda r: r["date"])
    if not begun:
        raise ValueError(f"{folder.name} holds no session of {', '.join(_CONTENT)}; give the folder that gpu_day wrote")
    devices = {session["device"] for session in begun}
    if len(devices) > 1:
        raise ValueError(f"{folder.name} mixes the devices {', '.join(sorted(devices))}; report each in a folder")
    ends = {part: ended(found) for part, found in records.items()}
    saved = {record["task"] for record in Journal(folder / "failures.jsonl").records()}
    last = begun[-1]
    result = {
        "schema": SCHEMA,
        "kind": GPU_DAY,
        "name": name,
        "date": begun[0]["date"],
        "device": last["device"],
        "machine": last["machine"],
        "versions": last["versions"],
        "failures": failures(ends, saved),
        "parts": {
            part: {**_progress(found, ends[part]), **_CONTENT[part](ends[part], found)}
            for part, found in records.items()
        },
    }
    cleaned: dict[str, Any] = clean(result)
    return cleaned


def clean(value: Any) -> Any:
    """The same without addresses and paths, and with numbers of a few digits that JSON can hold."""
    if isinstance(value, str):
        return PATH.sub(lambda path: _file(path[0]), URL.sub("URL", value))
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return value


def flat_rows(speed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `speed` as `report` wants them: one for each case, mode and candidate."""
    found = []
    for case in speed["cases"]:
        shared = {name: case[name] for name in SHARED}
        for row in case["rows"]:
            errors = {name: float(error) for name, error in row.get("errors", {}).items()}  # JSON holds no infinity
            found.append({"reason": "", **shared, **row, **({"errors": errors} if errors else {})})
    return found


def _file(path: str) -> str:
    kept = FILE.search(path)
    return kept[0] if kept else "PATH"


def _progress(records: Sequence[Record], ends: Mapping[str, Record]) -> dict[str, Any]:
    """Sessions, how the tasks ended, and those that did not."""
    statuses = [end["status"] for end in ends.values()]
    planned = [name for record in records if record["event"] == "session" for name, *_ in record["tasks"]]
    skipped: dict[str, list[str]] = {}
    for task, end in ends.items():
        if end["status"] == SKIPPED:
            skipped.setdefault(end.get("reason", ""), []).append(task)
    return {
        "sessions": _sessions(records),
        "counts": {status: statuses.count(status) for status in (OK, SKIPPED, *FAILURES) if status in statuses},
        "task_seconds": sum(end.get("seconds", 0.0) for end in ends.values()),
        "left": [task for task in dict.fromkeys(planned) if task not in ends],
        "skipped": skipped,
    }


def _sessions(records: Sequence[Record]) -> list[dict[str, Any]]:
    """When each session was, on what, for how long it might run and how long it did."""
    starts = [i for i, record in enumerate(records) if record["event"] == "session"]
    found = []
    for start, end in zip(starts, [*starts[1:], len(records)], strict=True):
        session, rest = records[start], records[start:end]
        begun = {record["task"]: record["time"] for record in rest if record["event"] == "begin"}
        done = [begun[r["task"]] + r.get("seconds", 0.0) for r in rest if r["event"] == "end" and r["task"] in begun]
        gpu = session["machine"]["gpu"]
        found.append(
            {
                "date": session["date"],
                "gpu": gpu["name"] if gpu else None,
                "commit": session["versions"]["commit"],
                "allowed_s": session["seconds"],
                "used_s": max([*begun.values(), *done]) - min(begun.values()) if begun else 0.0,
            }
        )
    return found


def _check(ends: Mapping[str, Record], records: Sequence[Record]) -> dict[str, Any]:
    """The worst errors of each op in each dtype, and what the compiler made of the kernels."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for task, end in ends.items():
        op, _, rest = task.partition("/")
        name, _, dtype = rest.rpartition("/")
        if dtype not in DTYPES or "allowed" not in end:
            continue
        for result, allowed in end["allowed"].items():
            share = float(end["errors"][result]) / float(allowed)
            if share >= worst.get((op, dtype), {"share": -1.0})["share"]:
                worst[op, dtype] = {"op": op, "dtype": dtype, "case": name, "result": result, "share": share}
    kernels: dict[str, dict[str, Any]] = {}
    for row in ends.get("resources", {}).get("kernels", ()):
        kernel = kernels.setdefault(row["kernel"], {"kernel": row["kernel"], "variants": 0, "spilling": 0})
        kernel["variants"] += 1
        kernel["spilling"] += bool(row["spills"])
        for name in ("registers", "spills", "shared"):
            kernel[name] = max(kernel.get(name, 0), row[name])
    return {"worst": list(worst.values()), "kernels": list(kernels.values())}


def _speed(ends: Mapping[str, Record], records: Sequence[Record]) -> dict[str, Any]:
    """A case for each task, with a row for each mode and candidate."""
    rates = ends.get("limits", {}).get("rates")
    builds = [{"command": r["command"], "code": r["code"]} for r in records if r["event"] == "build"]
    cases = [_case(end["rows"], rates) for end in ends.values() if end.get("rows")]
    return {"limits": rates, "builds": builds, "cases": cases}


def _case(rows: Sequence[Record], rates: Mapping[str, Any] | None) -> dict[str, Any]:
    """Ratios are to our time, or to the first that was timed where we were not."""
    shared = {name: rows[0][name] for name in SHARED}
    case = Case(shared["case"], shared["suite"], shared["op"], shared["sizes"])
    kept = []
    for row in rows:
        timed = [r for r in rows if r["mode"] == row["mode"] and r["status"] == "ok"]
        base = next((r for r in timed if r["candidate"] == OURS), timed[0] if timed else None)
        kept.append(_row(row, base, _limit(case, row, timed, rates)))
    return {**shared, "rows": kept}


def _row(row: Record, base: Record | None, least: float | None) -> dict[str, Any]:
    names = ("candidate", "mode", "status", "reason", "median_s", "min_s", "peak_bytes", "saved_bytes")
    found = {name: row[name] for name in names if row.get(name) not in (None, "")}
    if errors := row.get("errors"):
        gradients = [error for name, error in errors.items() if name != "output"]
        found["errors"] = {"output": errors["output"], **({"gradients": max(gradients)} if gradients else {})}
    if row["status"] == "ok" and base is not None:
        found["ratio"] = row["median_s"] / base["median_s"]
        if least is not None:
            found |= {"limit_s": least, "limit_fraction": least / row["median_s"]}
    return found


def _limit(case: Case, row: Record, timed: Sequence[Record], rates: Mapping[str, Any] | None) -> float | None:
    """The least time: of a KANLinear that of the bare product, of a scan's forward pass what the GPU's rates allow."""
    if case.op == "kan_linear":
        return next((r["median_s"] for r in timed if r["candidate"] == GEMM), None)
    if rates is None or row["mode"] != "forward":
        return None
    return limit.seconds(case, dict(rates), row["device"], row["threads"], getattr(torch, row["dtype"]).itemsize)


def _tune(ends: Mapping[str, Record], records: Sequence[Record]) -> dict[str, Any]:
    """Today's choice and the best for each kernel and shape, the rules, and a few of the hardware's counters."""
    choices = []
    for task, end in ends.items():
        if not end.get("times"):
            continue
        kernel, _, shape = task.removeprefix("time/").partition("/")
        times = [(plan, seconds) for plan, seconds in end["times"]]
        choices.append(
            {
                "kernel": kernel,
                "shape": shape,
                **{name: end[name] for name in ("fields", "today", "best", "today_over_best")},
                "today_s": next(seconds for plan, seconds in times if plan == end["today"]),
                "best_s": min(seconds for _, seconds in times),
                "timed": len(times),
                "wrong": end.get("wrong", []),
            }
        )
    refused = {task.removeprefix("warm/"): end["refused"] for task, end in ends.items() if end.get("refused")}
    rules = ends.get("rule", {}).get("rules") or best_rules(ends)
    counters = {
        task.partition("/")[2]: pick_counters(end["counters"]) for task, end in ends.items() if end.get("counters")
    }
    return {"choices": choices, "refused": refused, "rules": rules, "counters": counters}


def pick_counters(found: Mapping[str, str]) -> dict[str, str]:
    """Those of `COUNTERS` that are there, as ncu wrote them; the time with its unit."""
    picked = {}
    for title, alternatives in COUNTERS.items():
        names = (name for parts in alternatives for name in found if all(part in name for part in parts))
        if name := next(names, None):
            unit = name.partition("[")[2].rstrip("]") if title == "time" else ""
            picked[title] = f"{found[name]} {unit}".strip()
    return picked


def _train(ends: Mapping[str, Record], records: Sequence[Record]) -> dict[str, Any]:
    """Cost and scores of every training that ended, and how far the others came."""
    runs = []
    for task, end in ends.items():
        if end["status"] == OK:
            names = ("model_args", "parameters", "steps", "epochs", "best_epoch", "train_seconds", "seconds_per_step")
            known = {name: end[name] for name in (*names, "validation", "test", "weights_kept") if name in end}
            runs.append({"run": task, **known})
    progress = {r["task"]: r["curves"] for r in records if r["event"] == "progress" and r["task"] not in ends}
    unfinished = {
        task: {name: values[-1] for name, values in curves.items() if values} for task, curves in progress.items()
    }
    return {"runs": runs, "unfinished": unfinished}


_CONTENT = {"check": _check, "speed": _speed, "tune": _tune, "train": _train}
