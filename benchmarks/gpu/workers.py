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

from gpu.journal import CRASHED, FAILED, OK, SKIPPED, TIMEOUT, WRONG, Journal
from gpu.tasks import Setting, Skip, Task, Wrong

POLL = 0.2  # seconds
LOST = ("CUDA error", "an illegal memory access", "unspecified launch failure", "CUBLAS_STATUS", "device-side assert")
RESTART = 75  # exit code of a worker whose GPU context is lost


def supervise(
    tasks: Sequence[Task], journal: Journal, start: Callable[[bool], subprocess.Popen[bytes]], workers: int, end: float
) -> bool:
    """Keep workers running until every task has ended; False if the time `end` came first.

    First the tasks that may run side by side, then those that want to be alone. `start(alone)` starts a worker.
    """
    for alone, count in ((False, workers), (True, 1)):
        mine = {task.name: task for task in tasks if task.alone == alone}
        if not _run_crew(mine, journal, lambda alone=alone: start(alone), count, end):
            return False
    return True


def _run_crew(
    tasks: dict[str, Task], journal: Journal, start: Callable[[], subprocess.Popen[bytes]], count: int, end: float
) -> bool:
    crew: list[subprocess.Popen[bytes]] = []
    try:
        while left := len(tasks.keys() - journal.ends().keys()):
            if time.time() > end:
                return False
            crew = [worker for worker in crew if not _gone(worker, tasks, journal)]
            crew += [start() for _ in range(min(count, left) - len(crew))]
            time.sleep(POLL)
        return True
    finally:
        for worker in crew:
            _kill(worker)


def _gone(worker: subprocess.Popen[bytes], tasks: dict[str, Task], journal: Journal) -> bool:
    """Whether a worker has stopped; what it leaves open, or holds for too long, is ended for it."""
    code = worker.poll()
    task = journal.open_task(worker.pid)
    if code is not None:
        if task is not None:
            journal.append(event="end", task=task["task"], status=CRASHED, reason=f"its process ended with {code}")
        return True
    if task is not None and time.time() - task["time"] > tasks[task["task"]].limit:
        _kill(worker)
        limit = tasks[task["task"]].limit
        journal.append(event="end", task=task["task"], status=TIMEOUT, reason=f"not done after {limit:.0f} s")
        return True
    return False


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """A worker and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def start_worker(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker in a process group of its own, but not a session: what ends the session ends it too."""
    environment = {**os.environ, **environment}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, preexec_fn=os.setpgrp)


def work(tasks: Sequence[Task], journal: Journal, setting: Setting) -> int:
    """Do what no other worker has begun, until nothing is left or the supervisor is gone; returns the exit code."""
    supervisor = os.getppid()
    for task in tasks:
        if os.getppid() != supervisor:
            return 0
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
