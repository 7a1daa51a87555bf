"""The encoder that KMUNet and KMUNetPP share, and the blocks of their decoders."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kan_mamba_layers._check import check_divisible, check_int
from kan_mamba_layers.layers import KANBlock
from kan_mamba_layers.layers.arguments import options_for
from kan_mamba_layers.models.blocks import ContextBlock, DownLayer, KANStage, PatchEmbed
from kan_mamba_layers.models.features import FeatureInfo
from kan_mamba_layers.models.model import Model

# The first levels of the encoder are convolutional; the deeper ones are small enough for tokens and a KAN block.
CONV_LEVELS = 3
# The levels at which a decoder has KAN blocks.
KAN_DECODER_LEVELS = (2, 3)


class SegmentationModel(Model):
    """An encoder of levels, each at half the size of the one before, and the blocks for a decoder.

    Args:
        arguments: see :class:`Model`.
    """

    context_name = ""  # of a context block of the encoder, with {} for its level

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        widths = tuple(arguments["widths"])
        check_int("ema_factor", arguments["ema_factor"], 1)
        for i, width in enumerate(widths):
            has_context = arguments.get("context_from", 0) <= i < max(CONV_LEVELS, len(widths) - 1)
            if arguments["use_ema"] and has_context:
                check_divisible(f"widths[{i}]", width, "ema_factor", arguments["ema_factor"])
        self.widths = widths
        self.trunk_context: bool = arguments["trunk_context"]
        names = [self.context_name.format(i) if i < CONV_LEVELS else f"encoder.{i}" for i in range(len(widths))]
        info = [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": name}
            for i, (width, name) in enumerate(zip(widths, names, strict=True))
        ]
        self.feature_info = FeatureInfo(info, arguments["out_indices"])
        self.encoder = nn.ModuleList(self._encoder_level(i) for i in range(self.feature_info.depth))

    def _encoder_level(self, level: int) -> nn.Module:
        """The block from the level above, or from the image, to this level."""
        width = self.widths[level]
        above = self.widths[level - 1] if level else self.config["in_channels"]
        if level < CONV_LEVELS:
            return DownLayer(above, width)
        return nn.Sequential(PatchEmbed(above, width), self._kan_stage(level))

    def _kan_stage(self, level: int) -> KANStage:
        return KANStage(self.widths[level], **options_for(KANBlock, self.config))

    def _context_block(self, level: int) -> nn.Module:
        if level < self.config.get("context_from", 0):
            return nn.Identity()
        options = options_for(ContextBlock, self.config)
        return ContextBlock(self.widths[level], residual=self.config["context_residual"], **options)

    def _encoder_context(self, level: int) -> nn.Module:
        """The context block of a level of the encoder, if anything depends on it."""
        used = self.trunk_context or level in self.feature_info.out_indices
        return self._context_block(level) if used else nn.Identity()

    def _encode(self, x: Tensor, context: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor]]:
        """Return the map at full size, before the first pooling, and those of all levels for the decoder.

        ``context`` holds the context blocks of the first levels.
        """
        self._check_image(x)
        self._check_batch(x, (self._deepest(x.shape[2]), self._deepest(x.shape[3])))
        full, maps = x, []
        for level, encode in enumerate(self.encoder):
            if level < CONV_LEVELS:
                before, x = encode(x)
                full = full if level else before
                skip = self._recomputed(context[level], x)
                x = skip if self.trunk_context else x
            else:
                x = skip = encode(x)
            maps.append(skip)
        return full, maps

    def _deepest(self, size: int) -> int:
        """The size at the deepest level: pooling rounds down, strided convolution rounds up."""
        for level in range(len(self.encoder)):
            size = size // 2 if level < CONV_LEVELS else (size + 1) // 2
        return size
