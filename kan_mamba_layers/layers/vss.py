"""VSSBlock: the residual block of VMamba."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_int, check_mask, check_number, check_shape
from kan_mamba_layers.layers.arguments import options_for
from kan_mamba_layers.layers.drop_path import DropPath
from kan_mamba_layers.layers.dynamics import multiple
from kan_mamba_layers.layers.grid_scan import GridScan, MakeWalks
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.layers.ss2d import SS2D
from kan_mamba_layers.ops.backend import Backend
from kan_mamba_layers.ops.precision import check_dtype


class VSSBlock(Layer):
    r"""Mix the pixels of an image by SS2D, then the channels of each pixel by an MLP, both in residual connections.

    .. math::
        x &\leftarrow x + \mathrm{DropPath}(\mathrm{SS2D}(\mathrm{LayerNorm}(x))) \\
        x &\leftarrow x + \mathrm{DropPath}(W_2\, \mathrm{GELU}(W_1\, \mathrm{LayerNorm}(x) + b_1) + b_2)

    The norms are over the channels.

    Args:
        dim: channels of input and output, ``c``.
        d_state: see :class:`SS2D`.
        d_conv: see :class:`SS2D`.
        expand: see :class:`SS2D`.
        dt_rank: see :class:`SS2D`.
        walks: see :class:`SS2D`.
        gate: see :class:`SS2D`.
        conv_bias: see :class:`SS2D`.
        dropout: see :class:`SS2D`.
        mlp_ratio: the MLP has ``mlp_ratio * dim`` hidden channels; with 0 there is no MLP.
        drop_path: rate of stochastic depth, in ``[0, 1)``.
        channels_first: whether input and output are ``b c h w`` instead of ``b h w c``. The weights are the same.
        backend: see :class:`SS2D`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input and output ``(b, h, w, dim)``, or ``(b, dim, h, w)`` with ``channels_first=True``. ``mask``, if given, is
        a boolean tensor ``(b, h, w)`` in both layouts, False where a pixel is to be left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or an input has another shape, or another dtype than the parameters,
            without autocast.

    Numerics:
        The scan runs in float32 at least; see :class:`SS2D`. Where ``mask`` is False the output is 0, and no gradient
        gets anything, even if the input is not finite there.

    Example:
        >>> import torch
        >>> VSSBlock(16)(torch.randn(2, 6, 5, 16)).shape
        torch.Size([2, 6, 5, 16])
        >>> VSSBlock(16, channels_first=True)(torch.randn(2, 16, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    References:
        Liu et al., VMamba, arXiv 2401.10166, section 4. With default arguments it is the block of the published
        VMamba v2; :func:`convert_state_dict` with ``source="vss_block"`` takes its weights. The parameters have the
        names used there.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 1.0,
        dt_rank: int | Literal["auto"] = "auto",
        walks: MakeWalks | None = None,
        gate: bool = False,
        conv_bias: bool = False,
        dropout: float = 0.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        channels_first: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = options_for(SS2D, locals())
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        check_int("dim", dim, 1)
        check_number("mlp_ratio", mlp_ratio, 0.0)
        hidden = multiple("mlp_ratio", mlp_ratio, dim) if mlp_ratio else 0
        self.dim = dim
        self.channels_first = channels_first
        self.norm = nn.LayerNorm(dim, **factory)
        self.op = SS2D(dim, d_state, d_conv, expand, dt_rank, **options)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, **factory) if hidden else None
        self.mlp = _MLP(dim, hidden, **factory) if hidden else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # b h w c
        """Map images of any size to the same shape; where ``mask`` is False they are left out, and the output is 0."""
        if self.channels_first:
            check_shape("x", x, ("any", self.dim, "any", "any"), "b, dim, h, w")
            x = x.permute(0, 2, 3, 1)  # b h w c
        else:
            check_shape("x", x, ("any", "any", "any", self.dim), "b, h, w, dim")
        check_dtype("x", x, "norm.weight", getattr(self.norm, "weight", None))
        if mask is not None:
            check_mask("mask", mask, x.shape[:-1], "b, h, w")
            x = x.masked_fill(~mask[..., None], 0)
        x = x + self.drop_path(self.op(self.norm(x), mask))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    def extra_repr(self) -> str:
        return f"{self.dim}, channels_first={self.channels_first}"


def takes_channels_last(module: nn.Module) -> bool:
    """Whether a layer of this library takes images or volumes with the channels last, as ``b h w c``."""
    return isinstance(module, GridScan) or (isinstance(module, VSSBlock) and not module.channels_first)


class _MLP(nn.Module):
    """Two linear layers on the channels of each pixel, with GELU between them."""

    def __init__(self, channels: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.fc2 = nn.Linear(hidden, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:  # ... c
        return self.fc2(F.gelu(self.fc1(x)))
