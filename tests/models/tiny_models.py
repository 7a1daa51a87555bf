"""The tiny models, their inputs and a loss that reaches every parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kan_mamba_layers import create_model

FAMILIES = ("km_unet", "km_unet_pp", "u_kan")
TINY = tuple(f"{family}_tiny" for family in FAMILIES)


def build(name: str, **overrides) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **overrides)


def image(*shape: int, channels: int = 3) -> Tensor:
    return torch.randn(shape[0], channels, *shape[1:], generator=torch.Generator().manual_seed(0))


def total(out: Tensor | list[Tensor]) -> Tensor:
    """A loss that no gradient can hide from: random weights on every logit."""
    outs = out if isinstance(out, list) else [out]
    draw = torch.Generator().manual_seed(1)
    return sum((y * torch.randn(y.shape, generator=draw)).sum() for y in outs)


def assert_gradients(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert p.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        assert p.grad.abs().max() > 0, f"{name} has a zero gradient"
