"""Layers, runs and oracles that the tests of KAN layers share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import basis_oracle, kan_oracle, to_array
from kan_mamba_layers import KANLinear


def with_large_splines(mode: str = "uniform", features: tuple[int, int] = (8, 6), **options: Any) -> KANLinear:
    """A layer whose splines are of the size that training gives them, not the small initial noise."""
    layer = KANLinear(*features, grid_mode=mode, **options)
    with torch.no_grad():
        layer.spline_weight.normal_()
    return layer


def on_uneven_knots(**options: Any) -> KANLinear:
    """A layer whose knots follow the quantiles of skewed data."""
    layer = with_large_splines("adaptive", **options)
    layer.update_grid(torch.randn(500, layer.in_features) ** 3)
    assert np.ptp(np.diff(to_array(layer.grid), axis=1)) > 0.1, "the knots are meant to be uneven here"
    return layer


def layer_oracle(layer: KANLinear, x: Tensor) -> np.ndarray:
    state = {k: to_array(v) for k, v in layer.state_dict().items()}
    state.setdefault("spline_scaler", None)
    return kan_oracle(to_array(x), **state, extrapolation=layer.extrapolation)


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
