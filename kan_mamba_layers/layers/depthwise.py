"""The depthwise convolution of the layers."""

from typing import Any

import torch
from torch import nn


def depthwise_conv(channels: int, size: int, **options: Any) -> nn.Conv2d:
    """A depthwise convolution that keeps the size of images whose channels lie last in memory.

    Its weight, (c 1 k k), has the strides of such images, as its gradient will: DistributedDataParallel warns where the
    two differ, in a dimension of size 1 too.
    """
    conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, **options)
    conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=torch.channels_last))
    return conv
