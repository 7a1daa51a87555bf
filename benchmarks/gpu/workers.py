"""Run tasks in processes of their own, so that a crash, a hang or a lost GPU context costs one task and not the day."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import CRASHED, FAILED, OK, SKIPPED, TIMEOUT, WRONG, Journal
from benchmarks.gpu.processes import end_with_parent_in_own_group
from benchmarks.gpu.tasks import Setting, Skip, Task, Wrong

POLL = 0.2  # seconds
LOST = ("CUDA error", "an illegal memory access", "unspecified launch failure", "CUBLAS_STATUS", "device-side assert")
MOST_STARTS = 3  # of workers that stop before they say what there is to do
RESTART = 75  # exit code of a worker whose GPU context is lost


def supervise(
    journal: Journal, run: str, start: Callable[[bool], subprocess.Popen[bytes]], workers: int, end: float
) -> bool:
    """Keep workers running until every task of the run has ended; False if the time `end` came first.

    The first worker writes what there is to do. Tasks that may run side by side come first, then those that want to be
    alone. `start(alone)` starts a worker.
    """
    for alone, count in ((False, workers), (True, 1)):
        crew: list[subprocess.Popen[bytes]] = []
        starts = 0
        try:
            while (left := _left(journal, run, alone)) is None or left:
                if time.time() > end:
                    return False
                crew = [worker for worker in crew if not _gone(worker, left or {}, journal)]
                if left is None and starts >= MOST_STARTS and not crew:
                    raise RuntimeError("no worker comes to its first task; what they said stands in log.txt")
                for _ in range(min(count, count if left is None else len(left)) - len(crew)):
                    crew.append(start(alone))
                    starts += 1
                time.sleep(POLL)
        finally:
            for worker in crew:
                _kill(worker)
    return True


def _left(journal: Journal, run: str, alone: bool) -> dict[str, float] | None:
    """The limits in seconds of tasks that have not ended; None before the first worker has said what there is to do."""
    session = journal.session(run)
    if session is None:
        return None
    done = journal.ends()
    return {name: limit for name, limit, kind in session["tasks"] if kind == alone and name not in done}


def _gone(worker: subprocess.Popen[bytes], limits: dict[str, float], journal: Journal) -> bool:
    """Whether a worker has stopped; what it leaves open, or holds for too long, is ended for it."""
    code = worker.poll()
    task = journal.open_task(worker.pid)
    if code is not None:
        if task is not None:
            journal.append(event="end", task=task["task"], status=CRASHED, reason=f"its process ended with {code}")
        return True
    limit = limits.get(task["task"]) if task is not None else None
    if task is not None and limit is not None and time.time() - task["time"] > limit:
        _kill(worker)
        journal.append(event="end", task=task["task"], status=TIMEOUT, reason=f"not done after {limit:.0f} s")
        return True
    return False


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """A worker and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def start_worker(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker; what it prints goes to the log."""
    environment = {**os.environ, **environment}
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_with_parent_in_own_group
        )


def work(tasks: Sequence[Task], journal: Journal, setting: Setting) -> int:
    """Do what no other worker has begun, until nothing is left; returns the exit code."""
    for task in tasks:
        if not journal.claim(task.name):
            continue
        began = time.time()
        result = perform(task, setting)
        journal.append(**{**result, "event": "end", "task": task.name, "seconds": round(time.time() - began, 3)})
        if any(sign in result.get("reason", "") for sign in LOST):
            return RESTART
    return 0


def perform(task: Task, setting: Setting) -> dict[str, Any]:
    """Run a task and tell how it ended; the inputs of a wrong result are saved."""
    print(f"-- {task.name}", file=sys.stderr, flush=True)
    try:
        return {"status": OK, **(task.run(setting) or {})}
    except Skip as reason:
        return {"status": SKIPPED, "reason": str(reason)}
    except Wrong as wrong:
        saved = setting.save(task.name, wrong.inputs) if wrong.inputs else False
        return {"status": WRONG, "reason": str(wrong), "inputs_saved": saved, **wrong.details}
    except Exception as error:  # whatever it is, the other tasks go on
        traceback.print_exc()
        return {"status": FAILED, "reason": f"{type(error).__name__}: {error}"[:2000]}
