"""The parts of VMamba, channels last: the embedding of patches, the stages, the classifier."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from kan_mamba_layers.layers import VSSBlock


class PatchEmbedding(nn.Sequential):
    """Two strided convolutions, each followed by LayerNorm over the channels, and GELU between them."""

    def __init__(self, in_channels: int, width: int) -> None:  # b c h w -> b h/4 w/4 c'
        half = width // 2
        super().__init__(
            _halving(in_channels, half),
            _channels_last(),
            nn.LayerNorm(half),
            _channels_first(),
            nn.GELU(),
            _halving(half, width),
            _channels_last(),
            nn.LayerNorm(width),
        )


class Downsampling(nn.Sequential):
    """A strided convolution and LayerNorm over the channels."""

    def __init__(self, width: int, next_width: int) -> None:  # b h w c -> b h/2 w/2 c'
        super().__init__(_channels_first(), _halving(width, next_width), _channels_last(), nn.LayerNorm(next_width))


class Stage(nn.Module):
    """Blocks, and the way to the next stage if there is one."""

    def __init__(self, blocks: Sequence[VSSBlock], next_width: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if next_width is None else Downsampling(blocks[0].dim, next_width)

    def forward(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, Tensor]:  # b h w c
        """Return the map of this stage and the input of the next; ``run`` calls a block."""
        for block in self.blocks:
            x = run(block, x)
        return x, self.downsample(x)


class Classifier(nn.Module):
    """LayerNorm, the mean over the pixels, and a linear layer, which is missing for 0 classes."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the linear layer by one for ``num_classes``, on the norm's device and in its dtype."""
        device, dtype = self.norm.weight.device, self.norm.weight.dtype
        self.head = nn.Linear(self.width, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.head.train(self.training).apply(draw_linear)

    def forward(self, x: Tensor) -> Tensor:  # b h w c -> b num_classes
        return self.head(self.norm(x).mean((1, 2)))


class _Permute(nn.Module):
    """Another order of the dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


def draw_linear(module: nn.Module) -> None:
    """Draw the weights of a linear layer as the published code does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _channels_last() -> _Permute:  # b c h w -> b h w c
    return _Permute(0, 2, 3, 1)


def _channels_first() -> _Permute:  # b h w c -> b c h w
    return _Permute(0, 3, 1, 2)


def _halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
