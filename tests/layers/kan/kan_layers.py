"""Layers, runs and oracles that the tests of KAN layers share."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import basis_oracle, kan_oracle, to_array
from kan_mamba_layers import KANConv2d, KANLinear

BACKENDS = ("reference", "chunked", "cpu")
EXTRAPOLATIONS = ("zero", "clamp", "linear")
HALF = (torch.bfloat16, torch.float16)
MODES = ("uniform", "adaptive")


def with_large_splines(mode: str = "uniform", features: tuple[int, int] = (8, 6), **options: Any) -> KANLinear:
    """A layer whose splines are of the size that training gives them, not the small initial noise."""
    layer = KANLinear(*features, grid_mode=mode, **options)
    with torch.no_grad():
        layer.spline_weight.normal_()
    return layer


def on_nonuniform_knots(**options: Any) -> KANLinear:
    """A layer whose knots follow the quantiles of skewed data."""
    layer = with_large_splines("adaptive", **options)
    layer.update_grid(torch.randn(500, layer.in_features) ** 3)
    assert np.ptp(np.diff(to_array(layer.grid), axis=1)) > 0.1, "the knots are meant to be nonuniform here"
    return layer


# A layer on knots of either kind.
LAYERS: dict[str, Callable[..., KANLinear]] = {"uniform": with_large_splines, "nonuniform": on_nonuniform_knots}


def convolution(*sizes: Any, knots: str = "uniform", **options: Any) -> KANConv2d:
    """A convolution with large splines; every channel of it has its own knots."""
    layer = KANConv2d(*sizes, **options)
    with torch.no_grad():
        layer.spline_weight.normal_()
        layer.grid.mul_(1 + torch.arange(layer.in_channels)[:, None] / 10)
    if knots == "nonuniform":
        layer.grid_mode = "adaptive"
        layer.update_grid(torch.randn(2, layer.in_channels, 12, 12) ** 3)
        assert not layer.has_uniform_grid
    return layer


def grouped_convolution() -> KANConv2d:
    """Two groups: outputs 0 to 2 see channels 0 and 1, outputs 3 to 5 see 2 and 3."""
    return convolution(4, 6, (3, 2), groups=2)


def layer_oracle(layer: KANLinear, x: Tensor) -> np.ndarray:
    state = {k: to_array(v) for k, v in layer.state_dict().items()}
    state.setdefault("spline_scaler", None)
    return kan_oracle(to_array(x), **state, extrapolation=layer.extrapolation)


def penalty_oracle(layer: KANLinear | KANConv2d, activation: float, entropy: float) -> float:
    """The regularisation loss by its formula, where no edge is zero."""
    size = to_array(layer.spline_weight.abs()).mean(-1)
    share = size / size.sum()
    return activation * size.sum() - entropy * (share * np.log(share)).sum()


def spline_only(layer: KANLinear, x: Tensor) -> Tensor:
    """The output without its base part, in float64."""
    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        double.base_weight.zero_()
        return double(x.double())


def best_fit_error(target: KANLinear, layer: KANLinear, x: Tensor) -> float:
    """Relative L2 error of the least-squares fit of `target`'s splines on `layer`'s knots, one feature at a time."""
    old, new = to_array(target.grid), to_array(layer.grid)
    weight = to_array(target.spline_weight) * to_array(target.spline_scaler)[..., None]
    values, fitted = 0.0, 0.0
    for i in range(x.shape[1]):
        column = to_array(x)[:, i : i + 1]
        curves = basis_oracle(column, old[i : i + 1], 3)[:, 0] @ weight[:, i].T
        bases = basis_oracle(column, new[i : i + 1], 3)[:, 0]
        values = values + curves
        fitted = fitted + bases @ np.linalg.lstsq(bases, curves, rcond=None)[0]
    return float(np.linalg.norm(fitted - values) / np.linalg.norm(values))


def gradcheck(layer: KANLinear | KANConv2d, x: Tensor) -> bool:
    """Compare the gradients of the input and of every parameter with finite differences."""
    names = [k for k, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    return torch.autograd.gradcheck(function, (x, *values))


def exported(module: nn.Module, example: Tensor, dynamic: dict[int, torch.export.Dim], strict: bool) -> nn.Module:
    """The module after export, saving and loading."""
    program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


class OnnxModel:
    """A module exported to ONNX and run by onnxruntime."""

    def __init__(self, module: nn.Module, example: Tensor, dynamic: dict[int, torch.export.Dim], folder: Path) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        path = folder / "layer.onnx"
        torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
        model = onnx.load(path)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}, "operators that every runtime has"
        self.name = model.graph.input[0].name
        self.session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])
