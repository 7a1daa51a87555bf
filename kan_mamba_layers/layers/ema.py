"""EMA: efficient multi-scale attention with cross-spatial learning."""

import torch
from einops import rearrange
from torch import Tensor, nn

from kan_mamba_layers._check import check_divisible, check_int, check_pixels, check_shape
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops.precision import check_dtype


class EMA(Layer):
    r"""Weight every pixel by the agreement of two branches with different receptive fields.

    The channels are split into ``factor`` groups :math:`x`, which share all weights. With :math:`\bar{x}^h, \bar{x}^w`
    the means over the width and over the height,

    .. math::
        (a, b) &= \mathrm{Conv}_{1\times1}([\bar{x}^h, \bar{x}^w]), \qquad
        x_1 = \mathrm{GroupNorm}(x \cdot \mathrm{sigmoid}(a) \cdot \mathrm{sigmoid}(b)), \qquad
        x_2 = \mathrm{Conv}_{3\times3}(x) \\
        m &= \mathrm{softmax}_c(\mathrm{mean}(x_1))^\top x_2 + \mathrm{softmax}_c(\mathrm{mean}(x_2))^\top x_1, \qquad
        \mathrm{EMA}(x) = x \cdot \mathrm{sigmoid}(m) .

    Args:
        channels: channels ``c`` of input and output.
        factor: number of groups; must divide ``channels``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input and output ``(b, channels, h, w)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``factor`` does not divide ``channels``, the input is not ``(b, channels, h, w)``, or it has another
            dtype than the parameters, without autocast.

    Numerics:
        Uses plain means instead of adaptive pooling, whose backward pass on CUDA is not deterministic.

    Example:
        >>> import torch
        >>> EMA(16)(torch.randn(2, 16, 9, 7)).shape
        torch.Size([2, 16, 9, 7])

    References:
        Ouyang et al., Efficient Multi-Scale Attention Module with Cross-Spatial Learning, arXiv 2305.13563, section 3.
    """

    def __init__(
        self,
        channels: int,
        factor: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("channels", channels, 1)
        check_int("factor", factor, 1)
        check_divisible("channels", channels, "factor", factor)
        self.channels = channels
        self.factor = factor
        width = channels // factor
        self.conv1x1 = nn.Conv2d(width, width, 1, device=device, dtype=dtype)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1, device=device, dtype=dtype)
        self.gn = _GroupNorm(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # b c h w
        """Weight the pixels of images of any size: ``(b, channels, h, w)`` to the same shape."""
        check_shape("x", x, ("any", self.channels, "any", "any"), "b, channels, h, w")
        height, width = x.shape[2:]
        check_pixels("x", x, height, width)
        check_dtype("x", x, "conv3x3.weight", getattr(self.conv3x3, "weight", None))
        groups = rearrange(x, "b (f c) h w -> (b f) c h w", f=self.factor)
        means = torch.cat([groups.mean(3), groups.mean(2)], 2)  # b*f c h+w
        gates = self.conv1x1(means[..., None]).sigmoid()  # b*f c h+w 1
        row_gates, column_gates = gates.split([height, width], 2)
        local = self.gn(groups * row_gates * column_gates.mT)  # b*f c h w
        spatial = self.conv3x3(groups)  # b*f c h w
        agreement = _channel_weights(local) * spatial + _channel_weights(spatial) * local  # b*f c h w
        gate = agreement.sum(1, keepdim=True).sigmoid()  # b*f 1 h w
        return rearrange(groups * gate, "(b f) c h w -> b (f c) h w", f=self.factor)

    def extra_repr(self) -> str:
        return f"{self.channels}, factor={self.factor}"


class _GroupNorm(nn.GroupNorm):
    """The same for a single value per channel, which PyTorch's layer refuses in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _channel_weights(x: Tensor) -> Tensor:  # b c h w -> b c 1 1
    """The weight of each channel: the softmax of the channels' means."""
    return x.mean((2, 3), keepdim=True).softmax(1)
