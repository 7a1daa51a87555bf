"""The blocks that the models are made of."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kan_mamba_layers.layers import EMA, SS2D, KANBlock
from kan_mamba_layers.ops import Backend
from kan_mamba_layers.ops.precision import check_dtype


class ConvBNReLU(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU. The convolution has no bias: BatchNorm cancels it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:  # b c h w -> b c' h w
        check_dtype("x", x, "the convolution's weight", getattr(self[0], "weight", None))
        return super().forward(x)


class ConvLayer(nn.Sequential):
    """Two convolutions; the first changes the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(ConvBNReLU(in_channels, out_channels), ConvBNReLU(out_channels, out_channels))


class DConvLayer(nn.Sequential):
    """Two convolutions; the second changes the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(ConvBNReLU(in_channels, in_channels), ConvBNReLU(in_channels, out_channels))


class DownLayer(nn.Module):
    """Two convolutions, then 2x2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # b c h w -> b c' h w, b c' h/2 w/2
        """Return the map before pooling and the map after it."""
        x = self.conv(x)  # b c' h w
        return x, F.max_pool2d(x, 2)


class PatchEmbed(nn.Module):
    """Halve the size with an overlapping strided convolution, then LayerNorm over the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # b c h w -> b c' h/2 w/2
        x = self.proj(x)  # b c' h/2 w/2
        return _to_image(self.norm(_to_tokens(x)), x)


class KANStage(nn.Module):
    """A KAN block on the pixels of a map as tokens, then LayerNorm."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.block = KANBlock(channels, **options)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:  # b c h w
        tokens = self.block(_to_tokens(x), *x.shape[2:])  # b (h w) c
        return _to_image(self.norm(tokens), x)


class ContextBlock(nn.Module):
    """SS2D for the context of the whole image, then EMA for attention; either can be left out.

    With ``residual`` the block adds its result to its input, unless both are left out, and LayerNorm precedes SS2D.
    """

    def __init__(
        self,
        channels: int,
        *,
        use_ss2d: bool = True,
        use_ema: bool = True,
        ema_factor: int = 8,
        residual: bool = False,
        d_state: int = 16,
        expand: float = 2,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.residual = residual and (use_ss2d or use_ema)
        self.norm = nn.LayerNorm(channels) if residual and use_ss2d else nn.Identity()
        self.ss2d = SS2D(channels, d_state, expand=expand, backend=backend) if use_ss2d else None
        self.ema = EMA(channels, ema_factor) if use_ema else None

    def forward(self, x: Tensor) -> Tensor:  # b c h w
        y = x
        if self.ss2d is not None:
            y = rearrange(self.ss2d(self.norm(rearrange(x, "b c h w -> b h w c"))), "b h w c -> b c h w")
        if self.ema is not None:
            y = self.ema(y)
        return x + y if self.residual else y


class Decode(nn.Module):
    """Bring a map to the channels and the size of the level above: two convolutions, then bilinear interpolation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = DConvLayer(in_channels, out_channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:  # b c h w -> b c' 2h 2w
        return _enlarge(self.conv(x), size)


class Head(nn.Module):
    """From half size to logits at full size, with or without a skip at full size."""

    def __init__(self, in_channels: int, num_classes: int, *, full_resolution: bool = False) -> None:
        super().__init__()
        self.decode = Decode(in_channels, in_channels)
        self.fuse = ConvBNReLU(in_channels, in_channels) if full_resolution else None
        self.logits = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor, size: torch.Size, skip: Tensor | None = None) -> Tensor:
        # b c h/2 w/2, b c h w -> b num_classes h w
        if self.fuse is not None and skip is not None:
            return self.logits(self.fuse(self.decode(x, size) + skip))
        # Interpolation commutes with a convolution of 1x1 pixels, and logits have fewer channels.
        return _enlarge(self.logits(self.decode.conv(x)), size)


def _enlarge(x: Tensor, size: Sequence[int]) -> Tensor:  # b c h w -> b c h' w'
    return F.interpolate(x, size=tuple(size), mode="bilinear")


def _to_tokens(x: Tensor) -> Tensor:  # b c h w -> b (h w) c
    return rearrange(x, "b c h w -> b (h w) c")


def _to_image(tokens: Tensor, like: Tensor) -> Tensor:  # b (h w) c -> b c h w
    # In the order of its shape: Inductor cannot bound the strides of another order at sizes it does not know.
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[2], w=like.shape[3]).contiguous()
