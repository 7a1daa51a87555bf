"""Time the kernels under other plans and tiles than they choose, and find the rule that chooses best.

The scans are timed under every plan that any rule of `RULES` would choose, so that the rules can be compared without
timing them again. The tiles of a KAN kernel are changed one at a time.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import search_path, start
from benchmarks.gpu import launchers
from benchmarks.gpu.calls import kan_backward, kan_forward, kan_inputs, scan_backward, scan_forward, scan_inputs
from benchmarks.gpu.compare import CLOSE
from benchmarks.gpu.journal import WRONG, Journal
from benchmarks.gpu.processes import run
from benchmarks.gpu.rules import RULES, best_rules, sizes
from benchmarks.gpu.tasks import Setting, Task, find_program
from benchmarks.measure import relative_l2, time_in_rounds

Calls = dict[Any, Callable[[], Any]]  # by plan or tiles
# b h w d n r: the levels of a base KMUNet and two stages of VMamba, one image and a batch.
SHAPES = [
    (b, *size)
    for b in (8, 1)
    for size in (
        (128, 128, 32, 16, 1),
        (64, 64, 64, 16, 2),
        (32, 32, 256, 16, 8),
        (16, 16, 320, 16, 10),
        (56, 56, 192, 16, 6),
        (56, 56, 192, 1, 6),
    )
]
KAN_SHAPES = [(65536, 64), (16384, 128), (4096, 256), (2048, 320), (1024, 160), (1048576, 64)]  # rows, features
COUNTERS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "InstructionStats", "MemoryWorkloadAnalysis", "Occupancy")
HEAVIEST = ("scan", "scan_backward", "kan_forward", "grad_weights")  # calls, and the kernels that they are there for
LARGEST_TILE = 1 << 15  # rows times outs: more does not fit into the registers, and compiles for minutes
ROUNDS, SAMPLE_SECONDS = 7, 2e-3


def plans(shape: tuple[int, ...], back: bool, multiprocessors: int) -> list[Any]:
    """The plan in use, those of all rules, and the one in use with other warps and stages."""
    choose = partial(launchers.scan.choose_plan, launchers.scan.Sizes(*sizes(shape)), multiprocessors, back=back)
    today = choose()
    found = [today, *(choose(rule=launchers.scan.Rule(*rule)) for rule in RULES)]
    found += [today._replace(warps=warps) for warps in (1, 2, 4)]
    found += [today._replace(stages=stages) for stages in (1, 2, 4)]
    found += [today._replace(pair=not today.pair)] if not back else []
    return list(dict.fromkeys(found))


def scan_calls(shape: tuple[int, ...], back: bool, setting: Setting) -> Calls:
    """The scan of a shape, forward or backward, under every plan."""
    x = scan_inputs(*shape, setting.device)
    height, width = shape[1:3]
    y, _, saved = scan_forward(x, height, width)
    grad_y = torch.randn_like(y)
    found = plans(shape, back, multiprocessors(setting))[: 3 if setting.rehearsal else None]
    if back:
        return {plan: partial(scan_backward, x, grad_y, saved, height, width, plan) for plan in found}
    return {plan: partial(scan_forward, x, height, width, plan) for plan in found}


def tiles(kernel: str, job: Any, gpu: Any) -> list[Any]:
    """The tiles in use of a KAN kernel, and those with one or two of them changed."""
    today = getattr(launchers.kan, f"{kernel}_tiles")(job, gpu)
    found = [today]
    for rows in {today.rows // 2, today.rows, 2 * today.rows}:
        for warps in (4, 8):
            found.append(today._replace(rows=max(16, rows), warps=warps))
    found += [today._replace(ins=ins) for ins in (16, 32, 64)]
    found += [today._replace(outs=outs) for outs in (32, 64, 128, 256) if outs < 2 * job.o]
    found += [today._replace(stages=stages) for stages in (1, 2, 3, 4)]
    if kernel == "forward":
        found += [today._replace(slots=slots) for slots in (1, 1 + job.bases)]
    if kernel == "grad_weights":
        found += [today._replace(slots=slots) for slots in (1, 2, 3)]
        found += [today._replace(splits=max(1, int(today.splits * factor))) for factor in (0.5, 2, 4)]
    return [t for t in dict.fromkeys(found) if t.rows * t.outs <= LARGEST_TILE]


def kan_calls(kernel: str, shape: tuple[int, int], dtype: torch.dtype, setting: Setting) -> Calls:
    """A KAN kernel at a shape, under every choice of tiles."""
    rows, width = shape
    x = kan_inputs(rows, width, width, 5, 3, setting.device, dtype)
    half = dtype != torch.float32
    job = launchers.kan.Job(rows, width, width, 8, 3, True, half, not half)
    calls: Calls = {}
    for t in tiles(kernel, job, launchers.kan._gpu(x["x"].device))[: 3 if setting.rehearsal else None]:
        if kernel == "forward":
            calls[t] = partial(kan_forward, x, tiles=t)
        else:
            wanted = (kernel == "grad_input", kernel == "grad_weights")
            chosen = (t, None) if wanted[0] else (None, t)
            calls[t] = partial(kan_backward, x, wanted, tiles=chosen)
    return calls


def warm(make: Callable[[Setting], Calls], setting: Setting) -> dict[str, Any]:
    """Compile every variant; those that do not fit the GPU are told."""
    return {"refused": [list(plan) for plan, call in make(setting).items() if results_of(call) is None]}


def timed(make: Callable[[Setting], Calls], setting: Setting) -> dict[str, Any]:
    """Seconds of every variant that gives the results of the first, today's choice; in turns."""
    calls = make(setting)
    today = next(iter(calls))
    expected = calls[today]()
    wrong, right = [], {}
    for plan, call in calls.items():
        found = results_of(call)
        if found is None:
            continue
        if agrees(found, expected):
            right[plan] = call
        else:
            wrong.append(list(plan))
    times = medians(right, setting)
    best = min(times, key=lambda plan: times[plan])
    return {
        "fields": list(type(today)._fields),
        "times": [[list(plan), seconds] for plan, seconds in times.items()],
        "today": list(today),
        "best": list(best),
        "today_over_best": times[today] / times[best],
        "multiprocessors": multiprocessors(setting),
        **({"status": WRONG, "reason": f"wrong results under {wrong}", "wrong": wrong} if wrong else {}),
    }


def medians(calls: Calls, setting: Setting) -> dict[Any, float]:
    """Seconds per call of each, all of them in every round."""
    samples = time_in_rounds(calls, setting.device, 1 if setting.rehearsal else ROUNDS, sample=SAMPLE_SECONDS)
    return {plan: statistics.median(values) for plan, values in samples.items()}


def results_of(call: Callable[[], Any]) -> Any:
    """What a variant computes; None if it does not fit the GPU, whose shared memory it may exceed."""
    try:
        found = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        print(f"refused: {type(error).__name__}: {str(error)[:200]}")
        return None
    return found


def agrees(found: Any, expected: Any) -> bool:
    """Whether all tensors of two results are the same but for the order of sums; saved states may be cut elsewhere."""
    pairs = zip(*map(_tensors, (found, expected)), strict=True)
    return all(
        relative_l2(x, y) <= (CLOSE if x.dtype == torch.float32 else 2.0**-8) for x, y in pairs if x.shape == y.shape
    )


def _tensors(found: Any) -> list[Tensor]:
    """Those of a result: one, several, or several by name."""
    values = [found] if isinstance(found, Tensor) else found.values() if isinstance(found, dict) else found
    return [x for x in values if x is not None]


def counters(kernel: str, setting: Setting) -> dict[str, Any]:
    """Hardware counters of one launch of a heavy call: issue, special functions, memory, occupancy."""
    program = find_program("ncu")
    command = [program, "--clock-control", "none", "--csv", "--page", "raw", "--launch-count", "1"]
    command += ["--kernel-name", rf"regex:^{kernel}(_\d.*)?$"]
    command += [flag for name in COUNTERS for flag in ("--section", name)]
    command += start("gpu_day", "--out", str(setting.out), "--device", setting.device, "--call", kernel, "--heavy")
    result = run(command, {**os.environ, **search_path()})
    found = read_counters(result.stdout)
    if not found:
        raise RuntimeError(f"ncu told nothing ({result.returncode}): {(result.stdout + result.stderr)[-1500:]}")
    return {"counters": found}


def read_counters(output: str) -> dict[str, str]:
    """Names, units and values of the CSV that ncu prints behind its own remarks."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return {}
    names, units, values = list(csv.reader(lines))[:3]
    return {f"{name} [{unit}]" if unit else name: value for name, unit, value in zip(names, units, values, strict=True)}


def multiprocessors(setting: Setting) -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if setting.device == "cuda" else 132


def tasks(setting: Setting) -> Iterator[Task]:
    """Compile side by side, then time alone: batches of images before single ones, bfloat16 before float32."""
    shapes = SHAPES if not setting.rehearsal else [(1, 1, 2, 3, 1, 1)]
    kan_shapes = KAN_SHAPES if not setting.rehearsal else [(9, 4)]
    makers: dict[str, Callable[[Setting], Calls]] = {}
    for shape, (name, back) in product(shapes, (("forward", False), ("backward", True))):
        makers["scan {}/b{} {}x{} d{} n{} r{}".format(name, *shape)] = partial(scan_calls, shape, back)
    for dtype, (rows, width) in product((torch.bfloat16, torch.float32), kan_shapes):
        for kernel in ("forward", "grad_input", "grad_weights"):
            label = f"kan {kernel}/{rows}x{width} {str(dtype).removeprefix('torch.')}"
            makers[label] = partial(kan_calls, kernel, (rows, width), dtype)
    if setting.rehearsal:
        makers = {name: maker for name, maker in makers.items() if "backward" not in name and "grad" not in name}
    for name, maker in makers.items():
        if not setting.rehearsal:
            yield Task(f"warm/{name}", partial(warm, maker), limit=240)
    for kernel in HEAVIEST:
        yield Task(f"counters/{kernel}", partial(counters, kernel), alone=True)
    for name, maker in makers.items():
        yield Task(f"time/{name}", partial(timed, maker), alone=True)
    yield Task("rule", lambda setting: {"rules": best_rules(Journal(setting.out / "tune.jsonl").ends())}, alone=True)
