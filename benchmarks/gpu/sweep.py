"""Every op, layer and model on the GPU against float64 on the CPU, forward and backward, in three dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.compare import Results, judge, moved, results, tf32
from benchmarks.gpu.tasks import Setting, Task
from kan_mamba_layers import (
    EMA,
    SS2D,
    KANBlock,
    KANConv2d,
    KANLayer,
    KANLinear,
    bspline_basis,
    create_model,
    cross_selective_scan,
    kan_linear,
    list_models,
    selective_scan,
)

Inputs = dict[str, Tensor | None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONG = 256  # steps above which the oracle is the chunked form: the recurrence takes time quadratic in the length


@dataclass(frozen=True)
class Op:
    """A function with its inputs; `halves` are those that a model under half precision hands over in it."""

    make: Callable[[], Inputs]
    function: Callable[..., Tensor]  # with a keyword `backend`
    halves: tuple[str, ...]
    length: int = 1
    backend: str = "triton"


def image(b: int, h: int, w: int, d: int, r: int, n: int) -> Op:
    """A scan in four directions."""

    def make() -> Inputs:
        draw = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=draw)
        return {
            "x": normal(b, h, w, d),
            "x_proj_weight": normal(4, r + 2 * n, d) * d**-0.5,
            "dt_proj_weight": normal(4, d, r) * r**-0.5,
            "dt_proj_bias": normal(4, d) - 2,
            "A_log": normal(4 * d, n) * 0.5,
            "D": normal(4 * d),
        }

    return Op(make, cross_selective_scan, ("x",), h * w)


def line(b: int, d: int, l: int, n: int, groups: int = 1, whole: bool = True) -> Op:
    """A scan along a sequence; `whole`: with gate, skip, bias, initial and last state."""

    def make() -> Inputs:
        draw = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=draw)
        return {
            "u": normal(b, d, l),
            "delta": normal(b, d, l),
            "A": -(normal(d, n) * 0.5).exp(),
            "B": normal(b, groups, n, l),
            "C": normal(b, n, l),
            "D": normal(d) if whole else None,
            "z": normal(b, d, l) if whole else None,
            "delta_bias": normal(d) - 1,
            "initial_state": normal(b, d, n) if whole else None,
        }

    def function(backend: Any, **x: Tensor) -> Tensor:
        y, last = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
        return torch.cat([y, last.to(y.dtype)], -1)

    return Op(make, function, ("u", "delta", "B", "C", "z"), l)


def splines(
    rows: int, i: int, o: int, g: int = 5, s: int = 3, uniform: bool = True, extrapolation: Any = "zero", **more: Any
) -> Op:
    """A KAN linear map; `more` are further arguments, such as another activation."""

    def make() -> Inputs:
        draw = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=draw)
        return {
            "x": normal(rows, i),
            "base_weight": normal(o, i) * i**-0.5,
            "spline_weight": normal(o, i, g + s) * i**-0.5,
            "spline_scaler": 1 + 0.1 * normal(o, i),
            "bias": normal(o),
        }

    def function(backend: Any, x: Tensor, **weights: Tensor) -> Tensor:
        # No knot is a number of half precision: on a knot the slope of order 1 is one of two.
        grid = torch.arange(-s, g + s + 1, device=x.device) * (1.94 / g) - 0.97
        grid = grid if uniform else grid + 0.3 / g * torch.sin(3 * grid)
        grid = grid.to(torch.promote_types(x.dtype, torch.float32)).repeat(i, 1)
        options = {"extrapolation": extrapolation, "uniform": uniform, **more}
        return kan_linear(x, grid=grid, **weights, **options, backend=backend)

    return Op(make, function, ("x", "base_weight", "spline_weight", "spline_scaler", "bias"))


def bases(rows: int, i: int, g: int, s: int, uniform: bool) -> Op:
    """All B-splines of a tensor; there is one form of it, so the GPU's is compared with the CPU's."""

    def function(backend: Any, x: Tensor) -> Tensor:
        grid = (torch.arange(-s, g + s + 1, device=x.device) * (2 / g) - 1).repeat(i, 1)
        return bspline_basis(x, grid.to(torch.promote_types(x.dtype, torch.float32)), s, uniform=uniform)

    return Op(lambda: {"x": torch.randn(rows, i, generator=torch.Generator().manual_seed(0))}, function, ("x",))


OPS: dict[str, Op] = {
    "scan2d/9x7 d12 n16 r2": image(2, 9, 7, 12, 2, 16),
    "scan2d/pixel": image(1, 1, 1, 3, 1, 1),
    "scan2d/row": image(2, 1, 45, 33, 3, 5),
    "scan2d/column n17 r10": image(2, 45, 1, 33, 10, 17),
    "scan2d/40x36 d96": image(1, 40, 36, 96, 3, 16),
    "scan2d/56x56 d192 n1": image(1, 56, 56, 192, 6, 1),
    "scan2d/16x16 d320": image(1, 16, 16, 320, 10, 16),
    "scan2d/67x50 d65": image(1, 67, 50, 65, 4, 8),
    "scan2d/batch 64": image(64, 13, 11, 32, 1, 16),
    "scan2d/many channels": image(1, 5, 6, 2049, 16, 4),
    "scan2d/many states": image(1, 6, 5, 20, 2, 128),
    "scan2d/rank 33": image(1, 9, 8, 70, 33, 4),
    "scan2d/1024x1024": image(1, 1024, 1024, 4, 1, 2),
    "scan2d/1x65536": image(1, 1, 65536, 5, 1, 4),
    "scan1d/37": line(2, 12, 37, 16),
    "scan1d/step": line(1, 1, 1, 1),
    "scan1d/groups": line(3, 40, 70, 4, groups=2),
    "scan1d/group a channel": line(1, 24, 50, 8, groups=24),
    "scan1d/1500": line(1, 8, 1500, 5),
    "scan1d/bare": line(2, 65, 100, 16, whole=False),
    "scan1d/mamba": line(1, 768, 1024, 16, whole=False),
    "scan1d/65536": line(1, 6, 65536, 4),
    "scan1d/batch 64": line(64, 33, 40, 16),
    "scan1d/many channels": line(1, 5000, 20, 3),
    "kan/33x17-35": splines(33, 17, 35),
    "kan/one": splines(1, 1, 1),
    "kan/1024x160": splines(1024, 160, 160),
    "kan/2048x320": splines(2048, 320, 320),
    "kan/16384x128": splines(16384, 128, 128),
    "kan/tall": splines(100_003, 16, 24),
    "kan/wide": splines(65, 700, 300),
    "kan/grid 32": splines(300, 40, 50, g=32),
    **{f"kan/order {s}": splines(200, 20, 33, g=4, s=s) for s in (1, 2, 4, 5)},
    **{f"kan/{e}": splines(200, 20, 33, extrapolation=e) for e in ("clamp", "linear")},
    **{f"kan/knots order {s}": splines(200, 20, 33, s=s, uniform=False) for s in (1, 2, 3, 4, 5)},
    "kan/knots linear": splines(200, 20, 33, uniform=False, extrapolation="linear"),
    "kan/tanh": splines(200, 20, 33, base_activation=torch.tanh),
    **{f"basis/order {s}": bases(500, 30, 5, s, True) for s in (1, 3, 5)},
    "basis/knots": bases(500, 30, 5, 3, False),
}
REHEARSED = ("scan2d/pixel", "scan1d/step", "kan/one")


def compare_op(op: Op, dtype: torch.dtype, setting: Setting) -> dict[str, Any]:
    """The kernels on the device, and the plain formula in the same dtype and in float64 on the CPU."""
    inputs = {k: x if x is None or k not in op.halves else x.to(dtype) for k, x in op.make().items()}
    plain = "chunked" if op.length > LONG else "reference"
    with tf32(False):
        actual = results(partial(op.function, backend=op.backend), moved(inputs, setting.device))
    exact = results(partial(op.function, backend=plain), moved(inputs, torch.float64))
    return judge(actual, exact, results(partial(op.function, backend=plain), inputs), inputs)


@dataclass(frozen=True)
class Module:
    """A layer or model and the shape of its input; `sizes` are further arguments."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    joint: bool = False  # gradients are judged together: those of a bias before BatchNorm are zero but for rounding


MODULES: dict[str, Module] = {
    "KANLinear": Module(lambda: KANLinear(12, 7), (5, 9, 12)),
    "KANLinear adaptive": Module(lambda: KANLinear(12, 7, grid_mode="adaptive"), (50, 12)),
    "KANLayer": Module(lambda: KANLayer(16, 24, 16), (2, 42, 16), (7, 6)),
    "KANBlock": Module(lambda: KANBlock(16), (2, 30, 16), (6, 5)),
    "KANConv2d": Module(lambda: KANConv2d(5, 6, 3, padding=1), (2, 5, 11, 9)),
    "SS2D": Module(lambda: SS2D(12), (2, 9, 7, 12)),
    "SS2D wide": Module(lambda: SS2D(96), (1, 31, 29, 96)),
    "EMA": Module(lambda: EMA(16), (2, 16, 9, 7)),
    **{
        name: Module(partial(create_model, name), (2, 3, 67, 50), joint=True)
        for name in list_models()
        if name.rpartition("_")[2] in ("tiny", "small", "base") and ("vmamba" not in name or "tiny" in name)
    },
}


def compare_module(module: Module, dtype: torch.dtype, setting: Setting) -> dict[str, Any]:
    """A module on the device, in half precision under autocast, against itself in float64 on the CPU."""
    torch.manual_seed(0)
    fresh = module.build().eval()
    there, here = (copy.deepcopy(fresh) for _ in range(2))
    ours = "triton" if setting.rehearsal else "auto"
    set_backends(there, ours, ours)
    set_backends(here, "chunked", "reference")
    inputs = {"x": torch.randn(module.shape)}

    def run(network: nn.Module, device: str, kind: torch.dtype) -> Results:
        leaves = dict(network.named_parameters())
        x = inputs["x"].to(device, torch.float64 if kind == torch.float64 else torch.float32).requires_grad_()
        half = kind in (torch.bfloat16, torch.float16)
        with torch.autocast(device, kind if half else torch.bfloat16, enabled=half):
            out = network(x, *module.sizes)
        out = torch.stack(out) if isinstance(out, list) else out
        weights = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(0)) / 8
        grads = torch.autograd.grad(out, [x, *leaves.values()], weights.to(out))
        if module.joint:
            return {"output": out.detach().to(kind), "gradients": torch.cat([g.flatten() for g in grads]).to(kind)}
        return {k: v.detach().to(kind) for k, v in zip(["output", "grad x", *leaves], [out, *grads], strict=True)}

    with tf32(False):
        actual = run(there.to(setting.device), setting.device, dtype)
    exact = run(copy.deepcopy(here).double(), "cpu", torch.float64)
    # PyTorch's convolutions in float16 are not there on every CPU; bfloat16 is, and its errors are larger.
    plain = run(here, "cpu", torch.bfloat16 if dtype == torch.float16 else dtype)
    # The kinks of ReLU switch on and off at the last bit, elsewhere on every device.
    return judge(actual, exact, plain, inputs, bands=50.0 if module.joint else 4.0)


def as_op(module: Module, device: str) -> Op:
    """A module of fixed weights as a function of its input."""
    # Convolutions and bilinear interpolation may otherwise add in another order each time.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    network, x = module.build().eval().to(device), torch.randn(module.shape)

    def function(x: Tensor, **_: Any) -> Tensor:
        out = network(x, *module.sizes)
        return torch.stack(out) if isinstance(out, list) else out

    return Op(lambda: {"x": x}, function, ())


def set_backends(network: nn.Module, scans: Any, splines: Any) -> None:
    """The backend of every layer that has one."""
    for layer in network.modules():
        if isinstance(layer, SS2D):
            layer.backend = scans
        elif hasattr(layer, "backend"):
            layer.backend = splines


def tasks(setting: Setting) -> Iterator[Task]:
    """Ops first, then layers, then models."""
    ops = {name: op for name, op in OPS.items() if not setting.rehearsal or name in REHEARSED}
    modules = {name: m for name, m in MODULES.items() if not setting.rehearsal or name == "KANLinear"}
    dtypes = list(DTYPES)[: 2 if setting.rehearsal else None]
    for dtype in dtypes:
        for name, op in ops.items():
            yield Task(f"{name}/{dtype}", partial(compare_op, op, DTYPES[dtype]))
    for dtype in dtypes:
        for name, module in modules.items():
            yield Task(f"module/{name}/{dtype}", partial(compare_module, module, DTYPES[dtype]))
