"""The recipes run as a newcomer runs them, and what they print is what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from helpers import fresh_process

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = ("drop_in", "edges", "sequence")


def run(recipe: str, *arguments: object) -> str:
    """What `python examples/RECIPE.py ARGUMENTS` prints."""
    path = EXAMPLES / f"{recipe}.py"
    code = f"""
import runpy, sys
sys.argv = {[str(path), *map(str, arguments)]}
sys.path[0] = {str(EXAMPLES)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return fresh_process(code, OMP_NUM_THREADS="1")  # other tests run beside this one


def number(pattern: str, text: str) -> float:
    found = re.findall(pattern + r"\D*?([\d.]+)", text, re.MULTILINE)
    assert len(found) == 1, f"{pattern!r} is there {len(found)} times in\n{text}"
    return float(found[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_is_short_and_listed(recipe: str) -> None:
    assert len((EXAMPLES / f"{recipe}.py").read_text(encoding="utf-8").splitlines()) < 80
    assert f"python examples/{recipe}.py" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_drop_in_trains_both_networks() -> None:
    text = run("drop_in", 25)
    for kind in ("plain", "extended"):
        scores = re.findall(rf"^{kind} .*loss ([\d.]+), Dice ([\d.]+)$", text, re.MULTILINE)
        (loss_before, dice_before), (loss_after, dice_after) = ((float(a), float(b)) for a, b in scores)
        assert loss_after < 0.75 * loss_before
        assert dice_after > max(0.75, dice_before + 0.3)


def test_edges_finds_the_formula_and_draws_it(tmp_path: Path) -> None:
    figure = tmp_path / "deep" / "edges.png"
    text = run("edges", figure)
    errors = [number(name, text) for name in ("error after Adam", "with  5 intervals", "with 10 int", "with 20 int")]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * number("spread of the data", text)
    assert number("error after pruning", text) <= 2 * errors[-1]
    assert "2 of 4 edges kept" in text
    drawn = Image.open(figure).convert("L")
    assert min(drawn.size) > 300
    low, high = drawn.getextrema()
    assert high - low > 100


def test_sequence_remembers() -> None:
    accuracy = [float(value) for value in re.findall(r"steps: ([\d.]+)%", run("sequence", 200))]
    assert accuracy[0] < 20  # an untrained network guesses among 8 letters
    assert accuracy[-1] > 60  # all of them after 300 steps
