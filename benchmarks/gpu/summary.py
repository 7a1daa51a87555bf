"""The record of sessions on a GPU, from their journals.

Of several sessions the last end of each task counts. Samples are left out, and so are paths, which name machines and
users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.failures import failures
from benchmarks.gpu.journal import FAILURES, OK, SKIPPED, Journal, Record, ended
from benchmarks.gpu.rules import best_rules
from benchmarks.gpu.sanitizer import CHECKERS
from benchmarks.gpu.sweep import DTYPES
from benchmarks.record import GPU_SESSIONS, SCHEMA
from benchmarks.run import pack

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
    "registers per thread": (("launch__registers_per_thread",), ("registers_per_thread",)),
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
    return {
        "schema": SCHEMA,
        "kind": GPU_SESSIONS,
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
    checkers = {
        task: {"faults": end["faults"], "shared_writes": end["shared_writes"]}
        for task, end in ends.items()
        if task.startswith(CHECKERS) and end["status"] == OK
    }
    return {"worst": list(worst.values()), "kernels": list(kernels.values()), "checkers": checkers}


def _speed(ends: Mapping[str, Record], records: Sequence[Record]) -> dict[str, Any]:
    """A case for each task, with a row for each mode and candidate; seconds of the scans along other walks."""
    rates = ends.get("limits", {}).get("rates")
    cases = [pack(end["rows"], rates or {}) for end in ends.values() if end.get("rows")]
    walks = {task.partition("/")[2]: end["walks"] for task, end in ends.items() if end.get("walks")}
    return {"limits": rates, "cases": cases, "walks": walks}


def _tune(ends: Mapping[str, Record], records: Sequence[Record]) -> dict[str, Any]:
    """The launcher's choice and the best for each kernel and shape, the rules, and some of the hardware's counters."""
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
