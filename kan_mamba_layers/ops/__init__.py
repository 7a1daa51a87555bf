"""Ops: functions of tensors, without modules, that the layers call."""

from kan_mamba_layers.ops.backend import Backend, resolve
from kan_mamba_layers.ops.bspline import bspline_basis
from kan_mamba_layers.ops.kan_linear import kan_linear
from kan_mamba_layers.ops.selective_scan import cross_selective_scan, selective_scan

__all__ = ["Backend", "bspline_basis", "cross_selective_scan", "kan_linear", "resolve", "selective_scan"]
