"""Two KANLinear layers find a formula: y = exp(sin(pi a) + b^2), hidden among two inputs that do not matter.

    python examples/edges.py [FIGURE]

Every edge of a KAN is a curve that one can look at. The figure (runs/edges.png) shows the four curves of the first
layer after training: a sine, a parabola, and two lines at zero that pruning took away.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from kan_mamba_layers import KANLinear

FIGURE = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/edges.png")
torch.set_num_threads(1)  # tensors this small gain nothing from more
torch.manual_seed(0)  # about one start in five ends in a poor fit: if yours does, try another


def sample(number: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(number, 4) * 2 - 1
    return x, torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:2] ** 2)


def error() -> float:
    with torch.no_grad():
        return (model(test_x) - test_y).square().mean().sqrt().item()


x, y = sample(1000)
test_x, test_y = sample(1000)
first = KANLinear(4, 1, extrapolation="linear")
second = KANLinear(1, 1, bias=True, extrapolation="linear")
model = nn.Sequential(first, second)
print(f"spread of the data           {test_y.std():.4f}")
print(f"error before training        {error():.4f}")

optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for step in range(300):
    if step % 50 == 0:
        second.update_grid(first(x))  # what the first layer returns moves as it learns; the knots follow
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"error after Adam             {error():.4f}")


def closure() -> Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


for intervals in (5, 10, 20):
    for layer in model:
        layer.extend_grid(intervals)  # the same functions on finer knots
    second.update_grid(first(x))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    print(f"error with {intervals:2} intervals      {error():.4f}")

sizes = first.edge_sizes()
print("sizes of the first layer's edges:", *(f"{size:.4f}" for size in sizes[0].tolist()))
kept = first.prune_edges(0.01 * sizes.max().item())
print(f"error after pruning          {error():.4f}, {kept.sum()} of {kept.numel()} edges kept")

FIGURE.parent.mkdir(parents=True, exist_ok=True)
first.plot().savefig(FIGURE, dpi=200)
print(f"the edges are drawn in {FIGURE}")
