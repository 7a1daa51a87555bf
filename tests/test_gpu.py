"""The same numbers on a GPU as on the CPU: outputs and every gradient of the layers and of both models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers import assert_close
from kan_mamba_layers import EMA, SS2D, KANBlock, KANLinear, create_model

CASES = {
    "KANLinear": (lambda: KANLinear(12, 7), (5, 9, 12), ()),
    "KANBlock": (lambda: KANBlock(16), (2, 6 * 5, 16), (6, 5)),
    "SS2D": (lambda: SS2D(12), (2, 9, 7, 12), ()),
    "EMA": (lambda: EMA(16), (2, 16, 9, 7), ()),
    "km_unet_tiny": (lambda: create_model("km_unet_tiny"), (2, 3, 67, 50), ()),
    "km_unet_pp_tiny": (lambda: create_model("km_unet_pp_tiny"), (2, 3, 67, 50), ()),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_on_the_cpu(name: str) -> None:
    build, shape, sizes = CASES[name]
    on_cpu: nn.Module = build().eval()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(shape)
    outputs = []
    for module, image in ((on_cpu, x.clone()), (on_gpu, x.cuda())):
        image.requires_grad_()
        with torch.backends.cudnn.flags(allow_tf32=False):  # which rounds the inputs of convolutions to 10 bits
            y = module(image, *sizes)
            y.square().sum().backward()
        outputs.append({"output": y, "input": image.grad, **{k: p.grad for k, p in module.named_parameters()}})
    for part, expected in outputs[0].items():
        assert_close(part, outputs[1][part].cpu(), expected, 1e-4)
