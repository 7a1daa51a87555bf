"""Models built from the layers."""

from kan_mamba_layers.models.convert import convert_state_dict
from kan_mamba_layers.models.factory import create_model, from_pretrained, list_models
from kan_mamba_layers.models.km_unet import KMUNet
from kan_mamba_layers.models.km_unet_pp import KMUNetPP
from kan_mamba_layers.models.pretrained import list_pretrained
from kan_mamba_layers.models.vmamba import VMamba
from kan_mamba_layers.models.vmamba_unet import VMambaUNet

__all__ = [
    "KMUNet",
    "KMUNetPP",
    "VMamba",
    "VMambaUNet",
    "convert_state_dict",
    "create_model",
    "from_pretrained",
    "list_models",
    "list_pretrained",
]
