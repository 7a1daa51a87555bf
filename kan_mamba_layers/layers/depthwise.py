"""The depthwise convolution of the layers."""

from typing import Any

import torch
from torch import nn


def depthwise_conv(channels: int, size: int, dimensions: int = 2, **options: Any) -> nn.Conv2d | nn.Conv3d:
    """A depthwise convolution that keeps the size of images, or of volumes, whose channels lie last in memory.

    Its weight, (c 1 k k) or (c 1 k k k), has the strides of such images, as its gradient will: DistributedDataParallel
    warns where the two differ, in a dimension of size 1 too.
    """
    kind, layout = ((nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d))[dimensions - 2]
    conv = kind(channels, channels, size, padding=size // 2, groups=channels, **options)
    conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=layout))
    return conv
