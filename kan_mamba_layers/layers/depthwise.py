"""The depthwise convolution of the layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers.ops.precision import autocast_is_on, autocast_off


class _Conv3d(nn.Conv3d):
    """In float32 on CPUs: in bfloat16 PyTorch 2.13 gets the gradient of the weight wrong for small volumes.

    With channels last and a volume of 2x3x2 it is off by its own size, and now and then NaN. Images have no such fault.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_cast = autocast_is_on(x)
        if x.device.type != "cpu" or x.dtype == torch.float64 or (x.dtype == torch.float32 and not is_cast):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if is_cast else x.dtype
        with autocast_off(x):
            bias = None if self.bias is None else self.bias.float()
            y = F.conv3d(x.float(), self.weight.float(), bias, padding=self.padding, groups=self.groups)
        return y.to(dtype)


def depthwise_conv(channels: int, size: int, dimensions: int = 2, **options: Any) -> nn.Conv2d | nn.Conv3d:
    """A depthwise convolution that keeps the size of images, or of volumes, whose channels lie last in memory.

    Its weight, (c 1 k k) or (c 1 k k k), has the strides of such images, as its gradient will: DistributedDataParallel
    warns where the two differ, in a dimension of size 1 too.
    """
    kind, layout = ((nn.Conv2d, torch.channels_last), (_Conv3d, torch.channels_last_3d))[dimensions - 2]
    conv = kind(channels, channels, size, padding=size // 2, groups=channels, **options)
    conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=layout))
    return conv
