"""Makes `examples/` importable and builds small data folders."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from segmentation.data.demo import draw, subject_of  # noqa: E402
from segmentation.tasks import get_task  # noqa: E402

Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of the examples."""
    return EXAMPLES


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """`folder(task, number)` writes demo images in the layout that users bring: images/ masks/ items.csv."""

    def write(name: str = "lumbar_spine", number: int = 9, size: tuple[int, int] = (40, 33)) -> Path:
        root = tmp_path / "data"
        values = [0, *get_task(name).labels]
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
        with (root / "items.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["id", "file", "group"])
            for index in range(number):
                image, mask = draw(name, 0, index, size)
                image.save(root / "images" / f"{index}.png")
                Image.fromarray(mask).point(values + [0] * (256 - len(values))).save(root / "masks" / f"{index}.png")
                table.writerow([index, f"{index}.png", subject_of(index)])
        return root

    return write
