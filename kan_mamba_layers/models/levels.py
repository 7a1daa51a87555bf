"""The base class of the models: the levels of the encoder, the checks of the input, storage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kan_mamba_layers._check import check_divisible, check_int, check_shape
from kan_mamba_layers.layers import KANBlock
from kan_mamba_layers.layers.arguments import options_for
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.models.blocks import ContextBlock, DownLayer, KANStage, PatchEmbed
from kan_mamba_layers.models.storage import read_model, write_model
from kan_mamba_layers.ops.backend import check_backend

# The first levels of the encoder are convolutional; the deeper ones are small enough for tokens and a KAN block.
CONV_LEVELS = 3
# The levels at which a decoder has KAN blocks.
KAN_DECODER_LEVELS = (2, 3)
_MIN_SIZE = 32

Model = TypeVar("Model", bound="SegmentationModel")


class SegmentationModel(Layer):
    """An encoder of levels, each at half the size of the one before, and the blocks for a decoder.

    Args:
        arguments: the arguments of the subclass's constructor. They are kept as ``config``, which
            :meth:`save_pretrained` stores beside the weights.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        widths = tuple(arguments["widths"])
        check_int("in_channels", arguments["in_channels"], 1)
        check_int("num_classes", arguments["num_classes"], 1)
        check_int("ema_factor", arguments["ema_factor"], 1)
        check_backend("cross_selective_scan", arguments["backend"])
        for i, width in enumerate(widths):
            if arguments["use_ema"] and (i < CONV_LEVELS or i < len(widths) - 1):
                check_divisible(f"widths[{i}]", width, "ema_factor", arguments["ema_factor"])
        self.config: dict[str, Any] = {**arguments, "widths": widths}
        self.widths = widths
        self.trunk_context: bool = arguments["trunk_context"]
        self.grad_checkpointing = False
        self.encoder = nn.ModuleList(self._encoder_level(i) for i in range(len(widths)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute SS2D and EMA blocks in backward instead of storing their activations, for the same gradients."""
        self.grad_checkpointing = enable

    def save_pretrained(self, folder: str | Path) -> None:
        """Store the model in a folder: ``config.json`` (class, arguments, checksum) and ``model.safetensors``.

        Args:
            folder: created if it does not exist.

        Raises:
            ImportError: safetensors is not installed.
        """
        write_model(folder, type(self).__name__, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | Path, *, num_classes: int | None = None, in_channels: int | None = None
    ) -> Model:
        """Load a model that :meth:`save_pretrained` stored, in evaluation mode, on the CPU.

        Args:
            folder: the local folder.
            num_classes: another number of classes than the stored one; the last layer of each head is drawn anew.
            in_channels: another number of channels than the stored one; the first convolution is drawn anew.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            TypeError: ``num_classes`` or ``in_channels`` is not an integer.
            ValueError: the folder holds another model, its files are damaged, or an argument is less than 1.
            ImportError: safetensors is not installed.
        """
        arguments, state = read_model(folder, cls.__name__)
        wanted = {"num_classes": num_classes, "in_channels": in_channels}
        changes = {name: value for name, value in wanted.items() if value not in (None, arguments[name])}
        model = cls(**{**arguments, **changes})
        drawn = model.state_dict()
        if changes:
            state = {name: x if x.shape == drawn[name].shape else drawn[name] for name, x in state.items()}
        model.load_state_dict(state)
        return model.eval()

    def _encoder_level(self, level: int) -> nn.Module:
        """The block from the level above, or from the image, to this level."""
        width = self.widths[level]
        above = self.widths[level - 1] if level else self.config["in_channels"]
        if level < CONV_LEVELS:
            return DownLayer(above, width)
        return nn.Sequential(PatchEmbed(above, width), self._kan_stage(level))

    def _kan_stage(self, level: int) -> KANStage:
        return KANStage(self.widths[level], **options_for(KANBlock, self.config))

    def _context_block(self, level: int) -> ContextBlock:
        options = options_for(ContextBlock, self.config)
        return ContextBlock(self.widths[level], residual=self.config["context_residual"], **options)

    def _encode(self, x: Tensor, context: Sequence[nn.Module]) -> list[Tensor]:
        """Return the map of every level for the decoder; ``context`` holds the context blocks of the first levels."""
        maps = []
        for level, encode in enumerate(self.encoder):
            x = skip = encode(x)
            if level < CONV_LEVELS:
                skip = self._run_context(context[level], x)
                x = skip if self.trunk_context else x
            maps.append(skip)
        return maps

    def _run_context(self, block: nn.Module, x: Tensor) -> Tensor:
        # Only context blocks are checkpointed: they hold most activations, and no BatchNorm.
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _check_input(self, x: Tensor) -> None:
        check_shape("x", x, ("any", self.config["in_channels"], "any", "any"), "b, in_channels, h, w")
        batch, _, height, width = x.shape
        for name, size in (("height", height), ("width", width)):
            if size < _MIN_SIZE:
                raise ValueError(
                    f"image {name} must be at least {_MIN_SIZE}, got {size}, which is too small to halve at every "
                    "level; pad or resize the image"
                )
        if self.training and batch * self._deepest(height) * self._deepest(width) == 1:
            raise ValueError(
                f"a batch of 1 image of {height}x{width} leaves BatchNorm one value per channel at the deepest level, "
                "too few to train on; use 2 or more images, images of 64x64 or more, or model.eval()"
            )

    def _deepest(self, size: int) -> int:
        """The size at the deepest level: pooling rounds down, strided convolution rounds up."""
        for level in range(len(self.widths)):
            size = size // 2 if level < CONV_LEVELS else (size + 1) // 2
        return size
