"""Rows of a record as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import pandas as pd

from benchmarks.record import Row, times

SUITES = {
    "ops": "Scans, batch 1",
    "ops-b8": "Scans, batch 8",
    "blocks": "SS2D",
    "models": "Models",
    "scaling": "Scaling",
    "kan": "KANLinear",
}
MODES = {"forward": "forward", "training": "forward and backward"}
BASES = {"gemm": "of gemm", "efficient-kan": "of efficient-kan"}  # what layers are compared with, and the columns
SHORT = {"not run": "–", "not measured": "–", "wrong": "wrong", "failed": "failed"}  # noqa: RUF001


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Markdown; the last `numbers` columns are numbers."""
    rule = "---|" * (len(head) - numbers) + "---:|" * numbers
    safe = [[cell.replace("|", "&#124;").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in safe)])


def measurements(rows: list[Row]) -> Iterator[str]:
    """Times, shares of the limit, memory and errors: a section for each suite, dtype, number of threads and mode."""
    yield (
        "Times are median milliseconds, with the ratio to the first column where that has a time; of two runs both "
        "are given. Memory is the peak above the inputs, in MiB. Errors are relative L2 errors against float64."
    )
    for suite, title in SUITES.items():
        of_suite = [row for row in rows if row["suite"] == suite]
        for dtype, where in dict.fromkeys((row["dtype"], _threads(row)) for row in of_suite):
            found = [row for row in of_suite if (row["dtype"], _threads(row)) == (dtype, where)]
            if suite == "kan":
                yield from _layers(found, f"{dtype}{where}")
                continue
            for mode, name in MODES.items():
                of_mode = [row for row in found if row["mode"] == mode]
                if not of_mode:
                    continue
                yield f"## {title}, {dtype}, {name}{where}"
                yield times_table(of_mode)
                yield from notes(of_mode)
                if mode == "forward" and any("limit_s" in row for row in of_mode):
                    yield "Share of the physical limit:"
                    yield pivot(of_mode, lambda row: f"{100 * row['limit_s'] / row['median_s']:.1f} %", limit=True)
                if any(row.get("peak_bytes") is not None for row in of_mode):
                    yield "Peak memory:"
                    yield pivot(of_mode, lambda row: mebibytes(row.get("peak_bytes")))
    if any(row["errors"] for row in rows):
        yield "## Largest errors"
        yield errors(rows)


def _threads(row: Row) -> str:
    if row["device"] == "cuda":
        return ""
    return ", 1 thread" if row["threads"] == 1 else f", {row['threads']} threads"


def times_table(rows: list[Row]) -> str:
    """Milliseconds, and ratios to the first column in the cases in which that was timed."""
    first = columns(rows)[:1]
    bases = {row["case"]: row for row in rows if row["candidate"] in first and row["status"] == "ok"}

    def cell(row: Row) -> str:
        text = span(1e3 * t for t in times(row))
        if row["case"] not in bases:
            return text
        ratios = (t / b for t, b in zip(times(row), times(bases[row["case"]]), strict=True))
        return f"{text} ({span(ratios)}x)"

    return pivot(rows, cell)


def columns(rows: list[Row]) -> list[str]:
    """The candidates that were run on one case at least."""
    tried = {row["candidate"] for row in rows if row["status"] not in ("not run", "not measured")}
    return [name for name in dict.fromkeys(row["candidate"] for row in rows) if name in tried]


def pivot(rows: list[Row], cell: Callable[[Row], str], limit: bool = False) -> str:
    """Cases by the candidates that were run on one of them at least."""
    frame = pd.DataFrame(rows)
    frame["cell"] = [cell(row) if row["status"] == "ok" else SHORT[row["status"]] for row in rows]
    names = columns(rows)
    wide = frame.pivot(index="case", columns="candidate", values="cell").reindex(frame.case.unique(), columns=names)
    if limit:
        wide.insert(0, "limit, ms", (1e3 * frame.groupby("case").limit_s.first()).map(three_digits))
    wide = wide.fillna("").reset_index()
    return table(list(wide), [[f"`{case}`", *cells] for case, *cells in wide.values], len(names) + limit)


def _layers(rows: list[Row], where: str) -> Iterator[str]:
    """A table of candidates for each case of KANLinear."""
    yield f"## KANLinear, {where}"
    yield (
        "`gemm` is the product alone, its matrix of bases being the input: the limit of any layer that computes bases "
        "and one dense product. `saved` is what is kept for the backward pass beyond the input and the parameters."
    )
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        yield f"### `{case}`"
        yield layer_table(of_case)
        yield from notes(of_case)


def layer_table(rows: list[Row]) -> str:
    """Candidates by what was measured of them, in one case."""
    head = ["candidate", *(cell for mode in MODES.values() for cell in (f"{mode}, ms", *BASES.values()))]
    head += ["peak, forward", "peak, both", "saved", "error, output", "error, gradients"]
    found = {(row["candidate"], row["mode"]): row for row in rows}
    absent: Row = {"status": "not measured", "errors": {}}
    lines = []
    for name in dict.fromkeys(row["candidate"] for row in rows if row["status"] != "not measured"):
        cells = [name]
        for mode in MODES:
            row = found.get((name, mode), absent)
            cells.append(three_digits(1e3 * row["median_s"]) if row["status"] == "ok" else SHORT[row["status"]])
            for base in (found.get((base, mode), absent) for base in BASES):
                both = row["status"] == base["status"] == "ok"
                cells.append(f"{three_digits(row['median_s'] / base['median_s'])}x" if both else "")
        forward, training = (found.get((name, mode), absent) for mode in MODES)
        cells += [mebibytes(b) for b in (forward.get("peak_bytes"), training.get("peak_bytes"))]
        worst = training["errors"] or forward["errors"]
        cells += [mebibytes(training.get("saved_bytes")), *(_error(worst.get(of)) for of in ("output", "gradients"))]
        lines.append(cells)
    return table(head, lines, len(head) - 1)


def notes(rows: list[Row]) -> list[str]:
    """Why candidates have no time, each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(row["reason"] or row["status"], {})[row["candidate"]] = None
    lines = [f"* {reason[0].upper()}{reason[1:]}: {', '.join(names)}." for reason, names in reasons.items()]
    return ["\n".join(lines)] if lines else []


def errors(rows: list[Row]) -> str:
    """The worst errors of each candidate over all cases that were checked."""
    checked = [{**row, "output": None, "gradients": None, **row["errors"]} for row in rows if row["errors"]]
    frame = pd.DataFrame(checked).assign(wrong=lambda frame: frame.status == "wrong")
    groups = frame.groupby(["candidate", "dtype"], sort=False)
    worst = groups.agg(output=("output", "max"), gradients=("gradients", "max"), wrong=("wrong", "sum"))
    lines = [[*key, _error(output), _error(grad), str(wrong)] for key, output, grad, wrong in worst.itertuples()]
    return table(["candidate", "dtype", "output", "gradients", "refused as wrong"], lines, 3)


def _error(value: float | None) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.1e}"


def mebibytes(count: int | None) -> str:
    """Bytes as tables show them."""
    return "" if count is None or pd.isna(count) else f"{count / 2**20:.1f}"


def span(values: Iterable[float]) -> str:
    """One number, or the lowest and the highest."""
    return " to ".join(dict.fromkeys(map(three_digits, sorted(values))))


def three_digits(value: float) -> str:
    """A number as tables show it."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"
