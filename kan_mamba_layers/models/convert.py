"""Convert the keys of published checkpoints to ours."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from kan_mamba_layers._check import check_choice
from kan_mamba_layers.models.vmamba_keys import KEYS, our_weight

Source = Literal["km_unet", "u_kan", "vmamba", "vss_block"]

# Published name -> ours. Published decoders are numbered from the bottom, ours by level.
_SHARED = {
    **{f"encoder{i + 1}.conv": f"encoder.{i}.conv" for i in range(3)},
    **{f"decoder{i + 1}.conv": f"decoder.{3 - i}.conv" for i in range(4)},
    "decoder5.conv": "head.decode.conv",
    "final": "head.logits",
    "patch_embed3": "encoder.3.0",
    "block1.0": "encoder.3.1.block",
    "norm3": "encoder.3.1.norm",
    "patch_embed4": "encoder.4.0",
    "block2.0": "encoder.4.1.block",
    "norm4": "encoder.4.1.norm",
}
_DECODER_KAN = {
    "dblock1.0": "decoder_kan_stages.3.block",
    "dnorm3": "decoder_kan_stages.3.norm",
    "dblock2.0": "decoder_kan_stages.2.block",
    "dnorm4": "decoder_kan_stages.2.norm",
}
_CONTEXT = {
    **{f"ss2d_{i + 1}": f"encoder_context.{i}.ss2d" for i in range(3)},
    **{f"ema{i + 1}": f"encoder_context.{i}.ema" for i in range(3)},
    **{f"ss2d_decoder{i + 1}": f"decoder_context.{3 - i}.ss2d" for i in range(4)},
    **{f"ema_decoder{i + 1}": f"decoder_context.{3 - i}.ema" for i in range(4)},
}
_NAMES: dict[str, dict[str, str]] = {"km_unet": _SHARED | _CONTEXT, "u_kan": _SHARED | _DECODER_KAN}
# Modules that the published KM-UNet builds and never calls.
_DEAD = {"km_unet": ("cbam", "cbam1", "cbam2", "dblock1.0", "dblock2.0", "dnorm3", "dnorm4"), "u_kan": ()}
# In a published pair of convolutions: conv, BatchNorm, ReLU, conv, BatchNorm, ReLU.
_PAIR = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1"}


def convert_state_dict(state_dict: Mapping[str, Any], source: Source) -> tuple[dict[str, Tensor], list[str]]:
    """Translate a published checkpoint: KM-UNet or U-KAN for :class:`KMUNet`, or VMamba v2 for :class:`VMamba`.

    In :class:`KMUNet`, convolutions before BatchNorm have no bias, since BatchNorm cancels it. Published biases are
    folded into the running mean, so the converted model computes the same function. VMamba's linear layers may be
    stored as 1x1 convolutions, and the weights of its four directions stacked or apart; both become those of
    :class:`SS2D`.

    Args:
        state_dict: the published model's state; the prefix ``module.`` of ``DataParallel`` is removed. For VMamba also
            a checkpoint that has the state under ``"model"``; what else it has is left aside.
        source: ``"km_unet"`` for ``KMUNet(trunk_context=False, decoder_kan=False)``, ``"u_kan"`` for
            ``KMUNet(use_ss2d=False, use_ema=False)``. The published ``embed_dims=(a, b, c)`` are
            ``widths=(a // 8, a // 4, a, b, c)``. ``"vmamba"`` for :class:`VMamba`, ``"vss_block"`` for one
            :class:`VSSBlock`.

    Returns:
        The state for ``load_state_dict``, and the names of the published parameters that the published code never uses;
        these are dropped.

    Raises:
        TypeError: ``state_dict`` is not a mapping from names to tensors, for example a checkpoint that contains one.
        ValueError: ``source`` is unknown, or a key does not belong to the published model.

    Example:
        >>> import torch
        >>> published = {"final.bias": torch.zeros(1), "dnorm3.bias": torch.zeros(8)}
        >>> state, dropped = convert_state_dict(published, "km_unet")
        >>> list(state), dropped
        (['head.logits.bias'], ['dnorm3.bias'])
        >>> state, _ = convert_state_dict({"model": {"op.x_proj.weight": torch.zeros(12, 8)}}, "vss_block")
        >>> state["op.x_proj_weight"].shape
        torch.Size([4, 3, 8])
    """
    check_choice("source", source, (*_NAMES, *KEYS))
    if source in KEYS:
        return _convert_vmamba(state_dict, source), []
    _check_state(state_dict)
    _check_source(state_dict, source)
    converted: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}  # by the name of the running mean that absorbs them
    dropped = []
    for published, value in state_dict.items():
        key = published.removeprefix("module.")
        if key.startswith(tuple(f"{name}." for name in _DEAD[source])):
            dropped.append(published)
            continue
        ours = _rename(key, _NAMES[source])
        if ours is None:
            raise ValueError(_foreign(published, source))
        pair = re.fullmatch(r"(.*\.conv\.[01])\.0\.bias", ours)
        if pair:
            biases[f"{pair[1]}.1.running_mean"] = value
        else:
            converted[ours] = value
    for mean, bias in biases.items():
        if mean not in converted:
            raise ValueError(
                f"state_dict has the bias of a convolution but no {mean!r} after it; pass the whole state_dict"
            )
        converted[mean] = converted[mean] - bias
    return converted, dropped


def _convert_vmamba(state_dict: Mapping[str, Any], source: Source) -> dict[str, Tensor]:
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    _check_state(state_dict)
    converted: dict[str, Tensor] = {}
    for published, value in state_dict.items():
        key = published.removeprefix("module.")
        if not KEYS[source].fullmatch(key):
            raise ValueError(_foreign(published, source))
        ours, value = our_weight(key, value)
        if ours in converted:
            raise ValueError(f"state_dict has {ours!r} twice, the second time as {published!r}; leave one out")
        converted[ours] = value
    return converted


def _foreign(key: str, source: Source) -> str:
    return f"state_dict key {key!r} does not belong to a published {source}; check source={source!r}"


def _check_state(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}; pass model.state_dict()")
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            raise TypeError(f"state_dict[{key!r}] is a mapping itself; pass it alone, as checkpoint[{key!r}]")
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a torch.Tensor, got {type(value).__name__}; leave it out")


def _check_source(state_dict: Mapping[str, Tensor], source: Source) -> None:
    keys = [key.removeprefix("module.") for key in state_dict]
    encoder, context = (any(key.startswith(tuple(names)) for key in keys) for names in (("encoder1.",), _CONTEXT))
    if source == "km_unet" and encoder and not context:
        raise ValueError("state_dict has no SS2D and no EMA, so it is not of a published km_unet; pass source='u_kan'")


def _rename(key: str, names: dict[str, str]) -> str | None:
    for published, ours in names.items():
        if key.startswith(f"{published}."):
            rest = key.removeprefix(f"{published}.")
            if ours.endswith(".conv"):
                index, _, parameter = rest.partition(".")
                return f"{ours}.{_PAIR[index]}.{parameter}" if index in _PAIR else None
            return f"{ours}.{rest}"
    return None
