"""The figures of the documentation are drawn by one command, and show what the code and the records say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "figures"
NAMES = (
    *("directions", "edges", "km_unet", "km_unet_pp", "memory"),
    *("receptive_fields", "scan_attention", "speed_kan", "speed_scans", "walks"),
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder, which is a program and no package."""
    monkeypatch.syspath_prepend(FOLDER)
    names = [path.stem for path in FOLDER.glob("*.py") if path.stem != "__main__"]
    try:
        yield {name: __import__(name) for name in names}
    finally:
        for name in names:
            sys.modules.pop(name, None)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.nightly  # the build of the documentation draws all of them in every run
def test_command(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER, tmp_path]
    subprocess.run(command, check=True, cwd=ROOT)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(NAMES)
    for path in tmp_path.iterdir():
        root = ElementTree.parse(path).getroot()
        assert sum(1 for _ in root.iter()) > 100, f"{path.name} is nearly empty"
        assert path.stat().st_size < 120_000
    subprocess.run([*command[:2], tmp_path / "again", "directions"], check=True, cwd=ROOT)
    assert (tmp_path / "again" / "directions.svg").read_bytes() == (tmp_path / "directions.svg").read_bytes()


def test_every_page_finds_its_figures() -> None:
    used = {
        name for name in NAMES for page in (ROOT / "docs").rglob("*.md") if f"_figures/{name}.svg" in page.read_text()
    }
    assert used == set(NAMES)


def test_architectures(figures: dict[str, ModuleType]) -> None:
    """Every node of the grid, and the sizes of 256 pixels halved five times."""
    found = texts(figures["architecture"].km_unet_pp())
    for i in range(5):
        for j in range(5 - i):
            assert sum(text.startswith(f"X[{i}, {j}]") for text in found) == 1
    assert not any(text.startswith("X[1, 4]") for text in found)
    found = texts(figures["architecture"].km_unet())
    for width, size in ((16, 128), (32, 64), (64, 32), (96, 16)):
        assert found.count(f"{width} channels\n{size} x {size}") == 2
    assert found.count("128 channels\n8 x 8") == 1


def test_directions(figures: dict[str, ModuleType]) -> None:
    """Each path visits every pixel once; the last two are the first two reversed."""
    paths = []
    for axes in figures["directions"].directions().axes:
        segments = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 2]
        steps = [tuple(segments[0][0]), *(tuple(end) for _, end in segments)]
        assert len(set(steps)) == len(steps) == 20
        paths.append(steps)
    assert paths[0][:6] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1)]
    assert paths[1][:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert paths[2] == paths[0][::-1] and paths[3] == paths[1][::-1]


def test_attention(figures: dict[str, ModuleType]) -> None:
    """A direction gives weight to the pixels that it visited before, and to no others."""
    sight = figures["sight"]
    shares = sight.scan_shares(sight.lesion(sight.SIZE, 0)) > 0  # q 1+k h w
    rows, columns = np.mgrid[: shares.shape[2], : shares.shape[3]]
    for (row, column), (total, *found) in zip(sight.PIXELS, shares, strict=True):
        above = (rows < row) | (rows == row) & (columns < column)
        left = (columns < column) | (columns == column) & (rows < row)
        own = (rows == row) & (columns == column)
        for share, seen in zip(found, (above, left, ~above & ~own, ~left & ~own), strict=True):
            assert not share[~seen].any() and share[seen].mean() > 0.5
        assert not total[own].any()


def test_half_of_a_field(figures: dict[str, ModuleType]) -> None:
    """The square around the centre of 9 x 9 equal pixels that holds at least half of them."""
    field = np.zeros((20, 20))
    field[6:15, 6:15] = 1
    assert figures["sight"].half_side(field) == 7  # 25 < 81 / 2 <= 49


def test_walks(figures: dict[str, ModuleType]) -> None:
    """Each path has 63 steps and jumps, between all 64 pixels."""
    module = figures["walks"]
    panels = module.walks().axes
    assert len(panels) == 2 * len(module.KINDS)
    for axes in panels:
        steps, jumps, _ = (line.get_xydata().tolist() for line in axes.lines)
        assert len(steps) // 3 + len(jumps) // 3 == 63
        assert len({tuple(pixel) for pixel in steps + jumps if pixel[0] == pixel[0]}) == 64


@pytest.mark.parametrize(("name", "record"), [("scans", "cpu"), ("layers", "cpu-kan")])
def test_ratios(figures: dict[str, ModuleType], name: str, record: str) -> None:
    """The numbers at the bars are the medians on record, or their ratios to ours."""
    speed = figures["speed"]
    found = json.loads((ROOT / "benchmarks" / "results" / f"{record}.json").read_text())["cases"]
    medians = {(case["case"], r["mode"], r["candidate"]): r.get("median_s") for case in found for r in case["rows"]}
    cases, candidates = (speed.SCAN_CASES, speed.SCANS) if name == "scans" else (speed.LAYER_CASES, speed.LAYERS)
    expected = []
    for case in cases:
        for mode in ("forward", "training"):
            own = medians[case, mode, "cpu"]
            expected.append(f"{own * 1e3:.3g} ms")
            others = (medians.get((case, mode, other)) for other in list(candidates)[1:])
            expected += ["not run" if other is None else f"{other / own:.3g} x" for other in others]
    assert texts(getattr(speed, name)()) == expected
