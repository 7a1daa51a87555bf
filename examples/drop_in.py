"""SS2D, KANLayer and EMA inside a network that is not ours, MONAI's BasicUNet.

    python examples/drop_in.py

Trains the plain network and the extended one alike on the synthetic skin lesions of the demo, and prints loss and Dice
on images of other subjects before and after. So short a training shows how to put the layers in, not which is better.
"""

import sys

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from kan_mamba_layers import EMA, SS2D, KANLayer
from segmentation.data.demo import draw

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40  # of training, for each network
FEATURES = (16, 16, 32, 64, 64, 16)


class Context(nn.Module):  # SS2D on the pixels, then KANLayer on them as tokens, each added to its input
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])
        self.ss2d, self.kan = SS2D(channels), KANLayer(channels)

    def forward(self, x: Tensor) -> Tensor:  # b c h w
        pixels = x.permute(0, 2, 3, 1)  # b h w c, as SS2D wants them
        pixels = pixels + self.ss2d(self.norms[0](pixels))
        tokens = pixels.flatten(1, 2)  # b (h w) c, as KANLayer wants them
        tokens = tokens + self.kan(self.norms[1](tokens), *x.shape[2:])
        return tokens.mT.unflatten(2, x.shape[2:])


class AttendedSkip(nn.Module):  # a decoder level of BasicUNet with EMA on its skip
    def __init__(self, level: nn.Module, channels: int) -> None:
        super().__init__()
        self.level, self.ema = level, EMA(channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.level(x, self.ema(skip))


torch.set_num_threads(1)  # images this small gain little from more
images, masks = zip(*(draw("isic2017", 0, n, (64, 64)) for n in range(72)), strict=True)  # three of each subject
x = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1  # b c h w
y = torch.tensor(np.stack(masks))[:, None].float()  # b 1 h w
train_x, train_y, test_x, test_y = x[:48], y[:48], x[48:], y[48:]
loss_of, dice = DiceCELoss(sigmoid=True), DiceMetric()


def score() -> str:
    with torch.no_grad():
        logits = model.eval()(test_x)
    model.train()
    return f"loss {loss_of(logits, test_y):.3f}, Dice {dice(logits > 0, test_y).mean():.3f}"


for kind in ("plain", "extended"):
    torch.manual_seed(0)
    model = BasicUNet(2, 3, 1, FEATURES)
    if kind == "extended":
        model.down_4 = nn.Sequential(model.down_4, Context(FEATURES[4]))
        for name, channels in zip(("upcat_2", "upcat_3", "upcat_4"), FEATURES[1:4], strict=True):
            setattr(model, name, AttendedSkip(getattr(model, name), channels))
    print(f"{kind} BasicUNet, {sum(p.numel() for p in model.parameters()):,} parameters: {score()}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = torch.randperm(len(train_x))[:8]
        loss = loss_of(model(train_x[batch]), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{kind} BasicUNet after {STEPS} steps: {score()}", flush=True)
