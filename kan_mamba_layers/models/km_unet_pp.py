"""KMUNetPP: the blocks of KMUNet on the nested grid of U-Net++."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_int, check_sizes
from kan_mamba_layers.layers.arguments import own_arguments
from kan_mamba_layers.models.blocks import ConvBNReLU, Decode, Head
from kan_mamba_layers.models.levels import CONV_LEVELS, KAN_DECODER_LEVELS, SegmentationModel
from kan_mamba_layers.ops import Backend


class KMUNetPP(SegmentationModel):
    r"""Segment an image of any size on a grid of nodes ``X[i, j]``: level ``i`` (size 1/2^(i+1)), column ``j``.

    Column 0 is the encoder of :class:`KMUNet`. Every other node adds up the node below its left neighbour, upsampled,
    and all nodes to its left on its level, each through its own convolution (the "plus-plus" convolutions),

    .. math::
        X_{i,j} = \mathrm{ctx}_{i,j}\Big(\mathrm{KAN}_{i,j}\big(\mathrm{up}(\mathrm{DConv}_{i,j}(X_{i+1,j-1}))
                  + \textstyle\sum_{k<j} \mathrm{plus}_{i,j,k}(X_{i,k})\big)\Big), \qquad j \ge 1,

    with :math:`\mathrm{KAN}` on levels 2 and 3 only and
    :math:`\mathrm{ctx}(x) = x + \mathrm{EMA}(\mathrm{SS2D}(\mathrm{LN}(x)))` from level ``context_from`` on. With depth
    ``L = len(widths) - 1`` the result is read from ``X[0, L]``, and under deep supervision also from ``X[0, 1]`` to
    ``X[0, L-1]``. The logits are

    .. math::
        \mathrm{conv}_j\big(\mathrm{up}(\mathrm{DConv}_j(X_{0,j}))\big)
        \quad\text{or, with } \texttt{full\_resolution}, \quad
        \mathrm{conv}_j\big(\mathrm{fuse}_j(\mathrm{up}(\mathrm{DConv}_j(X_{0,j})) + E)\big),

    with :math:`E` the first level before its pooling, :math:`\mathrm{fuse}` a 3x3 convolution with BatchNorm and ReLU,
    and :math:`\mathrm{conv}` a 1x1 convolution.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits: 1 for a binary mask (sigmoid), ``k`` for ``k`` exclusive classes (softmax).
        widths: channels of the 2 to 5 levels; at levels with EMA they must be divisible by ``ema_factor``.
        trunk_context: see :class:`KMUNet`.
        decoder_kan: whether the nodes ``j >= 1`` on levels 2 and 3 have KAN blocks.
        context_residual: whether SS2D and EMA add their result to their input, as above; the model learns worse
            without it (docs/short_trainings.md).
        use_kan: see :class:`KMUNet`.
        use_ss2d: see :class:`KMUNet`.
        use_ema: see :class:`KMUNet`.
        grid_size: see :class:`KMUNet`.
        spline_order: see :class:`KMUNet`.
        d_state: see :class:`KMUNet`.
        expand: see :class:`KMUNet`.
        ema_factor: see :class:`KMUNet`.
        drop_path: see :class:`KMUNet`.
        features_only: see :class:`KMUNet`; the maps are ``X[i, 0]``.
        out_indices: see :class:`KMUNet`.
        backend: see :class:`KMUNet`.
        full_resolution: whether every head adds the map of the first level at full size, so that outlines are not
            limited to half size.
        context_from: the first level with SS2D and EMA, which cost most at the first levels.
        deep_supervision: whether every ``X[0, j]``, ``j >= 1``, has a head. In training ``forward`` then returns a list
            of logits, the final one first; in evaluation it returns the final one.

    Shape:
        Input ``(b, in_channels, h, w)`` with ``h, w >= 32``, output logits ``(b, num_classes, h, w)`` or a list of
        ``L``; with ``features_only=True`` a list of maps, as of :class:`KMUNet`.

    Raises:
        TypeError: an argument has the wrong type, or the image is not floating point.
        ValueError: an argument is out of range, the image's channels or size do not fit, or a training batch leaves
            BatchNorm a single value (one image of 32x32).

    Numerics:
        Scans and splines run in float32 at least, even under autocast.

    Example:
        >>> import torch
        >>> model = KMUNetPP(widths=(8, 16, 32, 48, 64), d_state=4, deep_supervision=True)
        >>> [tuple(y.shape) for y in model(torch.randn(1, 3, 64, 96))]
        [(1, 1, 64, 96), (1, 1, 64, 96), (1, 1, 64, 96), (1, 1, 64, 96)]

    References:
        Zhou et al., UNet++, arXiv 1807.10165, equation 1; KM-UNet, arXiv 2501.02559. No working KM-UNet++
        has been published: this module defines one.
    """

    context_name = "context.{}_0"

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        *,
        widths: Sequence[int] = (16, 32, 128, 160, 256),
        trunk_context: bool = True,
        decoder_kan: bool = True,
        context_residual: bool = True,
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
        full_resolution: bool = False,
        context_from: int = 0,
        deep_supervision: bool = False,
    ) -> None:
        check_sizes("widths", widths, 2, 5)
        check_int("context_from", context_from, 0)
        super().__init__(own_arguments(locals()))
        self.deep_supervision = deep_supervision
        self.depth = depth = len(widths) - 1
        # Keys are indices of the grid: "i_j" for the node X[i, j], "i_j_k" for its connection from X[i, k].
        levels = range(min(CONV_LEVELS, self.feature_info.depth))
        nodes = [(i, j) for j in range(1, depth + 1) for i in range(depth + 1 - j)] if not features_only else []
        self.up = nn.ModuleDict({f"{i}_{j}": Decode(widths[i + 1], widths[i]) for i, j in nodes})
        self.plus = nn.ModuleDict(
            {f"{i}_{j}_{k}": ConvBNReLU(widths[i], widths[i]) for i, j in nodes for k in range(j)}
        )
        kan_nodes = [(i, j) for i, j in nodes if decoder_kan and i in KAN_DECODER_LEVELS]
        self.kan = nn.ModuleDict({f"{i}_{j}": self._kan_stage(i) for i, j in kan_nodes})
        self.context = nn.ModuleDict({f"{i}_0": self._encoder_context(i) for i in levels})
        self.context.update({f"{i}_{j}": self._context_block(i) for i, j in nodes})
        heads = [j for i, j in nodes if i == 0 and (deep_supervision or j == depth)]
        self.heads = nn.ModuleDict(
            {str(j): Head(widths[0], num_classes, full_resolution=full_resolution) for j in heads}
        )

    def forward_features(self, x: Tensor) -> Tensor:  # b in_channels h w -> b widths[0] h/2 w/2
        """Return ``X[0, L]``, the decoded map at half size that the final head reads."""
        self._check_whole("forward_features")
        return self._top_row(x)[1][-1]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # b in_channels h w -> b num_classes h w
        """Return the logits of every pixel, ``(b, num_classes, h, w)``, of images of any size from 32x32.

        In training under deep supervision it is a list with the logits of every head, the final ones first; with
        ``features_only=True`` the list of the encoder's maps.
        """
        if self.features_only:
            return self._chosen(self._first_column(x)[1])
        full, top = self._top_row(x)
        if self.deep_supervision and self.training:
            return [self.heads[str(j)](top[j], x.shape[2:], full) for j in range(self.depth, 0, -1)]
        return self.heads[str(self.depth)](top[self.depth], x.shape[2:], full)

    def prune(self, depth: int) -> "KMUNetPP":
        """Return the smaller model that ends at ``X[0, depth]``, with the same weights, in evaluation mode.

        Args:
            depth: the last column to keep, from 1 to ``len(widths) - 1``.

        Raises:
            TypeError: ``depth`` is not an integer.
            ValueError: ``depth`` is out of range, or the model has no head there because it was built without
                ``deep_supervision``, or some of its parameters were replaced, as by ``weight_norm``.
        """
        self._check_whole("prune")
        check_int("depth", depth, 1)
        if str(depth) not in self.heads:
            raise ValueError(
                f"depth={depth} has no head, only {', '.join(self.heads)}; "
                "train with deep_supervision=True and prune to a depth with a head"
            )
        config = {**self.config, "widths": self.widths[: depth + 1], "deep_supervision": False}
        with torch.device("meta"):
            pruned = KMUNetPP(**config)
        state, kept = self.state_dict(), pruned.state_dict().keys()
        if missing := sorted(kept - state.keys()):
            raise ValueError(f"the model has no {missing[0]} any more; undo what replaced it, such as weight_norm")
        pruned.load_state_dict({key: state[key].clone() for key in kept}, assign=True)
        return pruned.eval()

    def _first_column(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the map ``E`` at full size, and ``X[0, 0], X[1, 0], ...``."""
        levels = range(min(CONV_LEVELS, self.feature_info.depth))
        return self._encode(x, [self.context[f"{i}_0"] for i in levels])

    def _top_row(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute the grid column by column; return the map ``E`` at full size, and ``X[0, 0], ..., X[0, L]``."""
        full, column = self._first_column(x)
        X = {(i, 0): node for i, node in enumerate(column)}
        for j in range(1, self.depth + 1):
            for i in range(self.depth + 1 - j):
                node = self.up[f"{i}_{j}"](X[i + 1, j - 1], X[i, 0].shape[2:])
                for k in range(j):
                    node = node + self.plus[f"{i}_{j}_{k}"](X[i, k])
                if f"{i}_{j}" in self.kan:
                    node = self.kan[f"{i}_{j}"](node)
                X[i, j] = self._recomputed(self.context[f"{i}_{j}"], node)
        return full, [X[0, j] for j in range(self.depth + 1)]
