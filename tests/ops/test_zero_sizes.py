"""Sizes of zero: every backend gives the values and gradients of `reference`, or all refuse the call by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import nan_filled_empty, says
from kan_mamba_layers import EMA, SS2D, cross_selective_scan, kan_linear, selective_scan
from ops.kan_linear.calls import kan_inputs
from ops.selective_scan.calls import image_inputs, line_inputs

# Makes the inputs, their sizes, and those of the sizes that must not be zero.
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], dict[str, int], tuple[str, ...]]] = {
    "selective_scan": (selective_scan, line_inputs, {"b": 2, "d": 4, "length": 3, "n": 2}, ("length",)),
    "cross_selective_scan": (
        cross_selective_scan,
        image_inputs,
        {"b": 2, "h": 2, "w": 3, "d": 3, "r": 2, "n": 2},
        ("h", "w"),
    ),
    "kan_linear": (kan_linear, kan_inputs, {"rows": 3, "i": 2, "o": 4}, ()),
}


def combinations(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """The sizes with any of them zero."""
    for keep in product((False, True), repeat=len(sizes)):
        if not all(keep):
            yield {name: size * kept for (name, size), kept in zip(sizes.items(), keep, strict=True)}


def results(op: Callable[..., Any], inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The output and the gradients of all arguments but the knots; a gradient that is None is zero."""
    leaves = {name: x.detach().requires_grad_(name != "grid") for name, x in inputs.items()}
    y = op(**leaves, backend=backend)
    y.sum().backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()]
    return [y.detach(), *grads]


FORMS = [{}, {"B": "dn"}, {"B": "dn", "C": "dn"}, {"B": "bgnl"}]  # of the coefficients of selective_scan
CASES = [("selective_scan", forms) for forms in FORMS] + [("cross_selective_scan", {}), ("kan_linear", {})]


@pytest.mark.parametrize(("op", "forms"), CASES, ids=str)
def test_every_combination(op: str, forms: dict[str, str]) -> None:
    function, make, sizes, least_one = CALLS[op]
    for zeros in combinations(sizes):
        inputs = make(**zeros, **forms)
        if any(zeros[name] == 0 for name in least_one):
            for backend in ("auto", "cpu", "chunked", "reference"):
                with pytest.raises(ValueError, match=says("(x|u) must have at least one (pixel|time step)", "pass")):
                    function(**inputs, backend=backend)
            continue
        with nan_filled_empty():
            expected = results(function, inputs, "reference")
            for backend in ("auto", "cpu", "chunked"):
                for value, want in zip(results(function, inputs, backend), expected, strict=True):
                    torch.testing.assert_close(value, want, atol=1e-5, rtol=1e-5, msg=f"{backend}, {zeros}")


@pytest.mark.parametrize("layer", [SS2D(4), EMA(8)], ids=["SS2D", "EMA"])
def test_layers_refuse_an_image_without_pixels(layer: torch.nn.Module) -> None:
    shape = {SS2D: (2, 0, 3, 4), EMA: (2, 8, 0, 3)}[type(layer)]
    with pytest.raises(ValueError, match=says("x must have at least one pixel", "pass h >= 1 and w >= 1")):
        layer(torch.zeros(shape))
