"""KAN layers: layers whose edges are learned B-spline functions.

``isinstance(module, SplineLayer)`` finds them in a model, for example to add up their penalties::

    penalty = sum(m.regularization_loss() for m in model.modules() if isinstance(m, SplineLayer))
"""

from kan_mamba_layers.layers.kan.base import GridMode, SplineLayer
from kan_mamba_layers.layers.kan.block import KANBlock, KANLayer
from kan_mamba_layers.layers.kan.conv import KANConv2d
from kan_mamba_layers.layers.kan.linear import KANLinear

__all__ = ["GridMode", "KANBlock", "KANConv2d", "KANLayer", "KANLinear", "SplineLayer"]
