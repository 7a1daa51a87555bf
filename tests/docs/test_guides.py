"""Examples of the guide that are whole programs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kan_mamba_layers import KANLinear, create_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"


def run(page: str) -> dict[str, Any]:
    """What the blocks of a page define, one after the other."""
    scope: dict[str, Any] = {}
    for block in re.findall(r"```\{code-block\} python\n(.*?)```", (GUIDE / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), scope)
    return scope


def test_the_pipeline_of_monai() -> None:
    pytest.importorskip("monai")
    scope = run("monai.md")
    assert scope["logits"].shape == (2, 1, 40, 48)
    assert torch.isfinite(scope["loss"])


def test_what_a_model_sees() -> None:
    scope = run("explain.md")
    assert scope["corner"].shape == (64, 64) and scope["corner"].argmax() // 64 < 16
    assert scope["picture"].argmax() == 16 * 32 + 16


def test_scans_along_walks() -> None:
    scope = run("cross_selective_scan.md")
    assert scope["y"].shape == (2, 24, 32, 16) and scope["z"].shape == (1, 6, 24, 32, 16)
    assert not scope["windows"](scope["x"], scope["mask"])[~scope["mask"]].any()


def test_the_update_of_a_stack() -> None:
    """The loop leaves the values of the updated stack, and the knots of each layer reach as far as its data."""
    (block,) = re.findall(r"```python\n(stack = .*?)```", (GUIDE / "kan_linear.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    scope: dict[str, Any] = {"torch": torch, "KANLinear": KANLinear}
    exec(compile(block, "kan_linear.md", "exec"), scope)
    first, second = scope["stack"]
    torch.manual_seed(0)
    KANLinear(4, 16), KANLinear(16, 3)  # the same random state as in the block
    data = torch.randn(256, 4)
    assert torch.equal(scope["values"], scope["stack"](data))
    for layer, x in ((first, data), (second, first(data))):
        s, inner = layer.spline_order, layer.grid[:, layer.spline_order : -layer.spline_order]
        assert s == 3 and (inner[:, 0] <= x.amin(0)).all() and (x.amax(0) <= inner[:, -1]).all()
        assert (inner[:, -1] - inner[:, 0] < 1.05 * (x.amax(0) - x.amin(0)) + 0.03).all()


def test_trained_weights() -> None:
    scope = run("pretrained.md")
    assert scope["labels"].shape == (320, 200) and scope["p"].shape == (6, 320, 200)
    assert scope["segmenter"].classes == ("L1", "L2", "L3", "L4", "L5")
    assert scope["model"].config["num_classes"] == 4
    assert len(scope["encoder"].eval()(torch.zeros(1, 1, 64, 64))) == 5


@pytest.mark.parametrize(
    ("name", "saved"), [("km_unet_tiny", 0.5), ("km_unet_base", 0.5), ("km_unet_pp_tiny", 0.2), ("vmamba_tiny", 0.85)]
)
def test_checkpointing_saves_what_the_guide_of_the_models_says(name: str, saved: float) -> None:
    def kept(model: torch.nn.Module) -> int:
        own, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(torch.randn(1, 3, 128, 128))
        assert out.requires_grad
        return sum(size for address, size in sizes.items() if address not in own)

    model = create_model(name, backend="cpu")
    before = kept(model)
    model.set_grad_checkpointing()
    assert 1 - kept(model) / before == pytest.approx(saved, abs=0.03)
