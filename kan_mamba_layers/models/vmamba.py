"""VMamba: the image classifier and encoder of VSSBlocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_int, check_number, check_pixels, check_shape, check_sizes
from kan_mamba_layers.layers import VSSBlock
from kan_mamba_layers.layers.arguments import options_for, own_arguments
from kan_mamba_layers.models.convert import convert_state_dict
from kan_mamba_layers.models.features import FeatureInfo
from kan_mamba_layers.models.model import Model
from kan_mamba_layers.models.stages import Classifier, PatchEmbedding, Stage, draw_linear
from kan_mamba_layers.models.vmamba_keys import arguments_of
from kan_mamba_layers.ops import Backend
from kan_mamba_layers.ops.precision import check_dtype

# The published models: s1l8 of tiny, s2l15 of small and base.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vmamba_tiny": {"depths": (2, 2, 8, 2), "dims": 96, "expand": 1.0, "drop_path": 0.2},
    "vmamba_small": {"depths": (2, 2, 15, 2), "dims": 96, "expand": 2.0, "drop_path": 0.3},
    "vmamba_base": {"depths": (2, 2, 15, 2), "dims": 128, "expand": 2.0, "drop_path": 0.6},
}
_STAGES = 4
# Errors for a weight, named in the braces, that a checkpoint or the model itself lacks.
_NOT_PUBLISHED = "the checkpoint has no {!r}, so it is not of a VMamba v2; pass the whole checkpoint"
_CHANGED = "the model has no {!r}; undo what changed it, such as torch.nn.utils.prune or parametrize"


class VMamba(Model):
    r"""Classify images with four stages of :class:`VSSBlock`, or encode them for another network.

    .. math::
        x_0 &= \mathrm{VSS}^{n_0}(\mathrm{embed}(\mathrm{image})), \qquad
        x_i = \mathrm{VSS}^{n_i}(\mathrm{LayerNorm}(\mathrm{Conv}_{3\times3}^{/2}(x_{i-1}))), \qquad i = 1, 2, 3 \\
        \mathrm{logits} &= W\, \mathrm{mean}_{h, w}(\mathrm{LayerNorm}(x_3)) + b

    with :math:`\mathrm{embed}` two strided 3x3 convolutions, each followed by LayerNorm, and GELU between them.

    Args:
        in_channels: channels of the image.
        num_classes: classes; with 0 there is no last layer, and the model returns the pooled features.
        depths: blocks of the four stages, :math:`n_i`.
        dims: channels of the four stages, or of the first, at least 2; each further stage then has twice as many.
        d_state: see :class:`SS2D`.
        expand: see :class:`SS2D`.
        mlp_ratio: see :class:`VSSBlock`.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0 in the first.
        features_only: whether there is no classifier, and ``forward`` returns the maps :math:`x_i` of the stages, as of
            a model of timm; ``feature_info`` describes them.
        out_indices: with ``features_only=True`` the stages whose maps are returned, by default all. Later stages are
            not built.
        backend: backend of the scans.

    Shape:
        Input ``(b, in_channels, h, w)`` of any size, output ``(b, num_classes)``, or a list of maps
        ``(b, dims[i], h / 2^(i+2), w / 2^(i+2))``. A strided convolution rounds up, so the sizes are rounded up.

    Raises:
        TypeError: an argument has the wrong type, or the image is not floating point.
        ValueError: an argument is out of range, or the image's channels or dtype do not fit.

    Numerics:
        Scans run in float32 at least, even under autocast.

    Example:
        >>> import torch
        >>> model = VMamba(num_classes=10, depths=(1, 1, 1, 1), dims=8).eval()
        >>> model(torch.randn(2, 3, 64, 50)).shape
        torch.Size([2, 10])
        >>> encoder = VMamba(depths=(1, 1, 1, 1), dims=8, features_only=True, out_indices=(0, 3)).eval()
        >>> [tuple(x.shape) for x in encoder(torch.randn(2, 3, 64, 50))]
        [(2, 8, 16, 13), (2, 64, 2, 2)]
        >>> encoder.feature_info.channels(), encoder.feature_info.reduction()
        ([8, 64], [4, 32])

    References:
        Liu et al., VMamba, arXiv 2401.10166, in its second published version. The keys are those of its checkpoints;
        see :meth:`load_published`.
    """

    fewest_classes = 0
    classifier: Any  # a Classifier, or None with features_only=True

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        expand: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(own_arguments(locals()))
        check_sizes("depths", depths, _STAGES, _STAGES)
        check_number("drop_path", drop_path, 0.0, 1.0, open_high=True)
        widths = _widths(dims)
        info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks.{depths[i] - 1}"}
            for i, width in enumerate(widths)
        ]
        self.feature_info = FeatureInfo(info, out_indices)
        built = self.feature_info.depth
        self.patch_embed = PatchEmbedding(in_channels, widths[0])
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        options = options_for(VSSBlock, self.config)
        stages = []
        for i, depth in enumerate(depths[:built]):
            blocks = [VSSBlock(widths[i], **{**options, "drop_path": rates.pop(0)}) for _ in range(depth)]
            stages.append(Stage(blocks, widths[i + 1] if i + 1 < built else None))
        self.layers = nn.ModuleList(stages)
        self.classifier = None if features_only else Classifier(widths[-1], num_classes)
        self.apply(draw_linear)

    def forward_features(self, x: Tensor) -> Tensor:  # b in_channels h w -> b dims[3] h/32 w/32
        """Return the map of the last stage after the norm: what the classifier pools."""
        self._check_whole("forward_features")
        return self.classifier.norm(self._stages(x)[-1]).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # b in_channels h w -> b num_classes
        """Return the logits ``(b, num_classes)`` of images of any size.

        With ``num_classes=0`` it is the mean of :meth:`forward_features` over the pixels, with ``features_only=True``
        the list of the stages' maps.
        """
        maps = self._stages(x)
        if self.features_only:
            return [x.permute(0, 3, 1, 2).contiguous() for x in self._chosen(maps)]  # b c h w
        return self.classifier(maps[-1])

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one for another number of classes.

        Args:
            num_classes: at least 0; 0 removes the layer.

        Raises:
            TypeError: ``num_classes`` is not an integer.
            ValueError: ``num_classes`` is negative, or the model has ``features_only=True``.
        """
        self._check_whole("reset_classifier")
        check_int("num_classes", num_classes, 0)
        self.classifier.reset(num_classes)
        self.config["num_classes"] = int(num_classes)

    def load_published(self, checkpoint: str | Path | Mapping[str, Any]) -> None:
        """Load the weights of a published VMamba v2, in either form of its keys.

        All weights of the model are loaded, and every key of the checkpoint is accounted for. A model without
        classifier leaves out the classifier, and one without later stages leaves out these. With ``in_channels=1`` the
        first convolution gets the sum of its weights for red, green and blue, so a grey image is seen as the same image
        in all three.

        Args:
            checkpoint: a file, or what ``torch.load`` returned for one; the state may be under ``"model"``.

        Raises:
            FileNotFoundError: there is no such file.
            pickle.UnpicklingError: the file holds more than weights, so reading it could run code. Allow classes that
                you trust by ``torch.serialization.add_safe_globals``.
            TypeError: the checkpoint is not a mapping from names to tensors.
            ValueError: the checkpoint is of a VMamba of other sizes, of another number of classes or channels, or has
                keys of another model.
            RuntimeError: the checkpoint lacks weights, or has some that the model does not have.

        Example:
            >>> import torch
            >>> published = VMamba(num_classes=10, depths=(1, 1, 1, 1), dims=8).state_dict()
            >>> model = VMamba(1, 10, depths=(1, 1, 1, 1), dims=8)
            >>> model.load_published({"model": published})
            >>> model.reset_classifier(2)
        """
        read: Any = checkpoint
        if isinstance(checkpoint, (str, Path)):
            read = torch.load(checkpoint, map_location="cpu", weights_only=True)
        published, _ = convert_state_dict(read, "vmamba")
        ours = self.state_dict()
        _check_arguments(arguments_of(published, _NOT_PUBLISHED), arguments_of(ours, _CHANGED))
        stem, head = "patch_embed.0.weight", "classifier.head.weight"
        if self.config["in_channels"] == 1 and stem in published and published[stem].shape[1] == 3:
            published[stem] = published[stem].sum(1, keepdim=True)
        for name, dim, fix in ((stem, 1, "in_channels={}, or 1"), (head, 0, "num_classes={}, then reset_classifier")):
            if name in ours and name in published and (size := published[name].shape[dim]) != ours[name].shape[dim]:
                raise ValueError(
                    f"{name} of the checkpoint has shape {tuple(published[name].shape)}, that of the model "
                    f"{tuple(ours[name].shape)}; build the model with {fix.format(size)}"
                )
        self.load_state_dict({name: x for name, x in published.items() if not name.startswith(self._unbuilt())})

    def _unbuilt(self) -> tuple[str, ...]:
        """How the names of those parts of a whole model begin that this one lacks."""
        built = len(self.layers)
        parts = [f"layers.{i}." for i in range(built, _STAGES)]
        if built < _STAGES:
            parts.append(f"layers.{built - 1}.downsample.")
        if self.features_only:
            parts.append("classifier.")
        elif not self.config["num_classes"]:
            parts.append("classifier.head.")
        return tuple(parts)

    def _stages(self, x: Tensor) -> list[Tensor]:  # b c h w -> list of b h w c
        check_shape("x", x, ("any", self.config["in_channels"], "any", "any"), "b, in_channels, h, w")
        check_pixels("x", x, *x.shape[2:])
        check_dtype("x", x, "patch_embed.0.weight", next(self.patch_embed.parameters(), None))
        x = self.patch_embed(x)
        maps = []
        for stage in self.layers:
            found, x = stage(x, self._recomputed)
            maps.append(found)
        return maps


def _widths(dims: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(dims, Sequence):
        check_sizes("dims", dims, _STAGES, _STAGES)
        check_int("dims[0]", dims[0], 2)
        return tuple(dims)
    check_int("dims", dims, 2)
    return tuple(dims * 2**i for i in range(_STAGES))


def _check_arguments(published: dict[str, Any], ours: dict[str, Any]) -> None:
    """The checkpoint has the sizes of the model, which may lack the last stages."""
    for name, value in ours.items():
        theirs = published[name]
        if (theirs[: len(value)] if isinstance(value, tuple) else theirs) != value:
            sizes = ", ".join(f"{name}={value!r}" for name, value in published.items())
            raise ValueError(
                f"the checkpoint is of another VMamba: its {name} is {theirs!r}, that of the model {value!r}; build "
                f"the model with {sizes}"
            )
