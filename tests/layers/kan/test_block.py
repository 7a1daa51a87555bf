"""KANLayer and KANBlock: shapes, their parts, options."""

from __future__ import annotations

import pytest
import torch

from kan_mamba_layers import KANBlock, KANLayer


class TestKANLayerAndBlock:
    @pytest.mark.parametrize("use_kan", [True, False])
    @pytest.mark.parametrize(("height", "width"), [(6, 4), (1, 1), (1, 7), (5, 1)])
    def test_shapes_and_gradients(self, height: int, width: int, use_kan: bool) -> None:
        block = KANBlock(8, use_kan=use_kan)
        x = torch.randn(3, height * width, 8, requires_grad=True)
        out = block(x, height, width)
        assert out.shape == x.shape
        out.square().sum().backward()
        assert x.grad.isfinite().all()
        for name, p in block.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name

    def test_widths(self) -> None:
        layer = KANLayer(8, 12, 5)
        assert layer(torch.randn(2, 12, 8), 3, 4).shape == (2, 12, 5)
        assert KANLayer(8)(torch.randn(2, 12, 8), 3, 4).shape == (2, 12, 8)

    def test_layer_is_its_parts(self) -> None:
        layer, x = KANLayer(6).eval(), torch.randn(2, 20, 6)
        expected = x
        for m in (1, 2, 3):
            expected = getattr(layer, f"fc{m}")(expected)
            image = expected.transpose(1, 2).reshape(2, 6, 5, 4)
            part = getattr(layer, f"dwconv_{m}")
            expected = torch.relu(part.bn(part.dwconv(image))).flatten(2).transpose(1, 2)
        assert torch.equal(layer(x, 5, 4), expected)

    def test_block_is_a_residual_around_the_norm(self) -> None:
        block, x = KANBlock(6).eval(), torch.randn(2, 20, 6)
        assert torch.equal(block(x, 5, 4), x + block.layer(block.norm2(x), 5, 4))

    def test_height_and_width_are_not_exchanged(self) -> None:
        block, x = KANBlock(6).eval(), torch.randn(1, 20, 6)
        assert not torch.allclose(block(x, 5, 4), block(x, 4, 5))

    def test_keys(self) -> None:
        keys = set(KANBlock(4).state_dict())
        assert {"norm2.weight", "layer.fc1.grid", "layer.fc3.spline_scaler", "layer.dwconv_2.bn.running_var"} <= keys
        assert len(keys) == 2 + 3 * 4 + 3 * 7

    def test_drop_path(self) -> None:
        block, x = KANBlock(6, drop_path=0.5), torch.randn(64, 20, 6)
        kept = (block(x, 5, 4) != x).flatten(1).any(1)
        assert 10 < kept.sum() < 54, "some samples skip the branch, some do not"
        block.eval()
        assert (block(x, 5, 4) != x).flatten(1).any(1).all()

    def test_options_reach_the_linears(self) -> None:
        layer = KANLayer(4, grid_size=7, spline_order=2, dtype=torch.float64)
        for fc in (layer.fc1, layer.fc2, layer.fc3):
            assert (fc.grid_size, fc.spline_order, fc.base_weight.dtype) == (7, 2, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        block = KANBlock(8).to(dtype)
        out = block(torch.randn(2, 20, 8).to(dtype), 5, 4)
        assert out.dtype == dtype and out.isfinite().all()

    def test_meta_device(self) -> None:
        block = KANBlock(8, device="meta")
        assert block(torch.empty(2, 20, 8, device="meta"), 5, 4).shape == (2, 20, 8)
