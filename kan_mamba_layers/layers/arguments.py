"""Pass a constructor's arguments on by name, without writing them out again."""

import inspect
from collections.abc import Mapping
from typing import Any


def own_arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, in order. It passes its ``locals()`` before it makes any of its own."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def options_for(module: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` that ``module`` takes as keyword-only arguments."""
    return {name: arguments[name] for name in inspect.getfullargspec(module).kwonlyargs if name in arguments}
