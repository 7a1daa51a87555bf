"""Times of the recorded runs: horizontal bars on a log axis, ours in one colour, the ratio to ours at each end."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import INK, OTHERS, OURS, QUIET

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"
OWN = "kan_mamba_layers"
SCANS = {
    "cpu": OWN,
    "mambapy pscan": "mambapy (parallel scan)",
    "VMamba selective_scan_torch": "VMamba (PyTorch)",
    "mamba_ssm selective_scan_ref": "mamba_ssm (reference)",
}
SCAN_CASES = {
    "cross-b1-d32-128x128-n16-r1": "128 x 128 pixels, 32 channels",
    "cross-b1-d64-64x64-n16-r2": "64 x 64, 64",
    "cross-b1-d256-32x32-n16-r8": "32 x 32, 256",
    "cross-b1-d320-16x16-n16-r10": "16 x 16, 320",
}
LAYERS = {
    "cpu": OWN,
    "fast-kan": "fast-kan (Gaussian bases)",
    "compiled efficient-kan": "efficient-kan, compiled",
    "efficient-kan": "efficient-kan",
}
LAYER_CASES = {
    "kan-65536x64-64-g5": "65,536 rows, 64 to 64 features",
    "kan-16384x128-128-g5": "16,384 rows, 128 to 128",
    "kan-4096x256-256-g5": "4,096 rows, 256 to 256",
    "kan-1024x160-160-g5": "1,024 rows, 160 to 160",
}
MODES = {"forward": "inference", "training": "training step"}


def scans() -> Figure:
    """The scan of one image in four directions; the dashed line is the least time of its arithmetic."""
    rows = _rows("cpu")
    threads = rows[0]["threads"]
    title = f"Four-direction scan of one image, {threads} threads, float32, 16 states; dashed: limit of the arithmetic"
    return _figure(rows, SCAN_CASES, SCANS, lambda case, mode, rows: rows["cpu", case, mode].get("limit_s"), title)


def layers() -> Figure:
    """A KAN layer; the dashed line is the time of the dense product that the layer is equal to."""
    rows = _rows("cpu-kan")
    threads = rows[0]["threads"]
    title = f"KAN layer, cubic splines on 5 intervals, {threads} thread, float32; dashed: the dense product"
    return _figure(rows, LAYER_CASES, LAYERS, lambda case, mode, rows: rows["gemm", case, mode]["median_s"], title)


def memory() -> Figure:
    """Peak memory of a training step above its inputs, against the number of pixels, beside a peer."""
    rows = [r for r in _rows("cpu-memory") if r.get("peak_bytes")]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    lines = {"cpu": (OURS, "backend cpu"), "chunked": (QUIET, "backend chunked (PyTorch)")}
    lines["mambapy pscan"] = (OTHERS, "mambapy, parallel scan")
    for name, (colour, label) in lines.items():
        points = [r for r in rows if r["candidate"] == name and r["mode"] == "training"]
        pixels = [r["sizes"]["h"] * r["sizes"]["w"] for r in points]
        axes.plot(pixels, [r["peak_bytes"] / 2**20 for r in points], "o-", color=colour, lw=2.2, ms=5)
        last = (pixels[-1], points[-1]["peak_bytes"] / 2**20)
        axes.annotate(label, last, (8, 0), textcoords="offset points", va="center", color=INK)
    axes.set(xscale="log", yscale="log", xlabel="pixels of the image", ylabel="peak memory, MiB")
    axes.set_xlim(right=12 * pixels[-1])  # room for the names
    axes.set_title("Training step of the scan, 32 channels, 16 states", loc="left", fontweight="bold")
    axes.grid()
    return figure


def _rows(name: str) -> list[dict[str, Any]]:
    """One for each case, mode and candidate that was timed."""
    cases = json.loads((RECORDS / f"{name}.json").read_text())["cases"]
    return [{**case, **row} for case in cases for row in case["rows"] if "median_s" in row]


def _figure(
    timed: list[dict[str, Any]], cases: dict[str, str], candidates: dict[str, str], bound: Any, title: str
) -> Figure:
    rows = {(r["candidate"], r["case"], r["mode"]): r for r in timed}
    figure = Figure(figsize=(11, 1.1 + 1.12 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 2, sharex="col", squeeze=False)
    for panels, (case, label) in zip(grid, cases.items(), strict=True):
        for axes, mode in zip(panels, MODES, strict=True):
            found = {label: rows.get((name, case, mode)) for name, label in candidates.items()}
            times = {label: row["median_s"] if row else None for label, row in found.items()}
            _bars(axes, times, bound(case, mode, rows))
        panels[1].set_yticklabels([])
        panels[0].set_title(label, loc="left", fontsize=9.5)
    for axes, mode in zip(grid[-1], MODES.values(), strict=True):
        axes.set_xlabel(f"{mode}, milliseconds")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _bars(axes: Axes, times: dict[str, float | None], bound: float | None) -> None:
    own = times[OWN]
    assert own is not None, "the record has no time of our own"
    milliseconds = [1e3 * (seconds or 0) for seconds in times.values()]
    axes.barh(range(len(times)), milliseconds, 0.72, color=[OURS if name == OWN else OTHERS for name in times])
    for row, (name, seconds) in enumerate(times.items()):
        text = "not run" if seconds is None else f"{seconds / own:.3g} x"
        text = f"{1e3 * own:.3g} ms" if name == OWN else text
        axes.annotate(
            text, (1e3 * (seconds or own), row), (4, 0), textcoords="offset points", va="center", fontsize=8.5,
            fontweight="bold" if name == OWN else "normal", bbox={"fc": "white", "ec": "none", "pad": 0.6},
        )  # fmt: skip
    if bound:
        axes.axvline(1e3 * bound, color=QUIET, ls=(0, (4, 2)), lw=1.2)
    axes.set_yticks(range(len(times)), list(times), fontsize=8.5)
    axes.set(xscale="log")
    axes.margins(x=0.16)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
