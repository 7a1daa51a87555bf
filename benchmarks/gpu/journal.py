"""Results as they come: one JSON object per line, so that a killed run loses at most the line it was writing."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# How a task can end. Only the first two mean that it did what it was there for.
OK, SKIPPED, WRONG, FAILED, CRASHED, TIMEOUT = "ok", "skipped", "wrong", "failed", "crashed", "timeout"
FAILURES = (WRONG, FAILED, CRASHED, TIMEOUT)


class Journal:
    """An append-only file that several processes write.

    Its records are `{"event": "session", "run": ..., "tasks": [[name, limit, alone], ...], ...}` where a run starts,
    `{"event": "begin", "task": ..., "pid": ...}`, and `{"event": "end", "task": ..., "status": ..., ...}`. A task
    without an end is run again by the next session.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[Record]:
        """Every whole record; a line that was cut off by a kill is left out."""
        if not self.path.is_file():
            return []
        return list(_parsed(self.path.read_bytes()))

    def append(self, **record: Any) -> None:
        """Write one record at once."""
        with self._locked() as file:
            _write(file, record)

    def open_session(self, run: str, make: Callable[[], Record]) -> None:
        """Start the session of a run, unless another of its workers has."""
        with self._locked() as file:
            if _session(list(_parsed(_read(file))), run) is None:
                _write(file, {"event": "session", "run": run, **make()})

    def session(self, run: str) -> Record | None:
        """The session of a run, once one of its workers has started it."""
        return _session(self.records(), run)

    def claim(self, task: str) -> bool:
        """Begin a task, unless it has ended already or another worker of this session has begun it."""
        with self._locked() as file:
            records = list(_parsed(_read(file)))
            if task in ended(records) or task in _begun(records):
                return False
            _write(file, {"event": "begin", "task": task, "pid": os.getpid(), "time": time.time()})
            return True

    def ends(self) -> dict[str, Record]:
        """The end of every task that has one."""
        return ended(self.records())

    def open_task(self, pid: int) -> Record | None:
        """What a worker of this session has begun and not ended."""
        records = self.records()
        done = ended(records)
        mine = [record for record in _begun(records).values() if record["pid"] == pid and record["task"] not in done]
        return mine[-1] if mine else None

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def ended(records: list[Record]) -> dict[str, Record]:
    """The last end of every task."""
    return {record["task"]: record for record in records if record["event"] == "end"}


def _session(records: list[Record], run: str) -> Record | None:
    return next((record for record in records if record["event"] == "session" and record["run"] == run), None)


def _begun(records: list[Record]) -> dict[str, Record]:
    """What was begun since the last session started."""
    started = max((i for i, record in enumerate(records) if record["event"] == "session"), default=0)
    return {record["task"]: record for record in records[started:] if record["event"] == "begin"}


def _parsed(content: bytes) -> Iterator[Record]:
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "event" in record:
            yield record


def _read(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _write(file: int, record: Record) -> None:
    line = json.dumps(record).encode() + b"\n"
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":  # the last writer was killed in the middle of its line
        line = b"\n" + line
    while line:
        line = line[os.write(file, line) :]
