"""Who is measured on a KANLinear: our backends, the products alone, the textbook's layer, and peers.

All candidates with B-splines get the weights and the grid of one layer, so they compute the same function. In half
precision the input has it, the parameters are float32, and autocast is on: the peers' layers run in no other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidates import Bound, Candidate, Mode, serving
from benchmarks.cases import Case, make_kan
from benchmarks.peers import load, made
from kan_mamba_layers import KANLinear

GEMM, EFFICIENT, FAST, PYKAN = "gemm", "efficient-kan", "fast-kan", "pykan"
TUNED = "compiled reference, max-autotune"
# pykan computes every edge of every row: a tensor of rows x in x out, gigabytes where the others need megabytes.
PYKAN_EDGES = 1024 * 160 * 160
PYKAN_NAMES = {"coef": "spline_weight", "scale_base": "base_weight", "scale_sp": "spline_scaler"}
PYKAN_LAYOUT = {"spline_weight": (1, 0, 2), "base_weight": (1, 0), "spline_scaler": (1, 0)}  # i o g+s, i o, i o


def as_it_is(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Our layer."""
    return layer, x


@dataclass(frozen=True)
class Layer(Candidate):
    """A layer made from ours; `make` returns it, and what it is given instead of `x`."""

    make: Callable[[KANLinear, Tensor], tuple[nn.Module, Tensor]] = as_it_is
    same: bool = True  # the function of our layer; others are compared with themselves
    renamed: Mapping[str, str] = field(default_factory=dict)  # its parameters' names to ours
    max_edges: int | None = None  # rows i o
    mode: str | None = None  # of torch.compile

    def bind(self, case: Case, device: str, dtype: torch.dtype = torch.float32, exact: bool = False) -> Bound:
        layer, x = make_kan(case)
        with torch.no_grad():
            module, x = self.make(layer.to(device), x.to(device, dtype))
        if exact:
            module, x = module.double(), x.double()
        leaves = {"x": x.requires_grad_()}
        leaves |= {self.renamed.get(name, name): p for name, p in module.named_parameters() if p.requires_grad}
        fixed = [p for p in module.parameters() if not p.requires_grad]
        mixed = dtype != torch.float32 and not exact
        context = torch.autocast(device, dtype) if mixed else nullcontext()
        call: Callable[[Tensor], Any] = module
        if self.compiled:
            torch.compiler.reset()  # else, after eight shapes, the layer would silently run as it is
            call = torch.compile(module, mode=self.mode)

        def run() -> Tensor:
            with context:
                out = call(x)
            return out[0] if isinstance(out, tuple) else out  # pykan's layer returns its edges too

        return Bound(run, leaves, layout=self.layout, held=(*fixed, *module.buffers()))

    def oracle(self, case: Case) -> Candidate:
        """The textbook's layer in float64, which shares no code with ours; or the candidate itself."""
        return TEXTBOOK if self.same else self

    def refuses(self, case: Case, mode: Mode, memory: float = float("inf")) -> str:
        if self.max_edges is not None and case.length * case.sizes["in"] * case.sizes["out"] > self.max_edges:
            return "not run (computes each edge for itself, at most 1024 rows of 160 x 160 edges)"
        return super().refuses(case, mode, memory)


def layers(case: Case, device: str, dtype: torch.dtype, paths: Mapping[str, str]) -> list[Candidate]:
    """Our backends, the first being what "auto" takes, then what they are compared with."""
    own: list[Candidate] = [
        Layer(backend, make=partial(on_backend, backend), copies=10 if backend == "reference" else 0)
        for backend in serving("kan_linear", device, dtype)
    ]
    own += [
        Layer(f"compiled {backend}", make=partial(on_backend, backend), compiled=True)
        for backend in ("auto", "reference")
    ]
    if device == "cuda":  # where it chooses tiles by trying them
        mode = "max-autotune-no-cudagraphs"
        own.append(Layer(TUNED, make=partial(on_backend, "reference"), compiled=True, mode=mode))
    limits = [Layer(GEMM, make=product, same=False, copies=2), Layer("nn.Linear", make=linear, same=False)]
    return [*own, *limits, TEXTBOOK, *peers(case, paths)]


def on_backend(backend: Any, layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Our layer on a backend."""
    layer.backend = backend
    return layer, x


def linear(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A linear layer of the same features."""
    return _product_with(layer.base_weight), x


def product(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The one product that a KANLinear comes down to, given its bases: they are the input, `rows i*(1+g+s)`."""
    bases = torch.cat([F.silu(x)[..., None], layer.b_splines(x)], -1)  # rows i 1+g+s
    scaled = layer.spline_weight * layer.spline_scaler[..., None]
    weight = torch.cat([layer.base_weight[..., None], scaled], -1).flatten(1)  # o i*(1+g+s)
    return _product_with(weight), bases.flatten(1)


def _product_with(weight: Tensor) -> nn.Module:  # o i
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    module.weight.copy_(weight)
    return module


class Textbook(nn.Module):
    """The Cox-de Boor recursion as it is written in textbooks, and two products."""

    grid: Tensor

    def __init__(self, layer: KANLinear) -> None:
        super().__init__()
        self.base_weight, self.spline_weight = layer.base_weight, layer.spline_weight
        self.spline_scaler = layer.spline_scaler
        self.spline_order = layer.spline_order
        self.register_buffer("grid", layer.grid)

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


def textbook(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The textbook's layer with our weights."""
    return Textbook(layer), x


TEXTBOOK = Layer("textbook", make=textbook, copies=10)


def peers(case: Case, paths: Mapping[str, str]) -> list[Candidate]:
    """Other layers; those that cannot run here say why."""
    makers: dict[str, Callable[[Mapping[str, str]], list[Candidate]]] = {EFFICIENT: _efficient_kan, PYKAN: _pykan}
    if not case.sizes["adaptive"]:  # its grid is one for all features, and fixed
        makers[FAST] = _fast_kan
    return [c for name, make in makers.items() for c in made(name, partial(make, paths))]


def _efficient_kan(paths: Mapping[str, str]) -> list[Candidate]:
    module = load("efficient_kan.kan", "efficient_kan", paths)

    def make(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
        other = module.KANLinear(
            layer.in_features, layer.out_features, grid_size=layer.grid_size, spline_order=layer.spline_order
        )
        other.load_state_dict(layer.state_dict())
        return other.to(x.device), x

    return [
        Layer(EFFICIENT, make=make, copies=10),
        Layer(f"compiled {EFFICIENT}", make=make, compiled=True, copies=10),
    ]


def _fast_kan(paths: Mapping[str, str]) -> list[Candidate]:
    """Not the same function: as many Gaussians as we have splines, behind a LayerNorm, and a bias."""
    module = load("fastkan.fastkan", "fast_kan", paths)

    def make(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
        bases = layer.grid_size + layer.spline_order
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return module.FastKANLayer(layer.in_features, layer.out_features, num_grids=bases).to(x.device), x

    return [Layer(FAST, make=make, same=False, copies=10)]


def _pykan(paths: Mapping[str, str]) -> list[Candidate]:
    module = load("kan.KANLayer", "pykan", paths)

    def make(layer: KANLinear, x: Tensor) -> tuple[nn.Module, Tensor]:
        other = module.KANLayer(layer.in_features, layer.out_features, num=layer.grid_size, k=layer.spline_order)
        other.grid.copy_(layer.grid)
        ours = dict(layer.named_parameters())
        for name, our in PYKAN_NAMES.items():
            getattr(other, name).copy_(ours[our].permute(PYKAN_LAYOUT[our]))
        return other.to(x.device), x

    return [Layer(PYKAN, make=make, layout=PYKAN_LAYOUT, renamed=PYKAN_NAMES, max_edges=PYKAN_EDGES)]
