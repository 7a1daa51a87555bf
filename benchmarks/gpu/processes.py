"""Processes that do not outlive what started them, however that ends, and that wait for each other."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process is here for the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def end_with_parent() -> None:
    """To be called in a new process; does nothing on other systems than Linux."""
    if hasattr(C := ctypes.CDLL(None), "prctl"):
        C.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent_in_own_group() -> None:
    """The same, in a process group of its own, which can be killed as a whole."""
    os.setpgrp()
    end_with_parent()


def run(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it prints."""
    return subprocess.run(
        command, capture_output=True, text=True, env={**environment}, check=False, preexec_fn=end_with_parent, **options
    )
