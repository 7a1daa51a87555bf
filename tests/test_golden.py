"""Parity with the original implementations: outputs and every gradient to 2e-5 of the largest value, in float32.

The values of the layers are in the tree, in `golden/`. Those of whole models are large and come from `--shared`.
"""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import Golden, assert_close, relative_error
from kan_mamba_layers import EMA, SS2D, KANBlock, KANLinear, KMUNet, Mamba, VMamba, VSSBlock, convert_state_dict

TREE = Path(__file__).with_name("golden")
TOLERANCE = 2e-5
LAYERS = {
    "ema": EMA,
    "ss2d": SS2D,
    "kan_linear": KANLinear,
    "kan_block": KANBlock,
    "mamba": Mamba,
    "mamba_vim_v2": partial(Mamba, bidirectional=True),
    "vss_block_v2": VSSBlock,
}
LAYER_FILES = (
    "ema_0",
    "ema_1",
    "kan_block_0",
    "kan_linear_0",
    "kan_linear_1",
    "kan_linear_2",
    "mamba_0",
    "mamba_1",
    "mamba_vim_v2_0",
    "mamba_vim_v2_1",
    "ss2d_0",
    "ss2d_1",
    "ss2d_2",
    "vss_block_v2_0",
    "vss_block_v2_1",
    "vss_block_v2_gate",
)
VSS_BLOCKS = {
    "vss_block_v2_0": {"dim": 24, "channels_first": True},
    "vss_block_v2_1": {"dim": 32, "expand": 2.0, "d_state": 4, "channels_first": True},
    "vss_block_v2_gate": {"dim": 16, "d_state": 8, "gate": True, "conv_bias": True, "mlp_ratio": 0.0},
}
MODEL_FILES = {
    "km_unet_0": ("km_unet", {"widths": (16, 32, 128, 160, 32), "trunk_context": False, "decoder_kan": False}),
    "u_kan_0": ("u_kan", {"widths": (4, 8, 32, 40, 48), "use_ss2d": False, "use_ema": False}),
}
VMAMBA_FILE = "vmamba_v2_0"
BACKENDS = {**dict.fromkeys(LAYERS, ("reference", "chunked", "cpu", "auto")), "ema": ()}


def kind(name: str) -> str:
    return name.rpartition("_")[0]


CASES = [(name, backend) for name in LAYER_FILES for backend in BACKENDS[kind(name)] or (None,)]


def build(name: str, meta: str) -> nn.Module:
    """The layer that the description names, `SS2D(d_model=8, {'d_state': 4}); input ...` or the options alone."""
    if name in VSS_BLOCKS:
        return VSSBlock(**VSS_BLOCKS[name])
    call = meta.split(";")[0].split(" in eval")[0]
    options = ast.literal_eval(found[0]) if (found := re.search(r"\{.*\}", call)) else {}
    if "grid_range" in options:
        options["grid_range"] = tuple(options["grid_range"])
    options.pop("bimamba_type", None)
    sizes = [int(n) for n in re.findall(r"(?<=[(=,])\s*(\d+)(?=[,)])", call.split("{")[0])]
    return LAYERS[kind(name)](*sizes, **options)


def ours(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of an original under the names of our layer."""
    return convert_state_dict(values, "vss_block")[0] if name in VSS_BLOCKS else values


def check_layer(name: str, backend: str | None) -> None:
    """Output and every gradient of a layer in the tree, by a backend if the layer has any."""
    file = Golden.load(TREE / f"{name}.npz")
    layer = build(name, file.meta)
    with_backends = [module for module in layer.modules() if hasattr(module, "backend")]
    assert bool(with_backends) == bool(backend)
    for module in with_backends:
        module.backend = backend
    layer.load_state_dict(ours(name, file.state), strict=True)
    layer.eval()
    x = file.input.clone().requires_grad_()
    out = layer(x, 6, 4) if name.startswith("kan_block") else layer(x)
    assert_close("output", out, file.output, TOLERANCE)
    out.backward(file.grad_output)
    found = {"input": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}
    grad = {"input": file.grad.pop("input"), **ours(name, file.grad)}
    assert set(found) == set(grad)
    for key, expected in grad.items():
        assert_close(f"grad {key}", found[key], expected, TOLERANCE)


def test_all_files_are_tested() -> None:
    assert {path.stem for path in TREE.glob("*.npz")} == set(LAYER_FILES)


def test_the_tree_holds_the_shared_files(shared: Path) -> None:
    """Byte by byte, and all those of layers and models that are tested here; the folder may hold values of others."""
    names = {*LAYER_FILES, *MODEL_FILES, VMAMBA_FILE}
    kinds = {kind(name) for name in names}
    present = {path.stem for path in (shared / "golden").glob("*.npz") if kind(path.stem) in kinds}
    assert present == names
    for name in LAYER_FILES:
        assert (TREE / f"{name}.npz").read_bytes() == (shared / "golden" / f"{name}.npz").read_bytes(), name


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_layer(name: str, backend: str | None) -> None:
    check_layer(name, backend)


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


def test_vmamba(golden) -> None:
    file: Golden = golden(VMAMBA_FILE)
    options = {"depths": (1, 2, 1, 1), "dims": 8}
    model, encoder = VMamba(num_classes=10, **options).eval(), VMamba(features_only=True, **options).eval()
    state, dropped = convert_state_dict(file.state, "vmamba")
    assert dropped == []
    model.load_state_dict(state, strict=True)
    encoder.load_published(file.state)
    with torch.no_grad():
        outputs = {f"stage{i}": x for i, x in enumerate(encoder(file.input))} | {"logits": model(file.input)}
    assert outputs.keys() == file.outputs.keys()
    for name, expected in file.outputs.items():
        assert_close(name, outputs[name], expected, TOLERANCE)


@pytest.mark.parametrize("name", ["ss2d_0", "ema_0", "kan_linear_0", "mamba_0"])
def test_parity_can_fail(name: str) -> None:
    """The same comparison with one weight changed by one per cent is not equal."""
    file = Golden.load(TREE / f"{name}.npz")
    layer = build(name, file.meta)
    layer.load_state_dict(file.state)
    with torch.no_grad():
        key = {"ema_0": "conv3x3.weight", "kan_linear_0": "base_weight"}.get(name, "out_proj.weight")
        layer.get_parameter(key).mul_(1.01)
        assert relative_error(layer.eval()(file.input), file.output) > TOLERANCE
