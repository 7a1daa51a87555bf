"""Stochastic depth."""

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_number


class DropPath(nn.Module):
    """During training, drop a residual branch for random samples and scale it up for the others.

    Args:
        rate: probability that a sample's branch is dropped, in ``[0, 1)``.

    References:
        Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_number("drop_path", rate, 0.0, 1.0, open_high=True)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:  # b ...
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        # Not bernoulli_, which vmap refuses, and in float32, for half precision rounds the probability.
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device, dtype=torch.float32) < keep
        return x * (kept.to(x.dtype) / keep)

    def extra_repr(self) -> str:
        return f"{self.rate}"
