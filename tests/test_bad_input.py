"""Wrong calls: each raises the documented exception, whose text names the argument, the value and the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import says
from kan_mamba_layers import (
    EMA,
    SS2D,
    SS3D,
    KANBlock,
    KANConv2d,
    KANLayer,
    KANLinear,
    KMUNet,
    KMUNetPP,
    VMamba,
    VMambaUNet,
    VSSBlock,
    bspline_basis,
    convert_state_dict,
    create_model,
    cross_selective_scan,
    from_pretrained,
    kan_linear,
    resolve,
    selective_scan,
    walks,
)


class Bad(NamedTuple):
    """A wrong call, what it raises, and the parts of the message: argument, value, fix."""

    call: Callable[[], object]
    error: type[Exception]
    parts: tuple[str, ...]


def z(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def scan(**changes: object) -> object:
    good = {"u": z(2, 4, 5), "delta": z(2, 4, 5), "A": z(4, 3), "B": z(2, 3, 5), "C": z(2, 3, 5)}
    return selective_scan(**{**good, **changes})


def meta_scan(**options: object) -> object:
    """The good call with tensors that have no data, on a device that no fused backend knows."""
    shapes = {"u": (2, 4, 5), "delta": (2, 4, 5), "A": (4, 3), "B": (2, 3, 5), "C": (2, 3, 5)}
    return selective_scan(**{k: z(*shape).to("meta") for k, shape in shapes.items()}, **options)


def cross(**changes: object) -> object:
    good = {
        "x": z(1, 3, 3, 4),
        "x_proj_weight": z(4, 7, 4),
        "dt_proj_weight": z(4, 4, 1),
        "dt_proj_bias": z(4, 4),
        "A_log": z(16, 3),
        "D": z(16),
    }
    return cross_selective_scan(**{**good, **changes})


def grows(h: int, w: int) -> walks.Walks:
    return walks.snake(h, w) if h < 5 else walks.snake(h, w) + walks.diagonal(h, w)


def fixed(h: int, w: int) -> walks.Walks:
    return walks.snake(2, 4)


def kan(**changes: object) -> object:
    grid = torch.linspace(-2.2, 2.2, 12).expand(4, -1)
    good = {
        "x": z(7, 4),
        "base_weight": z(3, 4),
        "spline_weight": z(3, 4, 8),
        "spline_scaler": z(3, 4),
        "grid": grid,
    }
    return kan_linear(**{**good, **changes})


def with_meta(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    """A layer of which one parameter was left without values, as a checkpoint with a missing key leaves it."""
    setattr(layer, name, torch.nn.Parameter(getattr(layer, name).to("meta")))
    return layer


def steep() -> KANLinear:
    """A layer whose coefficients are nearly the largest of their dtype, with alternating signs."""
    layer = KANLinear(2, 2, dtype=torch.float16)
    layer.spline_weight.data = (60000 * (-1) ** torch.arange(8)).half().expand(2, 2, 8).clone()
    return layer


def vmamba() -> VMamba:
    return VMamba(depths=(1, 1, 1, 1), dims=8)


def tiny(**options: object) -> KMUNet:
    return KMUNet(widths=(8, 8, 8, 8, 8), **options)


# Why a backend refuses a call, when it is installed and when it is not.
NO_TRITON = "(it needs Triton, .* pip install|x is on 'cpu', .* 'cuda'|x is float64)"
NO_CPU = "(it needs Numba, .* pip install|x is on 'meta', .* 'cpu')"

WRONG_SCANS = [
    Bad(lambda: scan(u=z(4, 5)), ValueError, ("u must", r"b, d, l", r"\(4, 5\)")),
    Bad(lambda: scan(u=z(2, 4, 0), delta=z(2, 4, 0)), ValueError, ("u must", r"\(2, 4, 0\)", "l >= 1")),
    Bad(lambda: scan(u=z(2, 4, 5, dtype=torch.int64)), TypeError, ("u must", "int64", "float")),
    Bad(lambda: scan(u=[[1.0]]), TypeError, ("u must", "list", "tensor")),
    Bad(lambda: scan(delta=z(2, 4, 6)), ValueError, ("delta must", r"\(2, 4, 5\)", r"\(2, 4, 6\)")),
    Bad(lambda: scan(A=z(5, 3)), ValueError, ("A must", r"\(5, 3\)", "4")),
    Bad(lambda: scan(A=z(4, 3, dtype=torch.complex64)), TypeError, ("A must", "complex64", "real")),
    Bad(lambda: scan(B=z(2, 2, 5)), ValueError, ("B must", r"\(2, 2, 5\)", r"2, 3, 5")),
    Bad(lambda: scan(B=z(3)), ValueError, ("B must", r"\(3,\)", "b, g, n, l")),
    Bad(lambda: scan(C=z(2, 3, 3, 5)), ValueError, ("C", "3 groups", "4 channels", "divi")),
    Bad(lambda: scan(D=z(3)), ValueError, ("D must", r"\(3,\)", "4")),
    Bad(lambda: scan(z=z(2, 4)), ValueError, ("z must", r"\(2, 4\)", "b, d, l")),
    Bad(lambda: scan(delta_bias=z(5)), ValueError, ("delta_bias must", r"\(5,\)", "4")),
    Bad(lambda: scan(initial_state=z(2, 4, 2)), ValueError, ("initial_state must", r"b, d, n", r"\(2, 4, 2\)")),
    Bad(lambda: scan(initial_state=z(4, 3)), ValueError, ("initial_state must", r"2, 4, 3", r"\(4, 3\)")),
    Bad(lambda: scan(initial_state=z(2, 4, 3, dtype=torch.int64)), TypeError, ("initial_state must", "int64", "float")),
    Bad(lambda: scan(initial_state=z(2, 4, 3).cfloat()), TypeError, ("initial_state must", "complex64", "real")),
    Bad(lambda: scan(initial_state=0.0), TypeError, ("initial_state must", "float", "tensor")),
    Bad(
        lambda: scan(backend="triton"), ValueError, ("backend='triton'", "selective_scan", NO_TRITON, "backend='auto'")
    ),
    Bad(lambda: scan(u=z(2, 4, 5).double(), backend="triton"), ValueError, ("backend='triton'", NO_TRITON, "'auto'")),
    Bad(lambda: meta_scan(backend="cpu"), ValueError, ("backend='cpu'", "selective_scan", NO_CPU, "backend='auto'")),
    Bad(lambda: scan(backend="cuda"), ValueError, ("backend", "'cuda'", "choose", "'chunked'", "'reference'")),
    Bad(lambda: cross(x=z(3, 3, 4)), ValueError, ("x must", r"\(3, 3, 4\)", "b, h, w, d")),
    Bad(lambda: cross(x=z(1, 0, 3, 4)), ValueError, ("x must", r"\(1, 0, 3, 4\)", "h >= 1")),
    Bad(lambda: cross(x=z(1, 3, 3, 4, dtype=torch.uint8)), TypeError, ("x must", "uint8", "float")),
    Bad(lambda: cross(x_proj_weight=z(4, 6, 4)), ValueError, ("x_proj_weight must", r"4, 7, 4", r"\(4, 6, 4\)")),
    Bad(lambda: cross(dt_proj_weight=z(2, 4, 1)), ValueError, ("dt_proj_weight must", r"\(2, 4, 1\)")),
    Bad(lambda: cross(dt_proj_bias=z(16)), ValueError, ("dt_proj_bias must", r"\(16,\)", r"4, 4")),
    Bad(lambda: cross(A_log=z(4, 3)), ValueError, ("A_log must", r"\(4, 3\)", "16")),
    Bad(lambda: cross(D=z(4)), ValueError, ("D must", r"\(4,\)", "16")),
    Bad(lambda: cross(backend="triton"), ValueError, ("backend='triton'", "cross_", NO_TRITON, "backend='auto'")),
    Bad(
        lambda: resolve("cross_selective_scan", "cpu", z(1).to("meta")),
        ValueError,
        ("backend='cpu'", "cross_selective_scan", NO_CPU, "backend='auto'"),
    ),
    Bad(
        lambda: resolve("kan_linear", "cpu", z(1).to("meta")),
        ValueError,
        ("backend='cpu'", "kan_linear", NO_CPU, "backend='auto'"),
    ),
    Bad(lambda: cross(backend="nonsense"), ValueError, ("backend", "'nonsense'", "choose")),
    Bad(lambda: resolve("scan", "auto", z(1)), ValueError, ("op must", "'scan'", "'selective_scan'")),
    Bad(lambda: resolve("kan_linear", "triton", z(1)), ValueError, ("backend='triton'", "kan_linear", NO_TRITON)),
]

GRID = torch.linspace(-2.2, 2.2, 12).expand(4, -1)
WRONG_SPLINES = [
    Bad(lambda: bspline_basis(z(7, 4), GRID, 0), ValueError, ("spline_order must", "0", ">= 1")),
    Bad(lambda: bspline_basis(z(7, 4), GRID, 2.5), TypeError, ("spline_order must", "2.5", "int")),
    Bad(lambda: bspline_basis(z(7, 4), GRID, 3, nu=-1), ValueError, ("nu must", "-1", ">= 0")),
    Bad(lambda: bspline_basis(z(7, 4), GRID, 3, nu=1.0), TypeError, ("nu must", "1.0", "int")),
    Bad(lambda: bspline_basis(z(7, 3), GRID, 3), ValueError, ("x must", "4 features", r"\(7, 3\)")),
    Bad(lambda: bspline_basis(z(7, 4, dtype=torch.int32), GRID, 3), TypeError, ("x must", "int32", "float")),
    Bad(lambda: bspline_basis(z(7, 4), GRID[:, :7], 3), ValueError, ("grid", "7 knots", "spline_order=3")),
    Bad(lambda: bspline_basis(z(7, 4), GRID[0], 3), ValueError, ("grid must", r"\(12,\)")),
    Bad(lambda: kan(x=z(7, 5)), ValueError, ("x must", "4 features", r"\(7, 5\)")),
    Bad(lambda: kan(base_weight=z(4, 3)), ValueError, ("base_weight must", r"\(4, 3\)", "3, 4")),
    Bad(lambda: kan(spline_weight=z(3, 8)), ValueError, ("spline_weight must", r"\(3, 8\)")),
    Bad(lambda: kan(spline_weight=z(3, 4, 11)), ValueError, ("grid", "12 knots", "11 bases")),
    Bad(lambda: kan(spline_scaler=z(3)), ValueError, ("spline_scaler must", r"\(3,\)", "3, 4")),
    Bad(lambda: kan(bias=z(4)), ValueError, ("bias must", r"\(4,\)", "3")),
    Bad(lambda: kan(grid=GRID[:3]), ValueError, ("grid must", r"\(3, 12\)", "4")),
    Bad(lambda: kan(extrapolation="constant"), ValueError, ("extrapolation must", "'constant'", "'clamp'")),
    Bad(lambda: kan(backend="gpu"), ValueError, ("backend", "'gpu'", "choose")),
]

WRONG_LAYERS = [
    Bad(lambda: KANLinear(0, 4), ValueError, ("in_features must", "0", ">= 1")),
    Bad(lambda: KANLinear(4, -1), ValueError, ("out_features must", "-1", ">= 1")),
    Bad(lambda: KANLinear(4, 4, grid_size=-5), ValueError, ("grid_size must", "-5", ">= 1")),
    Bad(lambda: KANLinear(4, 4, spline_order=0), ValueError, ("spline_order must", "0", ">= 1")),
    Bad(lambda: KANLinear(4.0, 4), TypeError, ("in_features must", "4.0", "int")),
    Bad(lambda: KANLinear(4, 4, grid_range=(1, -1)), ValueError, ("grid_range must", r"\(1, -1\)", "ascend")),
    Bad(lambda: KANLinear(4, 4, grid_range=1.0), TypeError, ("grid_range must", "1.0", "pair")),
    Bad(lambda: KANLinear(4, 4, grid_mode="quantile"), ValueError, ("grid_mode must", "'quantile'", "'adaptive'")),
    Bad(lambda: KANLinear(4, 4, grid_eps=1.5), ValueError, ("grid_eps must", "1.5", r"\[0.0, 1.0\]")),
    Bad(lambda: KANLinear(4, 4, scale_base=-1.0), ValueError, ("scale_base must", "-1.0")),
    Bad(lambda: KANLinear(4, 4, scale_noise=float("nan")), ValueError, ("scale_noise must", "nan", "finite")),
    Bad(lambda: KANLinear(4, 4, extrapolation="nearest"), ValueError, ("extrapolation must", "'nearest'", "'linear'")),
    Bad(lambda: KANLinear(4, 4, backend="fused"), ValueError, ("backend", "'fused'", "choose")),
    Bad(lambda: KANLinear(4, 4)(z(3, 5)), ValueError, ("x must", "4 features", r"\(3, 5\)")),
    Bad(lambda: KANLinear(4, 4)(z(3, 4, dtype=torch.int64)), TypeError, ("x must", "int64", "float")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(3, 5)), ValueError, ("x must", "4 features", r"\(3, 5\)")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(0, 4)), ValueError, ("x must", r"\(0, 4\)", "at least one sample")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(3, 4) / 0), ValueError, ("x must", "finite")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(3, 4), margin=-1), ValueError, ("margin must", "-1")),
    Bad(lambda: KANLinear(4, 4).extend_grid(3), ValueError, ("new_grid_size must", "3", ">= 5")),
    Bad(lambda: KANLinear(4, 4).extend_grid("10"), TypeError, ("new_grid_size must", "'10'", "int")),
    Bad(lambda: KANLinear(4, 4).b_splines(z(3, 5)), ValueError, ("x must", "4 features", r"\(3, 5\)")),
    Bad(lambda: KANLinear(4, 4).edge_function(1.0), TypeError, ("x must", "float", "as_tensor")),
    Bad(lambda: KANLinear(4, 4).edge_function(z(3), 1), TypeError, ("edge must", "1", "index in base_weight")),
    Bad(lambda: KANLinear(4, 4).edge_function(z(3), (1,)), ValueError, ("edge must", "2 entries", r"\(1,\)", "index")),
    Bad(lambda: KANLinear(4, 3).edge_function(z(3), (3, 0)), ValueError, (r"edge\[0\] must", "less than 3", "got 3")),
    Bad(lambda: KANLinear(4, 3).edge_function(z(3), (0, -1)), ValueError, (r"edge\[1\] must", "-1", ">= 0")),
    Bad(lambda: KANLinear(4, 3).edge_function(z(3), (0, 1.0)), TypeError, (r"edge\[1\] must", "1.0", "int")),
    Bad(lambda: KANLinear(4, 4).prune_edges(-0.1), ValueError, ("threshold must", "-0.1", "choose")),
    Bad(lambda: KANLinear(4, 4).prune_edges("0.1"), TypeError, ("threshold must", "'0.1'", "float")),
    Bad(lambda: KANLinear(4, 4).plot("0"), TypeError, ("edges must", "'0'", r"\[\(0, 0\)")),
    Bad(lambda: KANLinear(4, 4).prune_edges(float("inf")), ValueError, ("threshold must", r"\[0.0, inf\)", "got inf")),
    Bad(lambda: KANLinear(4, 4, 5), TypeError, ("bias must", "True or False", "5", "grid_size=5")),
    Bad(lambda: KANLinear(4, 4).plot([]), ValueError, ("edges must", "1 to 36", "got 0", "None for all")),
    Bad(lambda: KANLinear(4, 4).plot([(0, 0)] * 37), ValueError, ("edges must", "1 to 36", "37", "several figures")),
    Bad(lambda: KANLinear(4, 4).plot([(0, 4)]), ValueError, (r"edges\[0\]\[1\] must", "less than 4", "got 4")),
    Bad(lambda: KANConv2d(0, 4, 3), ValueError, ("in_channels must", "0", ">= 1")),
    Bad(lambda: KANConv2d(4, 4.0, 3), TypeError, ("out_channels must", "4.0", "int")),
    Bad(lambda: KANConv2d(4, 4, 0), ValueError, ("kernel_size must", "0", ">= 1")),
    Bad(lambda: KANConv2d(4, 4, (3, 3, 3)), ValueError, ("kernel_size must", r"\(3, 3, 3\)", "pair")),
    Bad(lambda: KANConv2d(4, 4, (3, 0)), ValueError, (r"kernel_size\[1\] must", "0", ">= 1")),
    Bad(lambda: KANConv2d(4, 4, 3, stride=0), ValueError, ("stride must", "0", ">= 1")),
    Bad(lambda: KANConv2d(4, 4, 3, padding=-1), ValueError, ("padding must", "-1", ">= 0")),
    Bad(lambda: KANConv2d(4, 4, 3, padding="full"), ValueError, ("padding must", "'full'", "'same'")),
    Bad(lambda: KANConv2d(4, 4, 3, 2, "same"), ValueError, ("padding='same'", r"\(2, 2\)", "stride=1")),
    Bad(lambda: KANConv2d(4, 4, 3, dilation=1.5), TypeError, ("dilation must", "1.5", "int")),
    Bad(lambda: KANConv2d(4, 6, 3, groups=3), ValueError, ("in_channels must", "groups=3", "in_channels=6")),
    Bad(lambda: KANConv2d(4, 6, 3, groups=4), ValueError, ("out_channels must", "groups=4", "out_channels=8")),
    Bad(lambda: KANConv2d(4, 4, 3, groups=0), ValueError, ("groups must", "0", ">= 1")),
    Bad(lambda: KANConv2d(4, 4, 3, grid_size=0), ValueError, ("grid_size must", "0", ">= 1")),
    Bad(lambda: KANConv2d(4, 4, 3, extrapolation="same"), ValueError, ("extrapolation must", "'same'", "'linear'")),
    Bad(lambda: KANConv2d(4, 4, 3)(z(2, 3, 8, 8)), ValueError, ("x must", "4 channels", r"\(2, 3, 8, 8\)")),
    Bad(lambda: KANConv2d(4, 4, 3)(z(4, 8)), ValueError, ("x must", r"\(b, c, h, w\)", r"\(4, 8\)")),
    Bad(lambda: KANConv2d(4, 4, 3)(z(2, 4, 8, 2)), ValueError, ("x must", "width of at least 3", r"\(2, 4, 8, 2\)")),
    Bad(
        lambda: KANConv2d(4, 4, 5, padding=1)(z(2, 4, 2, 8)), ValueError, ("x must", "height of at least 3", "enlarge")
    ),
    Bad(lambda: KANConv2d(4, 4, 3)(z(2, 4, 8, 8).double()), ValueError, ("x is", "float64", "float32", "convert")),
    Bad(lambda: KANConv2d(4, 4, 3)(z(2, 4, 8, 8, dtype=torch.int64)), TypeError, ("x must", "int64", "float")),
    Bad(lambda: KANConv2d(4, 4, 3).update_grid(z(2, 8, 8, 4)), ValueError, ("x must", "4 channels", r"\(2, 8, 8, 4\)")),
    Bad(lambda: KANConv2d(4, 4, 3).update_grid(z(0, 4, 8, 8)), ValueError, ("x must", "at least one sample")),
    Bad(lambda: KANConv2d(4, 4, 3).plot([(0, 0)]), ValueError, (r"edges\[0\] must", "4 entries", r"\(0, 0\)")),
    Bad(lambda: KANConv2d(4, 4, 3, 1, 0, 1, 1, "yes"), TypeError, ("bias must", "True or False", "'yes'")),
    Bad(lambda: KANLayer(4)(z(1, 6, 4), 2.0, 3), TypeError, ("H must", "integer", "2.0")),
    Bad(lambda: KANBlock(4)(z(1, 6, 4), 2, "3"), TypeError, ("W must", "integer", "'3'")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(9, 4).double() + 1e300), ValueError, ("x must", "float32", r"1e\+300")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(9, 4) - 3e38), ValueError, ("x must", "float32", r"3\.0+\d*e\+38")),
    Bad(lambda: KANLinear(1, 1).update_grid(torch.tensor([[-7e37], [7e37]])), ValueError, ("x must", "float32")),
    Bad(lambda: KANLinear(4, 4).update_grid(z(9, 4), margin=1e38), ValueError, ("margin=1e\\+38", "smaller margin")),
    Bad(lambda: steep().extend_grid(7), ValueError, ("new_grid_size=7", "too large for .*float16", "float()")),
    Bad(lambda: KANLayer(0), ValueError, ("in_features must", "0", ">= 1")),
    Bad(lambda: KANLayer(4, hidden_features=0), ValueError, ("hidden_features must", "0", ">= 1")),
    Bad(lambda: KANLayer(4)(z(2, 12, 4), 3, 5), ValueError, ("x must", r"\(2, 12, 4\)", "H\\*W", "15")),
    Bad(lambda: KANBlock(4)(z(2, 4, 12), 3, 4), ValueError, ("must", r"\(2, 4, 12\)")),
    Bad(lambda: KANBlock(4, drop_path=1.0), ValueError, ("drop_path must", "1.0")),
    # On another device an address would be read as one of the CPU's.
    Bad(lambda: KANLinear(4, 4)(torch.zeros(2, 4, device="meta")), ValueError, ("x is on meta", "base_weight on cpu")),
    Bad(lambda: KANLinear(4, 4, device="meta")(z(2, 4)), ValueError, ("x is on cpu", "base_weight on meta", "move")),
    Bad(lambda: scan(A=torch.zeros(4, 3, device="meta")), ValueError, ("u is on cpu", "A on meta", "move")),
    Bad(lambda: scan(z=torch.zeros(2, 4, 5, device="meta")), ValueError, ("u is on cpu", "z on meta", "move")),
    Bad(lambda: with_meta(SS2D(8), "A_logs")(z(1, 3, 2, 8)), ValueError, ("x is on cpu", "A_log on meta", "move")),
    Bad(lambda: bspline_basis(z(2, 4), torch.zeros(4, 12, device="meta"), 3), ValueError, ("grid on meta", "move")),
    Bad(lambda: SS2D(0), ValueError, ("d_model must", "0", ">= 1")),
    Bad(lambda: SS2D(8, d_state=0), ValueError, ("d_state must", "0", ">= 1")),
    Bad(lambda: SS2D(8, d_conv=4), ValueError, ("d_conv must", "4", "odd", "use 5")),
    Bad(lambda: SS2D(8, expand=0), ValueError, ("expand must", "0")),
    Bad(lambda: SS2D(8, dt_rank="full"), ValueError, ("dt_rank must", "'full'", "'auto'")),
    Bad(lambda: SS2D(8, dt_min=0.1, dt_max=0.01), ValueError, ("dt_max must", "0.01", "0.1")),
    Bad(lambda: SS2D(8, dropout=1.5), ValueError, ("dropout must", "1.5")),
    Bad(lambda: SS2D(8, backend="mamba_ssm"), ValueError, ("backend", "'mamba_ssm'", "choose")),
    Bad(lambda: SS2D(8)(z(2, 8, 5, 6)), ValueError, ("x must", r"\(2, 8, 5, 6\)", "b, h, w, d_model")),
    Bad(lambda: SS2D(8, walks=walks.snake(6, 5)), TypeError, ("walks must", "function", r"snake\(6, 5\)", "pass")),
    Bad(lambda: SS2D(8, walks="snake"), TypeError, ("walks must", "function of h, w", "'snake'", "walks.snake")),
    Bad(lambda: SS2D(8, walks=walks.windows), TypeError, ("walks must", "walks.windows", "'size'", "partial")),
    Bad(lambda: SS2D(8, walks=walks.volume), TypeError, ("walks must", "h, w", "walks.volume", "walks.snake")),
    Bad(lambda: SS2D(8, walks=max), TypeError, ("walks must return", "max", "kan_mamba_layers.walks")),
    Bad(lambda: SS2D(8, walks=lambda h, w: walks.snake(w, h)), ValueError, ("walks must", r"\(4, 2\)", r"\(2, 4\)")),
    Bad(lambda: SS2D(8, walks=grows)(z(1, 5, 4, 8)), ValueError, ("walks must", "4 dir", "got 8 from grows", r"5, 4")),
    Bad(lambda: SS2D(8, walks=fixed)(z(1, 5, 4, 8)), ValueError, ("walks must", r"snake\(2, 4\) from fixed", r"5, 4")),
    Bad(lambda: SS2D(8)(z(1, 3, 2, 8), z(1, 3, 2)), TypeError, ("mask must", "float32", "mask.bool")),
    Bad(lambda: SS2D(8)(z(1, 3, 2, 8), z(1, 2, 3).bool()), ValueError, ("mask must", r"1, 3, 2", r"\(1, 2, 3\)")),
    Bad(lambda: VSSBlock(8, walks=3), TypeError, ("walks must", "3", "walks.snake")),
    Bad(lambda: SS3D(8, walks=walks.snake), TypeError, ("walks must", "d, h, w", "walks.snake", "walks.volume")),
    Bad(lambda: SS3D(8, d_conv=2), ValueError, ("d_conv must", "2", "use 3")),
    Bad(lambda: SS3D(8)(z(1, 3, 2, 8)), ValueError, ("x must", "b, d, h, w, d_model", r"\(1, 3, 2, 8\)")),
    Bad(lambda: SS3D(8)(z(1, 0, 3, 2, 8)), ValueError, ("x must", "pixel", "d >= 1")),
    Bad(lambda: SS3D(8)(z(1, 1, 3, 2, 8).double()), ValueError, ("x is", "float64", "conv3d.weight", "convert")),
    Bad(lambda: SS3D(8)(z(1, 4, 3, 2, 8), z(1, 3, 2).bool()), ValueError, ("mask must", "b, d, h, w", r"\(1, 3, 2\)")),
    Bad(lambda: EMA(20), ValueError, ("channels", "20", "factor", "8", "use channels=24")),
    Bad(lambda: EMA(8, factor=0), ValueError, ("factor must", "0", ">= 1")),
    Bad(lambda: EMA(8)(z(2, 16, 5, 5)), ValueError, ("x must", r"\(2, 16, 5, 5\)", "8")),
    Bad(lambda: EMA(8)(z(2, 8, 0, 5)), ValueError, ("x must", "one pixel", r"\(2, 8, 0, 5\)", "h >= 1 and w >= 1")),
    Bad(lambda: EMA(8)(z(8, 5, 5)), ValueError, ("x must", r"\(8, 5, 5\)", "b, channels, h, w")),
]

WRONG_MODELS = [
    Bad(lambda: VSSBlock(0), ValueError, ("dim must", "0", ">= 1")),
    Bad(lambda: VSSBlock(4, mlp_ratio=-1), ValueError, ("mlp_ratio must", "-1")),
    Bad(lambda: VSSBlock(4, mlp_ratio=0.1), ValueError, ("mlp_ratio must", "0.25", "0.1")),
    Bad(lambda: VSSBlock(4, drop_path=1.0), ValueError, ("drop_path must", "1.0")),
    Bad(lambda: VSSBlock(4)(z(1, 4, 3, 3)), ValueError, ("x must", "b, h, w, dim", r"\(1, 4, 3, 3\)")),
    Bad(lambda: VSSBlock(4, channels_first=True)(z(1, 3, 3, 4)), ValueError, ("x must", "b, dim, h, w")),
    Bad(lambda: VSSBlock(4)(z(1, 3, 3, 4, dtype=torch.float64)), ValueError, ("x is", "float64", "norm.weight")),
    Bad(lambda: VSSBlock(4)(z(1, 0, 3, 4)), ValueError, ("x must", "pixel")),
    Bad(lambda: VMamba(num_classes=-1), ValueError, ("num_classes must", "-1", ">= 0")),
    Bad(lambda: VMamba(depths=(2, 2)), ValueError, ("depths must", r"\(2, 2\)", "4")),
    Bad(lambda: VMamba(depths=8), TypeError, ("depths must", "8")),
    Bad(lambda: VMamba(dims=1), ValueError, ("dims must", "1", ">= 2")),
    Bad(lambda: VMamba(dims=(8, 16)), ValueError, ("dims must", r"\(8, 16\)", "4")),
    Bad(lambda: VMamba(drop_path=1), ValueError, ("drop_path must", "1")),
    Bad(lambda: VMamba(features_only=True).reset_classifier(3), ValueError, ("reset_classifier", "features_only")),
    Bad(lambda: vmamba()(z(1, 1, 32, 32)), ValueError, ("x must", "in_channels", r"\(1, 1, 32, 32\)")),
    Bad(lambda: vmamba()(z(1, 3, 0, 32)), ValueError, ("x must", "pixel")),
    Bad(lambda: vmamba()(z(1, 3, 9, 9, dtype=torch.float64)), ValueError, ("x is", "float64", "patch_embed.0.weight")),
    *(
        Bad(
            lambda name=name, dtype=dtype: create_model(name).eval()(z(1, 3, 40, 40, dtype=dtype)),
            ValueError,
            ("x is", str(dtype), "float32", "convert one"),
        )
        for name in ("km_unet_tiny", "km_unet_pp_tiny", "u_kan_tiny", "vmamba_unet_tiny")
        for dtype in (torch.float64, torch.bfloat16)
    ),
    Bad(lambda: vmamba().reset_classifier(-1), ValueError, ("num_classes must", "-1")),
    Bad(lambda: vmamba().load_published([1]), TypeError, ("state_dict must", "list")),
    Bad(lambda: VMambaUNet("vmamba"), ValueError, ("encoder must", "'vmamba_tiny'", "'vmamba'")),
    Bad(lambda: VMambaUNet(3, 2), ValueError, ("encoder must", "'vmamba_tiny'", "3")),
    Bad(lambda: VMambaUNet({"dims": 8, "num_classes": 3}), TypeError, ("num_classes",)),
    Bad(lambda: VMambaUNet({"dims": 8, "width": 3}), TypeError, ("width",)),
    Bad(lambda: VMambaUNet({"depths": (1, 1, 1, 1), "dims": 8})(z(1, 3, 31, 40)), ValueError, ("height", "31", "32")),
    Bad(lambda: KMUNetPP(features_only=True).prune(1), ValueError, ("prune", "features_only")),
    Bad(lambda: KMUNet(in_channels=0), ValueError, ("in_channels must", "0", ">= 1")),
    Bad(lambda: KMUNet(num_classes=0), ValueError, ("num_classes must", "0", ">= 1")),
    Bad(lambda: KMUNet(widths=(8, 16, 32)), ValueError, ("widths must", r"\(8, 16, 32\)", "5")),
    Bad(lambda: KMUNet(widths=(8, 16, 30, 32, 64)), ValueError, ("widths", "30", "ema_factor", "8", "32")),
    Bad(lambda: KMUNet(widths=8), TypeError, ("widths must", "8")),
    Bad(lambda: KMUNetPP(widths=(8,)), ValueError, ("widths must", r"\(8,\)", "2 to 5")),
    Bad(lambda: tiny(grid_size=0), ValueError, ("grid_size must", "0", ">= 1")),
    Bad(lambda: tiny(d_state=-1), ValueError, ("d_state must", "-1", ">= 1")),
    Bad(lambda: tiny(drop_path=2.0), ValueError, ("drop_path must", "2.0")),
    Bad(lambda: tiny(backend="numba"), ValueError, ("backend", "'numba'", "choose")),
    Bad(lambda: tiny()(z(2, 3, 31, 64)), ValueError, ("height", "31", "32", "resize")),
    Bad(lambda: tiny()(z(2, 3, 64, 16)), ValueError, ("width", "16", "32", "resize")),
    Bad(lambda: tiny()(z(2, 4, 64, 64)), ValueError, ("x must", r"\(2, 4, 64, 64\)", "in_channels", "3")),
    Bad(lambda: tiny()(z(3, 64, 64)), ValueError, ("x must", r"\(3, 64, 64\)", "b, in_channels, h, w")),
    Bad(lambda: tiny()(z(2, 3, 64, 64, dtype=torch.uint8)), TypeError, ("x must", "uint8", "float")),
    Bad(lambda: tiny()(z(1, 3, 32, 32)), ValueError, ("batch of 1", "32x32", "BatchNorm", "64x64")),
    Bad(lambda: KMUNetPP(widths=(8, 8, 8)).prune(1), ValueError, ("depth", "1", "deep_supervision=True")),
    Bad(
        lambda: KMUNetPP(widths=(8, 8), deep_supervision=True).prune(2), ValueError, ("depth", "2", "deep_supervision")
    ),
    Bad(lambda: KMUNetPP(widths=(8, 8), deep_supervision=True).prune(0), ValueError, ("depth must", "0", ">= 1")),
    Bad(lambda: create_model("km_unett"), ValueError, ("name", "'km_unett'", "did you mean", "km_unet")),
    Bad(lambda: create_model("zzz"), ValueError, ("name", "'zzz'", "list_models")),
    Bad(lambda: create_model("km_unet_tiny", classes=2), TypeError, ("'classes'", "did you mean", "num_classes")),
    Bad(lambda: create_model("u_kan_tiny", num_classes=-2), ValueError, ("num_classes must", "-2", ">= 1")),
    Bad(lambda: convert_state_dict({}, source="unet"), ValueError, ("source must", "'unet'", "'km_unet'", "'u_kan'")),
    Bad(lambda: convert_state_dict({"foo.weight": z(1)}, "km_unet"), ValueError, ("'foo.weight'", "km_unet", "check")),
    Bad(
        lambda: convert_state_dict({"encoder1.conv.0.bias": z(1)}, "u_kan"), ValueError, ("encoder", "whole state_dict")
    ),
    Bad(lambda: convert_state_dict({"encoder1.conv.0.bias": z(1)}, "km_unet"), ValueError, ("SS2D", "source='u_kan'")),
    Bad(
        lambda: convert_state_dict({"state_dict": {}, "epoch": 3}, "km_unet"),
        TypeError,
        (r"state_dict\['state_dict'\]", "mapping", r"checkpoint\['state_dict'\]"),
    ),
    Bad(lambda: convert_state_dict({"epoch": 3}, "u_kan"), TypeError, (r"\['epoch'\] must", "int", "leave it out")),
    Bad(lambda: convert_state_dict(EMA(8), "u_kan"), TypeError, ("state_dict must", "EMA", r"model\.state_dict\(\)")),
    Bad(lambda: create_model("u_kan", pretrained=True), ValueError, ("pretrained=True", "list_pre", "fetal_head")),
    Bad(lambda: SS2D(8).bfloat16()(z(2, 3, 3, 8)), ValueError, ("x is", "float32", "conv2d.weight", "autocast")),
    Bad(lambda: EMA(8)(z(2, 8, 3, 3).double()), ValueError, ("x is", "float64", "conv3x3.weight", "convert")),
    Bad(lambda: KANLayer(4)(z(2, 0, 4), 0, 3), ValueError, ("x must", "one pixel", r"\(2, 0, 4\)", "h >= 1")),
]

TABLE = WRONG_SCANS + WRONG_SPLINES + WRONG_LAYERS + WRONG_MODELS


@pytest.mark.parametrize("bad", TABLE, ids=[f"{i}-{bad.parts[0].split()[0]}" for i, bad in enumerate(TABLE)])
def test_wrong_call(bad: Bad) -> None:
    with pytest.raises(bad.error, match=says(*bad.parts)) as caught:
        bad.call()
    assert type(caught.value) is bad.error, "no subclass that happens to come from below"
    assert caught.value.__cause__ is None or bad.error is not TypeError


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 100


class TestFolders:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=says("nowhere", r"config\.json", "save_pretrained")):
            from_pretrained(tmp_path / "nowhere")

    def test_missing_weights(self, tmp_path: Path) -> None:
        KMUNetPP(widths=(8, 8)).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=says(r"model\.safetensors", "save_pretrained")):
            from_pretrained(tmp_path)

    def test_another_class(self, tmp_path: Path) -> None:
        KMUNetPP(widths=(8, 8)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=says("holds a KMUNetPP", "not a KMUNet;", "class")):
            KMUNet.from_pretrained(tmp_path)

    def test_unknown_class(self, tmp_path: Path) -> None:
        KMUNetPP(widths=(8, 8)).save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace("KMUNetPP", "ResNet"))
        with pytest.raises(ValueError, match=says("'ResNet'", "KMUNet", "folder")):
            from_pretrained(tmp_path)

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=r"model\.pt"):
            from_pretrained(tmp_path / "model.pt")


def test_good_calls_pass() -> None:
    """The bases of the table are right: each bad row is bad for its own reason."""
    scan()
    scan(initial_state=z(2, 4, 3))
    meta_scan()
    cross()
    kan()
    kan(spline_scaler=None, bias=z(3), base_activation=F.gelu)
    tiny()(z(2, 3, 32, 32))
