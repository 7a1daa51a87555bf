"""KAN, selective-scan and attention layers for PyTorch, and the segmentation models built from them."""

from kan_mamba_layers import walks
from kan_mamba_layers.explain import effective_receptive_field, scan_attention
from kan_mamba_layers.export import export_onnx
from kan_mamba_layers.layers import (
    EMA,
    SS2D,
    SS3D,
    KANBlock,
    KANConv2d,
    KANLayer,
    KANLinear,
    Mamba,
    VSSBlock,
    param_groups,
)
from kan_mamba_layers.models import (
    KMUNet,
    KMUNetPP,
    VMamba,
    VMambaUNet,
    convert_state_dict,
    create_model,
    from_pretrained,
    list_models,
    list_pretrained,
)
from kan_mamba_layers.ops import bspline_basis, cross_selective_scan, kan_linear, resolve, selective_scan
from kan_mamba_layers.segmenter import Segmenter

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SS2D",
    "SS3D",
    "KANBlock",
    "KANConv2d",
    "KANLayer",
    "KANLinear",
    "KMUNet",
    "KMUNetPP",
    "Mamba",
    "Segmenter",
    "VMamba",
    "VMambaUNet",
    "VSSBlock",
    "__version__",
    "bspline_basis",
    "convert_state_dict",
    "create_model",
    "cross_selective_scan",
    "effective_receptive_field",
    "export_onnx",
    "from_pretrained",
    "kan_linear",
    "list_models",
    "list_pretrained",
    "param_groups",
    "resolve",
    "scan_attention",
    "selective_scan",
    "walks",
]
