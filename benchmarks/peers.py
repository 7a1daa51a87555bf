"""Other implementations, called as their users call them, where they are installed or given by the path of a checkout.

Nothing of theirs is kept here. A file that wants a compiled extension or another library when it is imported gets an
empty stand-in for it, for the time of that import only: the functions measured do not use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.candidates import CHANNELS_FIRST, CHANNELS_LAST, Candidate
from benchmarks.cases import Case

MAMBAPY, MAMBA_REF, VMAMBA_TORCH = "mambapy pscan", "mamba_ssm selective_scan_ref", "VMamba selective_scan_torch"
MAMBA_CUDA, VMAMBA_CUDA = "mamba_ssm CUDA", "VMamba CUDA"
FILES = {
    "mamba_ssm": "mamba_ssm/ops/selective_scan_interface.py",
    "vmamba": "classification/models/csms6s.py",
    "vmamba_cross": "classification/models/csm_triton.py",
    "mambapy": "mambapy/mamba.py",
    "efficient_kan": "src/efficient_kan/kan.py",
    "fast_kan": "fastkan/fastkan.py",
    "pykan": "kan/KANLayer.py",
}
STAND_INS = (
    *("causal_conv1d.cpp_functions", "mamba_ssm.utils.torch", "mamba_ssm.ops.triton.layer_norm"),
    *("sklearn.linear_model", "yaml"),
)


class PeerError(Exception):
    """Why a peer cannot be measured here, without a path."""


def peers(case: Case, device: str, paths: Mapping[str, str]) -> list[Candidate]:
    """The peers of an op; those that cannot run here say why."""
    if case.op not in ("cross_selective_scan", "selective_scan"):
        return []
    makers = {MAMBAPY: _mambapy, MAMBA_REF: _mamba_reference, VMAMBA_TORCH: _vmamba_torch}
    if device == "cuda":
        makers |= {MAMBA_CUDA: _mamba_cuda, VMAMBA_CUDA: _vmamba_cuda}
    return [c for name, make in makers.items() for c in made(name, partial(make, case, paths))]


def made(name: str, make: Callable[[], list[Candidate]]) -> list[Candidate]:
    """The candidates of a peer, or one that says why there are none."""
    try:
        return make()
    except PeerError as error:
        return [Candidate(name, absent=str(error))]


def _mambapy(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    scan = partial(_with_pscan, load("mambapy.mamba", "mambapy", paths).pscan)
    if case.op == "cross_selective_scan":
        return [Candidate(MAMBAPY, partial(baselines.cross_scan_channels_last, scan), copies=12)]
    return [Candidate(MAMBAPY, partial(baselines.sequence_channels_last, scan), layout=CHANNELS_LAST, copies=12)]


def _with_pscan(
    pscan: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,  # b l k d
    delta: Tensor,  # b l k d
    A: Tensor,  # k d n
    B: Tensor,  # b l k n
    C: Tensor,  # b l k n
    D: Tensor,  # k d
    bias: Tensor,  # k d
) -> Tensor:  # b l k d
    delta = torch.nn.functional.softplus(delta + bias)
    decay = torch.exp(delta[..., None] * A)  # b l k d n
    entry = delta[..., None] * B[..., None, :] * u[..., None]
    states = pscan(decay.flatten(2, 3), entry.flatten(2, 3))  # b l k*d n
    return (states.unflatten(2, A.shape[:2]) @ C[..., None])[..., 0] + D * u


def _mamba_reference(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    function = load("mamba_ssm.ops.selective_scan_interface", "mamba_ssm", paths).selective_scan_ref
    return [_like_mamba(case, MAMBA_REF, function, max_backward_length=256, copies=4)]


def _vmamba_torch(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    function = _from_file("vmamba", paths).selective_scan_torch
    return [_like_mamba(case, VMAMBA_TORCH, function, gated=False, max_backward_length=256, copies=4)]


def _like_mamba(case: Case, name: str, function: Callable[..., Tensor], gated: bool = True, **limits: int) -> Candidate:
    """A function with Mamba's arguments, with or without the gate `z` among them."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return function(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

    if case.op == "cross_selective_scan":
        cross = partial(baselines.cross_scan_channels_first, scan)
        return Candidate(name, cross, layout=CHANNELS_FIRST, **limits)
    with_gate = partial(function, delta_softplus=True)
    return Candidate(name, with_gate if gated else partial(baselines.sequence_channels_first, scan), **limits)


def _mamba_cuda(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    module = load("mamba_ssm.ops.selective_scan_interface", "mamba_ssm", paths)
    if getattr(module, "selective_scan_cuda", None) is None:
        raise PeerError("its CUDA extension is not built")
    return [_like_mamba(case, MAMBA_CUDA, module.selective_scan_fn)]


def _vmamba_cuda(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    """Its newer form: a Triton kernel makes the four copies, a CUDA kernel scans, a Triton kernel merges."""
    if not importlib.util.find_spec("selective_scan_cuda_oflex"):
        raise PeerError("its CUDA extension is not built")
    scan = _from_file("vmamba", paths).selective_scan_fn
    if case.op == "selective_scan":
        return [_like_mamba(case, VMAMBA_CUDA, scan, gated=False)]
    copies = _from_file("vmamba_cross", paths)

    def run(
        x: Tensor, x_proj_weight: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A_log: Tensor, D: Tensor
    ) -> Tensor:  # b d h w -> b h w d
        batch, channels, height, width = x.shape
        rank, states = dt_proj_weight.shape[2], A_log.shape[1]
        sequences = copies.cross_scan_fn(x)  # b 4 d l
        maps = torch.einsum("bkdl,kcd->bkcl", sequences, x_proj_weight.to(x.dtype))
        low, B, C = maps.split([rank, states, states], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", low, dt_proj_weight.to(x.dtype)).flatten(1, 2)
        A, bias = -torch.exp(A_log), dt_proj_bias.flatten()
        y = scan(sequences.flatten(1, 2), delta.contiguous(), A, B.contiguous(), C.contiguous(), D, bias, True)
        y = copies.cross_merge_fn(y.view(batch, 4, channels, height, width))  # b d l
        return y.transpose(1, 2).reshape(batch, height, width, channels).to(x.dtype)

    return [Candidate(VMAMBA_CUDA, run, layout=CHANNELS_FIRST)]


def load(module: str, name: str, paths: Mapping[str, str]) -> Any:
    """An installed module, or the same file of a checkout."""
    if name in paths:
        return _from_file(name, paths)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise PeerError("not installed, and no path given") from None
        raise PeerError(f"installed, but cannot be imported: {error.name or type(error).__name__}") from None


def _from_file(name: str, paths: Mapping[str, str]) -> Any:
    key = name.split("_cross")[0]
    if key not in paths:
        raise PeerError("no path given")
    root = Path(paths[key])
    file = root / FILES[name]
    if not file.is_file():
        raise PeerError(f"{FILES[name]} is not in the path given")
    alias = f"_peer_{name}"
    if alias in sys.modules:
        return sys.modules[alias]
    # As a package, it finds the files beside it by relative imports.
    spec = importlib.util.spec_from_file_location(alias, file, submodule_search_locations=[str(file.parent)])
    if spec is None or spec.loader is None:
        raise PeerError(f"{FILES[name]} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    try:
        with _stand_ins(root), redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's file raises, it cannot be measured
        del sys.modules[alias]
        raise PeerError(f"its file cannot be loaded: {type(error).__name__}") from None
    return module


class _StandIn(ModuleType):
    """A module whose every name is a decorator that changes nothing."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda function: function


@contextmanager
def _stand_ins(root: Path) -> Iterator[None]:
    """Modules that are found in a checkout, and empty ones for what it imports and does not use."""
    names = {".".join(name.split(".")[:depth]) for name in STAND_INS for depth in range(1, name.count(".") + 2)}
    added = [name for name in sorted(names) if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in added})
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in added:
            del sys.modules[name]
