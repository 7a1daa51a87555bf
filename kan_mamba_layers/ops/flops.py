"""FLOP formulas of the fused ops for PyTorch's counter, which is not imported here, since it imports Triton."""

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Register a formula of the shapes of ``operator``'s arguments, for every counter from now on."""
    _formulas[operator] = formula
    count_flops()


def count_flops() -> None:
    """Register our formulas with the counter, if imported, and with active counters, which copied the registry."""
    counter = sys.modules.get(_COUNTER)
    if counter is None:
        return
    # Not by register_flop_formula: in PyTorch 2.4 it registers overloads, which the counter does not look up.
    for operator in _formulas.keys() - counter.flop_registry.keys():
        counter.flop_registry[operator] = counter.shape_wrapper(_formulas[operator])
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", {})
        for operator in _formulas.keys() - registry.keys():  # a formula of custom_mapping stays
            registry[operator] = counter.flop_registry[operator]
