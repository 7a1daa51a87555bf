"""Parity with the original implementations: outputs and every gradient to 1e-4 of the largest value, in float32."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import Golden, assert_close, relative_error
from kan_mamba_layers import EMA, SS2D, KANBlock, KANLinear, KMUNet, convert_state_dict

TOLERANCE = 1e-4
LAYERS = {"ema": EMA, "ss2d": SS2D, "kan_linear": KANLinear, "kan_block": KANBlock}
LAYER_FILES = (
    "ema_0",
    "ema_1",
    "kan_block_0",
    "kan_linear_0",
    "kan_linear_1",
    "kan_linear_2",
    "ss2d_0",
    "ss2d_1",
    "ss2d_2",
)
MODEL_FILES = {
    "km_unet_0": ("km_unet", {"widths": (16, 32, 128, 160, 32), "trunk_context": False, "decoder_kan": False}),
    "u_kan_0": ("u_kan", {"widths": (4, 8, 32, 40, 48), "use_ss2d": False, "use_ema": False}),
}
# Only the scan has more than one backend.
CASES = [(name, "auto") for name in LAYER_FILES] + [
    (name, backend) for name in LAYER_FILES if name.startswith("ss2d") for backend in ("reference", "chunked")
]


def build(name: str, meta: str) -> nn.Module:
    """The layer that the file's description names: `SS2D(d_model=8, {'d_state': 4}); input ...`."""
    call = meta.split(";")[0].split(" in eval")[0]
    options = ast.literal_eval(found[0]) if (found := re.search(r"\{.*\}", call)) else {}
    if "grid_range" in options:
        options["grid_range"] = tuple(options["grid_range"])
    sizes = [int(n) for n in re.findall(r"(?<=[(=,])\s*(\d+)(?=[,)])", call.split("{")[0])]
    return LAYERS[name.rpartition("_")[0]](*sizes, **options)


def test_all_files_are_tested(shared: Path) -> None:
    """Those of the layers and models that are here; the folder may hold values of others."""
    kinds = {*LAYERS, *(name.rpartition("_")[0] for name in MODEL_FILES)}
    present = {path.stem for path in (shared / "golden").glob("*.npz") if path.stem.rpartition("_")[0] in kinds}
    assert present == {*LAYER_FILES, *MODEL_FILES}


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_layer(golden, name: str, backend: str) -> None:
    file: Golden = golden(name)
    layer = build(name, file.meta)
    if name.startswith("ss2d"):
        layer.backend = backend
    layer.load_state_dict(file.state, strict=True)
    layer.eval()
    x = file.input.clone().requires_grad_()
    out = layer(x, 6, 4) if name.startswith("kan_block") else layer(x)
    assert_close("output", out, file.output, TOLERANCE)
    out.backward(file.grad_output)
    found = {"input": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}
    assert set(found) == set(file.grad)
    for key, expected in file.grad.items():
        assert_close(f"grad {key}", found[key], expected, TOLERANCE)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model(golden, name: str) -> None:
    file: Golden = golden(name)
    source, options = MODEL_FILES[name]
    model = KMUNet(**options)
    state, dropped = convert_state_dict(file.state, source=source)
    assert dropped == []
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        out = model.eval()(file.input)
    assert_close("output", out, file.output, TOLERANCE)


@pytest.mark.parametrize("name", ["ss2d_0", "ema_0", "kan_linear_0"])
def test_parity_can_fail(golden, name: str) -> None:
    """The same comparison with one weight changed by one per cent is not equal."""
    file: Golden = golden(name)
    layer = build(name, file.meta)
    layer.load_state_dict(file.state)
    with torch.no_grad():
        key = {"ss2d_0": "out_proj.weight", "ema_0": "conv3x3.weight", "kan_linear_0": "base_weight"}[name]
        layer.get_parameter(key).mul_(1.01)
        assert relative_error(layer.eval()(file.input), file.output) > TOLERANCE
