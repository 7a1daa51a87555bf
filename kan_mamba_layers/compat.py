"""Stand-ins for the compiled packages of the Mamba family, so that code which imports them runs without an edit.

Importing this module changes nothing. :func:`install`, or running a program with
``python -m kan_mamba_layers.compat SCRIPT``, makes importable what such code asks for: the functions of ``mamba_ssm``
and of VMamba's ``selective_scan``, and the entry points ``fwd`` and ``bwd`` of the extensions below them. All of them
run :func:`kan_mamba_layers.selective_scan`.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from runpy import run_module, run_path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import kan_mamba_layers

__all__ = ["install", "main", "uninstall"]


# mamba_ssm


def selective_scan_fn(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b n l | b g n l
    C: Tensor,  # d n | b n l | b g n l
    D: Tensor | None = None,  # d
    z: Tensor | None = None,  # b d l
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stand in for ``mamba_ssm``'s function; see :func:`kan_mamba_layers.selective_scan`."""
    y, state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def selective_scan_ref(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b n l | b g n l
    C: Tensor,  # d n | b n l | b g n l
    D: Tensor | None = None,  # d
    z: Tensor | None = None,  # b d l
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Stand in for ``mamba_ssm``'s step-by-step reference, with the backend ``"reference"``."""
    y, state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="reference")
    return (y, state) if return_last_state else y


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: Literal["auto", "reference"] = "auto",
) -> tuple[Tensor, Tensor]:  # y: b d l, last state: b d n
    if A.is_complex():
        raise TypeError(f"A must be real, got {A.dtype}: complex scans are not supported; use mamba_ssm itself")
    options = (D, z, delta_bias, delta_softplus)
    result = kan_mamba_layers.selective_scan(u, delta, A, B, C, *options, return_last_state=True, backend=backend)
    return result[0], result[1]


# selective_scan, the package of VMamba's first version: no gate, no last state


def vmamba_selective_scan_fn(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b n l | b g n l
    C: Tensor,  # b n l | b g n l
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Tensor:
    """Stand in for ``selective_scan.selective_scan_fn``; ``nrows`` tunes the original's kernel and has no effect."""
    return _scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


def vmamba_selective_scan_ref(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # b n l | b g n l
    C: Tensor,  # b n l | b g n l
    D: Tensor | None = None,  # d
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
) -> Tensor:
    """Stand in for ``selective_scan.selective_scan_ref``, with the backend ``"reference"``."""
    return _scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, backend="reference")[0]


# The extensions. Autograd does not see into them: `fwd` makes no graph, and `bwd` gets the inputs again and makes one
# for itself. Of the states `x`, which `fwd` hands to `bwd`, callers read the last one only.


def _packed(state: Tensor) -> Tensor:
    """The last state where callers look for it: ``x[:, :, -1, 1::2]``."""
    return torch.stack((torch.zeros_like(state), state), -1).flatten(-2)[:, :, None]  # b d 1 2n


def _wide(u: Tensor) -> Tensor:
    return u.to(torch.promote_types(u.dtype, torch.float32))


def _repeated(delta: Tensor, bias: Tensor | None, channels: int) -> tuple[Tensor, Tensor | None]:
    """One step per channel, where neighbouring channels share a row of ``delta``."""
    times = channels // delta.shape[1]
    return delta.repeat_interleave(times, 1), None if bias is None else bias.repeat_interleave(times)


def _gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The value of ``function`` and the gradient with respect to every input that is given."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
        given = iter(torch.autograd.grad(value, [x for x in leaves if x is not None], grad.to(value.dtype)))
    return value.detach(), [None if x is None else next(given) for x in leaves]


@torch.no_grad()
def oflex_fwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d' l, d' divides d
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    delta_bias: Tensor | None,  # d'
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = False,
) -> list[Tensor]:
    """Stand in for ``fwd`` of ``selective_scan_cuda_oflex`` and ``selective_scan_cuda_core``: ``[out, x]``."""
    steps, bias = _repeated(delta, delta_bias, u.shape[1])
    out, state = _scan(_wide(u), steps, A, B, C, D, None, bias, delta_softplus)
    return [out if out_float else out.to(u.dtype), _packed(state)]


def oflex_bwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d' l
    A: Tensor,  # d n
    B: Tensor,  # b g n l
    C: Tensor,  # b g n l
    D: Tensor | None,  # d
    delta_bias: Tensor | None,  # d'
    dout: Tensor,  # b d l
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """Stand in for ``bwd`` of the same two: ``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``, None for what is None."""

    def out(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None) -> Tensor:
        steps, bias = _repeated(delta, bias, u.shape[1])
        return _scan(_wide(u), steps, A, B, C, D, None, bias, delta_softplus)[0]

    return _gradients(out, (u, delta, A, B, C, D, delta_bias), dout)[1]


@torch.no_grad()
def mamba_fwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b g n l
    C: Tensor,  # d n | b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    delta_softplus: bool,
) -> list[Tensor]:
    """Stand in for ``selective_scan_cuda.fwd``: ``[out, x]``, and the gated ``out_z`` if there is ``z``."""
    out, state = _scan(_wide(u), delta, A, B, C, D, None, delta_bias, delta_softplus)
    gated = [] if z is None else [(out * F.silu(z.to(out.dtype))).to(u.dtype)]
    return [out.to(u.dtype), _packed(state), *gated]


def mamba_bwd(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b g n l
    C: Tensor,  # d n | b g n l
    D: Tensor | None,  # d
    z: Tensor | None,  # b d l
    delta_bias: Tensor | None,  # d
    dout: Tensor,  # b d l
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """Stand in for ``selective_scan_cuda.bwd``: seven gradients, then ``dz`` if there is ``z``, ``out_z`` if asked for.

    A ``dz`` given by the caller is a place to write to, as in the original.
    """

    def gated(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor | None) -> Tensor:
        D, z, bias = rest
        return _scan(_wide(u), delta, A, B, C, D, z, bias, delta_softplus)[0]

    out_z, grads = _gradients(gated, (u, delta, A, B, C, D, z, delta_bias), dout)
    grad_z = grads.pop(6)
    if z is None:
        return grads
    grads.append(grad_z if dz is None or grad_z is None else dz.copy_(grad_z))
    return [*grads, out_z.to(u.dtype)] if recompute_out_z else grads


# Importing


_EXTENSION: dict[str, Callable[..., Any]] = {"fwd": oflex_fwd, "bwd": oflex_bwd}
_MODULES: dict[str, dict[str, Callable[..., Any]]] = {
    "mamba_ssm": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": selective_scan_fn,
        "selective_scan_ref": selective_scan_ref,
    },
    "selective_scan": {
        "selective_scan_fn": vmamba_selective_scan_fn,
        "selective_scan_ref": vmamba_selective_scan_ref,
    },
    "selective_scan_cuda": {"fwd": mamba_fwd, "bwd": mamba_bwd},
    "selective_scan_cuda_core": _EXTENSION,
    "selective_scan_cuda_oflex": _EXTENSION,
}


def _contents(module: str) -> list[str]:
    below = [name.removeprefix(f"{module}.") for name in _MODULES if name.startswith(f"{module}.")]
    return [*_MODULES[module], *(name for name in below if "." not in name)]


def _missing(module: str, name: str) -> str:
    return (
        f"no {name!r} in the stand-in {module!r} of kan_mamba_layers.compat, which has {', '.join(_contents(module))}; "
        "for anything else install the original package"
    )


class _StandIns(MetaPathFinder, Loader):
    """Finds and makes the stand-ins, by the ordinary machinery of imports."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname in _MODULES:
            # A package each, also where nothing is below: only for packages `from m import x` asks here for x.
            return ModuleSpec(fullname, self, origin=__name__, is_package=True)
        parent, _, name = fullname.rpartition(".")
        if parent in _MODULES:
            raise ModuleNotFoundError(_missing(parent, name), name=parent)
        return None

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> Any:
            raise AttributeError(_missing(module.__name__, name), name=name, obj=module)

        module.__doc__ = f"Stand-in for {module.__name__}, made by kan_mamba_layers.compat."
        contents = {"__version__": f"0+kan.mamba.layers.{kan_mamba_layers.__version__}", "__getattr__": missing}
        vars(module).update(contents, **_MODULES[module.__name__])


_FINDER = _StandIns()


def _is_ours(module: ModuleType) -> bool:
    return getattr(getattr(module, "__spec__", None), "loader", None) is _FINDER


def _original(name: str) -> str | None:
    """Where a module of that name comes from that is not ours, None if there is none."""
    module = sys.modules.get(name)
    if module is not None:
        return None if _is_ours(module) else "already imported"
    spec = importlib.util.find_spec(name)
    # A folder of that name without __init__.py, such as the sources of VMamba's kernels, is no installation.
    return None if spec is None or spec.loader is _FINDER or spec.origin is None else f"found at {spec.origin}"


def install() -> None:
    """Make the stand-ins importable in this process; a second call changes nothing.

    Call it before the code that imports ``mamba_ssm``, ``selective_scan`` or ``selective_scan_cuda``,
    ``selective_scan_cuda_core``, ``selective_scan_cuda_oflex``. Asking them for anything that they do not have raises
    ImportError or AttributeError with a list of what they have.

    Raises:
        ImportError: a real module of one of these names is installed or imported; nothing is ever put in front of it.

    Example:
        >>> from kan_mamba_layers import compat
        >>> compat.install()  # doctest: +SKIP
        >>> from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # doctest: +SKIP
    """
    for name in _MODULES:
        if "." not in name and (found := _original(name)):
            raise ImportError(
                f"kan_mamba_layers.compat will not stand in for {name!r}, which is {found}; use that one and leave "
                "install() out, or uninstall it",
                name=name,
            )
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in _MODULES:
        importlib.import_module(name)


def uninstall() -> None:
    """Take the stand-ins away again; functions that were imported from them keep working."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in _MODULES:
        if name in sys.modules and _is_ours(sys.modules[name]):
            del sys.modules[name]


# Running


def main(arguments: Sequence[str] | None = None) -> None:
    """Install the stand-ins and run a program as ``python SCRIPT`` or ``python -m MODULE`` would."""
    parser = argparse.ArgumentParser(
        prog="python -m kan_mamba_layers.compat",
        description="Run a program with stand-ins for mamba_ssm, selective_scan and selective_scan_cuda*.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="TARGET is a module, as in python -m")
    parser.add_argument("target", metavar="TARGET", help="the script to run")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="passed on to it")
    options = parser.parse_args(arguments)
    script = Path(options.target)
    if not (options.module or script.is_file()):
        parser.error(f"there is no script {options.target!r}; give the path of a Python file, or -m and a module")
    sys.argv = [options.target, *options.arguments]
    if options.module:
        install()
        run_module(options.target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(script.resolve().parent))
        install()
        run_path(str(script.absolute()), run_name="__main__")


if __name__ == "__main__":
    # By its name, so that a program which calls install() itself meets the same stand-ins.
    importlib.import_module("kan_mamba_layers.compat").main()
