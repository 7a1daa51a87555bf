"""The edges of a KAN layer: their indices, the features they read, sums and integrals over them."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kan_mamba_layers._check import check_int

# Points of Gauss-Legendre quadrature per interval: exact for squares of splines up to degree 7.
_QUADRATURE = 8
_BLOCK = 1 << 22  # factors that are mapped at a time


def all_edges(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The index of every edge in a ``base_weight`` of this shape."""
    return list(itertools.product(*map(range, shape)))


def largest_edges(sizes: Tensor, count: int) -> list[tuple[int, ...]]:
    """The ``count`` edges of largest size, in descending order."""
    flat = sizes.flatten().topk(count).indices.cpu()
    return [tuple(index) for index in torch.stack(torch.unravel_index(flat, sizes.shape), 1).tolist()]


def check_edge(name: str, edge: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``edge`` as a tuple if it is an index in a ``base_weight`` of this shape."""
    if not isinstance(edge, (tuple, list)):
        raise TypeError(f"{name} must be a sequence of integers, got {edge!r}; pass an index in base_weight")
    if len(edge) != len(shape):
        raise ValueError(
            f"{name} must have {len(shape)} entries, one per dimension of base_weight, which has shape {shape}; "
            f"got {edge!r}; pass an index in base_weight"
        )
    for n, index in enumerate(edge):
        check_int(f"{name}[{n}]", index, 0)
        if index >= shape[n]:
            raise ValueError(f"{name}[{n}] must be less than {shape[n]}, got {index}; base_weight has shape {shape}")
    return tuple(edge)


def check_edges(edges: Sequence[Sequence[int]], shape: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Return ``edges`` as tuples if they are 1 to ``most`` such indices."""
    if not isinstance(edges, (tuple, list)):
        raise TypeError(f"edges must be a sequence of edges, got {edges!r}; pass e.g. [(0, 0), (0, 1)]")
    if not 1 <= len(edges) <= most:
        fix = "draw them in several figures" if edges else "name one, or pass None for all"
        raise ValueError(f"edges must hold 1 to {most} edges, got {len(edges)}; {fix}")
    return [check_edge(f"edges[{n}]", edge, shape) for n, edge in enumerate(edges)]


def input_feature(edge: tuple[int, ...], shape: tuple[int, ...], features: int) -> int:
    """The input feature of an edge. Each group of outputs sees ``shape[1]`` of the features."""
    o, i = shape[:2]
    groups = features // i
    return edge[0] // (o // groups) * i + edge[1]


def map_edges(matrices: Tensor, weight: Tensor) -> Tensor:  # i n t, o i ... t -> o i ... n
    """Multiply the factors of each edge by the matrix of its input feature, in the matrices' dtype, group by group."""
    o, i, *kernel, t = weight.shape
    groups = len(matrices) // i
    grouped = weight.reshape(groups, o // groups, i, -1, t)
    matrices = matrices.unflatten(0, (groups, i))
    mapped = [
        torch.einsum("gint,goikt->goikn", matrices, some.to(matrices.dtype)).to(weight.dtype)
        for some in grouped.split(max(1, _BLOCK // (groups * i * weight[0, 0].numel())), 1)
    ]
    return torch.cat(mapped, 1).reshape(o, i, *kernel, -1)


def mean_quadrature(knots: Tensor) -> tuple[Tensor, Tensor]:  # i g+1 -> m i, m i
    """Points and weights whose weighted sum is a function's mean over the knots' interval, per feature."""
    nodes, weights = (torch.from_numpy(v / 2).to(knots) for v in np.polynomial.legendre.leggauss(_QUADRATURE))  # p
    width = knots.diff(dim=1)[..., None]  # i g 1
    points = knots[:, :-1, None] + width * (nodes + 0.5)  # i g p
    weights = width * weights / width.sum(1, keepdim=True)  # i g p
    return points.flatten(1).T, weights.flatten(1).T
