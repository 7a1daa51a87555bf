"""One way to build every network of the experiments: ours by name, and MONAI's U-Net and U-Net++ as baselines."""

import difflib
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import BasicUNet, BasicUNetPlusPlus
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kan_mamba_layers
from kan_mamba_layers import Segmenter, create_model, list_models, list_pretrained

# Half of MONAI's default widths: about half a million parameters, the size of our small models.
BASELINE_FEATURES = (16, 16, 32, 64, 128, 16)
BASELINES = ("unet", "unet_pp")


class UNetPlusPlus(BasicUNetPlusPlus):
    """MONAI's U-Net++ with our convention: in training the list of logits, deepest first; else one tensor."""

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        outputs = super().forward(x)  # shallowest first
        return outputs[::-1] if self.training and self.deep_supervision else outputs[-1]


def list_networks() -> list[str]:
    """Every name that `build_network` takes."""
    classifiers = {*list_models("vmamba_*")} - {*list_models("vmamba_unet_*")}
    return [*BASELINES, *(name for name in list_models() if name not in classifiers)]


def build_network(name: str, in_channels: int, num_classes: int, **overrides: Any) -> nn.Module:
    """A network from images (b c h w) to logits (b num_classes h w), at any size from 32x32.

    In training the U-Net++ family gives a list of logits (deep supervision, deepest first) unless `overrides` says
    `deep_supervision=False`. Where a size is not a multiple of 16, MONAI's networks repeat the last row or column.
    """
    if name not in list_networks():
        near = difflib.get_close_matches(name, list_networks(), n=3, cutoff=0.4) or list_networks()
        raise ValueError(f"model {name!r} is unknown: did you mean {', '.join(near)}?")
    if "_pp" in name:
        overrides = {"deep_supervision": True, **overrides}
    if name not in BASELINES:
        model = create_model(name, in_channels=in_channels, num_classes=num_classes, **overrides)
        return model.to(memory_format=torch.channels_last)  # a tenth to a quarter faster on a CPU; not so the baselines
    if "pretrained" in overrides:
        raise ValueError(f"pretrained={overrides['pretrained']!r} are weights of one of our networks, not of {name!r}")
    network = UNetPlusPlus if name == "unet_pp" else BasicUNet
    overrides = {"features": BASELINE_FEATURES, **overrides}
    return network(spatial_dims=2, in_channels=in_channels, out_channels=num_classes, **overrides)


def weights_folder(name: str) -> Path:
    """The folder of weights that the library brings, with the split of their training."""
    return Path(kan_mamba_layers.__file__).parent / "weights" / name


def pretrained_settings(name: str) -> list[str]:
    """The settings under which weights that the library brings were trained, as flags of the lab."""
    if name not in list_pretrained():
        raise ValueError(f"pretrained {name!r} is none of the weights: choose {', '.join(list_pretrained())}")
    task = {"skin_lesion": "isic2017"}.get(name, name)
    size = Segmenter.from_pretrained(name).size
    return [f"--data.task={task}", f"--data.image_size={size}", f"--model.pretrained={name}"]


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@torch.no_grad()
def multiply_adds(network: nn.Module, in_channels: int, size: int) -> int:
    """Half the floating-point operations of convolutions, matrix products, KAN layers and scans for one image."""
    image = torch.zeros(1, in_channels, size, size, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return counter.get_total_flops() // 2
