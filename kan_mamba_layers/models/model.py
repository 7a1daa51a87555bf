"""The base class of the models: their arguments, feature maps, recomputation in backward, and storage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kan_mamba_layers._check import check_int, check_shape
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.models.features import FeatureInfo
from kan_mamba_layers.models.storage import read_model, state_in, write_model
from kan_mamba_layers.ops.backend import Backend, check_backend

_MIN_SIZE = 32  # of images of the models with five levels

AnyModel = TypeVar("AnyModel", bound="Model")


class Model(Layer):
    """A model that is rebuilt from its arguments.

    Args:
        arguments: the arguments of the subclass's constructor. They are kept as ``config``, which
            :meth:`save_pretrained` stores beside the weights.
    """

    feature_info: FeatureInfo
    fewest_classes = 1

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        check_int("in_channels", arguments["in_channels"], 1)
        check_int("num_classes", arguments["num_classes"], self.fewest_classes)
        check_backend("cross_selective_scan", arguments["backend"])
        self.config: dict[str, Any] = json_value(arguments)
        self.features_only: bool = arguments.get("features_only", False)
        if not self.features_only and arguments.get("out_indices") is not None:
            raise ValueError(f"out_indices={arguments['out_indices']!r} needs features_only=True; pass both")
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks with scans in backward instead of storing their activations, for the same gradients."""
        for module in self.modules():
            if isinstance(module, Model):
                module.grad_checkpointing = enable

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Store the model in a folder: ``config.json`` (class, arguments, checksum) and ``model.safetensors``.

        Args:
            folder: created if it does not exist.
            dtype: of the stored parameters, such as ``torch.float16``, which halves the file; None for their own.
                Buffers and the grids of splines stay as they are, and a loaded model has its usual types.

        Raises:
            ImportError: safetensors is not installed.
            TypeError: ``dtype`` is not a floating-point type.
            ValueError: a parameter is too large for ``dtype``, or the model has other parameters than a new one of the
                same arguments. Weights that layers share are stored for each, and not shared again.
        """
        store(self, folder, dtype)

    @classmethod
    def from_pretrained(
        cls: type[AnyModel],
        folder: str | Path,
        *,
        num_classes: int | None = None,
        in_channels: int | None = None,
        backend: Backend | None = None,
    ) -> AnyModel:
        """Load a model that :meth:`save_pretrained` stored, in evaluation mode, on the CPU.

        Args:
            folder: the local folder.
            num_classes: another number of classes than the stored one; the last layer of each head is reinitialised.
            in_channels: another number of channels than the stored one; the first convolution is reinitialised.
            backend: another backend than the stored one.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            TypeError: ``num_classes`` or ``in_channels`` is not an integer.
            ValueError: the folder holds another model, its files are damaged, or an argument is less than 1.
            ImportError: safetensors is not installed.
        """
        wanted = {"num_classes": num_classes, "in_channels": in_channels, "backend": backend}
        return cls._from_stored(folder, {name: value for name, value in wanted.items() if value is not None}).eval()

    @classmethod
    def _from_stored(cls: type[AnyModel], folder: str | Path, overrides: Mapping[str, Any]) -> AnyModel:
        """Load a stored model with some other arguments, on the CPU; what these give another shape is reinitialised."""
        arguments, state = read_model(folder, cls.__name__)
        changes = {name: value for name, value in overrides.items() if value != arguments[name]}
        with torch.device("cpu"):
            model = cls(**{**arguments, **changes})
        if changes:
            with torch.device("meta"):
                before = {name: x.shape for name, x in cls(**arguments).state_dict().items()}
            drawn = model.state_dict()
            state = {name: state[name] if before.get(name) == x.shape else x for name, x in drawn.items()}
        model.load_state_dict(state)
        return model

    def _recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block that holds many activations and no BatchNorm, whose statistics would count a batch twice."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _chosen(self, maps: list[Tensor]) -> list[Tensor]:
        """Those of the maps of all levels that a model with ``features_only=True`` returns."""
        return [maps[i] for i in self.feature_info.out_indices]

    def _check_whole(self, method: str) -> None:
        if self.features_only:
            raise ValueError(f"{method} needs more than features_only=True builds; call the model for its maps")

    def _check_image(self, x: Tensor) -> None:
        check_shape("x", x, ("any", self.config["in_channels"], "any", "any"), "b, in_channels, h, w")
        for name, size in zip(("height", "width"), x.shape[2:], strict=True):
            if size < _MIN_SIZE:
                raise ValueError(
                    f"image {name} must be at least {_MIN_SIZE}, got {size}, which is too small to halve at every "
                    "level; pad or resize the image"
                )

    def _check_batch(self, x: Tensor, deepest: tuple[int, int]) -> None:
        """BatchNorm has more than one value per channel to train on, at the deepest level too, which has that size."""
        batch, _, height, width = x.shape
        if self.training and batch * deepest[0] * deepest[1] == 1 and any(map(_counts, self.modules())):
            raise ValueError(
                f"a batch of 1 image of {height}x{width} leaves BatchNorm one value per channel at the deepest level, "
                "too few to train on; use 2 or more images, images of 64x64 or more, or model.eval()"
            )


def _counts(module: nn.Module) -> bool:
    """Whether a module normalises by the statistics of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def json_value(x: Any) -> Any:
    """Dictionaries, tuples and Python's own numbers alone, also of what JSON or NumPy made of them."""
    if isinstance(x, Mapping):
        return {name: json_value(value) for name, value in x.items()}
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(map(json_value, x))
    return x.item() if isinstance(x, np.generic) else x


def store(
    model: Model, folder: str | Path, dtype: torch.dtype | None, settings: Mapping[str, Any] | None = None
) -> None:
    """Write a model, and the settings of a segmenter."""
    write_model(folder, type(model).__name__, model.config, _stored_state(model, dtype), settings)


def _stored_state(model: Model, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state with its parameters in another type, which a new model of the same arguments can load."""
    state, name = state_in(model, dtype), type(model).__name__
    try:
        with torch.device("meta"):
            fresh = type(model)(**model.config)
    except TypeError:  # a subclass with other arguments, which knows how it is loaded
        return state
    try:
        fresh.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the folder could not be loaded, since the model is no {name} of its arguments any more ({error}); undo "
            "what changed it, such as a new head, torch.nn.utils.prune or parametrize, or use torch.save"
        ) from error
    return state
