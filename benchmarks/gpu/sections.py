"""The parts of a GPU record as Markdown, in tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.sweep import DTYPES
from benchmarks.record import rows_of
from benchmarks.tables import measurements, table, three_digits

Summary = Mapping[str, Any]


def check_section(check: Summary) -> Iterator[str]:
    yield "## Check"
    yield from _skipped(check)
    if check["worst"]:
        yield "Largest error over what is allowed, of all results of an op; above 1 it is wrong:"
        cells = {(row["op"], row["dtype"]): row for row in check["worst"]}
        rows = []
        for op in dict.fromkeys(row["op"] for row in check["worst"]):
            found = [cells.get((op, dtype)) for dtype in DTYPES]
            texts = [f"{_share(row['share'])}, {row['result']} of `{row['case']}`" if row else "" for row in found]
            rows.append([f"`{op}`", *texts])
        yield table(["op", *DTYPES], rows)
    if check["checkers"]:
        writes = [task for task, found in check["checkers"].items() if found["shared_writes"]]
        yield f"NVIDIA's memory checkers found no fault in {', '.join(f'`{task}`' for task in check['checkers'])}."
        if writes:
            told = ", ".join(f"`{task}`" for task in writes)
            yield f"In {told} lanes write to one address, and the same value: the results repeat bit for bit."
    if check["kernels"]:
        spilling = [f"`{row['kernel']}`" for row in check["kernels"] if row["spilling"]]
        yield f"Kernels that spill registers: {', '.join(spilling) or 'none'}. The largest of all compiled variants:"
        names = ("variants", "spilling", "registers", "spills", "shared")
        rows = [[f"`{row['kernel']}`", *(str(row[name]) for name in names)] for row in check["kernels"]]
        yield table(["kernel", "variants", "that spill", "registers", "spills", "shared memory, bytes"], rows, 5)


def _share(share: float | str) -> str:
    return share if isinstance(share, str) else three_digits(share)


def _skipped(part: Summary) -> Iterator[str]:
    if part["skipped"]:
        rows = [[", ".join(f"`{task}`" for task in tasks), reason] for reason, tasks in part["skipped"].items()]
        yield table(["skipped", "why"], rows)


def speed_section(speed: Summary) -> Iterator[str]:
    yield "## Speed"
    if speed["cases"]:
        yield from (f"#{text}" if text.startswith("##") else text for text in measurements(rows_of(speed["cases"])))
    if walks := speed.get("walks"):
        yield "### Walks"
        yield "Milliseconds of the scan along the four directions, by a table of them, in random orders, under a mask:"
        names = list(next(iter(walks.values())))
        yield table(
            ["case", *names], [[f"`{c}`", *(three_digits(1e3 * x[n]) for n in names)] for c, x in walks.items()]
        )


def tune_section(tune: Summary) -> Iterator[str]:
    yield "## Choices"
    yield from _skipped(tune)
    if tune["choices"]:
        yield "The launcher's choice, what the fastest choice changes of it, and the ratio of their times."
    for kernel in dict.fromkeys(choice["kernel"] for choice in tune["choices"]):
        yield f"### {kernel}"
        rows = []
        for c in tune["choices"]:
            if c["kernel"] == kernel:
                today, best = (dict(zip(c["fields"], c[name], strict=True)) for name in ("today", "best"))
                changed = {field: value for field, value in best.items() if value != today[field]}
                chosen = {field: value for field, value in today.items() if value is not None and value is not False}
                times = [three_digits(1e3 * c[name]) for name in ("today_s", "best_s")]
                cells = [f"`{c['shape']}`", _fields(chosen), _fields(changed) or "the same", str(c["timed"])]
                rows.append([*cells, *times, f"{three_digits(c['today_over_best'])}x"])
        yield table(
            ["shape", "chosen", "fastest", "timed", "chosen, ms", "fastest, ms", "chosen over fastest"], rows, 4
        )
    wrong = [(c, plan) for c in tune["choices"] for plan in c["wrong"]]
    if wrong:
        told = [[c["kernel"], f"`{c['shape']}`", _fields(dict(zip(c["fields"], p, strict=True)))] for c, p in wrong]
        yield "Choices that gave wrong results:"
        yield table(["kernel", "shape", "choice"], told)
    if tune["refused"]:
        refused = [[f"`{task}`", str(len(plans))] for task, plans in tune["refused"].items()]
        yield "Choices that the GPU cannot launch:"
        yield table(["kernel and shape", "choices"], refused, 1)
    if tune["rules"]:
        yield "Rules, and the geometric mean of their times over those of the fastest plans:"
        rules = []
        for name, rule in tune["rules"].items():
            fields = [_fields(dict(zip(rule["fields"], rule[which], strict=True))) for which in ("today", "best")]
            ratios = [_share(rule[which]) for which in ("today_over_fastest", "worst_shape_today", "best_over_fastest")]
            rules.append([name, str(rule["shapes"]), fields[0], *ratios[:2], fields[1], ratios[2]])
        yield table(["pass", "shapes", "rule in use", "mean", "worst", "best rule", "mean"], rules)
    if tune["counters"]:
        titles = list(dict.fromkeys(title for found in tune["counters"].values() for title in found))
        counted = [[f"`{k}`", *(found.get(title, "") for title in titles)] for k, found in tune["counters"].items()]
        yield "Counters of the hardware, of one launch:"
        yield table(["kernel", *titles], counted, len(titles))


def _fields(values: Mapping[str, Any]) -> str:
    """Such as "block 32, pair"."""
    words = {True: "{}", False: "no {}", None: "default {}"}
    return ", ".join(
        words[value].format(field) if value is None or isinstance(value, bool) else f"{field} {value}"
        for field, value in values.items()
    )


def train_section(train: Summary) -> Iterator[str]:
    yield "## Trainings"
    yield from _skipped(train)
    scores = {
        "Dice": ("per_image", "dice", "mean"),
        "IoU": ("per_image", "iou", "mean"),
        "pooled Dice": ("pooled", "dice"),
        "mean of classes": ("mean_of_classes", "dice"),
        "circumference, mm": ("circumference", "mean_absolute_error_mm"),
        "without an ellipse": ("circumference", "no_ellipse"),
    }
    rows = []
    for run in train["runs"]:
        task, _, rest = run["run"].partition("/")
        network = rest.rpartition("/")[0] or rest
        cells = [task, f"`{network}`", *(str(run.get(name, "")) for name in ("steps", "best_epoch"))]
        seconds, step = run.get("train_seconds"), run.get("seconds_per_step")
        cells += ["" if seconds is None else f"{seconds:.0f}", "" if step is None else three_digits(1e3 * step)]
        rows.append([*cells, *(_score(run.get("test"), path) for path in scores.values())])
    if rows:
        yield "Scores on the test subjects, means over images; the circumference is its mean absolute error."
        head = ["task", "network", "steps", "best epoch", "seconds", "ms per step", *scores]
        filled = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
        yield table([head[i] for i in filled], [[row[i] for i in filled] for row in rows], len(filled) - 2)
    if train["unfinished"]:
        names = list(dict.fromkeys(name for last in train["unfinished"].values() for name in last))
        begun = [
            [f"`{t}`", *(f"{last[name]:g}" if name in last else "" for name in names)]
            for t, last in train["unfinished"].items()
        ]
        yield "Not finished; the last epoch that was recorded:"
        yield table(["training", *names], begun, len(names))


def _score(found: Any, path: Sequence[str]) -> str:
    """A number of nested scores, or nothing."""
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        return ""
    return str(found) if isinstance(found, int) else f"{found:.2f}" if "mm" in path[-1] else f"{found:.3f}"
