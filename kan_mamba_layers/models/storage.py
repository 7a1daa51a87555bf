"""Store a model in a folder, and read it back: its class and arguments as JSON, its weights as safetensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kan_mamba_layers.layers.kan import SplineLayer

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_BLOCK = 2**20  # bytes of a file that are read at a time


def write_model(
    folder: str | Path,
    model: str,
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the class name, the arguments, the settings of a segmenter, the weights, and a checksum of all of them.

    Both files are written beside the old ones first, so that a full disk leaves those as they were.
    """
    folder = Path(folder)
    safetensors = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        weights, config = Path(beside) / _WEIGHTS, Path(beside) / _CONFIG
        weights.write_bytes(safetensors.save(_separate(state)))
        content: dict[str, Any] = {"model": model, "arguments": arguments}
        if settings is not None:
            content["segmenter"] = settings
        content["sha256"] = _checksum(content, weights)
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in (weights, config):
            file.replace(folder / file.name)


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own memory, as safetensors asks for: weights that layers share are stored once for each."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in state.items():
        memory = x.untyped_storage().data_ptr()
        separate[name] = x.clone(memory_format=torch.contiguous_format) if memory in seen else x.contiguous()
        seen.add(memory)
    return separate


def state_in(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of a module with its parameters in another type, which must hold their values.

    Learned knots of splines keep their type, as those that are buffers.
    """
    state = module.state_dict()
    if dtype is None:
        return state
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}; pass e.g. torch.float16")
    knots = {id(layer.grid) for layer in module.modules() if isinstance(layer, SplineLayer)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in knots:
            continue
        x = state[name]
        lost = x[x.isfinite() & (x.abs() > torch.finfo(dtype).max)]
        if lost.numel():
            raise ValueError(
                f"dtype={dtype} cannot hold {name}, up to {lost.abs().max():g}; store the model with dtype=None"
            )
        state[name] = x.to(dtype)
    return state


def read_model(folder: str | Path, model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments and the weights of a stored model of the class ``model``, or raise if they are damaged."""
    config = _read_config(folder)
    if config["model"] != model:
        raise ValueError(
            f"folder {str(folder)!r} holds a {config['model']}, not a {model}; load it with the right class"
        )
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"folder {str(folder)!r} has no {_WEIGHTS}; store the model with save_pretrained")
    if _checksum(config, path) != config["sha256"]:
        raise ValueError(
            f"folder {str(folder)!r} is damaged: {_CONFIG} or {_WEIGHTS} does not match the stored sha256; copy the "
            "folder or store the model again"
        )
    with torch.device("cpu"):  # safetensors 0.4 would follow the default device
        return config["arguments"], _safetensors().load_file(path)


def read_class(folder: str | Path) -> str:
    """Return the class name of a stored model."""
    return _read_config(folder)["model"]


def read_arguments(folder: str | Path) -> dict[str, Any]:
    """Return the arguments of a stored model."""
    return _read_config(folder)["arguments"]


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings of a stored segmenter."""
    config = _read_config(folder)
    if not isinstance(config.get("segmenter"), dict):
        raise ValueError(
            f"folder {str(folder)!r} holds a model without classes and size; store a segmenter with "
            "Segmenter.save_pretrained, or load the model with kan_mamba_layers.from_pretrained"
        )
    return config["segmenter"]


def _read_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"folder {str(folder)!r} has no {_CONFIG}; pass a folder written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"file {str(path)!r} is not valid JSON ({error}); store the model again") from error
    if not isinstance(config, dict) or not {"model", "arguments", "sha256"} <= config.keys():
        raise ValueError(
            f"file {str(path)!r} lacks 'model', 'arguments' or 'sha256'; store the model with save_pretrained"
        )
    return config


def _checksum(config: Mapping[str, Any], weights: Path) -> str:
    """The sha256 of everything that defines a stored model: its class, its arguments, its use and its weights."""
    parts = [config[name] for name in ("model", "arguments", "segmenter") if name in config]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    with weights.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "storing models needs safetensors, which is not installed (pip install safetensors)"
        ) from error
    return safetensors.torch
