"""What is measured on a KANLinear: our backends, the products alone, the textbook's layer, and peers.

All candidates with B-splines get the weights and the grid of one layer, so they compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidates import Candidate, supported_backends
from benchmarks.cases import Case, make_module
from benchmarks.peers import load, made
from kan_mamba_layers import KANLinear

GEMM, EFFICIENT, FAST, PYKAN = "gemm", "efficient-kan", "fast-kan", "pykan"
TUNED = "compiled reference, max-autotune"
# pykan computes every edge of every row: a tensor of rows x in x out, gigabytes where the others need megabytes.
PYKAN_EDGES = 1024 * 160 * 160
PYKAN_NAMES = {"coef": "spline_weight", "scale_base": "base_weight", "scale_sp": "spline_scaler"}
PYKAN_LAYOUT = {"spline_weight": (1, 0, 2), "base_weight": (1, 0), "spline_scaler": (1, 0)}  # i o g+s, i o, i o


Make = Callable[[Any, Tensor], tuple[nn.Module, Tensor]]  # from our layer and its input


def layer(name: str, make: Make, **settings: Any) -> Candidate:
    """A candidate that is made from our layer and its input."""

    def module(case: Case, device: str) -> tuple[nn.Module, Tensor]:
        with torch.no_grad():
            return make(*make_module(case, device))

    return Candidate(name, module=module, **settings)


def layers(case: Case, device: str, dtype: torch.dtype, paths: Mapping[str, str]) -> list[Candidate]:
    """Our backends, the first being what "auto" takes, then what they are compared with."""
    found = [
        layer(backend, partial(on_backend, backend), copies=10 if backend == "reference" else 0)
        for backend in supported_backends("kan_linear", device, dtype)
    ]
    for backend in ("auto", "reference"):
        found.append(layer(f"compiled {backend}", partial(on_backend, backend), compiled="default"))
    if device == "cuda":  # where it chooses tiles by trying them
        found.append(layer(TUNED, partial(on_backend, "reference"), compiled="max-autotune-no-cudagraphs"))
    found += [layer(GEMM, product, same=False, copies=2), layer("nn.Linear", linear, same=False)]
    return [*found, TEXTBOOK, *peers(case, paths)]


def on_backend(backend: Any, ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Our layer on a backend."""
    ours.backend = backend
    return ours, x


def linear(ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A linear layer of the same features."""
    return _product_with(ours.base_weight), x


def product(ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The one product that a KANLinear comes down to, given its bases: they are the input, `rows i*(1+g+s)`."""
    bases = torch.cat([F.silu(x)[..., None], ours.b_splines(x)], -1)  # rows i 1+g+s
    scaled = ours.spline_weight * ours.spline_scaler[..., None]
    weight = torch.cat([ours.base_weight[..., None], scaled], -1).flatten(1)  # o i*(1+g+s)
    return _product_with(weight), bases.flatten(1)


def _product_with(weight: Tensor) -> nn.Module:  # o i
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    module.weight.copy_(weight)
    return module


class Textbook(nn.Module):
    """The Cox-de Boor recursion as it is written in textbooks, and two products."""

    grid: Tensor

    def __init__(self, ours: KANLinear) -> None:
        super().__init__()
        self.base_weight, self.spline_weight = ours.base_weight, ours.spline_weight
        self.spline_scaler = ours.spline_scaler
        self.spline_order = ours.spline_order
        self.register_buffer("grid", ours.grid)

    def forward(self, x: Tensor) -> Tensor:  # rows i -> rows o
        spline_weight = self.spline_weight * self.spline_scaler[..., None]
        bases = self.bases(x[..., None], self.spline_order)  # rows i g+s
        return F.linear(F.silu(x), self.base_weight) + F.linear(bases.flatten(1), spline_weight.flatten(1))

    def bases(self, x: Tensor, degree: int) -> Tensor:  # rows i 1 -> rows i m-1-degree
        """All bases of a degree, from those of the degree below."""
        t = self.grid  # i m
        if degree == 0:
            return ((t[:, :-1] <= x) & (x < t[:, 1:])).to(x.dtype)
        below = self.bases(x, degree - 1)
        rising = (x - t[:, : -degree - 1]) / (t[:, degree:-1] - t[:, : -degree - 1])
        falling = (t[:, degree + 1 :] - x) / (t[:, degree + 1 :] - t[:, 1:-degree])
        return rising * below[..., :-1] + falling * below[..., 1:]


def textbook(ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The textbook's layer with our weights."""
    return Textbook(ours), x


TEXTBOOK = layer("textbook", textbook, copies=10)


def peers(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    """Other layers; those that cannot run here say why."""
    makers: dict[str, Callable[[Mapping[str, str]], list[Candidate]]] = {EFFICIENT: _efficient_kan, PYKAN: _pykan}
    if not case.sizes["adaptive"]:  # its grid is one for all features, and fixed
        makers[FAST] = _fast_kan
    return [c for name, make in makers.items() for c in made(name, partial(make, paths))]


def _efficient_kan(paths: Mapping[str, str]) -> list[Candidate]:
    module = load("efficient_kan.kan", "efficient_kan", paths)

    def make(ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
        other = module.KANLinear(
            ours.in_features, ours.out_features, grid_size=ours.grid_size, spline_order=ours.spline_order
        )
        other.load_state_dict(ours.state_dict())
        return other.to(x.device), x

    return [
        layer(EFFICIENT, make, copies=10),
        layer(f"compiled {EFFICIENT}", make, compiled="default", copies=10),
    ]


def _fast_kan(paths: Mapping[str, str]) -> list[Candidate]:
    """Not the same function: as many Gaussians as we have splines, behind a LayerNorm, and a bias."""
    module = load("fastkan.fastkan", "fast_kan", paths)

    def make(ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
        bases = ours.grid_size + ours.spline_order
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return module.FastKANLayer(ours.in_features, ours.out_features, num_grids=bases).to(x.device), x

    return [layer(FAST, make, same=False, copies=10)]


def _pykan(paths: Mapping[str, str]) -> list[Candidate]:
    module = load("kan.KANLayer", "pykan", paths)

    def make(ours: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
        other = module.KANLayer(ours.in_features, ours.out_features, num=ours.grid_size, k=ours.spline_order)
        other.grid.copy_(ours.grid)
        for name, our in PYKAN_NAMES.items():
            getattr(other, name).copy_(ours.get_parameter(our).permute(PYKAN_LAYOUT[our]))
        return other.to(x.device), x

    return [layer(PYKAN, make, layout=PYKAN_LAYOUT, renamed=PYKAN_NAMES, max_edges=PYKAN_EDGES)]
