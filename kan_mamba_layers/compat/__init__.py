"""Stand-ins for the compiled packages of the Mamba family, so that code which imports them runs unmodified.

Importing this package changes nothing. :func:`install`, or running a program with
``python -m kan_mamba_layers.compat SCRIPT``, makes the names importable that such code needs: ``Mamba`` and functions
of ``mamba_ssm``, those of ``causal_conv1d`` and of VMamba's ``selective_scan``, and ``fwd`` and ``bwd`` of the
compiled extensions beneath them. Scans along a sequence run :func:`kan_mamba_layers.selective_scan`.
"""

from kan_mamba_layers.compat.importing import install, uninstall
from kan_mamba_layers.compat.running import main

__all__ = ["install", "main", "uninstall"]
