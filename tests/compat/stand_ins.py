"""Names, inputs and comparisons that the tests of the stand-ins share."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import assert_budget, gradients, largest
from kan_mamba_layers import selective_scan

ROOT = Path(__file__).resolve().parents[2]
EXTENSIONS = ("selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")
TOP = (
    *("mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "selective_scan", *EXTENSIONS),
    *("selective_scan_cuda_oflex_rh", "v2dmamba_scan"),
)
REAL = [name for name in TOP if importlib.util.find_spec(name)]
without_originals = pytest.mark.skipif(bool(REAL), reason=f"the real {REAL} are installed; nothing stands in for them")


def function(module: str, name: str = "selective_scan_fn") -> Callable:
    return getattr(importlib.import_module(module), name)


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter that sees this checkout and, apart from that, starts as a user's does."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def make_inputs(
    dtype: torch.dtype = torch.float64, *, form: str = "bgnl", z: bool = False, rows: int = 6
) -> dict[str, Tensor]:
    """Inputs of a scan; A, D and delta_bias are float32 or more, as the original kernels want them."""
    wide = torch.promote_types(dtype, torch.float32)
    shape, kind = {"dn": ((6, 3), wide), "bnl": ((2, 3, 11), dtype), "bgnl": ((2, 2, 3, 11), dtype)}[form]
    inputs = {
        "u": torch.randn(2, 6, 11).to(dtype),
        "delta": torch.rand(2, rows, 11).to(dtype),
        "A": -torch.rand(6, 3, dtype=wide),
        "B": torch.randn(shape).to(kind),
        "C": torch.randn(shape).to(kind),
        "D": torch.randn(6, dtype=wide),
        "delta_bias": torch.rand(rows, dtype=wide),
    }
    return {**inputs, "z": torch.randn(2, 6, 11).to(dtype)} if z else inputs


def assert_equals_reference(run: Callable[..., Tensor], inputs: dict[str, Tensor], **options: bool) -> None:
    """Value and every gradient of `run(**inputs)` within the budgets of the scan."""
    dtype = inputs["u"].dtype

    def reference(**x: Tensor) -> Tensor:
        return selective_scan(**x, **options, backend="reference")

    out, grads = gradients(run, inputs)
    same, same_grads = gradients(reference, inputs)
    double = {k: v.double() for k, v in inputs.items()}
    true, true_grads = gradients(reference, double)
    sizes = gradients(reference, {k: v if k == "A" else v.abs() for k, v in double.items()}, absolute=True)[1]
    assert out.dtype == dtype
    assert_budget("out", out, same, true, dtype, bands=8)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        compare = (grad, same_grads[name], true_grads[name], grad.dtype)
        assert_budget(f"d{name}", *compare, bands=8, terms=largest(sizes[name]))
