"""KMUNet: its parts by hand, and U-KAN as a special case."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, image
from torch.nn.functional import max_pool2d


class TestKMUNet:
    @pytest.mark.parametrize("residual", [True, False])
    def test_equals_its_parts(self, residual: bool) -> None:
        """The model by hand: context in the trunk, KAN blocks at 1/16 and 1/8 of the decoder."""
        model, x = build("km_unet_tiny", context_residual=residual).eval(), image(2, 70, 45)
        with torch.no_grad():
            maps, t = [], x
            for i in range(5):
                t = max_pool2d(model.encoder[i].conv(t), 2) if i < 3 else model.encoder[i](t)
                t = model.encoder_context[i](t) if i < 3 else t
                maps.append(t)
            shapes = [tuple(m.shape[1:]) for m in maps]
            assert shapes == [(16, 35, 22), (16, 17, 11), (32, 8, 5), (48, 4, 3), (64, 2, 2)]
            for i in (3, 2, 1, 0):
                t = model.decoder[i](t, maps[i].shape[2:]) + maps[i]
                t = model.decoder_kan_stages[str(i)](t) if i >= 2 else t
                t = model.decoder_context[i](t)
            assert torch.equal(model.head(t, x.shape[2:]), model(x))

    def test_u_kan_is_the_model_without_context(self) -> None:
        u_kan, plain = build("u_kan_tiny").eval(), build("km_unet_tiny", use_ss2d=False, use_ema=False).eval()
        assert torch.equal(u_kan(image(1, 48, 48)), plain(image(1, 48, 48)))
