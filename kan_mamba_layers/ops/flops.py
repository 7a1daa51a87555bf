"""Tell PyTorch's FLOP counter the cost of our operators, without importing it: it would bring Triton along."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Register a formula of the shapes of ``operator``'s arguments, now or as soon as the counter is imported.

    The counter copies the formulas when it is made, so they must be there before, whatever is imported first.
    """
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(operator)(formula)
    else:
        _formulas[operator] = formula


class _Finder(MetaPathFinder):
    """Waits for the import of the counter, and then steps aside."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads the counter as its own loader does, and registers the formulas."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for operator, formula in _formulas.items():
            module.register_flop_formula(operator)(formula)


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
