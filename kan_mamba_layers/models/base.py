"""What both models share: their levels, their checks, and how they are stored."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kan_mamba_layers._check import check_divisible, check_int, check_shape
from kan_mamba_layers.layers.blocks import ContextBlock, DConvLayer, DownLayer, KANStage, PatchEmbed, upsample
from kan_mamba_layers.ops.backend import Backend, check_backend

# The first levels are convolutional; deeper ones are small enough for tokens and a KAN block.
CONV_LEVELS = 3
_MIN_SIZE = 32
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

Model = TypeVar("Model", bound="SegmentationModel")


class SegmentationModel(nn.Module):
    """Levels of an encoder, each at half the size of the one before, and the blocks that a decoder puts on them.

    ``config`` holds the constructor's arguments; it is what :meth:`save_pretrained` stores beside the weights.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        trunk_context: bool,
        decoder_kan: bool,
        context_residual: bool,
        use_kan: bool,
        use_ss2d: bool,
        use_ema: bool,
        grid_size: int,
        spline_order: int,
        d_state: int,
        expand: float,
        ema_factor: int,
        drop_path: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        check_int("in_channels", in_channels, 1)
        check_int("num_classes", num_classes, 1)
        check_int("ema_factor", ema_factor, 1)
        check_backend("cross_selective_scan", backend)
        for i, width in enumerate(widths):
            if use_ema and (i < CONV_LEVELS or i < len(widths) - 1):
                check_divisible(f"widths[{i}]", width, "ema_factor", ema_factor)
        self.widths = tuple(widths)
        self.trunk_context = trunk_context
        self.grad_checkpointing = False
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "widths": self.widths,
            "trunk_context": trunk_context,
            "decoder_kan": decoder_kan,
            "context_residual": context_residual,
            "use_kan": use_kan,
            "use_ss2d": use_ss2d,
            "use_ema": use_ema,
            "grid_size": grid_size,
            "spline_order": spline_order,
            "d_state": d_state,
            "expand": expand,
            "ema_factor": ema_factor,
            "drop_path": drop_path,
            "backend": backend,
        }

    def _encoder_level(self, level: int) -> nn.Module:
        """The block that makes level ``level`` from the one above, or level 0 from the image."""
        width = self.widths[level]
        above = self.widths[level - 1] if level else self.config["in_channels"]
        if level < CONV_LEVELS:
            return DownLayer(above, width)
        return nn.Sequential(PatchEmbed(above, width), self._kan_stage(level))

    def _kan_stage(self, level: int) -> KANStage:
        names = ("drop_path", "use_kan", "grid_size", "spline_order", "backend")
        return KANStage(self.widths[level], **{name: self.config[name] for name in names})

    def _context(self, level: int) -> ContextBlock:
        names = ("use_ss2d", "use_ema", "ema_factor")
        options = {name: self.config[name] for name in names}
        if self.config["use_ss2d"]:
            options |= {name: self.config[name] for name in ("d_state", "expand", "backend")}
        return ContextBlock(self.widths[level], residual=self.config["context_residual"], **options)

    def _run_context(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a context block, the only kind worth recomputing: it holds nearly all activations, and no BatchNorm."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute SS2D and EMA blocks in backward instead of storing their activations, for the same gradients."""
        self.grad_checkpointing = enable

    def _check_input(self, x: Tensor) -> None:
        check_shape("x", x, ("any", self.config["in_channels"], "any", "any"), "b, in_channels, h, w")
        batch, _, height, width = x.shape
        for name, size in (("height", height), ("width", width)):
            if size < _MIN_SIZE:
                raise ValueError(
                    f"image {name} {size} is less than {_MIN_SIZE}, too small to halve; pad or resize the image"
                )
        if self.training and batch * _deepest(height, len(self.widths)) * _deepest(width, len(self.widths)) == 1:
            raise ValueError(
                f"a batch of 1 image of {height}x{width} leaves BatchNorm one value per channel at the deepest level, "
                "which it cannot train on; use 2 or more images, images of 64x64 or more, or model.eval()"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Store the model in a folder: ``config.json`` (class, arguments, checksum) and ``model.safetensors``.

        Args:
            folder: created if it does not exist.

        Raises:
            ImportError: safetensors is not installed.
        """
        folder = Path(folder)
        safetensors = _safetensors()
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / _WEIGHTS)
        config = {"model": type(self).__name__, "arguments": self.config}
        config["sha256"] = _checksum(config, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path) -> Model:
        """Load a model that :meth:`save_pretrained` stored, in evaluation mode, on the CPU.

        Args:
            folder: the local folder.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            ValueError: the folder holds another model, or not what was stored.
            ImportError: safetensors is not installed.
        """
        config = read_config(folder)
        if config["model"] != cls.__name__:
            raise ValueError(
                f"folder {str(folder)!r} holds a {config['model']}, not a {cls.__name__}; load it with that class"
            )
        path = Path(folder) / _WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"folder {str(folder)!r} has no {_WEIGHTS}; store the model with save_pretrained")
        if _checksum(config, path) != config["sha256"]:
            raise ValueError(
                f"folder {str(folder)!r} is damaged: by its sha256 {_CONFIG} or {_WEIGHTS} is not what was stored; "
                "copy it or store the model again"
            )
        model = cls(**config["arguments"])
        model.load_state_dict(_safetensors().load_file(path))
        return model.eval()


class Decode(nn.Module):
    """Bring a map to the channels and the size of the level above: DConv, then bilinear interpolation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = DConvLayer(in_channels, out_channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:  # b c h w -> b c' 2h 2w
        return upsample(self.conv(x), size)


class Head(nn.Module):
    """From half size to logits at full size."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.decode = Decode(in_channels, in_channels)
        self.logits = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:  # b c h/2 w/2 -> b num_classes h w
        return self.logits(self.decode(x, size))


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the class, arguments and checksum of a stored model."""
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"folder {str(folder)!r} has no {_CONFIG}; pass a folder written by save_pretrained")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"file {str(path)!r} is not valid JSON ({error}); store the model again") from error
    if not isinstance(config, dict) or not {"model", "arguments", "sha256"} <= config.keys():
        raise ValueError(
            f"file {str(path)!r} lacks 'model', 'arguments' or 'sha256'; store the model with save_pretrained"
        )
    return config


def _deepest(size: int, levels: int) -> int:
    """Size of the deepest level: pooling rounds down, strided convolution up."""
    for level in range(levels):
        size = size // 2 if level < CONV_LEVELS else (size + 1) // 2
    return size


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("storing models needs safetensors: pip install kan-mamba-layers[hub]") from error
    return safetensors.torch


def _checksum(config: dict[str, Any], weights: Path) -> str:
    """The sha256 of what a stored model is: its class, its arguments and its weights."""
    identity = json.dumps([config["model"], config["arguments"]], sort_keys=True)
    return hashlib.sha256(identity.encode() + weights.read_bytes()).hexdigest()
