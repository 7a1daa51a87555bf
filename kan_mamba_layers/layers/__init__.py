"""The layers as modules, with the names, shapes and checkpoint keys of the field."""

from kan_mamba_layers.layers.ema import EMA
from kan_mamba_layers.layers.kan import KANBlock, KANConv2d, KANLayer, KANLinear
from kan_mamba_layers.layers.mamba import Mamba
from kan_mamba_layers.layers.module import param_groups
from kan_mamba_layers.layers.ss2d import SS2D
from kan_mamba_layers.layers.ss3d import SS3D
from kan_mamba_layers.layers.vss import VSSBlock

__all__ = ["EMA", "SS2D", "SS3D", "KANBlock", "KANConv2d", "KANLayer", "KANLinear", "Mamba", "VSSBlock", "param_groups"]
