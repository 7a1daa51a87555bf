"""Train the networks of the three experiments at 256x256, score them on their test subjects, keep what they learned.

Every training is a process of its own and goes on from its last epoch if it is started again. What it leaves behind, in
`setting.runs`, is too large to bring home; the record holds its scores and curves, and `weights.tar` the tiny networks.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.processes import end_with_parent, only_one
from benchmarks.gpu.tasks import Setting, Skip, Task

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"isic2017": "isic2017", "fetal_head": "hc18", "lumbar_spine": "lumbar_spine"}  # of --data
# The most telling first: what the library recommends, what it is compared with, then the larger and the other ones.
MODELS = ("km_unet_pp_tiny", "unet", "km_unet_pp_base", "km_unet_tiny", "unet_pp", "km_unet_base")
LONGER = ("km_unet_pp_tiny", "km_unet_pp_base")
TIMES_LONGER = 5
# As in examples/configs: the published form of KMUNet learns worse.
MODEL_ARGS = {"km_unet_base": {"context_residual": True}}

IMAGE_SIZE, REHEARSAL_SIZE = 256, 32
REHEARSAL_STEPS, REHEARSAL_IMAGES = 2, 15
THREADS = 3
DATA_WORKERS = 3  # augmentation takes 0.1 s of a core for 8 images of 256x256
SHARED_MEMORY = 1 << 30  # bytes that the data processes of four trainings may need
PROGRESS = 60.0  # seconds between two looks at the curves of a training
CURVE_ROWS = 40
CURVES = ("epoch", "train/loss", "val/loss", "val/dice")
TAIL = 1500  # characters of the output of a failure
WEIGHTS_BYTES = 16_000_000  # all tiny networks, and no more than one file may have

# Trains and scores in one process, for its imports take long.
RUN = """
import json, sys
import lab
for arguments in json.loads(sys.argv[1]):
    lab.main(arguments)
"""


@dataclass(frozen=True)
class Case:
    """One network on one task. The longer training of a network is a run of its own: its learning rate falls later."""

    task: str
    model: str
    steps: int
    model_args: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its task."""
        return f"{self.task}/{self.model}/{self.steps}"


def tasks(setting: Setting) -> Iterator[Task]:
    """A task for each case."""
    for case in cases(setting):
        limit = 300.0 + case.steps  # a training of more than a second a step has no end here
        yield Task(case.name, partial(train_and_score, case), limit=limit)


def cases(setting: Setting) -> list[Case]:
    """Every network on every task, then the longer trainings; in a rehearsal one that does nearly nothing."""
    if setting.rehearsal:
        return [Case("lumbar_spine", "km_unet_pp_tiny", REHEARSAL_STEPS)]
    return [
        Case(task, model, steps, MODEL_ARGS.get(model, {}))
        for models, steps in ((MODELS, setting.steps), (LONGER, TIMES_LONGER * setting.steps))
        for model in models
        for task in FOLDERS
    ]


def train_and_score(case: Case, setting: Setting) -> dict[str, Any]:
    """Train, or go on training, score the best epoch on the test subjects, and put its weights into the archive."""
    run = setting.runs.resolve() / case.name.replace("/", "-")
    journal = Journal(setting.out / "train.jsonl")
    workers = data_workers(setting)

    def note_progress() -> None:
        if curves := read_curves(run):
            journal.append(event="progress", task=case.name, curves=curves)

    commands = [training_flags(case, setting, run, workers), ["test", f"--run={run}"]]
    execute(commands, run.with_suffix(".log"), environment(setting), note_progress)
    name = f"{case.task}-{case.model}"
    kept = "tiny" in case.model and keep(run / "model", name, str(case.steps), setting.out / "weights.tar")
    return {**read_record(run), "data_workers": workers, "weights_kept": kept}


def training_flags(case: Case, setting: Setting, run: Path, workers: int) -> list[str]:
    """The arguments of lab.py. Numbers are float32, with PyTorch's defaults: TF32 in convolutions, not in products.

    The networks are small, so that launches and memory set the pace more than products do, and their scores stay
    comparable with those measured on CPUs.
    """
    flags = ["fit", f"--run={run}", "--resume", f"--data.task={case.task}", f"--model.network={case.model}"]
    flags += [f"--model.model_args={json.dumps(case.model_args)}"] if case.model_args else []
    flags += [f"--trainer.max_steps={case.steps}", "--trainer.enable_progress_bar=false"]
    flags += [f"--data.num_workers={workers}"]
    if setting.rehearsal:
        flags += [f"--data.image_size={REHEARSAL_SIZE}", f"--data.limit={REHEARSAL_IMAGES}"]
        return [*flags, "--trainer.accelerator=cpu"]
    if setting.data is None:
        raise Skip(f"data is not given: add --data DIR, a folder that holds {', '.join(FOLDERS.values())}")
    flags += [f"--data.image_size={IMAGE_SIZE}", "--trainer.accelerator=gpu", "--trainer.devices=1"]
    return [*flags, f"--data.folder={setting.data.resolve() / FOLDERS[case.task]}"]


def data_workers(setting: Setting) -> int:
    """Processes that augment; none where their batches would not fit into shared memory."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free >= SHARED_MEMORY
    return DATA_WORKERS if roomy and not setting.rehearsal else 0


def environment(setting: Setting) -> dict[str, str]:
    """Of a training: it finds the examples and the library, and leaves cores to those beside it."""
    paths = [str(ROOT / "examples"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    threads = "1" if setting.rehearsal else str(THREADS)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": threads}
    return variables | ({"CUDA_VISIBLE_DEVICES": ""} if setting.rehearsal else {})


def execute(commands: Sequence[list[str]], log: Path, variables: dict[str, str], meanwhile: Callable[[], None]) -> None:
    """Run commands of lab.py one after the other, in a process that ends with this one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, preexec_fn=end_with_parent
        )
    try:
        while process.poll() is None:
            try:
                process.wait(PROGRESS)
            except subprocess.TimeoutExpired:
                meanwhile()
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        raise RuntimeError(f"the training ended with {process.returncode}, its output with\n{tail}")


def read_record(run: Path) -> dict[str, Any]:
    """What a finished run came to; seconds are those of its epochs, validation included, of all sessions."""
    facts, scores = (_read_json(run / name) for name in ("metrics.json", "test/scores.json"))
    known = ("network", "model_args", "image_size", "seed", "parameters", "data", "images", "subjects")
    known += ("split_sha256", "epochs", "best_epoch", "steps", "device", "versions")
    scored = ("images", "unreadable", "unit", "per_image", "pooled", "classes", "mean_of_classes", "circumference")
    return {
        **{name: facts[name] for name in known},
        "train_seconds": facts["seconds"],
        "seconds_per_step": round(facts["seconds"] / facts["steps"], 5),
        "validation": facts["metrics"],
        "test": {name: scores[name] for name in scored if name in scores},
        "curves": read_curves(run),
    }


def read_curves(run: Path) -> dict[str, list[float]]:
    """Loss and Dice of some of the epochs so far, the last among them; empty before the first has ended."""
    path = run / "history.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    every = -(-len(rows) // CURVE_ROWS)
    return {name: [round(float(row[name]), 4) for row in rows[::-1][::every][::-1]] for name in CURVES}


def keep(folder: Path, name: str, version: str, archive: Path, most: int = WEIGHTS_BYTES) -> bool:
    """Put a folder into a tar file as `name/version`, in place of other versions; not if it would outgrow `most` bytes.

    The archive is written beside its place and moved there, so that a kill leaves the old one whole.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    draft = archive.with_name(f"{archive.name}.part")
    with only_one(archive.parent):
        with tarfile.open(draft, "w") as new:
            if archive.is_file():
                with tarfile.open(archive) as old:
                    for member in old:
                        if Path(member.name).parts[0] != name:
                            new.addfile(member, old.extractfile(member))
            for path in sorted(folder.iterdir()):
                new.add(path, f"{name}/{version}/{path.name}")
        fits = draft.stat().st_size <= most
        if fits:
            os.replace(draft, archive)
        else:
            draft.unlink()
    return fits


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
