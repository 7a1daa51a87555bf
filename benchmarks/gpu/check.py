"""Whether the kernels are right: the tests, a sweep against float64, known suspects, and memory checkers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import sanitizer, suspects, sweep, walks
from benchmarks.gpu.tasks import Setting, Task


def tasks(setting: Setting) -> Iterator[Task]:
    """The first minutes tell the most."""
    first, *checkers = sanitizer.tasks(setting)
    yield first
    yield from sweep.tasks(setting)
    yield from walks.checks(setting)
    yield from suspects.tasks(setting)
    yield from checkers
