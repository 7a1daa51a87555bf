"""Models by name."""

import difflib
import fnmatch
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kan_mamba_layers.models.km_unet import KMUNet
from kan_mamba_layers.models.km_unet_pp import KMUNetPP
from kan_mamba_layers.models.model import Model, json_value
from kan_mamba_layers.models.pretrained import brought, list_pretrained
from kan_mamba_layers.models.storage import read_arguments, read_class
from kan_mamba_layers.models.vmamba import PUBLISHED, VMamba
from kan_mamba_layers.models.vmamba_unet import VMambaUNet
from kan_mamba_layers.ops.backend import Backend

_CLASSES: dict[str, type[Model]] = {cls.__name__: cls for cls in (KMUNet, KMUNetPP, VMamba, VMambaUNet)}
# Suffixes of the names; without one a name means base.
_SIZES: dict[str, dict[str, Any]] = {
    "": {},
    # KMUNet learns better with the residual connection, which KMUNetPP has at every size (docs/short_trainings.md).
    "_tiny": {"widths": (16, 16, 32, 48, 64), "d_state": 4, "expand": 1, "ema_factor": 4, "context_residual": True},
    "_small": {"widths": (16, 32, 64, 96, 128), "d_state": 8, "expand": 1},
    "_base": {},
}
# The arguments of a family take precedence over those of a size.
_FAMILIES: dict[str, tuple[type[Model], dict[str, Any]]] = {
    "km_unet": (KMUNet, {}),
    "km_unet_pp": (KMUNetPP, {"context_from": 1}),
    "u_kan": (KMUNet, {"use_ss2d": False, "use_ema": False, "context_residual": False}),
}
_MODELS: dict[str, tuple[type[Model], dict[str, Any]]] = {
    **{
        f"{family}{suffix}": (cls, {**size, **arguments})
        for family, (cls, arguments) in _FAMILIES.items()
        for suffix, size in _SIZES.items()
    },
    **{name: (VMamba, arguments) for name, arguments in PUBLISHED.items()},
    **{name.replace("vmamba_", "vmamba_unet_"): (VMambaUNet, {"encoder": name}) for name in PUBLISHED},
}


# Arguments that may differ from those of the stored weights.
_FREE = ("in_channels", "num_classes", "drop_path", "features_only", "out_indices", "backend", "deep_supervision")


def create_model(name: str, *, pretrained: str | None = None, **overrides: Any) -> Model:
    """Build a model by name.

    Args:
        name: one of :func:`list_models`: a family (``km_unet``, ``km_unet_pp``, ``u_kan``, ``vmamba``,
            ``vmamba_unet``) and a size (``_tiny``, ``_small``, ``_base``). The first three families without a size are
            base. ``km_unet_tiny`` has ``context_residual=True``; the VMambas have the sizes and the ``drop_path`` of
            the published ones.
        pretrained: weights to begin with, one of :func:`list_pretrained`; ``in_channels`` and ``num_classes`` are
            theirs unless overridden. With other channels the first convolution is reinitialised, with other classes the
            last layer of each head. None for random weights.
        overrides: arguments of the class of the model that replace those of the named one, such as ``in_channels``,
            ``num_classes`` or ``features_only=True``.

    Returns:
        The model in training mode, on PyTorch's default device.

    Raises:
        TypeError: an override is not an argument of the model.
        ValueError: the name is unknown, an argument is out of range, or the pretrained weights are those of another
            model or damaged.

    Example:
        >>> create_model("km_unet_pp_tiny", in_channels=1).config["in_channels"]
        1
        >>> create_model("km_unet_pp_tiny", pretrained="lumbar_spine").config["num_classes"]
        6
    """
    if name not in _MODELS:
        raise ValueError(f"name {name!r} is not one of list_models(); did you mean {_nearest(name, _MODELS)}?")
    cls, arguments = _MODELS[name]
    accepted = inspect.signature(cls).parameters
    for override in overrides:
        if override not in accepted:
            raise TypeError(
                f"{override!r} is not an argument of {cls.__name__}; did you mean {_nearest(override, accepted)}?"
            )
    if pretrained is not None:
        return _pretrained(name, pretrained, overrides)
    return cls(**{**arguments, **overrides})


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that :func:`create_model` knows, sorted.

    Args:
        pattern: a shell-style pattern.

    Example:
        >>> list_models("km_unet_pp*")
        ['km_unet_pp', 'km_unet_pp_base', 'km_unet_pp_small', 'km_unet_pp_tiny']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def from_pretrained(
    folder: str | Path,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    backend: Backend | None = None,
) -> Model:
    """Load a model of any class from a folder that ``save_pretrained`` wrote, in evaluation mode, on the CPU.

    Args:
        folder: the local folder.
        num_classes: another number of classes than the stored one; the last layer of each head is reinitialised.
        in_channels: another number of channels than the stored one; the first convolution is reinitialised.
        backend: another backend than the stored one.

    Raises:
        FileNotFoundError: the folder or one of its files does not exist.
        TypeError: ``num_classes`` or ``in_channels`` is not an integer.
        ValueError: the folder holds no model of this library, its files are damaged, or an argument is less than 1.
        ImportError: safetensors is not installed.
    """
    name = read_class(folder)
    if name not in _CLASSES:
        raise ValueError(
            f"folder {str(folder)!r} holds a {name!r}, which is not one of {', '.join(_CLASSES)}; check the folder"
        )
    return _CLASSES[name].from_pretrained(folder, num_classes=num_classes, in_channels=in_channels, backend=backend)


def _pretrained(name: str, pretrained: str, overrides: dict[str, Any]) -> Model:
    if pretrained not in list_pretrained():
        raise ValueError(f"pretrained={pretrained!r} is not one of list_pretrained(): {', '.join(list_pretrained())}")
    cls, arguments = _MODELS[name]
    folder = brought(pretrained)
    stored = read_arguments(folder)
    usual = {key: p.default for key, p in inspect.signature(cls).parameters.items()}
    wanted = json.loads(json.dumps(json_value({**usual, **arguments, **overrides})))  # with lists for tuples, as stored
    if read_class(folder) != cls.__name__:
        raise ValueError(f"pretrained={pretrained!r} are weights of a {read_class(folder)}, not of {name!r}")
    for key, value in wanted.items():
        if key not in _FREE and value != stored[key]:
            raise ValueError(
                f"{key} is {value!r}, but pretrained={pretrained!r} are weights of a model with {stored[key]!r}; "
                f"leave pretrained or {key} out, or choose another model"
            )
    default_device = torch.empty(0, device=None).device
    return cls._from_stored(folder, {key: overrides[key] for key in _FREE if key in overrides}).to(default_device)


def _nearest(name: object, known: Iterable[str]) -> str:
    known = list(known)
    return ", ".join(difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.3) or known)
