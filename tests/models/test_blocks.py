"""The blocks that the models are made of."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close
from kan_mamba_layers.models.blocks import ContextBlock, ConvLayer, DConvLayer, PatchEmbed


class TestConvolutions:
    @pytest.mark.parametrize("block", [ConvLayer, DConvLayer])
    def test_shapes_and_sign(self, block: type) -> None:
        out = block(3, 8)(torch.randn(2, 3, 7, 5))
        assert out.shape == (2, 8, 7, 5) and (out >= 0).all()

    def test_which_convolution_changes_the_channels(self) -> None:
        def convolutions(block: torch.nn.Module) -> list[tuple[int, int]]:
            found = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
            return [(m.in_channels, m.out_channels) for m in found]

        assert convolutions(ConvLayer(3, 8)) == [(3, 8), (8, 8)]
        assert convolutions(DConvLayer(3, 8)) == [(3, 3), (3, 8)]

    @pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 1), (2, 3)])
    def test_patch_embed_halves_and_rounds_up(self, height: int, width: int) -> None:
        out = PatchEmbed(4, 6)(torch.randn(2, 4, height, width))
        assert out.shape == (2, 6, -(-height // 2), -(-width // 2))
        assert_close("mean over channels", out.mean(1) + 1, torch.ones(out.mean(1).shape), 1e-5)


class TestContextBlock:
    def test_is_ss2d_then_ema(self) -> None:
        block, x = ContextBlock(8, d_state=2), torch.randn(2, 8, 7, 5)
        mixed = block.ss2d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.equal(block(x), block.ema(mixed))

    def test_residual_adds_the_branch_to_the_input(self) -> None:
        block, x = ContextBlock(8, d_state=2, residual=True), torch.randn(2, 8, 7, 5)
        mixed = block.ss2d(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        assert torch.equal(block(x), x + block.ema(mixed))
        torch.nn.init.zeros_(block.ss2d.out_proj.weight)
        assert torch.equal(block(x), x)
        only_ema = ContextBlock(8, use_ss2d=False, residual=True)
        assert torch.equal(only_ema(x), x + only_ema.ema(x)) and not list(only_ema.norm.parameters())
        neither = ContextBlock(8, use_ss2d=False, use_ema=False, residual=True)
        assert torch.equal(neither(x), x)

    def test_either_may_be_left_out(self) -> None:
        x = torch.randn(2, 8, 7, 5)
        only_ema = ContextBlock(8, use_ss2d=False)
        assert torch.equal(only_ema(x), only_ema.ema(x))
        only_ss2d = ContextBlock(8, use_ema=False)
        assert torch.equal(only_ss2d(x), only_ss2d.ss2d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        neither = ContextBlock(8, use_ss2d=False, use_ema=False)
        assert torch.equal(neither(x), x) and not list(neither.parameters())
