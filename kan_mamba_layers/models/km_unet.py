"""KMUNet: a U-Net with selective scans, multi-scale attention and KAN blocks."""

from collections.abc import Sequence

from torch import Tensor, nn

from kan_mamba_layers._check import check_sizes
from kan_mamba_layers.layers.arguments import own_arguments
from kan_mamba_layers.models.blocks import Decode, Head
from kan_mamba_layers.models.levels import CONV_LEVELS, KAN_DECODER_LEVELS, SegmentationModel
from kan_mamba_layers.ops import Backend


class KMUNet(SegmentationModel):
    r"""Segment an image of any size with KAN blocks at the deep levels, and SS2D and EMA at all but the deepest.

    With :math:`E_i` the encoder's levels (three convolutional, two KAN), :math:`\mathrm{ctx} = \mathrm{EMA} \circ
    \mathrm{SS2D}`, and levels counted from 0 (half size) to 4 (1/32),

    .. math::
        t_i &= E_i(t_{i-1}), \quad t_i \leftarrow \mathrm{ctx}_i(t_i) \ (i \le 2), \qquad
        x_4 = t_4 \\
        x_i &= \mathrm{ctx}'_i\big(\mathrm{KAN}_i(\mathrm{up}(\mathrm{DConv}_i(x_{i+1})) + t_i)\big),
            \qquad i = 3 \dots 0,

    with :math:`\mathrm{KAN}_i` at levels 3 and 2 only. A last DConv and a 1x1 convolution produce logits at full size.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits: 1 for a binary mask (sigmoid), ``k`` for ``k`` exclusive classes (softmax).
        widths: channels at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size; all but the last divisible by
            ``ema_factor``.
        trunk_context: whether the output of the context blocks feeds the next level too, as in the report; with False
            it feeds the skips only, as in the published code.
        decoder_kan: whether the decoder has KAN blocks at 1/16 and 1/8.
        context_residual: whether SS2D and EMA, or the one of them that is used, add their result to their input, with
            LayerNorm before SS2D. Neither the report nor its code has this connection; the model learns better with
            it (docs/short_trainings.md).
        use_kan: False replaces KANLinear with ``nn.Linear`` everywhere.
        use_ss2d: False leaves out SS2D.
        use_ema: False leaves out EMA.
        grid_size: intervals of the splines.
        spline_order: degree of the splines.
        d_state: state size of SS2D.
        expand: expansion factor of SS2D.
        ema_factor: groups of EMA.
        drop_path: rate of stochastic depth in KAN blocks.
        features_only: whether there is only the encoder, whose maps ``forward`` returns, as of a model of timm;
            ``feature_info`` describes them.
        out_indices: with ``features_only=True`` the levels whose maps are returned, by default all.
        backend: backend of the scans and of the splines.

    Shape:
        Input ``(b, in_channels, h, w)`` with ``h, w >= 32``, output logits ``(b, num_classes, h, w)``, or with
        ``features_only=True`` a list of maps ``(b, widths[i], h / 2^(i+1), w / 2^(i+1))``.

    Raises:
        TypeError: an argument has the wrong type, or the image is not floating point.
        ValueError: an argument is out of range, the image's channels or size do not fit, or a training batch leaves
            BatchNorm a single value (one image of 32x32).

    Numerics:
        Scans and splines run in float32 at least, even under autocast.

    Example:
        >>> import torch
        >>> model = KMUNet(in_channels=1, num_classes=3, widths=(8, 16, 32, 48, 64), d_state=4).eval()
        >>> model(torch.randn(1, 1, 67, 50)).shape
        torch.Size([1, 3, 67, 50])

    References:
        KM-UNet, arXiv 2501.02559; Li et al., U-KAN, arXiv 2406.02918. ``trunk_context=False,
        decoder_kan=False`` is the published KM-UNet, ``use_ss2d=False, use_ema=False`` the published U-KAN; see
        :func:`convert_state_dict`.
    """

    context_name = "encoder_context.{}"

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        *,
        widths: Sequence[int] = (16, 32, 128, 160, 256),
        trunk_context: bool = True,
        decoder_kan: bool = True,
        context_residual: bool = False,
        use_kan: bool = True,
        use_ss2d: bool = True,
        use_ema: bool = True,
        grid_size: int = 5,
        spline_order: int = 3,
        d_state: int = 16,
        expand: float = 2,
        ema_factor: int = 8,
        drop_path: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_sizes("widths", widths, 5, 5)
        super().__init__(own_arguments(locals()))
        levels = range(min(CONV_LEVELS, self.feature_info.depth))
        self.encoder_context = nn.ModuleList(self._encoder_context(i) for i in levels)
        if features_only:
            return
        above = range(len(widths) - 1)  # the levels above the bottleneck
        kan_levels = KAN_DECODER_LEVELS if decoder_kan else ()
        self.decoder = nn.ModuleList(Decode(widths[i + 1], widths[i]) for i in above)
        self.decoder_kan_stages = nn.ModuleDict({str(i): self._kan_stage(i) for i in kan_levels})
        self.decoder_context = nn.ModuleList(self._context_block(i) for i in above)
        self.head = Head(widths[0], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # b in_channels h w -> b widths[0] h/2 w/2
        """Return the decoded map at half size that the head reads."""
        self._check_whole("forward_features")
        _, (*skips, x) = self._encode(x, list(self.encoder_context))
        for i in reversed(range(len(self.decoder))):
            x = self.decoder[i](x, skips[i].shape[2:]) + skips[i]
            if str(i) in self.decoder_kan_stages:
                x = self.decoder_kan_stages[str(i)](x)
            x = self._recomputed(self.decoder_context[i], x)
        return x

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # b in_channels h w -> b num_classes h w
        """Return the logits of every pixel, ``(b, num_classes, h, w)``, of images of any size from 32x32.

        With ``features_only=True`` it is the list of the encoder's maps.
        """
        if self.features_only:
            return self._chosen(self._encode(x, list(self.encoder_context))[1])
        return self.head(self.forward_features(x), x.shape[2:])
