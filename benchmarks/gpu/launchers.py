"""The launchers and kernels beneath the public ops. Checks of one kernel and searches for better plans need them.

No other file outside the package reaches into it.
"""

from kan_mamba_layers.ops.kan_linear import triton as kan
from kan_mamba_layers.ops.kan_linear.call import KANCall
from kan_mamba_layers.ops.kan_linear.triton import backward_kernel as kan_backward
from kan_mamba_layers.ops.kan_linear.triton import forward_kernel as kan_forward
from kan_mamba_layers.ops.selective_scan import triton as scan
from kan_mamba_layers.ops.selective_scan.call import ScanCall
from kan_mamba_layers.ops.selective_scan.triton import backward_kernel as scan_backward
from kan_mamba_layers.ops.selective_scan.triton import forward_kernel as scan_forward
from kan_mamba_layers.ops.selective_scan.triton import steps_kernel as scan_steps

__all__ = [
    "KANCall",
    "ScanCall",
    "kan",
    "kan_backward",
    "kan_forward",
    "scan",
    "scan_backward",
    "scan_forward",
    "scan_steps",
]
