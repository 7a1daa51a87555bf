"""A small Mamba block built on `selective_scan` learns to remember: which capitals stood in a line of 29 letters?

    python examples/sequence.py

The lower-case letters are noise. At each of the three question marks at the end the model must name the next capital:

    beagddfHehb ... cegAdabcg ... aggCdgb???  ->  HAC

The block keeps a state of fixed size, so it must learn which letters are worth writing to it.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers import selective_scan

LETTERS, CAPITALS, LENGTH = 8, 3, 29
VOCABULARY = "abcdefghABCDEFGH?"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300  # of training, 10 s on one core


class MambaBlock(nn.Module):
    def __init__(self, width: int, expand: int = 2, states: int = 8) -> None:
        super().__init__()
        d = expand * width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 2 * d)
        self.conv = nn.Conv1d(d, d, 4, padding=3, groups=d)
        self.step = nn.Linear(d, d)
        self.write_read = nn.Linear(d, 2 * states)
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(d, 1))
        self.skip = nn.Parameter(torch.ones(d))
        self.out = nn.Linear(d, width)
        nn.init.uniform_(self.step.bias, -5, -1)  # small first steps: a long memory

    def forward(self, x: Tensor) -> Tensor:  # b l c
        u, gate = self.project(self.norm(x)).mT.chunk(2, 1)  # b d l, b d l
        u = F.silu(self.conv(u)[..., : x.shape[1]])  # the first l values only, so that no letter sees the next
        delta = self.step(u.mT).mT  # b d l, a step size for each channel and letter
        B, C = self.write_read(u.mT).mT.chunk(2, 1)  # b n l, b n l
        y = selective_scan(u, delta, -self.log_rate.exp(), B, C, self.skip, z=gate, delta_softplus=True)
        return x + self.out(y.mT)


def lines(number: int) -> tuple[Tensor, Tensor]:  # b l+3, b 3
    """Random lines and the capitals in them."""
    noise = torch.randint(LETTERS, (number, LENGTH))
    places = torch.rand(number, LENGTH).topk(CAPITALS).indices.sort().values
    capitals = torch.randint(LETTERS, (number, CAPITALS))
    questions = torch.full((number, CAPITALS), 2 * LETTERS)
    return torch.cat([noise.scatter(1, places, capitals + LETTERS), questions], 1), capitals


torch.set_num_threads(1)  # tensors this small gain nothing from more
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(len(VOCABULARY), 32), MambaBlock(32), nn.LayerNorm(32), nn.Linear(32, LETTERS))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
test_lines, test_capitals = lines(512)

print(f"chance: {1 / LETTERS:.1%} of the capitals")
for step in range(STEPS + 1):
    if step % 50 == 0 or step == STEPS:
        with torch.no_grad():
            named = model(test_lines)[:, -CAPITALS:].argmax(-1)
        print(f"after {step:3} steps: {(named == test_capitals).float().mean():.1%}", flush=True)
    if step < STEPS:
        x, capitals = lines(64)
        loss = F.cross_entropy(model(x)[:, -CAPITALS:].flatten(0, 1), capitals.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
for n in range(3):
    line, answer = ("".join(VOCABULARY[i] for i in numbers) for numbers in (test_lines[n], named[n] + LETTERS))
    print(f"{line}  ->  {answer}")
