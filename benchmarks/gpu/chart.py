"""The times on a GPU as bars, ours in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Row, rows_of
from benchmarks.tables import three_digits

OURS = "triton"
PANELS = {"ops-b8": "Scans in four directions, 8 images", "kan": "KANLinear"}  # in bfloat16, forward and backward
# What is drawn, and its name: what a user would take, and what cannot be passed. The tables hold the rest.
DRAWN = {
    OURS: "this library",
    "chunked": "this library, PyTorch only",
    "VMamba CUDA": "VMamba, CUDA",
    "mamba_ssm CUDA": "mamba_ssm, CUDA",
    "compiled reference": "torch.compile",
    "efficient-kan": "efficient-kan",
    "gemm": "product alone",
}
LEFT_OUT = {"kan": ("chunked",)}
COLOUR, GREY = "#0072B2", "#b8bcc2"
ROW_HEIGHT = 0.165  # inches
GAP = 0.7  # of a row, between cases


def plot(day: Mapping[str, Any], file: Path) -> bool:
    """Write the bars; False where nothing of what they show was timed."""
    panels = {suite: rows for suite in PANELS if (rows := _rows(day, suite))}
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "kan_mamba_layers", "font.size": 8}):
        heights = [_height(rows) for rows in panels.values()]
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(7.2, ROW_HEIGHT * sum(heights) + 0.8 * len(panels)),
            height_ratios=heights,
            layout="constrained",
            squeeze=False,
        )
        for panel, (suite, rows) in zip(axes[:, 0], panels.items(), strict=True):
            _bars(panel, rows)
            panel.set_title(f"{PANELS[suite]}, bfloat16, forward and backward", loc="left", fontsize=10, pad=8)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        plt.close(figure)
    return True


def _rows(day: Mapping[str, Any], suite: str) -> list[Row]:
    speed = day["parts"].get("speed", {"cases": []})
    wanted = [name for name in DRAWN if name not in LEFT_OUT.get(suite, ())]
    rows = [
        row
        for row in rows_of(speed["cases"])
        if (row["suite"], row["dtype"], row["mode"], row["status"]) == (suite, "bfloat16", "training", "ok")
        and row["candidate"] in wanted
    ]
    ours = {row["case"] for row in rows if row["candidate"] == OURS}
    return [row for row in rows if row["case"] in ours]


def _height(rows: Sequence[Row]) -> float:
    """In rows: a line for each bar and for the name of each case."""
    return len(rows) + len({row["case"] for row in rows}) * (1 + GAP)


def _bars(panel: Any, rows: Sequence[Row]) -> None:
    """Cases one below the other, each with its candidates in the order of `DRAWN`."""
    from matplotlib.ticker import LogLocator

    place, ticks = 0.0, {}
    longest = max(1e3 * row["median_s"] for row in rows)
    shortest = min(1e3 * row["median_s"] for row in rows)
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["candidate"]: row for row in rows if row["case"] == case}
        panel.text(
            0, place, case_name(of_case[OURS]), transform=panel.get_yaxis_transform(), va="center", weight="bold"
        )
        place += 1
        for name in (name for name in DRAWN if name in of_case):
            milliseconds = 1e3 * of_case[name]["median_s"]
            ours = name == OURS
            panel.barh(place, milliseconds, 0.8, color=COLOUR if ours else GREY)
            ratio = of_case[name]["median_s"] / of_case[OURS]["median_s"]
            text = f"{three_digits(milliseconds)} ms" if ours else f"{three_digits(ratio)}x"
            panel.annotate(
                text,
                (milliseconds, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                color=COLOUR if ours else "#444",
            )
            ticks[place] = DRAWN[name]
            place += 1
        place += GAP
    panel.set_yticks(list(ticks), list(ticks.values()))
    panel.tick_params(axis="y", length=0)
    panel.set(xscale="log", xlim=(shortest / 2, longest * 2), ylim=(place - GAP - 0.3, -0.7))
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")
    panel.set_xlabel("median, ms; beside the bars, multiples of this library's time")
    panel.set_axisbelow(True)
    panel.grid(axis="x", color="#e4e6e9")
    panel.spines[["top", "right", "left"]].set_visible(False)


def case_name(row: Row) -> str:
    """The sizes of a case in words."""
    sizes = row["sizes"]
    if row["suite"] == "kan":
        return f"{sizes['rows']:,} rows, {sizes['in']} features"
    states = "1 state" if sizes["n"] == 1 else f"{sizes['n']} states"
    return f"{sizes['h']}x{sizes['w']}, {sizes['d']} channels, {states}"
