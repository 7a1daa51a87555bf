"""KANConv2d: a convolution whose kernel consists of learned B-spline functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_divisible, check_int, check_tensor
from kan_mamba_layers.layers.arguments import options_for
from kan_mamba_layers.layers.kan.base import GridMode, SplineLayer
from kan_mamba_layers.ops.bspline import Extrapolation
from kan_mamba_layers.ops.precision import check_dtype


class KANConv2d(SplineLayer):
    r"""A drop-in for ``nn.Conv2d`` in which every kernel tap is an activation plus a learned B-spline.

    .. math::
        y_{o}(p) = \sum_{i, k} \varphi_{oik}\big(x_i(p + k)\big) + b_o, \qquad
        \varphi_{oik}(x) = w^\mathrm{base}_{oik}\, \beta(x) + \gamma_{oik} \sum_j w^\mathrm{spline}_{oikj} B_{ij}(x)

    with :math:`p` a pixel and :math:`k` a tap of the kernel. The activation and the bases of a pixel are computed once;
    one convolution forms all sums.

    Args:
        in_channels: channels of the input, ``c``; each has its own knots.
        out_channels: channels of the output, ``o``.
        kernel_size: height and width of the kernel; like the next three, one number or a pair.
        stride: step between the pixels of the output.
        padding: pixels added on every side, ``"valid"`` for none, or ``"same"`` for an output of the input's size
            (with ``stride=1``). Padded positions contribute 0 to ``y``: the edge functions are padded, not the pixels,
            since :math:`\varphi(0)` is not 0.
        dilation: distance between the taps of the kernel.
        groups: divides input and output channels into groups without edges between them.
        bias: whether to add a learned bias; False by default, unlike ``nn.Conv2d``.
        grid_size: see :class:`KANLinear`, as for the remaining arguments.
        spline_order: degree ``s >= 1`` of the splines.
        grid_range: interval on which the splines are complete.
        base_activation: class of the elementwise module :math:`\beta`, or the function.
        scale_noise: ``grid_size`` times the range of the noise that the initial splines pass through at the knots.
        scale_base: multiplies the initial base weights, uniform in :math:`\pm 1/\sqrt{n}` for ``n`` edges per output.
        scale_spline: multiplies the initial splines.
        enable_standalone_scale_spline: whether each edge has its own factor ``spline_scaler``.
        grid_mode: how :meth:`update_grid` places the knots, ``"uniform"`` or ``"adaptive"``.
        grid_eps: share of equal spacing mixed into the quantiles in ``"adaptive"`` mode, in ``[0, 1]``.
        extrapolation: how the splines continue outside the grid: ``"zero"``, ``"clamp"`` or ``"linear"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input ``(b, c, h, w)`` or ``(c, h, w)``; output with ``o`` channels and the height and width of ``nn.Conv2d``.
        ``base_weight`` and ``spline_scaler`` are ``(o, c/groups, kernel height, kernel width)``, ``spline_weight`` has
        one more dimension, ``g + s``, and ``grid`` is ``(c, g + 2 s + 1)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the input does not fit.

    Numerics:
        Bases are computed in float32 at least and rounded once for the convolution. They dominate the memory use, with
        ``1 + g + s`` values per value of the input.

    Example:
        >>> import torch
        >>> layer = KANConv2d(8, 16, 3, stride=2, padding=1)
        >>> layer(torch.randn(2, 8, 15, 12)).shape
        torch.Size([2, 16, 8, 6])

    References:
        Bodner et al., Convolutional Kolmogorov-Arnold Networks, arXiv 2406.13155.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        base_activation: Callable[..., Any] = nn.SiLU,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        enable_standalone_scale_spline: bool = True,
        grid_mode: GridMode = "uniform",
        grid_eps: float = 0.02,
        extrapolation: Extrapolation = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("in_channels", in_channels, 1)
        check_int("out_channels", out_channels, 1)
        check_int("groups", groups, 1)
        check_divisible("in_channels", in_channels, "groups", groups)
        check_divisible("out_channels", out_channels, "groups", groups)
        size = _pair("kernel_size", kernel_size, 1)
        edges = (out_channels, in_channels // groups, *size)
        super().__init__(edges, in_channels, **options_for(SplineLayer, locals()))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = size
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = groups
        self.padding = _padding(padding, self.stride)

    def forward(self, x: Tensor) -> Tensor:  # b c h w -> b o h' w'
        """Sum the edge functions over channels and taps: ``(b, c, h, w)`` or ``(c, h, w)``, as ``nn.Conv2d`` does."""
        pixels = self._features_last(x)  # b h w c
        self._check_image(x)
        terms = self._terms(pixels, self.grid).to(x.dtype)  # b h w c 1+g+s
        terms = terms.flatten(-2).movedim(-1, -3)  # b c*(1+g+s) h w
        weight = self._factors().movedim(-1, 2).flatten(1, 2)  # o (c/groups)*(1+g+s) height width
        y = F.conv2d(terms, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y.contiguous()  # do not leak the channels-last strides of the terms

    def b_splines(self, x: Tensor) -> Tensor:  # b c h w -> b c h w g+s
        """Return the B-spline bases of ``x`` on this layer's grid, extrapolated as the layer does."""
        return super().b_splines(x).movedim(-2, -4)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KANConv2d":
        def on_rows(x: Tensor) -> Tensor:  # torch.channels_last is a format of four dimensions
            return fn(x.flatten(1)).view(x.shape) if x.ndim == 5 else fn(x)

        super()._apply(on_rows, recurse)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"grid_size={self.grid_size}, spline_order={self.spline_order}, extrapolation={self.extrapolation!r}"
        )

    def _features_last(self, x: Tensor) -> Tensor:  # b c h w -> b h w c
        check_tensor("x", x)
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x must have shape (b, c, h, w) with c = {self.in_channels} channels, got {tuple(x.shape)}; permute "
                "it or build the layer for its channels"
            )
        return x.movedim(-3, -1)

    def _check_image(self, x: Tensor) -> None:
        for name in ("base_weight", "spline_weight", "spline_scaler", "bias"):
            check_dtype("x", x, name, getattr(self, name))
        if isinstance(self.padding, str):
            return
        for n, name in enumerate(("height", "width")):
            least = self.dilation[n] * (self.kernel_size[n] - 1) + 1 - 2 * self.padding[n]
            if x.shape[n - 2] < least:
                raise ValueError(
                    f"x must have a {name} of at least {least}, the extent of the kernel minus the padding, got shape "
                    f"{tuple(x.shape)}; enlarge x or padding"
                )


def _pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Height and width from one integer for both, or from a pair."""
    if not isinstance(value, (tuple, list)):
        check_int(name, value, minimum)
        return (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be an integer or a pair, for height and width, got {value!r}; pass one or two")
    for n, size in enumerate(value):
        check_int(f"{name}[{n}]", size, minimum)
    return (value[0], value[1])


def _padding(padding: Any, stride: tuple[int, int]) -> tuple[int, int] | str:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride=1, got stride={stride}; give padding as a number")
        return "same"
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'valid', 'same' or pixels, got {padding!r}; pass e.g. 1")
    return _pair("padding", padding, 0)
