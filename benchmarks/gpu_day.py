"""Use minutes on a GPU well: check the kernels, time them, tune them, train with them.

    python -m benchmarks gpu_day check speed --seconds 230 280 --out DIR
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
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.command import make_parser, peer_path, search_path, start
from benchmarks.gpu.journal import FAILURES, OK, SKIPPED, Journal, Record
from benchmarks.gpu.tasks import Setting, Task
from benchmarks.gpu.workers import start_worker, supervise, work

# Processes of each part side by side, on 16 cores and one GPU. Without NVIDIA's MPS trainings slow each other down: ten
# of them did little more in all than one alone.
WORKERS = {"check": 6, "speed": 6, "tune": 8, "train": 2}
SECONDS = 540.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after the other; 1 if a task did not end well."""
    args = _parser().parse_args(arguments)
    setting = Setting(
        out=args.out, device=args.device, peers=dict(args.peers_path), data=args.data, runs=args.runs, steps=args.steps
    )
    if args.call:
        from benchmarks.gpu.calls import run_call

        run_call(args.call, args.device, heavy=args.heavy)
        return 0
    if args.work:
        return _work(*args.work, setting, args)
    if not args.parts:
        raise SystemExit(f"name a part: {', '.join(WORKERS)}")
    if args.list:
        print("\n".join(f"{part} {task.name}" for part in args.parts for task in select(part, setting, args.tasks)))
        return 0
    setting.out.mkdir(parents=True, exist_ok=True)
    builds = {command: _in_background(command, setting) for command in args.build}
    code = 0
    for part, seconds in zip(args.parts, _seconds(args), strict=True):
        end = time.time() + seconds
        if part == "speed":  # which times what was built
            _await(builds, setting, end)
        code = max(code, run_part(part, setting, args, seconds, end))
    if "speed" not in args.parts:
        _await(builds, setting, end)
    return code


def select(part: str, setting: Setting, patterns: Sequence[str] = ("*",)) -> list[Task]:
    """The tasks of a part whose names match a pattern, the most important first."""
    tasks = importlib.import_module(f"benchmarks.gpu.{part}").tasks(setting)
    return [task for task in tasks if any(fnmatch.fnmatch(task.name, pattern) for pattern in patterns)]


def run_part(part: str, setting: Setting, args: argparse.Namespace, seconds: float, end: float) -> int:
    """Run a part until it is done or its time is up, and print what came of it. PyTorch is left to the workers."""
    journal, began = _journal(setting, part), time.time()
    run = f"{os.getpid()}-{began}"
    workers = args.workers or max(1, min(WORKERS[part], (os.cpu_count() or 1) // 2))
    start_one = _starter(part, run, workers, setting, args, seconds)
    try:
        left = "" if supervise(journal, run, start_one, workers, end) else ", time is up"
    except RuntimeError as error:
        said = (setting.out / "log.txt").read_text(errors="replace").strip().splitlines()
        raise SystemExit(f"{part}: {error}, the last of it: {said[-1] if said else ''}") from None
    except KeyboardInterrupt:
        _summary(part, run, journal, time.time() - began, ", interrupted; the same command goes on")
        raise SystemExit(130) from None
    return _summary(part, run, journal, time.time() - began, left)


def _starter(
    part: str, run: str, workers: int, setting: Setting, args: argparse.Namespace, seconds: float
) -> Callable[[bool], subprocess.Popen[bytes]]:
    environment = search_path() | ({"TRITON_INTERPRET": "1"} if setting.rehearsal else {})
    command = [*start("gpu_day", *_options(setting)), "--tasks", *args.tasks, "--seconds", str(seconds)]
    command += ["--commit", args.commit] if args.commit else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def start_one(alone: bool) -> subprocess.Popen[bytes]:
        crew = "alone" if alone else "together"
        variables = environment if alone else {**threads, **environment}
        return start_worker([*command, "--work", part, run, crew], setting.out / "log.txt", variables)

    return start_one


def _work(part: str, run: str, crew: str, setting: Setting, args: argparse.Namespace) -> int:
    """Be a worker of a part: the first one says where it runs and what there is to do."""
    tasks, journal = select(part, setting, args.tasks), _journal(setting, part)

    def session() -> Record:
        from benchmarks import machine

        return {
            "part": part,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": setting.device,
            "seconds": args.seconds[0],
            "machine": machine.describe(),
            "versions": {**machine.versions(), **({"commit": args.commit} if args.commit else {})},
            "tasks": [[task.name, task.limit, task.alone] for task in tasks],
        }

    journal.open_session(run, session)
    return work([task for task in tasks if task.alone == (crew == "alone")], journal, setting)


def _options(setting: Setting) -> list[str]:
    """The flags that make the same setting again."""
    flags = ["--out", str(setting.out), "--device", setting.device]
    flags += ["--runs", str(setting.runs), "--steps", str(setting.steps)]
    flags += ["--data", str(setting.data)] if setting.data else []
    return flags + (["--peers-path", *(f"{k}={v}" for k, v in setting.peers.items())] if setting.peers else [])


def _in_background(command: str, setting: Setting) -> subprocess.Popen[bytes]:
    """Start a command that runs beside the parts, such as the build of a peer."""
    with (setting.out / "build.txt").open("ab") as log:
        return subprocess.Popen(["bash", "-c", command], stdout=log, stderr=subprocess.STDOUT)


def _seconds(args: argparse.Namespace) -> list[float]:
    """Of each part: as many as there are parts, or one number for all."""
    given: list[float] = args.seconds
    if len(given) not in (1, len(args.parts)):
        raise SystemExit(f"--seconds has {len(given)} numbers for {len(args.parts)} parts: give one, or one for each")
    return given * len(args.parts) if len(given) == 1 else given


def _await(builds: dict[str, subprocess.Popen[bytes]], setting: Setting, end: float) -> None:
    """Wait until the builds are done, and record how they ended; one that fails stops nothing."""
    journal = _journal(setting, "speed")
    for command, process in builds.items():
        try:
            code: int | None = process.wait(max(0.0, end - time.time()))
        except subprocess.TimeoutExpired:
            code = None
        journal.append(event="build", command=command, code=code)
        if code != 0:
            print(f"build failed ({code}), see build.txt: {command}")


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
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *WORKERS], help=f"of {', '.join(WORKERS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    parser.add_argument("--seconds", nargs="+", type=float, default=[SECONDS], help="of all parts, or of each")
    parser.add_argument("--workers", type=int, help="processes side by side")
    parser.add_argument("--tasks", nargs="+", default=["*"], metavar="PATTERN", help="names of tasks, as in a shell")
    parser.add_argument("--list", action="store_true", help="print the names of the tasks and stop")
    parser.add_argument("--peers-path", nargs="+", type=peer_path, default=[], metavar="NAME=PATH")
    parser.add_argument("--build", action="append", default=[], metavar="COMMAND", help="runs beside the parts")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folders isic2017, hc18, lumbar_spine for `train`")
    parser.add_argument("--runs", type=Path, default=Setting.runs, metavar="DIR", help="run folders of `train`")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of each network in `train`")
    parser.add_argument("--commit", metavar="ID", help="of the sources, where there is no git to tell")
    parser.add_argument("--call", metavar="NAME", help="launch one kernel once and stop, for profilers")
    parser.add_argument("--heavy", action="store_true", help="the large size of --call")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    return parser
