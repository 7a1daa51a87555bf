"""The cases: ops, layers and models at fixed sizes, and their inputs.

Inputs are those of a freshly initialised layer: standard normal maps, uniform weights of scale 1/sqrt(fan-in),
`A = -(1, ..., n)`, and biases whose step sizes are log-uniform in [1e-3, 1e-1]. They depend only on the sizes. A
KANLinear is freshly initialised and its input standard normal, so a third of it lies outside the grid on [-1, 1].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kan_mamba_layers import EMA, SS2D, KANLinear, create_model

DIRECTIONS = 4
SUITES = ("ops", "ops-b8", "blocks", "models", "scaling", "kan")  # the ops at batch 1 and at batch 8
KAN_SHAPES = ((1024, 160), (2048, 320), (4096, 256), (16384, 128), (65536, 64))  # rows, features
GRID_SAMPLES = 4096  # that an adaptive grid is fitted to


@dataclass(frozen=True)
class Case:
    """One op, layer or model at one size; `axis` names the size that a scaling curve varies."""

    name: str
    suite: str  # one of SUITES
    op: str  # "cross_selective_scan", "selective_scan", "kan_linear", "ss2d", "ema" or a name that create_model takes
    sizes: dict[str, int] = field(hash=False)  # b h w d r n | b d l n | rows in out g s adaptive | b h w c n | b h w
    axis: str = ""
    device: str = ""  # the only one that measures it
    dtype: str = ""  # instead of that of the run

    @property
    def length(self) -> int:
        """Steps of each scan, or rows of a linear layer."""
        if self.op == "kan_linear":
            return self.sizes["rows"]
        return self.sizes["l"] if "l" in self.sizes else self.sizes["h"] * self.sizes["w"]

    @property
    def elements(self) -> int:
        """State updates, b k l d n; bases and activations of a linear layer, rows i 1+g+s; else pixels."""
        if self.op == "kan_linear":
            return self.length * self.sizes["in"] * (1 + self.sizes["g"] + self.sizes["s"])
        if self.op not in ("cross_selective_scan", "selective_scan"):
            return self.sizes["b"] * self.length
        directions = DIRECTIONS if self.op == "cross_selective_scan" else 1
        return directions * self.sizes["b"] * self.length * self.sizes["d"] * self.sizes["n"]

    def limited(self, batch: int, length: int) -> "Case":
        """The same case with at most `batch` images and `length` steps or rows."""
        if self.op == "kan_linear":
            return replace(self, sizes={**self.sizes, "rows": min(self.length, length)})
        sizes = {**self.sizes, "b": min(self.sizes["b"], batch)}
        if "l" in sizes:
            sizes["l"] = min(sizes["l"], length)
        elif self.length > length:
            sizes["h"] = min(sizes["h"], math.isqrt(length))
            sizes["w"] = min(sizes["w"], length // sizes["h"])
        return replace(self, sizes=sizes)


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of the op of a case; maps have the given dtype, parameters float32 at least."""
    draw = torch.Generator().manual_seed(0)
    sizes = case.sizes
    b, d, n = sizes["b"], sizes["d"], sizes["n"]
    exact = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    def uniform(scale: float, *shape: int) -> Tensor:
        return ((2 * torch.rand(*shape, generator=draw) - 1) * scale).to(exact)

    def step_bias(*shape: int) -> Tensor:
        step = torch.exp(torch.rand(*shape, generator=draw) * math.log(100)) * 1e-3
        return (step + torch.log(-torch.expm1(-step))).to(exact)  # the inverse of softplus

    rates = torch.arange(1, n + 1).to(exact)
    if case.op == "selective_scan":
        length = sizes["l"]
        return {
            "u": normal(b, d, length),
            "delta": normal(b, d, length) / 2,
            "A": -rates.repeat(d, 1),
            "B": normal(b, n, length),
            "C": normal(b, n, length),
            "D": torch.ones(d, dtype=exact),
            "z": normal(b, d, length),
            "delta_bias": step_bias(d),
        }
    r = sizes["r"]
    return {
        "x": normal(b, sizes["h"], sizes["w"], d),
        "x_proj_weight": uniform(d**-0.5, DIRECTIONS, r + 2 * n, d),
        "dt_proj_weight": uniform(r**-0.5, DIRECTIONS, d, r),
        "dt_proj_bias": step_bias(DIRECTIONS, d),
        "A_log": rates.log().repeat(DIRECTIONS * d, 1),
        "D": torch.ones(DIRECTIONS * d, dtype=exact),
    }


def make_module(
    case: Case, device: str = "cpu", backend: str = "auto", use_ss2d: bool = True, splines: str = "auto"
) -> tuple[nn.Module, Tensor]:
    """The layer or model of a case with fresh weights, its scans and splines on the given backends, and its input.

    An adaptive grid is fitted to the quantiles of such an input.
    """
    sizes = case.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if case.op == "kan_linear":
            module: nn.Module = KANLinear(sizes["in"], sizes["out"], grid_size=sizes["g"], spline_order=sizes["s"])
            if sizes["adaptive"]:
                module.grid_mode = "adaptive"
                module.update_grid(torch.randn(GRID_SAMPLES, sizes["in"]))
            x = torch.randn(sizes["rows"], sizes["in"])
        elif case.op == "ss2d":
            module = SS2D(sizes["c"], d_state=sizes["n"])
            x = torch.randn(sizes["b"], sizes["h"], sizes["w"], sizes["c"])
        elif case.op == "ema":
            module = EMA(sizes["c"])
            x = torch.randn(sizes["b"], sizes["c"], sizes["h"], sizes["w"])
        else:
            module = create_model(case.op, backend=splines, **({} if use_ss2d else {"use_ss2d": False}))
            x = torch.randn(sizes["b"], 3, sizes["h"], sizes["w"])
    for layer in module.modules():
        if isinstance(layer, SS2D):
            layer.backend = backend
    return module.to(device), x.to(device)


def cross(b: int, h: int, w: int, d: int, n: int, r: int, suite: str = "ops", axis: str = "") -> Case:
    """A case of `cross_selective_scan`."""
    name = "-".join([f"scaling-{axis}" if axis else "cross", f"b{b}", f"d{d}", f"{h}x{w}", f"n{n}", f"r{r}"])
    return Case(name, suite, "cross_selective_scan", {"b": b, "h": h, "w": w, "d": d, "n": n, "r": r}, axis)


def scan(b: int, d: int, length: int, n: int) -> Case:
    """A case of `selective_scan`."""
    return Case(f"scan-b{b}-d{d}-l{length}-n{n}", "ops", "selective_scan", {"b": b, "d": d, "l": length, "n": n})


def block(b: int, h: int, w: int, c: int, n: int) -> Case:
    """A case of the layer SS2D."""
    return Case(f"ss2d-b{b}-c{c}-{h}x{w}-n{n}", "blocks", "ss2d", {"b": b, "h": h, "w": w, "c": c, "n": n})


def model(name: str, b: int = 1, side: int = 256) -> Case:
    """A case of a whole model."""
    return Case(f"model-{name}-b{b}-{side}x{side}", "models", name, {"b": b, "h": side, "w": side})


def kan(rows: int, i: int, o: int, g: int = 5, adaptive: bool = False, device: str = "", dtype: str = "") -> Case:
    """A case of KANLinear with cubic splines."""
    parts = ["kan", f"{rows}x{i}", str(o), f"g{g}", *(["adaptive"] if adaptive else []), *([dtype] if dtype else [])]
    sizes = {"rows": rows, "in": i, "out": o, "g": g, "s": 3, "adaptive": int(adaptive)}
    return Case("-".join(parts), "kan", "kan_linear", sizes, device=device, dtype=dtype)


def _cases() -> Iterator[Case]:
    # The three levels of a base KMUNet and its neighbours, then the first stage of VMamba with n = 16 and n = 1.
    for b, suite in ((1, "ops"), (8, "ops-b8")):
        yield cross(b, 128, 128, 32, 16, 1, suite)
        yield cross(b, 64, 64, 64, 16, 2, suite)
        yield cross(b, 32, 32, 256, 16, 8, suite)
        yield cross(b, 16, 16, 320, 16, 10, suite)
        yield cross(b, 56, 56, 192, 16, 6, suite)
        yield cross(b, 56, 56, 192, 1, 6, suite)
    yield scan(1, 768, 1024, 16)
    yield scan(1, 1536, 4096, 16)  # the inner width of mamba-130m
    yield block(1, 128, 128, 16, 16)
    yield block(1, 56, 56, 96, 16)
    yield from (model(name) for name in ("km_unet_base", "km_unet_tiny", "km_unet_pp_tiny"))
    yield from (model("km_unet_base", side=side) for side in (512, 1024))
    # From the tokens of a deep level to the pixels of a wide one; the width of the product is 9 times the features.
    for rows, width in KAN_SHAPES:
        yield kan(rows, width, width)
    yield kan(16384, 128, 128, g=32)
    yield kan(16384, 128, 128, adaptive=True)
    yield kan(1048576, 64, 64, device="cuda")
    for rows, width in (*KAN_SHAPES, (1048576, 64)):
        yield kan(rows, width, width, device="cuda", dtype="bfloat16")

    # One size varied at a time, from b1 d64 64x64 n16 r4; pixels vary at the width of a first level, d32.
    for side in (32, 64, 128, 256, 512, 1024):
        yield cross(1, side, side, 32, 16, 1, "scaling", "pixels")
    for d in (16, 32, 64, 128, 256, 512):
        yield cross(1, 64, 64, d, 16, 4, "scaling", "d")
    for n in (1, 2, 4, 8, 16, 32, 64):
        yield cross(1, 64, 64, 64, n, 4, "scaling", "n")
    for b in (1, 2, 4, 8, 16):
        yield cross(b, 64, 64, 64, 16, 4, "scaling", "b")


CASES: tuple[Case, ...] = tuple(_cases())
QUICK: tuple[Case, ...] = (
    cross(1, 16, 16, 320, 16, 10),
    cross(1, 56, 56, 192, 1, 6),
    scan(1, 192, 1024, 16),
    block(1, 32, 32, 16, 16),
    kan(1024, 64, 64),
    kan(1024, 64, 64, adaptive=True),
    model("km_unet_tiny", side=128),
)
