"""Error first, then time, then memory."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import Bound, Candidate, Mode
from benchmarks.cases import Case

# Largest relative L2 error of an output or a gradient against float64 that is still timed.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Layers and models under autocast round several times. A training step of a model passes tens of BatchNorms and the
# kinks of ReLU, where a rounding can switch a pixel's gradient on or off; in half precision its gradients at random
# weights have little to do with those of float64, so they only have to be finite.
AUTOCAST_LIMIT, MODEL_TRAINING_LIMIT, FINITE = 5e-2, 5e-2, sys.float_info.max
CHECK_BATCH, CHECK_LENGTH, CHECK_MODEL_LENGTH = 2, 128 * 128, 64 * 64
SAMPLE_SECONDS = 5e-3


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected value, infinite where a value is not finite."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}; compare like")
    actual, expected = actual.detach().double(), expected.detach().to(actual.device).double()
    if not torch.isfinite(actual).all():
        return math.inf
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def error_limit(case: Case, mode: Mode, dtype: torch.dtype) -> float:
    """The largest error that is timed."""
    training, half = mode == "training", dtype != torch.float32
    if half and case.suite in ("blocks", "models"):
        return FINITE if training else AUTOCAST_LIMIT
    return MODEL_TRAINING_LIMIT if training and case.suite == "models" else LIMITS[dtype]


def check_version(case: Case) -> Case:
    """The case itself, or its first images and a corner of them where it is large."""
    return case.limited(CHECK_BATCH, CHECK_MODEL_LENGTH if case.suite == "models" else CHECK_LENGTH)


class Checker:
    """Compares candidates with `truth` in float64, or with themselves, and computes each expected result once."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, truth: Candidate) -> None:
        self.case, self.device, self.dtype, self.truth = check_version(case), device, dtype, truth
        self._expected: dict[tuple[str, Mode], dict[str, Tensor]] = {}

    def errors(self, candidate: Candidate, mode: Mode, longest: float = math.inf) -> tuple[dict[str, float], float]:
        """Relative L2 errors of the output and of every gradient, and the seconds of a call.

        A call that takes longer than `longest` is timed again, since the first may compile.
        """
        truth = self.truth if candidate.same else candidate
        if (truth.name, mode) not in self._expected:
            exact = truth.bind(self.case, self.device, self.dtype, exact=True)
            self._expected[truth.name, mode] = _results(exact, mode)
        bound, expected = candidate.bind(self.case, self.device, self.dtype), self._expected[truth.name, mode]
        start = time.perf_counter()
        actual = _results(bound, mode)
        seconds = time.perf_counter() - start
        if seconds > longest:
            seconds = seconds_per_call(call_of(bound, mode), 1, self.device)
        return {name: relative_l2(value, expected[name]) for name, value in actual.items()}, seconds


def output_gradient(out: Tensor) -> Tensor:
    """A fixed gradient of an output."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def _results(bound: Bound, mode: Mode) -> dict[str, Tensor]:
    """Output and gradients in this package's layout."""
    bound.train(mode == "training")
    if mode == "forward":
        with torch.no_grad():
            out = bound.run()
        return {"output": _restored("y", out, bound)}
    out = bound.run()
    order = bound.layout.get("y", tuple(range(out.ndim)))
    grad = output_gradient(_restored("y", out, bound)).permute(order)
    grads = torch.autograd.grad(out, list(bound.leaves.values()), grad)
    if bound.joint:
        return {"output": out.detach(), "grad": torch.cat([g.flatten() for g in grads])}
    named = {f"grad {name}": _restored(name, g, bound) for name, g in zip(bound.leaves, grads, strict=True)}
    return {"output": _restored("y", out, bound), **named}


def _restored(name: str, value: Tensor, bound: Bound) -> Tensor:
    if name not in bound.layout:
        return value
    order = bound.layout[name]
    return value.permute([order.index(i) for i in range(len(order))])


def time_in_rounds(
    calls: Mapping[Any, Callable[[], object]],
    device: str,
    rounds: int,
    budget: float = math.inf,
    sample: float = SAMPLE_SECONDS,
) -> dict[Any, list[float]]:
    """Seconds per call of each, once in every round, until its budget of seconds is used.

    A sample repeats a short call until it lasts `sample` seconds. Every round has an order of its own, lest a call
    always find the caches as the same neighbour leaves them.
    """
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, and fills caches
        seconds = max(seconds_per_call(call, 1, device), 1e-6)
        repeats[name] = max(1, min(1000, math.ceil(sample / seconds)))
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            if len(samples[name]) < 2 or sum(samples[name]) * repeats[name] <= budget:
                samples[name].append(seconds_per_call(calls[name], repeats[name], device))
    return samples


def quartiles(samples: Sequence[float]) -> list[float]:
    """With the median in the middle; of one sample three times its value."""
    return statistics.quantiles(samples if len(samples) > 1 else 2 * list(samples), method="inclusive")


def call_of(bound: Bound, mode: Mode) -> Callable[[], object]:
    """What is timed: inference, or output and all gradients from a fixed gradient of the output."""
    bound.train(mode == "training")
    if mode == "forward":
        return lambda: bound.step(mode)
    grad = output_gradient(bound.run())
    return lambda: bound.step(mode, grad)


def seconds_of_one(call: Callable[[], object], device: str, longest: float) -> float:
    """Seconds of a call, and of a second one if the first, which may compile, takes longer than `longest`."""
    seconds = seconds_per_call(call, 1, device)
    return seconds if seconds <= longest else seconds_per_call(call, 1, device)


def seconds_per_call(call: Callable[[], object], repeats: int, device: str) -> float:
    """The mean over calls in a row: by CUDA events on a GPU, by the host's clock elsewhere."""
    if device != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def peak_bytes(candidate: Candidate, case: Case, mode: Mode, dtype: torch.dtype) -> int:
    """Memory that one call takes on a CPU above its inputs; to be asked once, in a process of its own."""
    bound = candidate.bind(case, "cpu", dtype)
    # Load and compile everything; what torch.compile makes is for this size alone.
    small = case.limited(1, 64 * 64 if case.suite == "models" else 64)  # which halve their image
    call_of(bound if candidate.compiled else candidate.bind(small, "cpu", dtype), mode)()
    bound.train(mode == "training")
    gc.collect()
    before = _reset_peak()
    _once(bound, mode)
    return max(0, _status("VmHWM") - before)


def allocated_peak(bound: Bound, mode: Mode) -> int:
    """The same by the count of PyTorch's allocator on a GPU, which is exact whatever ran before."""
    bound.train(mode == "training")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _once(bound, mode)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(bound: Bound) -> int:
    """What the graph of one call holds for its backward pass, beyond the inputs and parameters; each storage once."""
    given = {t.untyped_storage().data_ptr() for t in (*bound.leaves.values(), *bound.held)}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:  # the graph keeps it, and so its address, until all is counted
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    bound.train(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = bound.run()
    total = sum(saved.values())
    del out
    return total


def _once(bound: Bound, mode: Mode) -> None:
    if mode == "forward":
        bound.step(mode)
        return
    out = bound.run()
    torch.autograd.grad(out, list(bound.leaves.values()), torch.ones_like(out))


def _reset_peak() -> int:
    """Set the peak to what the process holds now, and return it; only Linux can."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)  # what is free would be used uncounted; only glibc can
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
