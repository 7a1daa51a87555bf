"""One colour for everything that is drawn: a class has the same in every picture, and so has a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count

import numpy as np
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgb

# Told apart on grey and on skin, also by eyes without one of the three kinds of cones (tests/examples/test_figures.py).
CLASSES = ("#00ffff", "#ffdb00", "#ff006d", "#9292ff", "#dbffb6", "#926d00", "#9200ff", "#b62492")
# Pixels of the truth alone, of the prediction alone, and of two different classes.
MISSED, EXTRA, MISTAKEN = "#3fa7ff", "#ffb000", "#e0258a"

# As in docs/figures/palette.py: ours in its warm colours, the baselines in a cold one and in grey.
NETWORKS = {
    "unet": "#6b7682",
    "unet_pp": "#2d6cb5",
    "km_unet": "#f0a92e",
    "km_unet_pp": "#c8442f",
    "u_kan": "#8fc9a0",
}
FAMILIES = ("km_unet_pp", "km_unet", "u_kan")  # come in several sizes, which are shades of one colour
OTHERS = ("#8a4fb0", "#1d2733", "#b5739d", "#7a8f2a", "#7fb4e6")

GOLDEN = 0.618  # of the circle of hues: never comes back to where it was


def class_colour(number: int) -> str:
    """The colour of class `number` = 1, 2, ...; there is one for any number of classes."""
    if number <= len(CLASSES):
        return CLASSES[number - 1]
    return to_hex(tuple(hsv_to_rgb((GOLDEN * number % 1, 0.55, 0.95))))


def network_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, no two alike: networks that are known by name keep theirs whatever stands beside them."""
    others, seen, colours = count(), Counter[str](), {}
    for name in names:
        family = next((known for known in FAMILIES if name.startswith(known)), name)
        base = NETWORKS.get(family) or OTHERS[next(others) % len(OTHERS)]
        colours[name] = _shade(base, seen[base])
        seen[base] += 1
    return colours


def _shade(colour: str, number: int) -> str:
    """The colour itself, then lighter and darker ones in turn."""
    share = 1 - 0.6 ** ((number + 1) // 2)
    towards = np.ones(3) if number % 2 else np.zeros(3)
    return to_hex(tuple((1 - share) * np.array(to_rgb(colour)) + share * towards))
