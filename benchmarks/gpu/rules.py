"""Rules by which the scan's plan could be chosen, compared by what `tune` has timed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from itertools import product
from typing import Any

# values, enough, wanted, pair_steps: the fields of the launcher's Rule
RULES = [
    rule
    for rule in product((256, 512, 1024, 2048), (4, 8, 16, 32), (8, 16, 32, 64), (32, 64, 1 << 20))
    if rule[2] >= rule[1]
]
NAME = re.compile(r"time/scan (forward|backward)/b(\d+) (\d+)x(\d+) d(\d+) n(\d+) r(\d+)")


def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:  # b h w d n r -> b l d k g n
    """What a plan is chosen by."""
    b, h, w, d, n, _ = shape
    return b, h * w, d, 4, 1, n


def best_rules(ends: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each pass the rule with the least mean time, beside today's rule.

    Times are multiples of that of the shape's best plan, and their mean is geometric. `ends` are the records of tasks.
    """
    found = {}
    for kind in ("forward", "backward"):
        shapes = {
            tuple(map(int, match.groups()[1:])): end
            for name, end in ends.items()
            if (match := NAME.fullmatch(name)) and match.group(1) == kind and end.get("times")
        }
        if shapes:
            found[kind] = _compare(shapes, kind == "backward")
    return found


def _compare(shapes: Mapping[tuple[int, ...], Mapping[str, Any]], back: bool) -> dict[str, Any]:
    from benchmarks.gpu.launchers import scan  # which a report without rules does not need, nor Triton

    today = scan.BACKWARD if back else scan.FORWARD
    ratios: dict[tuple[int, ...], list[float]] = {tuple(today): []}
    for shape, end in shapes.items():
        times = {tuple(plan): seconds for plan, seconds in end["times"]}
        fastest = min(times.values())
        for rule in (tuple(today), *RULES):
            plan = scan.choose_plan(scan.Sizes(*sizes(shape)), end["multiprocessors"], back=back, rule=scan.Rule(*rule))
            ratios.setdefault(rule, []).append(times.get(tuple(plan), math.inf) / fastest)
    means = {rule: statistics.geometric_mean(values) for rule, values in ratios.items()}
    best = min(means, key=lambda rule: means[rule])
    return {
        "fields": list(scan.Rule._fields),
        "shapes": len(shapes),
        "best": list(best),
        "best_over_fastest": means[best],
        "today": list(today),
        "today_over_fastest": means[tuple(today)],
        "worst_shape_today": max(ratios[tuple(today)]),
    }
