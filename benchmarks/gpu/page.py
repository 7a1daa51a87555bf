"""The page of sessions on a GPU: failures by kernel, errors, times, choices, trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from benchmarks.candidates import BACKENDS
from benchmarks.gpu.chart import OURS
from benchmarks.gpu.sections import Summary, check_section, speed_section, train_section, tune_section
from benchmarks.kan_layers import GEMM
from benchmarks.record import rows_of
from benchmarks.tables import SUITES, table, three_digits

SECTIONS: dict[str, Callable[[Summary], Iterator[str]]] = {
    "check": check_section,
    "speed": speed_section,
    "tune": tune_section,
    "train": train_section,
}
# Our own backends, and what does less than the whole; `torch.compile` of our formula is an alternative.
NO_ALTERNATIVES = (*BACKENDS, GEMM, "nn.Linear", "without SS2D")
REASON = 120, 240  # characters of a reason in a table: of its head, and of its end, which tells the most


def render(day: Summary, images: Iterable[str] = ()) -> str:
    """The whole page."""
    parts = [*_head(day), *(f"![Times on this GPU]({image})" for image in images), sessions(day)]
    parts += _failures(day["failures"])
    for part, section in SECTIONS.items():
        if part in day["parts"]:
            parts += section(day["parts"][part])
    return "\n\n".join(parts) + "\n"


def _head(day: Summary) -> list[str]:
    if day["device"] == "cpu":
        return [
            f"# A rehearsal on a CPU, no measurements: {day['name']}",
            "These are no measurements: the commands ran on a CPU, at small sizes and in Triton's interpreter.",
            environment(day),
        ]
    told = "\n".join(f"* {line}" for line in headlines(day))
    return [f"# Measured on {day['machine']['gpu']['name']}", environment(day), *([told] if told else [])]


def environment(day: Summary) -> str:
    """What the figures were measured with."""
    gpu, versions = day["machine"]["gpu"], day["versions"]
    where = day["machine"]["cpu"]
    if gpu:
        where = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['multiprocessors']} multiprocessors"
    begun = [session for part in day["parts"].values() for session in part["sessions"]]
    commits = list(dict.fromkeys(str(session["commit"] or "unknown") for session in begun))
    text = f"{day['date'][:10]}: {where}; {libraries(versions)}; commit {', '.join(commits)}."
    gpus = list(dict.fromkeys(session["gpu"] for session in begun if session["gpu"]))
    if len(gpus) > 1:
        text += f" The sessions ran on several GPUs, {', '.join(gpus)}: times of different sessions do not compare."
    rates = day["parts"].get("speed", {}).get("limits")
    if rates and day["device"] != "cpu":
        text += f" A copy moves {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written."
        if rates["elements_per_second"]:
            text += f" {rates['elements_per_second'] / 1e9:.0f} G exponentials per second."
        products = rates.get("product_flops_per_second", {})
        told = ", ".join(f"{name} {three_digits(rate / 1e12)}" for name, rate in products.items())
        text += f" TFLOP/s of a large product: {told}." if told else ""
    return text


def libraries(versions: Mapping[str, str | None]) -> str:
    """Names and versions of what was used."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "commit")


def headlines(day: Summary) -> list[str]:
    """The numbers that tell the most: the kernels beside what else there is, and beside their own best."""
    found = []
    speed = day["parts"].get("speed", {"cases": []})
    rows = [row for row in rows_of(speed["cases"]) if (row["dtype"], row["mode"]) == ("bfloat16", "training")]
    for suite in ("ops-b8", "kan"):
        ratios = _fastest_others([row for row in rows if row["suite"] == suite])
        if ratios:
            found.append(
                f"{SUITES[suite]}, bfloat16, forward and backward: the fastest alternative takes "
                f"{three_digits(geometric_mean(ratios))} times our time, the geometric mean of {len(ratios)} cases "
                f"({three_digits(min(ratios))} to {three_digits(max(ratios))})."
            )
    choices = day["parts"].get("tune", {}).get("choices", [])
    if choices:
        worst = max(choices, key=lambda choice: choice["today_over_best"])
        mean = geometric_mean(choice["today_over_best"] for choice in choices)
        found.append(
            f"The chosen plans and tiles take {three_digits(mean)} times the time of the fastest, the geometric mean "
            f"of {len(choices)}; at worst {three_digits(worst['today_over_best'])} times: "
            f"{worst['kernel']}, {worst['shape']}."
        )
    return found


def _fastest_others(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each case the least time of an alternative over ours; an installed one without a time may be faster yet."""
    found = []
    for ours in (row for row in rows if row["candidate"] == OURS and row["status"] == "ok"):
        others = [row for row in rows if row["case"] == ours["case"] and row["candidate"] not in NO_ALTERNATIVES]
        others = [row for row in others if row["status"] != "not measured"]
        if others and all(row["status"] == "ok" for row in others):
            found.append(min(row["median_s"] for row in others) / ours["median_s"])
    return found


def sessions(day: Summary) -> str:
    """A row for each part: how its tasks ended, what was not reached, and the time it took."""
    rows = []
    for part, content in day["parts"].items():
        budget = ", ".join(f"{s['used_s']:.0f} of {s['allowed_s']:.0f}" for s in content["sessions"])
        ended = ", ".join(f"{count} {status}" for status, count in content["counts"].items())
        rows.append([part, ended, _tasks(content["left"]), budget, f"{content['task_seconds']:.0f}"])
    return table(["part", "tasks", "not reached", "seconds of each session", "seconds of the tasks"], rows)


def _tasks(names: Sequence[str]) -> str:
    """Names of tasks, those of a kind together."""
    kinds: dict[str, list[str]] = {}
    for kind, _, rest in (name.partition("/") for name in names):
        kinds.setdefault(kind, []).append(rest)
    told = {kind: ", ".join(f"`{rest}`" for rest in found if rest) for kind, found in kinds.items()}
    return "; ".join(f"{kind} {rest}".strip() for kind, rest in told.items())


def by_kernel(failures: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Failures under the kernel that they are likeliest in."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for failure in failures:
        found.setdefault(failure["kernels"][0], []).append(failure)
    return found


def _failures(failures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Failures by kernel"
    if not failures:
        yield "None."
    for kernel, of_kernel in by_kernel(failures).items():
        yield f"### {kernel}"
        rows = []
        for f in of_kernel:
            others = ", ".join(f"`{name}`" for name in f["kernels"][1:])
            saved = "yes" if f["inputs_saved"] else "no"
            rows.append([f["part"], f"`{f['task']}`", f["status"], _short(f["reason"]), others, saved])
        yield table(["part", "task", "status", "what is wrong", "or in", "inputs saved"], rows)


def _short(reason: str) -> str:
    head, end = REASON
    return reason if len(reason) <= head + end else f"{reason[:head]} ... {reason[-end:]}"


def terminal(day: Summary) -> str:
    """Failures by kernel and the numbers that tell the most."""
    lines = []
    for part, content in day["parts"].items():
        counts = [*content["counts"].items(), *([("not reached", len(content["left"]))] if content["left"] else [])]
        lines.append(f"{part}: {', '.join(f'{count} {status}' for status, count in counts)}")
    for kernel, of_kernel in by_kernel(day["failures"]).items():
        lines.append(f"{kernel}: {len(of_kernel)} failures")
        lines += [f"  {f['status']:8} {f['part']} {f['task']}: {_short(f['reason'])}" for f in of_kernel]
    return "\n".join([*lines, *([] if day["device"] == "cpu" else headlines(day))])
