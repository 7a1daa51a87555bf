"""Draw the figures of the documentation: ``python docs/figures FOLDER [NAME ...]``; by default all of them."""

import argparse
from pathlib import Path

import architecture
import directions
import learned
import sight
import speed
import walks
from palette import use_style

FIGURES = {
    "km_unet": architecture.km_unet,
    "km_unet_pp": architecture.km_unet_pp,
    "directions": directions.directions,
    "walks": walks.walks,
    "edges": learned.edges,
    "receptive_fields": sight.receptive_fields,
    "scan_attention": sight.attention,
    "speed_scans": speed.scans,
    "speed_kan": speed.layers,
    "memory": speed.memory,
}


def draw(folder: Path, names: list[str]) -> None:
    """Write each figure as SVG."""
    use_style()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        FIGURES[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], default=[])
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.names or list(FIGURES))
