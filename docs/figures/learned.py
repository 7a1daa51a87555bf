"""What the edges of a KAN layer learn: a layer fitted to a sum of three functions, drawn by `layer.plot()`."""

import torch
from matplotlib.figure import Figure

from kan_mamba_layers import KANLinear


def edges() -> Figure:
    """The edges of a fit of ``sin(pi a) + 2 b^2 + |c|``: each becomes its function, up to a constant."""
    torch.manual_seed(0)
    layer = KANLinear(3, 1, grid_size=10)
    x = 2 * torch.rand(1024, 3) - 1
    a, b, c = x.split(1, dim=1)
    y = torch.sin(torch.pi * a) + 2 * b**2 + c.abs()
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        error = torch.nn.functional.mse_loss(layer(x), y)
        error.backward()
        return error

    optimiser.step(loss)
    return layer.plot()
