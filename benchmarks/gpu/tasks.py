"""What a task is, and what it is given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.journal import Journal

if TYPE_CHECKING:  # the supervisor starts at once, without PyTorch
    from torch import Tensor

INPUT_BYTES = 1 << 20  # of one failure; larger inputs are made again from the task's name
ARCHIVE_BYTES = 15 << 20  # of all failures


def find_program(name: str) -> str:
    """A program of the CUDA toolkit, from the search path or the toolkit's own folder."""
    from torch.utils.cpp_extension import CUDA_HOME

    folders = [os.environ.get("PATH", os.defpath), *([str(Path(CUDA_HOME) / "bin")] if CUDA_HOME else [])]
    program = shutil.which(name, path=os.pathsep.join(folders))
    if program is None:
        raise Skip(f"{name} is not installed here")
    return program


@dataclass(frozen=True)
class Setting:
    """Where and how a part runs. On a CPU it is a rehearsal: small sizes, in Triton's interpreter."""

    out: Path
    device: str = "cuda"
    peers: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None  # of the trainings
    runs: Path = Path("runs/gpu_day")  # where they keep checkpoints, too large to bring home
    steps: int = 2000

    @property
    def rehearsal(self) -> bool:
        """Whether this only tries the kit."""
        return self.device == "cpu"

    def save(self, task: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep the inputs of a failure, if there is room for them."""
        from benchmarks.gpu.archive import pack

        if sum(x.nbytes for x in tensors.values()) > 8 * INPUT_BYTES:  # no packing makes them small enough
            return False
        file = Journal(self.out / "failures.jsonl")
        text = pack(tensors)
        used = file.path.stat().st_size if file.path.is_file() else 0
        if len(text) > INPUT_BYTES or used + len(text) > ARCHIVE_BYTES:
            return False
        file.append(event="inputs", task=task, tensors=text)
        return True


class Wrong(Exception):
    """A result is not what it has to be; `inputs` are what it came from."""

    def __init__(self, message: str, inputs: Mapping[str, Tensor | None] | None = None, **details: Any) -> None:
        super().__init__(message)
        self.inputs = {name: x for name, x in (inputs or {}).items() if x is not None}
        self.details = details


class Skip(Exception):
    """A task does not apply here, and why."""


@dataclass(frozen=True)
class Task:
    """One thing to do; what `run` returns is recorded."""

    name: str  # kind/what/...
    run: Callable[[Setting], dict[str, Any] | None]
    limit: float = 180.0  # seconds after which it is killed
    alone: bool = False  # as what is timed must be
