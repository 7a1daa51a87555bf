"""VSSBlock: its formula rebuilt from plain PyTorch and the NumPy scan; layouts, keys and stochastic depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close, cross_scan_oracle, to_array
from kan_mamba_layers import VSSBlock, effective_receptive_field

PUBLISHED = {"norm.weight", "norm.bias", "norm2.weight", "norm2.bias"}
PUBLISHED |= {f"mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")}
PUBLISHED |= {f"op.{name}" for name in ("A_logs", "Ds", "dt_projs_bias", "dt_projs_weight", "x_proj_weight")}
PUBLISHED |= {f"op.{name}" for name in ("in_proj.weight", "out_proj.weight", "conv2d.weight")}
PUBLISHED |= {"op.out_norm.weight", "op.out_norm.bias"}


def rebuilt(state: dict[str, Tensor], x: Tensor) -> Tensor:  # b h w c
    """The block of VMamba v2 from its weights alone, in float64."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].mT + state.get(f"{name}.bias", 0.0)

    u = linear(norm(x, "norm"), "op.in_proj").permute(0, 3, 1, 2)
    u = F.silu(F.conv2d(u, state["op.conv2d.weight"], padding=1, groups=u.shape[1])).permute(0, 2, 3, 1)
    names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    scanned = cross_scan_oracle(to_array(u), *(to_array(state[f"op.{name}"]) for name in names))
    x = x + linear(norm(torch.from_numpy(scanned), "op.out_norm"), "op.out_proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


@pytest.mark.parametrize("options", [{}, {"expand": 2.0, "d_state": 3, "mlp_ratio": 1.5}], ids=str)
def test_equals_its_parts_in_both_layouts(options: dict) -> None:
    block = VSSBlock(6, **options).double()
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in block.state_dict().items()}
    block.load_state_dict(state)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = rebuilt(state, x)
    assert_close("channels last", block(x), expected, 1e-11)
    first = VSSBlock(6, channels_first=True, **options).double()
    first.load_state_dict(state)
    assert_close("channels first", first(x.movedim(-1, 1)), expected.movedim(-1, 1), 1e-11)


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_a_padded_batch_gets_what_each_image_gets_alone(first: bool) -> None:
    block = VSSBlock(6, d_state=2, channels_first=first).double()
    block.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in block.state_dict().items()})
    sizes, channels = ((5, 3), (2, 7), (6, 7)), 1 if first else -1
    images = [torch.randn(1, h, w, 6, dtype=torch.float64).movedim(-1, channels) for h, w in sizes]
    x, mask = torch.full((3, 6, 7, 6), torch.nan, dtype=torch.float64), torch.zeros(3, 6, 7, dtype=torch.bool)
    for k, (h, w) in enumerate(sizes):
        x[k, :h, :w], mask[k, :h, :w] = images[k].movedim(channels, -1)[0], True
    out = block(x.movedim(-1, channels), mask)
    found = torch.autograd.grad(out.square().sum(), list(block.parameters()))
    alone = [block(image) for image in images]
    expected = torch.autograd.grad(sum(y.square().sum() for y in alone), list(block.parameters()))
    out = out.movedim(channels, -1)
    assert_close("out", out[mask], torch.cat([y.movedim(channels, -1).flatten(0, -2) for y in alone]), 1e-11)
    assert not out[~mask].any()
    for (name, _), grad, wanted in zip(block.named_parameters(), found, expected, strict=True):
        assert_close(name, grad, wanted, 1e-10)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask .*2, 3, 4"):
        VSSBlock(8, channels_first=True)(torch.randn(2, 8, 3, 4), torch.ones(2, 4, 3, dtype=torch.bool))


def test_keys_are_the_published_ones() -> None:
    assert set(VSSBlock(4).state_dict()) == PUBLISHED
    without = {name for name in PUBLISHED if not name.startswith(("norm2", "mlp"))}
    assert set(VSSBlock(4, mlp_ratio=0).state_dict()) == without
    assert set(VSSBlock(4, conv_bias=True).state_dict()) == PUBLISHED | {"op.conv2d.bias"}


def test_a_hidden_channel_is_not_lost_to_rounding() -> None:
    """1 / 49 * 49 is less than 1 in float64."""
    assert VSSBlock(49, mlp_ratio=1 / 49).mlp.fc1.out_features == 1
    assert VSSBlock(4, mlp_ratio=0).mlp is None


def test_drop_path_drops_both_branches_in_training_only() -> None:
    block, x = VSSBlock(4, drop_path=0.9), torch.randn(64, 2, 2, 4)
    whole = (block(x) == x).flatten(1).all(1)
    assert 0.5 < whole.float().mean() < 1  # 0.81 of the images keep both inputs
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_its_receptive_field_is_seen_in_both_layouts() -> None:
    assert effective_receptive_field(VSSBlock(4), torch.randn(1, 3, 5, 4)).shape == (3, 5)
    assert effective_receptive_field(VSSBlock(4, channels_first=True), torch.randn(1, 4, 3, 5)).shape == (3, 5)
