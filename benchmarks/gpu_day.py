"""Use minutes on a GPU well: check the kernels, time them, tune them, train with them.

    python -m benchmarks gpu_day check --out DIR --seconds 230
    python -m benchmarks gpu_day speed --out DIR --seconds 280
    python -m benchmarks gpu_day tune --out DIR --seconds 300
    python -m benchmarks gpu_day train --out DIR --data PATH
    python -m benchmarks gpu_report DIR --name h100

Every part writes its results to DIR as they come, and goes on where it was stopped if it is started again with the
same DIR. A task that crashes, hangs or fails is recorded, and the next one runs. `--device cpu` rehearses all of it on
a CPU, at small sizes and in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import make_parser, peer_path, search_path, start
from benchmarks.gpu.journal import FAILURES, OK, SKIPPED, Journal, Record
from benchmarks.gpu.tasks import Setting, Task
from benchmarks.gpu.workers import start_worker, supervise, work

# Processes of each part side by side, on 16 cores and one GPU. Without NVIDIA's MPS trainings slow each other down: ten
# of them did little more in all than one alone.
WORKERS = {"check": 6, "speed": 6, "tune": 8, "train": 2}


def main(arguments: Sequence[str]) -> int:
    """Run a part until it is done or its time is up; 1 if a task did not end well. PyTorch is left to the workers."""
    args = _parser().parse_args(arguments)
    setting = Setting(
        out=args.out, device=args.device, peers=dict(args.peers_path), data=args.data, runs=args.runs, steps=args.steps
    )
    if args.call:
        from benchmarks.gpu.calls import run_call

        run_call(args.call, args.device, heavy=args.heavy)
        return 0
    if args.part is None:
        raise SystemExit(f"name a part: {', '.join(WORKERS)}")
    if args.work:
        return _work(*args.work, setting, args)
    if args.list:
        print("\n".join(task.name for task in select(args.part, setting, args.tasks)))
        return 0
    setting.out.mkdir(parents=True, exist_ok=True)
    journal, began = _journal(setting, args.part), time.time()
    run, cores = f"{os.getpid()}-{began}", os.cpu_count() or 1
    workers = args.workers or max(1, min(WORKERS[args.part], cores // 2))
    environment = search_path() | ({"TRITON_INTERPRET": "1"} if setting.rehearsal else {})

    def start_one(alone: bool) -> subprocess.Popen[bytes]:
        """The same command again, as a worker."""
        crew = "alone" if alone else "together"
        variables = environment if alone else {"OMP_NUM_THREADS": str(max(1, cores // workers)), **environment}
        command = start("gpu_day", *arguments, "--work", run, crew)
        return start_worker(command, setting.out / "log.txt", variables)

    try:
        left = "" if supervise(journal, run, start_one, workers, began + args.seconds) else ", time is up"
    except RuntimeError as error:
        said = (setting.out / "log.txt").read_text(errors="replace").strip().splitlines()
        raise SystemExit(f"{args.part}: {error}, the last of it: {said[-1] if said else ''}") from None
    except KeyboardInterrupt:
        _summary(args.part, run, journal, time.time() - began, ", interrupted; the same command goes on")
        raise SystemExit(130) from None
    return _summary(args.part, run, journal, time.time() - began, left)


def select(part: str, setting: Setting, patterns: Sequence[str] = ("*",)) -> list[Task]:
    """The tasks of a part whose names match a pattern, the most important first."""
    tasks = importlib.import_module(f"benchmarks.gpu.{part}").tasks(setting)
    return [task for task in tasks if any(fnmatch.fnmatch(task.name, pattern) for pattern in patterns)]


def _work(run: str, crew: str, setting: Setting, args: argparse.Namespace) -> int:
    """Be a worker of a part: the first one says where it runs and what there is to do."""
    part = args.part
    tasks, journal = select(part, setting, args.tasks), _journal(setting, part)

    def session() -> Record:
        from benchmarks import machine

        return {
            "part": part,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": setting.device,
            "seconds": args.seconds,
            "machine": machine.describe(),
            "versions": {**machine.versions(), **({"commit": args.commit} if args.commit else {})},
            "tasks": [[task.name, task.limit, task.alone] for task in tasks],
        }

    journal.open_session(run, session)
    return work([task for task in tasks if task.alone == (crew == "alone")], journal, setting)


def _journal(setting: Setting, part: str) -> Journal:
    return Journal(setting.out / f"{part}.jsonl")


def _summary(part: str, run: str, journal: Journal, seconds: float, remark: str) -> int:
    session = journal.session(run)
    names = {name for name, *_ in session["tasks"]} if session else set()
    ends = {name: end for name, end in journal.ends().items() if name in names}
    count = {status: sum(end["status"] == status for end in ends.values()) for status in (OK, SKIPPED, *FAILURES)}
    for end in ends.values():
        if end["status"] in FAILURES:
            print(f"{end['status']:8} {end['task']}: {end.get('reason', '')[:300]}")
    left = len(names) - len(ends)
    words = [f"{number} {status}" for status, number in count.items() if number] + ([f"{left} left"] if left else [])
    print(f"{part}: {', '.join(words) or 'nothing to do'} in {seconds:.0f} s{remark}")
    return int(any(count[status] for status in FAILURES))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("gpu_day", __doc__)
    parser.add_argument("part", nargs="?", choices=tuple(WORKERS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    parser.add_argument("--seconds", type=float, default=540.0, help="that the part may take")
    parser.add_argument("--workers", type=int, help="processes side by side")
    parser.add_argument("--tasks", nargs="+", default=["*"], metavar="PATTERN", help="names of tasks, as in a shell")
    parser.add_argument("--list", action="store_true", help="print the names of the tasks and stop")
    parser.add_argument("--peers-path", nargs="+", type=peer_path, default=[], metavar="NAME=PATH")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folders isic2017, hc18, lumbar_spine for `train`")
    parser.add_argument("--runs", type=Path, default=Setting.runs, metavar="DIR", help="run folders of `train`")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of each network in `train`")
    parser.add_argument("--commit", metavar="ID", help="of the sources, where there is no git to tell")
    parser.add_argument("--call", metavar="NAME", help="launch one kernel once and stop, for profilers")
    parser.add_argument("--heavy", action="store_true", help="the large size of --call")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    return parser
