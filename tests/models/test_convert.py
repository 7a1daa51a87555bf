"""Published checkpoints: every key is accounted for; the values are checked against golden files in test_golden.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kan_mamba_layers import KMUNet, VSSBlock, convert_state_dict

SOURCES = {
    "km_unet": {"trunk_context": False, "decoder_kan": False},
    "u_kan": {"use_ss2d": False, "use_ema": False},
}
GOLDEN = {"km_unet": ("km_unet_0", (16, 32, 128, 160, 32)), "u_kan": ("u_kan_0", (4, 8, 32, 40, 48))}


@pytest.mark.parametrize("source", SOURCES)
class TestPublishedState:
    @pytest.fixture
    def published(self, golden, source: str) -> dict[str, Tensor]:
        return golden(GOLDEN[source][0]).state

    def model(self, source: str) -> KMUNet:
        return KMUNet(widths=GOLDEN[source][1], **SOURCES[source])

    def test_every_key_has_its_place(self, source: str, published: dict[str, Tensor]) -> None:
        state, dropped = convert_state_dict(published, source=source)
        assert dropped == []
        expected = {k: v.shape for k, v in self.model(source).state_dict().items()}
        assert {k: v.shape for k, v in state.items()} == expected

    def test_the_input_is_left_alone(self, source: str, published: dict[str, Tensor]) -> None:
        before = {k: v.clone() for k, v in published.items()}
        state, _ = convert_state_dict(published, source=source)
        for value in state.values():
            value.zero_() if value.is_floating_point() else None
        again, _ = convert_state_dict(before, source=source)
        assert set(published) == set(before) and set(again) == set(state)

    def test_data_parallel_prefix(self, source: str, published: dict[str, Tensor]) -> None:
        prefixed = {f"module.{k}": v for k, v in published.items()}
        state, dropped = convert_state_dict(prefixed, source=source)
        expected, _ = convert_state_dict(published, source=source)
        assert dropped == [] and set(state) == set(expected)
        assert all(torch.equal(state[k], expected[k]) for k in expected)

    def test_a_foreign_key_is_refused_by_name(self, source: str, published: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=r"encoder9\.conv\.0\.weight"):
            convert_state_dict({**published, "encoder9.conv.0.weight": torch.ones(1)}, source=source)

    def test_order_does_not_matter(self, source: str, published: dict[str, Tensor]) -> None:
        state, _ = convert_state_dict(dict(reversed(published.items())), source=source)
        expected, _ = convert_state_dict(published, source=source)
        assert all(torch.equal(state[k], expected[k]) for k in expected)


def test_dead_modules_of_km_unet_are_listed() -> None:
    dead = {"dnorm3.weight": torch.ones(8), "dblock1.0.norm2.weight": torch.ones(8)}
    state, dropped = convert_state_dict({"final.bias": torch.zeros(1), **dead}, source="km_unet")
    assert set(dropped) == set(dead) and list(state) == ["head.logits.bias"]


def test_decoder_blocks_of_u_kan_are_alive() -> None:
    _, dropped = convert_state_dict({"dnorm3.weight": torch.ones(8)}, source="u_kan")
    assert dropped == []


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other form of a block's weights: directions stacked, linear layers as 1x1 convolutions."""
    other = {}
    for name, value in state.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, value = f"{name.removesuffix('_weight')}.weight", value.flatten(0, 1)
        elif name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            value = value[..., None, None]
        other[name] = value
    return other


class TestVSSBlock:
    state = VSSBlock(6, d_state=2, conv_bias=True).state_dict()

    @pytest.mark.parametrize(
        "published",
        [state, stacked(state), {"model": stacked(state), "epoch": 3}, {f"module.{k}": v for k, v in state.items()}],
        ids=["apart", "stacked", "nested", "parallel"],
    )
    def test_both_forms_of_the_keys(self, published: dict) -> None:
        state, dropped = convert_state_dict(published, "vss_block")
        assert dropped == [] and list(state) == list(self.state)
        assert all(torch.equal(state[name], value) for name, value in self.state.items())

    def test_both_forms_at_once_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"op\.x_proj_weight' twice.*'op\.x_proj\.weight'"):
            convert_state_dict({**self.state, "op.x_proj.weight": torch.zeros(20, 6)}, "vss_block")

    def test_a_weight_that_stacks_no_four_directions_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"op\.x_proj\.weight'\] must stack 4 directions.*\(10, 6\)"):
            convert_state_dict({"op.x_proj.weight": torch.zeros(10, 6)}, "vss_block")

    @pytest.mark.parametrize("key", ["op.x_proj_bias", "op.in_proj.weight.extra", "mlp.fc3.weight", "norm3.bias", "op"])
    def test_a_foreign_key_is_refused_by_name(self, key: str) -> None:
        with pytest.raises(ValueError, match=rf"'{key}' does not belong to a published vss_block"):
            convert_state_dict({**self.state, key: torch.zeros(1)}, "vss_block")
