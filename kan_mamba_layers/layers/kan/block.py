"""The tokenised KAN layer and the KAN block of U-KAN."""

from numbers import Integral
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kan_mamba_layers._check import check_int, check_pixels, check_shape
from kan_mamba_layers.layers.arguments import options_for
from kan_mamba_layers.layers.depthwise import depthwise_conv
from kan_mamba_layers.layers.drop_path import DropPath
from kan_mamba_layers.layers.kan.linear import KANLinear
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops.backend import Backend
from kan_mamba_layers.ops.bspline import Extrapolation


class KANLayer(Layer):
    r"""Three KANLinear layers on tokens, each followed by a depthwise convolution on the image that the tokens form.

    .. math::
        x \leftarrow \mathrm{ReLU}(\mathrm{BN}(\mathrm{DWConv}_{3\times3}(\mathrm{KANLinear}_m(x)))), \qquad m = 1, 2, 3

    Args:
        in_features: channels of the input, ``c``.
        hidden_features: channels after the first and second KANLinear; default ``in_features``.
        out_features: channels of the output; default ``in_features``.
        use_kan: False replaces each KANLinear with ``nn.Linear``, as an ablation.
        grid_size: see :class:`KANLinear`.
        spline_order: see :class:`KANLinear`.
        grid_range: see :class:`KANLinear`.
        extrapolation: see :class:`KANLinear`.
        backend: see :class:`KANLinear`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input ``(b, H*W, in_features)`` and the two sizes, output ``(b, H*W, out_features)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the number of tokens is not ``H * W``.

    Numerics:
        As in :class:`KANLinear`; in training BatchNorm needs ``b * H * W >= 2``.

    Example:
        >>> import torch
        >>> KANLayer(16)(torch.randn(2, 6 * 4, 16), 6, 4).shape
        torch.Size([2, 24, 16])

    References:
        Li et al., U-KAN, arXiv 2406.02918, section 3.2 (Tok-KAN block).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        use_kan: bool = True,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        extrapolation: Extrapolation = "zero",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = options_for(KANLinear, locals())
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_int("in_features", in_features, 1)
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        check_int("hidden_features", hidden_features, 1)
        check_int("out_features", out_features, 1)
        self.in_features = in_features

        def linear(inputs: int, outputs: int) -> nn.Module:
            return KANLinear(inputs, outputs, **options) if use_kan else nn.Linear(inputs, outputs, **factory)

        self.fc1 = linear(in_features, hidden_features)
        self.dwconv_1 = _DepthwiseConv(hidden_features, **factory)
        self.fc2 = linear(hidden_features, hidden_features)
        self.dwconv_2 = _DepthwiseConv(hidden_features, **factory)
        self.fc3 = linear(hidden_features, out_features)
        self.dwconv_3 = _DepthwiseConv(out_features, **factory)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # b (h w) c -> b (h w) o
        """Map the tokens of images of ``H`` rows and ``W`` columns: ``(b, H*W, in_features)``, row by row."""
        _check_height_width(H, W)
        check_shape("x", x, ("any", H * W, self.in_features), "b, H*W, in_features")
        check_pixels("x", x, H, W)
        x = self.dwconv_1(self.fc1(x), H, W)
        x = self.dwconv_2(self.fc2(x), H, W)
        return self.dwconv_3(self.fc3(x), H, W)


class KANBlock(Layer):
    r"""A residual KAN layer: ``x + DropPath(KANLayer(LayerNorm(x)))``.

    Args:
        dim: channels, ``c``.
        drop_path: rate of stochastic depth, in ``[0, 1)``.
        use_kan: see :class:`KANLayer`.
        grid_size: see :class:`KANLinear`.
        spline_order: see :class:`KANLinear`.
        grid_range: see :class:`KANLinear`.
        extrapolation: see :class:`KANLinear`.
        backend: see :class:`KANLinear`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input ``(b, H*W, dim)`` and the two sizes, output ``(b, H*W, dim)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the number of tokens is not ``H * W``.

    Example:
        >>> import torch
        >>> KANBlock(16)(torch.randn(2, 6 * 4, 16), 6, 4).shape
        torch.Size([2, 24, 16])

    References:
        Li et al., U-KAN, arXiv 2406.02918, section 3.2. The parameters have the names used there.
    """

    def __init__(
        self,
        dim: int,
        *,
        drop_path: float = 0.0,
        use_kan: bool = True,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        extrapolation: Extrapolation = "zero",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = options_for(KANLayer, locals())
        super().__init__()
        check_int("dim", dim, 1)
        self.dim = dim
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.layer = KANLayer(dim, **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # b (h w) c
        """Map the tokens of images of ``H`` rows and ``W`` columns: ``(b, H*W, dim)``, row by row."""
        _check_height_width(H, W)
        check_shape("x", x, ("any", H * W, self.dim), "b, H*W, dim")
        return x + self.drop_path(self.layer(self.norm2(x), H, W))


def _check_height_width(H: Any, W: Any) -> None:
    """Both are integers, or what stands for one while PyTorch traces."""
    for name, size in (("H", H), ("W", W)):
        if not isinstance(size, (Integral, torch.SymInt, Tensor)):
            raise TypeError(f"{name} must be an integer, got {size!r}; pass the height and width in tokens")


class _DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution, BatchNorm and ReLU on the image that the tokens form."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.dwconv = depthwise_conv(channels, 3, **factory)
        self.bn = nn.BatchNorm2d(channels, **factory)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # b (h w) c
        image = rearrange(x, "b (h w) c -> b c h w", h=height, w=width)
        return rearrange(torch.relu(self.bn(self.dwconv(image))), "b c h w -> b (h w) c")
