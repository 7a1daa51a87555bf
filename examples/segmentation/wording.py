"""Numbers and facts of an experiment as short pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]  # what `comparison.compare` gives
Numbers = dict[str, Any]  # a part of it

SIDES = {"test": "test", "val": "validation"}
UNKNOWN = "n/a"


def code(text: str) -> str:
    """Names, numbers of commits and the like, as they are."""
    return f"`{text}`"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{value:+.3f}"


def plus_minus(values: Numbers, digits: int = 3) -> str:
    """Mean ± deviation over seeds, where there are several."""
    mean, deviation = (number(values[name], digits) for name in ("mean", "sd_seeds"))
    return mean if values["sd_seeds"] is None else f"{mean} ± {deviation}"


def interval(difference: Numbers) -> str:
    """The bounds of a paired difference."""
    return UNKNOWN if difference["low"] is None else f"{signed(difference['low'])} to {signed(difference['high'])}"


def count(many: int, thing: str) -> str:
    """1 seed, 2 seeds."""
    return f"{many} {thing}" if many == 1 else f"{many} {thing}s"


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def join(parts: Sequence[str]) -> str:
    """Paragraphs, without the empty ones."""
    return "\n\n".join(part for part in parts if part) + "\n"


def seeds(numbers: Sequence[int]) -> str:
    """one seed (0), or: each of 3 seeds (0, 1, 2)"""
    shown = ", ".join(str(seed) for seed in numbers)
    return f"one seed ({shown})" if len(numbers) == 1 else f"each of {len(numbers)} seeds ({shown})"


def epochs(results: Results) -> str:
    """How long the runs trained; a range where early stopping ended some of them."""
    lengths = [length for variant in results["variants"].values() for length in variant["epochs"]]
    return count(lengths[0], "epoch") if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)} epochs"


def over_seeds(results: Results) -> str:
    """What the ± of the tables is."""
    if len(results["seeds"]) == 1:
        return "of one seed, so without a deviation over seeds"
    return "then mean ± standard deviation over the seeds"


def on_cpu(results: Results) -> bool:
    """Whether a CPU trained any of the runs."""
    return any(name.startswith("cpu") for name in results["device"])


def device(results: Results) -> str:
    """What the runs were trained on."""
    names = [f"a CPU ({name.removeprefix('cpu, ')})" if name.startswith("cpu") else name for name in results["device"]]
    return listed(names)


def overrides(results: Results) -> list[tuple[str, str, Any]]:
    """(variant, setting, value) where one variant was trained otherwise than the others."""
    return [(name, key, value) for name, v in results["variants"].items() for key, value in v["train"].items()]
