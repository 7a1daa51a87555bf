"""Segmentation models built from the layers."""

from kan_mamba_layers.models.convert import convert_state_dict
from kan_mamba_layers.models.factory import create_model, from_pretrained, list_models
from kan_mamba_layers.models.km_unet import KMUNet
from kan_mamba_layers.models.km_unet_pp import KMUNetPP

__all__ = ["KMUNet", "KMUNetPP", "convert_state_dict", "create_model", "from_pretrained", "list_models"]
