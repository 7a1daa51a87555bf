"""Make the stand-ins importable, and remove them again."""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from kan_mamba_layers import __version__
from kan_mamba_layers.compat.contents import MODULES, YIELDING

_ORIGIN = "kan_mamba_layers.compat"


def _contents(module: str) -> list[str]:
    below = [name.removeprefix(f"{module}.") for name in MODULES if name.startswith(f"{module}.")]
    return [*MODULES[module], *(name for name in below if "." not in name)]


def _missing(module: str, name: str) -> str:
    return (
        f"no {name!r} in the stand-in {module!r} of {_ORIGIN}, which has {', '.join(_contents(module))}; "
        "for anything else install the original package"
    )


class _StandIns(MetaPathFinder, Loader):
    """Find and load the stand-ins through the ordinary import machinery."""

    force = False
    keep = False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if self.keep and _is_kept(fullname):
            return None
        if not self.force and fullname in YIELDING and PathFinder.find_spec(fullname) is not None:
            return None
        if fullname in MODULES or (self.force and _key(fullname) in YIELDING):
            # All are packages, even those without submodules: only for a package does `from m import x` look for m.x.
            return ModuleSpec(fullname, self, origin=_ORIGIN, is_package=True)
        parent, _, name = fullname.rpartition(".")
        if parent in MODULES:
            # For any other package importlib.util.find_spec returns None: that is the price of the message.
            raise ModuleNotFoundError(_missing(parent, name), name=parent)
        return None

    def exec_module(self, module: ModuleType) -> None:
        key = _key(module.__name__)

        def missing(name: str) -> Any:
            raise AttributeError(_missing(key, name), name=name, obj=module)

        module.__doc__ = f"Stand-in for {module.__name__}, made by {_ORIGIN}."
        contents = {"__version__": f"0+kan.mamba.layers.{__version__}", "__getattr__": missing}
        vars(module).update(contents, **MODULES[key])


def _key(module: str) -> str:
    """Its name in the list of stand-ins: a file such as ``csm_triton`` may lie in any package."""
    last = module.rpartition(".")[2]
    return last if last in YIELDING else module


_FINDER = _StandIns()
_KERNELS = tuple(f"{name}." for name in MODULES if name.startswith("mamba_ssm.ops.triton."))


def _is_kept(name: str) -> bool:
    """Whether a module is of ``mamba_ssm`` itself, and none of its files in Triton or a name in one."""
    return name.partition(".")[0] == "mamba_ssm" and not f"{name}.".startswith(_KERNELS)


def _is_ours(module: ModuleType | None) -> bool:
    return getattr(getattr(module, "__spec__", None), "loader", None) is _FINDER


def _original(name: str) -> str | None:
    """Where a module of this name that is not ours comes from; None if there is no such module."""
    module = sys.modules.get(name)
    if module is not None:
        return None if _is_ours(module) else "already imported"
    spec = importlib.util.find_spec(name)
    # A folder without __init__.py, such as the sources of VMamba's kernels, is not an installed package.
    return None if spec is None or spec.loader is _FINDER or spec.origin is None else f"found at {spec.origin}"


def _forget(name: str) -> None:
    """Remove a module, also from its parent, where ``from parent import name`` looks first."""
    module = sys.modules.pop(name)
    parent, _, last = name.rpartition(".")
    above = sys.modules.get(parent)  # may be None, which blocks an import
    if getattr(above, last, None) is module:
        delattr(above, last)


def install(*, force: bool = False, keep: bool = False) -> None:
    """Make the stand-ins importable in this process; a second call with the same arguments changes nothing.

    Call it before the code that imports ``mamba_ssm``, ``causal_conv1d``, ``selective_scan`` or one of the extensions
    ``selective_scan_cuda*``. Asking a stand-in for a name that it lacks raises ImportError or AttributeError and lists
    the names that it has.

    Args:
        force: whether the stand-ins also take the place of real modules of these names, such as a copy of
            ``mamba_ssm`` in a repository, or VMamba's file ``csm_triton`` in any package. Modules imported before are
            removed from ``sys.modules``.
        keep: whether a ``mamba_ssm`` that is installed, or lies in the repository, stays, and only its compiled parts
            are replaced: the extensions, ``causal_conv1d`` and the files below ``mamba_ssm.ops.triton`` that have
            stand-ins. For repositories that change ``mamba_ssm``. Without such a package there are all stand-ins.

    Raises:
        ImportError: a real module of one of these names is installed or imported, and neither ``force`` nor ``keep``
            allows it; or ``keep`` comes too late, after a call that put a stand-in in the place of ``mamba_ssm``.

    Example:
        >>> from kan_mamba_layers import compat
        >>> compat.install()  # doctest: +SKIP
        >>> from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # doctest: +SKIP
    """
    hidden = PathFinder.find_spec("mamba_ssm") if _is_ours(sys.modules.get("mamba_ssm")) else None
    if keep and hidden is not None and hidden.origin is not None:
        raise ImportError("keep=True comes after an install() that replaced mamba_ssm; call uninstall() first")
    keep = keep and _original("mamba_ssm") is not None
    replaced = [name for name in MODULES if name not in YIELDING and not (keep and _is_kept(name))]
    for name in replaced:
        asked = "." not in name or (keep and name in sys.modules)
        if not force and asked and (found := _original(name)):
            shadowing = "install(keep=True, force=True)" if keep else "install(force=True)"
            raise ImportError(
                f"{_ORIGIN} will not stand in for {name!r}, which is {found}; use that one and leave install() out, "
                f"uninstall it, or shadow it with {shadowing}"
                + (", or keep it with install(keep=True)" if name == "mamba_ssm" else ""),
                name=name,
            )
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
        _FINDER.force = _FINDER.keep = False
    _FINDER.force |= force
    _FINDER.keep = keep or (_FINDER.keep and not force)
    if force:
        tops = {name for name in replaced if "." not in name}
        for name, module in list(sys.modules.items()):
            shadowed = name in replaced or name.partition(".")[0] in tops or _key(name) in YIELDING
            if shadowed and not _is_ours(module):
                _forget(name)
    for name in replaced:
        if not (keep and name.startswith("mamba_ssm.")):  # whose parents are theirs, and not to be imported yet
            importlib.import_module(name)


def uninstall() -> None:
    """Remove the stand-ins; functions already imported from them keep working."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in list(sys.modules):
        if _key(name) in MODULES and _is_ours(sys.modules[name]):
            _forget(name)
