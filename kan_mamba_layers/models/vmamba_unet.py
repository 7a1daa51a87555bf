"""VMambaUNet: a U-Net whose encoder is a VMamba, which may be pretrained."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice
from kan_mamba_layers.layers.arguments import own_arguments
from kan_mamba_layers.models.blocks import Decode, Head
from kan_mamba_layers.models.model import Model
from kan_mamba_layers.models.vmamba import PUBLISHED, VMamba
from kan_mamba_layers.ops import Backend


class VMambaUNet(Model):
    r"""Segment an image of any size with a :class:`VMamba` as encoder and a convolutional decoder.

    With :math:`t_0, \ldots, t_3` the maps of the encoder's stages, at 1/4 to 1/32 of the image's size,

    .. math::
        x_3 = \mathrm{LayerNorm}_3(t_3), \qquad
        x_i = \mathrm{up}(\mathrm{DConv}_i(x_{i+1})) + \mathrm{LayerNorm}_i(t_i), \qquad i = 2, 1, 0 .

    Two more DConv and up, to half and to full size, and a 1x1 convolution produce the logits. DConv is two 3x3
    convolutions with BatchNorm and ReLU, up bilinear interpolation.

    Args:
        encoder: the name of a VMamba of :func:`list_models`, or a mapping of the arguments of :class:`VMamba` from
            ``depths`` to ``drop_path``.
        in_channels: channels of the image.
        num_classes: channels of the logits: 1 for a binary mask (sigmoid), ``k`` for ``k`` exclusive classes (softmax).
        encoder_weights: a published checkpoint for the encoder, see :meth:`VMamba.load_published`.
        drop_path: rate of stochastic depth in the encoder; None for that of ``encoder``.
        backend: backend of the scans.

    Shape:
        Input ``(b, in_channels, h, w)`` with ``h, w >= 32``, output logits ``(b, num_classes, h, w)``.

    Raises:
        TypeError: an argument has the wrong type, or the image is not floating point.
        ValueError: an argument is out of range, ``encoder_weights`` are of another VMamba, the image's channels or size
            do not fit, or a training batch leaves BatchNorm a single value (one image of 32x32).

    Numerics:
        Scans run in float32 at least, even under autocast.

    Example:
        >>> import torch
        >>> model = VMambaUNet({"depths": (1, 1, 1, 1), "dims": 8}, in_channels=1, num_classes=2).eval()
        >>> model(torch.randn(1, 1, 67, 50)).shape
        torch.Size([1, 2, 67, 50])

    References:
        Liu et al., VMamba, arXiv 2401.10166. The decoder is this project's own: that of :class:`KMUNet` without KAN
        blocks and scans.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] = "vmamba_tiny",
        in_channels: int = 3,
        num_classes: int = 1,
        *,
        encoder_weights: str | Path | Mapping[str, Any] | None = None,
        drop_path: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        arguments = own_arguments(locals())
        del arguments["encoder_weights"]  # a stored model has its own
        super().__init__(arguments)
        options = dict(encoder) if isinstance(encoder, Mapping) else _published(encoder)
        if drop_path is not None:
            options["drop_path"] = drop_path
        self.encoder = VMamba(in_channels, 0, features_only=True, backend=backend, **options)
        if encoder_weights is not None:
            self.encoder.load_published(encoder_weights)
        widths = self.encoder.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.decoder = nn.ModuleList(Decode(below, above) for above, below in pairwise(widths))
        self.up = Decode(widths[0], widths[0] // 2)
        self.head = Head(widths[0] // 2, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # b in_channels h w -> b dims[0]/2 h/2 w/2
        """Return the decoded map at half size that the head reads."""
        self._check_image(x)
        height, width = x.shape[2:]
        self._check_batch(x, ((height + 31) // 32, (width + 31) // 32))
        maps = self.encoder(x)
        *skips, x = (_normalised(norm, x) for norm, x in zip(self.norms, maps, strict=True))
        for decode, skip in zip(reversed(self.decoder), reversed(skips), strict=True):
            x = decode(x, skip.shape[2:]) + skip
        return self.up(x, ((height + 1) // 2, (width + 1) // 2))

    def forward(self, x: Tensor) -> Tensor:  # b in_channels h w -> b num_classes h w
        """Return the logits of every pixel, ``(b, num_classes, h, w)``, of images of any size from 32x32."""
        return self.head(self.forward_features(x), x.shape[2:])


def _published(name: str) -> dict[str, Any]:
    check_choice("encoder", name, PUBLISHED)
    return dict(PUBLISHED[name])


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:  # b c h w
    return rearrange(norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
