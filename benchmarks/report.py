"""Render the results of `run` as Markdown tables and plots.

python -m benchmarks report benchmarks/results/*.json --out docs/benchmarks
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.command import make_parser

Row = dict[str, Any]

SCHEMA = 1
GPU_DAY = "gpu day"  # the kind of a file that `gpu_report` renders
MODES = {"forward": "Forward", "training": "Forward and backward"}
AXES = {"pixels": "pixels, h w", "d": "channels, d", "n": "states, n", "b": "batch, b", "threads": "threads"}
BASES = {"gemm": "of gemm", "efficient-kan": "of efficient-kan"}  # what layers are compared with, and the columns
SHORT = {"not run": "–", "not measured": "–", "wrong": "wrong", "failed": "failed"}  # noqa: RUF001
COLOURS = (
    *("#0072B2", "#009E73", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#999999", "#000000", "#F0E442"),
    *("#882255", "#44AA99", "#332288", "#DDCC77"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one Markdown file and its plots for each file of results."""
    parser = make_parser("report", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {file: load(file) for file in args.files}
    on_gpu = {case for result in results.values() for case in measured_on_gpu(result)}
    for file, result in results.items():
        if result.get("kind") == GPU_DAY:
            continue
        images = plot(result, file.stem, args.out) if args.plots else []
        (args.out / f"{file.stem}.md").write_text(render(result, images, on_gpu), encoding="utf-8")


def load(file: Path) -> dict[str, Any]:
    """Results of a run, if they are of this version of the format."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{file.name} has schema {result.get('schema')!r}, expected {SCHEMA}; measure again")
    return result


def measured_on_gpu(result: dict[str, Any]) -> set[str]:
    """The cases that a file has measured on a GPU."""
    if result.get("kind") == GPU_DAY:
        speed = result["parts"].get("speed", {})
        return {case["case"] for case in speed.get("cases", []) if case["device"] == "cuda"}
    return {row["case"] for row in result["rows"] if row["device"] == "cuda"}


def render(result: dict[str, Any], images: Iterable[str] = (), on_gpu: Iterable[str] = ()) -> str:
    """The whole page: with what, times, limit, memory, errors; `on_gpu` are the cases measured there in any file."""
    parts = [environment(result)]
    for suite, title in (
        ("ops", "Ops"),
        ("ops-b8", "Ops at batch 8"),
        ("blocks", "SS2D"),
        ("models", "Models"),
        ("scaling", "Scaling"),
    ):
        of_suite = [row for row in result["rows"] if row["suite"] == suite]
        counts = sorted({row["threads"] for row in of_suite})
        for threads in [None] if suite == "scaling" else counts:
            for mode, name in MODES.items():
                rows = [r for r in of_suite if r["mode"] == mode and threads in (None, r["threads"])]
                if not rows:
                    continue
                where = "" if threads is None or result["settings"]["device"] == "cuda" else f", {_threads(threads)}"
                parts.append(f"## {title}, {name.lower()}{where}")
                parts.append("Median milliseconds, and the ratio to the first column.")
                parts += [time_table(rows), *notes(rows)]
                if any("limit_s" in row for row in rows):
                    parts += ["Share of the physical limit:", limit_table(rows)]
                if any(row.get("peak_bytes") is not None for row in rows):
                    parts += ["Peak memory above the inputs, MiB:", memory_table(rows)]
        parts += [f"![{suite} of this run]({image})" for image in images if f"-{suite}-" in image]
    parts += layers([row for row in result["rows"] if row["suite"] == "kan"], images, set(on_gpu))
    parts += [
        "## Errors",
        "Largest relative L2 error against float64 over all cases that were checked.",
        errors(result),
    ]
    return "\n\n".join(parts) + "\n"


def environment(result: dict[str, Any]) -> str:
    """What the figures were measured with."""
    machine, versions, rates = result["machine"], result["versions"], result["limit"]
    gpu = machine["gpu"]
    where = gpu["name"] if gpu and result["settings"]["device"] == "cuda" else _processor(machine)
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "commit")
    text = f"Measured on {result['date'][:10]}: {where}; {libraries}; commit {versions['commit'] or 'unknown'}; "
    text += f"inputs in {result['settings']['dtype']}."
    if rates["elements_per_second"] and any(row["suite"] != "kan" for row in result["rows"]):
        what = "exponentials" if result["settings"]["device"] == "cuda" else "elements of a scan on one core"
        text += f" Limit: {rates['elements_per_second'] / 1e9:.1f} G {what} per second;"
        text += f" a copy moves {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written."
    return text


def _processor(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])})"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def time_table(rows: list[Row]) -> str:
    """Cases by candidates."""
    return _table(rows, lambda row: f"{three_digits(1e3 * row['median_s'])} ({three_digits(row['ratio'])}x)")


def memory_table(rows: list[Row]) -> str:
    """The same for peak memory."""
    return _table(rows, lambda row: "–" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.0f}")  # noqa: RUF001


def limit_table(rows: list[Row]) -> str:
    """The limit of each case and how near each candidate comes to it."""
    return _table(
        rows,
        lambda row: f"{100 * row['limit_fraction']:.1f} %" if "limit_fraction" in row else "",
        ("limit, ms", lambda row: three_digits(1e3 * row["limit_s"]) if "limit_s" in row else ""),
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Markdown; the last `numbers` columns are numbers."""
    rule = "---|" * (len(head) - numbers) + "---:|" * numbers
    safe = [[cell.replace("|", "&#124;").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in safe)])


def _table(rows: list[Row], cell: Any, extra: tuple[str, Any] | None = None) -> str:
    names = _names(row for row in rows if row["status"] != "not measured")
    names = [n for n in names if any(r["candidate"] == n and r["status"] != "not run" for r in rows)]
    head, lines = ["case", *([extra[0]] if extra else []), *names], []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["candidate"]: row for row in rows if row["case"] == case}
        cells = [f"`{case}`"]
        if extra:
            cells.append(next((text for row in of_case.values() if (text := extra[1](row))), ""))
        for name in names:
            row = of_case.get(name)
            cells.append("" if row is None else cell(row) if row["status"] == "ok" else SHORT[row["status"]])
        lines.append(cells)
    return table(head, lines, len(head) - 1)


def layers(rows: list[Row], images: Iterable[str], on_gpu: set[str]) -> list[str]:
    """A table of candidates for each case of KANLinear, with the ratios to the bare product and to a peer."""
    if not rows:
        return []
    parts = [
        "## KANLinear",
        "Median milliseconds and their ratios; memory in MiB: the peak above the inputs, and what is saved for the "
        "backward pass beyond the input and the parameters; relative L2 errors against float64. `gemm` is the product "
        "alone, its matrix of bases being the input: the limit of any layer that computes bases and one dense product.",
    ]
    for case, threads in dict.fromkeys((row["case"], row["threads"]) for row in rows):
        of_case = [row for row in rows if row["case"] == case and row["threads"] == threads]
        where = "" if of_case[0]["device"] == "cuda" else f", {_threads(threads)}"
        parts += [f"### `{case}`, {of_case[0]['dtype']}{where}", layer_table(of_case), *notes(of_case)]
    parts += [f"![KANLinear of this run]({image})" for image in images if "-kan-" in image]
    missing = [case.name for case in CASES if case.suite == "kan" and case.name not in on_gpu]
    if missing:
        unknown = [[f"`{name}`", "not measured", "not measured"] for name in missing]
        parts.append(table(["case on a GPU", "forward", "forward and backward"], unknown, 2))
    return parts


def layer_table(rows: list[Row]) -> str:
    """Candidates by what was measured of them, in one case."""
    head = ["candidate"]
    for mode in MODES.values():
        head += [f"{mode.lower()}, ms", *BASES.values()]
    head += ["peak, forward", "peak, both", "saved", "error, output", "error, gradients"]
    lines = []
    for name in _names(row for row in rows if row["status"] != "not measured"):
        forward, training = (_only(rows, name, mode) for mode in MODES)
        cells = [name]
        for row in (forward, training):
            cells.append(three_digits(1e3 * row["median_s"]) if row["status"] == "ok" else SHORT[row["status"]])
            cells += [_times(row, _only(rows, base, row["mode"])) for base in BASES]
        cells += [_mebibytes(forward.get("peak_bytes")), _mebibytes(training.get("peak_bytes"))]
        cells.append(_mebibytes(training.get("saved_bytes")))
        found = training.get("errors") or forward.get("errors") or {}
        gradients = [error for of, error in found.items() if of != "output"]
        cells += [f"{found['output']:.1e}" if found else "", f"{max(gradients):.1e}" if gradients else ""]
        lines.append(cells)
    return table(head, lines, len(head) - 1)


def _only(rows: list[Row], name: str, mode: str) -> Row:
    absent = {"status": "not measured", "mode": mode}
    return next((row for row in rows if row["candidate"] == name and row["mode"] == mode), absent)


def _times(row: Row, base: Row) -> str:
    return f"{three_digits(row['median_s'] / base['median_s'])}x" if row["status"] == base["status"] == "ok" else ""


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def notes(rows: list[Row]) -> list[str]:
    """Why candidates have no time, each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(row["reason"] or row["status"], {})[row["candidate"]] = None
    lines = [f"* {reason[0].upper()}{reason[1:]}: {', '.join(names)}." for reason, names in reasons.items()]
    return ["\n".join(lines)] if lines else []


def errors(result: dict[str, Any]) -> str:
    """The worst errors of each candidate."""
    lines = []
    checked = [row for row in result["rows"] if "errors" in row]
    for name in _names(checked):
        for mode in MODES:
            rows = [row for row in checked if row["candidate"] == name and row["mode"] == mode]
            if not rows:
                continue
            outputs = [row["errors"]["output"] for row in rows]
            grads = [value for row in rows for key, value in row["errors"].items() if key != "output"]
            wrong = sum(row["status"] == "wrong" for row in rows)
            worst = f"{max(grads):.1e}" if grads else ""
            lines.append([name, MODES[mode].lower(), f"{max(outputs):.1e}", worst, str(wrong)])
    return table(["candidate", "mode", "output", "gradients", "not timed as wrong"], lines, 3)


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["candidate"] for row in rows))


def three_digits(value: float) -> str:
    """A number as tables show it."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def plot(result: dict[str, Any], stem: str, out: Path) -> list[str]:
    """Bars for the ops, curves for the scaling; the names of the files written."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "kan_mamba_layers", "font.size": 9, "axes.grid": True})
    written = []
    timed = [row for row in result["rows"] if row["status"] == "ok"]
    for suite in ("ops", "ops-b8"):
        for threads in sorted({row["threads"] for row in timed if row["suite"] == suite}):
            rows = [row for row in timed if row["suite"] == suite and row["threads"] == threads]
            milliseconds = [(row, 1e3 * row["median_s"]) for row in rows]
            written.append(_bars(milliseconds, "median, ms", out / f"{stem}-{suite}-t{threads}.svg"))
    for threads in sorted({row["threads"] for row in timed if row["suite"] == "kan"}):
        rows = [row for row in timed if row["suite"] == "kan" and row["threads"] == threads]
        products = {(row["case"], row["mode"]): row["median_s"] for row in rows if row["candidate"] == "gemm"}
        rows = [row for row in rows if row["candidate"] != "gemm" and (row["case"], row["mode"]) in products]
        if rows:
            ratios = [(row, row["median_s"] / products[row["case"], row["mode"]]) for row in rows]
            written.append(_bars(ratios, "median, in medians of gemm", out / f"{stem}-kan-t{threads}.svg"))
    for axis in AXES:
        rows = [row for row in timed if row["axis"] == axis]
        if rows:
            written.append(_curves(rows, axis, out / f"{stem}-scaling-{axis}.svg"))
    return written


def _bars(values: list[tuple[Row, float]], label: str, file: Path) -> str:
    import matplotlib.pyplot as plt

    rows = [row for row, _ in values]
    cases, names = list(dict.fromkeys(row["case"] for row in rows)), _names(rows)
    figure, panels = plt.subplots(1, 2, figsize=(11, 1 + 0.11 * len(cases) * (len(names) + 2)), sharey=True)
    for panel, (mode, title) in zip(panels, MODES.items(), strict=True):
        for i, name in enumerate(names):
            found = {r["case"]: value for r, value in values if r["candidate"] == name and r["mode"] == mode}
            places = [j + (i + 0.5) / (len(names) + 1) for j, case in enumerate(cases) if case in found]
            panel.barh(places, list(found.values()), 0.9 / (len(names) + 1), label=name, color=_colour(i))
        fastest = min((value for row, value in values if row["mode"] == mode), default=1)
        panel.set(xscale="log", title=title, xlabel=label, xlim=(fastest / 2, None))
    panels[0].set_yticks([j + 0.5 for j in range(len(cases))], cases)
    panels[0].invert_yaxis()
    return _finish(figure, panels[0], file)


def _curves(rows: list[Row], axis: str, file: Path) -> str:
    import matplotlib.pyplot as plt

    memory = any(row.get("peak_bytes") for row in rows)
    names = _names(rows)
    figure, grid = plt.subplots(2 if memory else 1, 2, figsize=(9, 7 if memory else 3.8), sharex=True, squeeze=False)
    for column, (mode, title) in enumerate(MODES.items()):
        for i, name in enumerate(names):
            of_name = [row for row in rows if row["candidate"] == name and row["mode"] == mode]
            style = {"marker": "o", "markersize": 4, "color": _colour(i), "label": name}
            where = [_place(row, axis) for row in of_name]
            grid[0, column].plot(where, [1e3 * row["median_s"] for row in of_name], **style)
            if memory:
                held = [row for row in of_name if row.get("peak_bytes")]
                places = [_place(row, axis) for row in held]
                grid[1, column].plot(places, [row["peak_bytes"] / 2**20 for row in held], **style)
        grid[0, column].set(title=title, ylabel="median, ms")
        grid[-1, column].set(xlabel=AXES[axis])
        if memory:
            grid[1, column].set(ylabel="peak memory, MiB")
    for panel in grid.flat:
        panel.set(xscale="log", yscale="log")
    return _finish(figure, grid[0, 0], file)


def _place(row: Row, axis: str) -> int:
    sizes = row["sizes"]
    return sizes["h"] * sizes["w"] if axis == "pixels" else row["threads"] if axis == "threads" else sizes[axis]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _finish(figure: Any, panel: Any, file: Path) -> str:
    import matplotlib.pyplot as plt

    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.01 + 0.03 * math.ceil(len(labels) / 4), 1, 1))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file.name
