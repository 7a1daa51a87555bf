"""What failed, and in which kernel that may be: by the name of the task, and by the results that were wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.journal import FAILURES, Record

SHARED = ("chunk_ends", "carry", "merge")  # by both passes of the scan
STEPS = ("step_sizes", "step_gradients")  # of the backward pass
SCAN_FORWARD, SCAN_BACKWARD = ("scan", *SHARED), ("scan_backward", *STEPS, *SHARED)
SCAN, KAN = ("scan", "scan_backward", *STEPS, *SHARED), ("kan_forward", "grad_input", "grad_weights")
CHECKERS = ("memcheck", "racecheck")
REASON_HEAD, REASON_TAIL = 200, 400  # characters of a reason that are kept; the end of an output tells the most
# Tasks that are of no kernel in particular.
OTHERS = {"tests": "tests of the project", "refused": "choice of a backend", "basis": "bspline_basis"}


def failures(ends: Mapping[str, Mapping[str, Record]], saved: set[str]) -> list[dict[str, Any]]:
    """Every task that failed and every result of ours that was wrong, ordered by kernel.

    `ends` are the records of tasks by part, and `saved` the tasks whose inputs were kept.
    """
    found = []
    for part, of_part in ends.items():
        for task, end in of_part.items():
            if end["status"] in FAILURES:
                reason = end.get("reason", "")
                kernels = kernels_of(part, task, reason)
                found.append(_failure(part, task, kernels, end["status"], reason, task in saved))
            found += _wrong_rows(task, end.get("rows", ()))
    order = {kernel: i for i, kernel in enumerate(dict.fromkeys((*SCAN, *KAN)))}
    return sorted(found, key=lambda failure: order.get(failure["kernels"][0], len(order)))


def kernels_of(part: str, task: str, reason: str) -> tuple[str, ...]:
    """The kernels that a failure may be in, the likeliest first; or the name of what else failed."""
    kind, _, rest = task.partition("/")
    if part == "train":
        return ("training",)
    if part == "speed":
        return _of_case(rest or kind)
    if part == "tune":
        return _of_choice(task)
    if kind in CHECKERS:
        return _of_fault(rest, reason)
    if kind in ("again", "graph", "compiled"):
        return kernels_of(part, rest, reason)
    if kind in ("scan1d", "scan2d", "plans", "walks"):
        return blamed(SCAN, wrong_results(reason))
    if kind in ("kan", "tf32"):
        return blamed(KAN, wrong_results(reason))
    if kind == "rounding":
        return SCAN_FORWARD
    if kind == "offsets":
        whole = KAN if rest.startswith("kan") else SCAN_BACKWARD if "back" in rest else SCAN
        return blamed(whole, wrong_results(reason))
    if kind == "module":
        return (f"module {rest.rpartition('/')[0]}",)
    return (OTHERS.get(kind, kind),)


def wrong_results(reason: str) -> list[str]:
    """The results that a reason names: "output", "y", "last" or "grad ..."; empty where it names none."""
    if listed := re.search(r"; wrong: (.+)", reason):
        return listed[1].split(", ")
    return re.findall(r": (output|y|last|grad [^:]+?) differs", reason)


def blamed(kernels: Sequence[str], wrong: Sequence[str]) -> tuple[str, ...]:
    """Those of some kernels that compute the wrong results.

    The scan's backward pass starts from states of the forward pass, so it is blamed only if the output is right.
    """
    if not wrong:
        return tuple(kernels)
    if kernels[0] in SCAN:
        return SCAN_BACKWARD if all(name.startswith("grad") for name in wrong) else SCAN_FORWARD
    of_result = {"output": "kan_forward", "y": "kan_forward", "grad x": "grad_input"}
    found = {of_result.get(name, "grad_weights") for name in wrong}
    return tuple(kernel for kernel in KAN if kernel in found)


def _of_fault(call: str, reason: str) -> tuple[str, ...]:
    """By the kernel that a memory checker names, else by what was called."""
    named = tuple(kernel for kernel in (*SCAN, *KAN) if re.search(rf"\bat {kernel}\+0x|:{kernel}\b", reason))
    kernel, _, way = call.partition("-")
    if kernel in KAN:
        return named or (kernel,)
    return named or (kernel, *(SHARED if way == "chunks" else ("merge",)))


def _of_case(name: str) -> tuple[str, ...]:
    """By the name of a case, and of its dtype."""
    case = name.rpartition("/")[0] or name
    if case.startswith(("cross-", "scan-")):
        return SCAN
    if case.startswith("kan-"):
        return KAN
    module = re.match(r"(?:model-)?(\w+)", case)
    return (f"module {module[1] if module else case}",) if "-" in case else (case,)


def _of_choice(task: str) -> tuple[str, ...]:
    """By what was timed under several plans or tiles."""
    kind, _, rest = task.partition("/")
    what = rest.partition("/")[0]
    passes = {"scan forward": SCAN_FORWARD, "scan backward": SCAN_BACKWARD, "kan forward": ("kan_forward",)}
    return passes.get(what, (what.removeprefix("kan ") or kind,))


def _wrong_rows(task: str, rows: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Rows of `speed` in which our kernels were wrong or failed."""
    for row in rows:
        if row["candidate"] == "triton" and row["status"] in FAILURES:
            over = [name for name, error in row.get("errors", {}).items() if not error <= row["error_limit"]]
            kernels = _of_case(task.partition("/")[2])
            kernels = blamed(kernels, over) if kernels in (SCAN, KAN) else kernels
            reason = f"{row['mode']}: {row['reason']}"
            yield _failure("speed", task, kernels, row["status"], reason, saved=False)


def _failure(part: str, task: str, kernels: Sequence[str], status: str, reason: str, saved: bool) -> dict[str, Any]:
    short = " ".join(word for word in reason.split() if word.strip("^~"))  # without the marks of a traceback
    if len(short) > REASON_HEAD + REASON_TAIL:
        short = f"{short[:REASON_HEAD]} ... {short[-REASON_TAIL:]}"
    return {
        "part": part,
        "task": task,
        "kernels": list(kernels),
        "status": status,
        "reason": short,
        "inputs_saved": saved,
    }
