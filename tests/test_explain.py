"""What a model sees: gradients against closed forms, and scans as matrices against one scan per position."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers import Array, assert_close, largest, pixel_order, says, scan_oracle, softplus, to_array
from kan_mamba_layers import EMA, SS2D, SS3D, KMUNetPP, Mamba, effective_receptive_field, scan_attention, walks
from kan_mamba_layers.compat.modules import Mamba as OriginalMamba

BACKEND = "reference"  # which has nothing to compile


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def captured(layer: nn.Module, parts: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """The first input and the output of some parts of a layer."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({f"{name} in": inputs[0], name: output})

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    with torch.no_grad():
        layer(x)
    for hook in hooks:
        hook.remove()
    return found


def columns(v: Array, projection: Array, dt: Array, bias: Array, A_log: Array, D: Array) -> Array:  # v: l d -> d t s
    """The outputs at all times of a scan of one at each time alone, with the coefficients that it makes of ``v``."""
    (length, d), n, r = v.shape, A_log.shape[1], dt.shape[1]
    low, B, C = np.split(v @ projection.T, [r, r + n], -1)
    step = softplus(low @ dt.T + bias)  # l d
    ones = np.broadcast_to(np.eye(length)[:, None], (length, d, length))
    step, B, C = (np.broadcast_to(x.T[None], (length, *x.T.shape)) for x in (step, B, C))
    return scan_oracle(ones, step, -np.exp(A_log), B, C, D)[0].transpose(1, 2, 0)


def directions(layer: SS2D, u: Tensor) -> Array:  # d h w -> k d l l
    """The same for the pixels of an image, in the order of the image."""
    p = {name: to_array(value) for name, value in layer.state_dict().items()}
    d, height, width = u.shape
    matrices = np.zeros((4, d, height * width, height * width))
    for k, found in enumerate(matrices):
        order, own = pixel_order(k, height, width), slice(k * d, (k + 1) * d)
        dynamics = (p["dt_projs_weight"][k], p["dt_projs_bias"][k], p["A_logs"][own], p["Ds"][own])
        expected = columns(np.stack([to_array(u[:, i, j]) for i, j in order]), p["x_proj_weight"][k], *dynamics)
        places = [i * width + j for i, j in order]
        found[np.ix_(range(d), places, places)] = expected
    return matrices


class TestScanAttention:
    @pytest.mark.parametrize(("height", "width"), [(1, 6), (5, 1), (2, 3)])
    def test_ss2d_is_one_scan_per_pixel(self, height: int, width: int) -> None:
        layer, x = SS2D(3, d_state=2, backend=BACKEND).double(), randn(1, height, width, 3)
        nn.init.normal_(layer.Ds)
        u = F.silu(captured(layer, {"conv": layer.conv2d}, x)["conv"])
        assert_close("matrices", scan_attention(layer, x)[0], directions(layer, u[0]), 1e-12)

    @pytest.mark.parametrize(
        "layer",
        [
            Mamba(3, d_state=2, backend=BACKEND),
            Mamba(3, d_conv=2, bidirectional=True, backend=BACKEND),
            OriginalMamba(3, 2, bimamba_type="v1"),
        ],
        ids=["forwards", "both", "v1"],
    )
    def test_mamba_is_one_scan_per_position(self, layer: Mamba) -> None:
        layer, x = copy.deepcopy(layer).double(), randn(1, 7, 3)
        shared = isinstance(layer, OriginalMamba)  # the directions of "v1" share a convolution
        for p in layer.parameters():
            nn.init.normal_(p)
        p = {name: to_array(value) for name, value in layer.state_dict().items()}
        u = to_array(layer.in_proj(x))[0, :, : layer.d_inner]
        found = to_array(scan_attention(layer, x))
        assert found.shape == (1, 1 + layer.bidirectional, layer.d_inner, 7, 7)
        for k in range(found.shape[1]):
            s = "_b" if k and not shared else ""
            flip = slice(None, None, -1 if k else 1)
            v = u if shared else u[flip]
            taps = p[f"conv1d{s}.weight"][:, 0]
            v = np.concatenate([np.zeros((taps.shape[1] - 1, v.shape[1])), v])
            v = np.stack([(taps.T * v[t : t + taps.shape[1]]).sum(0) for t in range(7)]) + p[f"conv1d{s}.bias"]
            v = v / (1 + np.exp(-v))
            v = v[flip] if shared else v
            dt = (p[f"dt_proj{s}.weight"], p[f"dt_proj{s}.bias"])
            expected = columns(v, p[f"x_proj{s}.weight"], *dt, p["A_b_log" if k else "A_log"], p[f"D{s}"])
            assert_close(f"direction {k}", found[0, k][:, flip][:, :, flip], expected, 1e-12)
        assert largest(np.triu(found[0, 0], 1)) == 0
        assert np.abs(found.sum(1)).min() > 0 or not layer.bidirectional

    @pytest.mark.parametrize(
        ("options", "grid"),
        [
            ({}, (1, 9)),
            ({}, (7, 5)),
            ({"walks": walks.hilbert}, (3, 5)),
            ({"walks": lambda h, w: walks.snake(h, w) + walks.diagonal(h, w)}, (3, 5)),
            ({}, (2, 4, 3)),
        ],
    )
    def test_matrices_times_the_input_are_the_output(self, options: dict, grid: tuple[int, ...]) -> None:
        kind = SS2D if len(grid) == 2 else SS3D
        layer, x = kind(4, expand=3, backend=BACKEND, **options).double(), randn(2, *grid, 4)
        parts = captured(layer, {"conv": getattr(layer, f"conv{len(grid)}d"), "norm": layer.out_norm}, x)
        M = scan_attention(layer, x)
        assert M.shape[1] == layer.directions
        y = torch.einsum("bkdts,bds->btd", M, F.silu(parts["conv"]).flatten(2))
        assert_close("y", y.unflatten(1, grid), parts["norm in"], 1e-13)

    def test_rows(self) -> None:
        for layer, x, positions, rows in (
            (SS2D(4, backend=BACKEND), torch.randn(1, 5, 7, 4), [(4, 0), (1, 6)], [28, 13]),
            (SS3D(4, backend=BACKEND), torch.randn(1, 2, 3, 4, 4), [(1, 0, 2), (0, 2, 0)], [14, 8]),
            (Mamba(4, backend=BACKEND), torch.randn(1, 9, 4), [8, 0], [8, 0]),
        ):
            assert torch.equal(scan_attention(layer, x, positions), scan_attention(layer, x)[..., rows, :])

    def test_far_decays_are_exact_in_single_precision(self) -> None:
        layer, x = Mamba(4, backend=BACKEND), torch.randn(1, 1000, 4)
        single = scan_attention(layer, x, [999])
        assert single.dtype == torch.float32
        assert_close("last row", single, scan_attention(layer.double(), x.double(), [999]), 1e-5)
        half = scan_attention(layer.bfloat16(), x.bfloat16(), [999])
        assert half.dtype == torch.float32
        assert_close("in half precision", half, single, 0.03)

    def test_autocast_changes_the_layer_alone(self) -> None:
        layer, x = SS2D(4, d_state=2, backend=BACKEND), torch.randn(1, 2, 5, 4)
        with torch.autocast("cpu", torch.bfloat16):
            found = scan_attention(layer, x)
            u = F.silu(captured(layer, {"conv": layer.conv2d}, x)["conv"])
        assert u.dtype == torch.bfloat16
        assert_close("matrices", found[0], directions(layer, u[0]), 1e-6)

    @pytest.mark.parametrize(
        ("layer", "name", "shape"), [(SS2D(4), "x_proj_weight", (1, 2, 3, 4)), (Mamba(4), "A_log", (1, 5, 4))]
    )
    def test_pruned_weights_are_those_of_the_next_pass(self, layer: nn.Module, name: str, shape: tuple) -> None:
        layer, plain, x = copy.deepcopy(layer), copy.deepcopy(layer), torch.randn(shape)
        prune.l1_unstructured(layer, name, 0.5)
        with torch.no_grad():
            changed = getattr(layer, f"{name}_orig").normal_()
            getattr(plain, name).copy_(changed * getattr(layer, f"{name}_mask"))
        layer.compile(backend=lambda *_: pytest.fail("a graph would hide the scan"))
        assert_close("matrices", scan_attention(layer, x), scan_attention(plain, x), 1e-6)

    def test_nothing_is_left_behind(self) -> None:
        layer, x = SS2D(4, dropout=0.5, backend=BACKEND), torch.randn(1, 5, 7, 4, requires_grad=True)
        state = torch.get_rng_state()
        assert not scan_attention(layer, x).requires_grad
        assert layer.training and layer.dropout.training and torch.equal(torch.get_rng_state(), state)
        assert all(p.requires_grad and p.grad is None for p in layer.parameters())


class Sum(nn.Conv2d):
    """A convolution with ones for weights."""

    def __init__(self, channels: int, size: int, **options: int) -> None:
        super().__init__(channels, channels, size, bias=False, **options)
        nn.init.ones_(self.weight)


class Last(nn.Module):
    """A module of images b c h w, for images b h w c."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Maps(nn.Module):
    """Several maps of an image."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        maps = {"out": F.avg_pool2d(x, 3, 1, 1), "aux": x}
        return maps if self.kind is dict else self.kind(maps.values())


class TestEffectiveReceptiveField:
    @pytest.mark.parametrize("position", [None, (0, 0), (5, 7)])
    def test_of_a_convolution_is_its_kernel(self, position: tuple[int, int] | None) -> None:
        conv = nn.Conv2d(3, 4, (5, 3), padding=(2, 1)).double()
        found = to_array(effective_receptive_field(conv, randn(2, 3, 6, 8), position))
        kernel = np.abs(to_array(conv.weight).sum(0)).mean(0)
        expected, (row, column) = np.zeros((6, 8)), position or (3, 4)
        for i, j in product(range(5), range(3)):
            if 0 <= row + i - 2 < 6 and 0 <= column + j - 1 < 8:
                expected[row + i - 2, column + j - 1] = kernel[i, j]
        assert_close("field", found, expected / expected.max(), 1e-13)

    def test_of_ones_is_a_binomial(self) -> None:
        """Four convolutions of 3x3 reach four pixels, with the weights of a sum of four dice."""
        found = effective_receptive_field(
            nn.Sequential(*(Sum(2, 3, padding=1) for _ in range(4))), torch.randn(1, 2, 15, 13)
        )
        line = np.ones(1)
        for _ in range(4):
            line = np.convolve(line, np.ones(3))
        expected = np.zeros((15, 13))
        expected[3:12, 2:11] = np.outer(line, line) / line.max() ** 2
        assert_close("field", found, expected, 1e-6)

    def test_of_channels_last(self) -> None:
        conv, images = nn.Conv2d(3, 4, (5, 3), padding=(2, 1)).double(), randn(2, 3, 6, 8)
        expected = effective_receptive_field(conv, images)
        found = effective_receptive_field(Last(conv), images.permute(0, 2, 3, 1), channels_last=True)
        assert_close("field", found, expected, 1e-13)

    @pytest.mark.parametrize(("position", "rows", "columns"), [(None, (6, 9), (3, 6)), ((0, 1), (0, 3), (3, 6))])
    def test_of_a_map_that_is_smaller(self, position: tuple[int, int] | None, rows: tuple, columns: tuple) -> None:
        found = effective_receptive_field(Sum(1, 3, stride=3), torch.randn(1, 1, 12, 9), position)
        assert (found[slice(*rows), slice(*columns)] == 1).all() and found.sum() == 9

    def test_of_the_scan_is_the_image(self) -> None:
        layer, images = SS2D(4, backend=BACKEND), torch.randn(2, 7, 9, 4)
        assert effective_receptive_field(layer, images).min() > 0
        moved = nn.Sequential(layer)
        assert torch.equal(
            effective_receptive_field(moved, images, channels_last=True), effective_receptive_field(layer, images)
        )
        nn.init.zeros_(layer.out_proj.weight)
        assert largest(effective_receptive_field(layer, images)) == 0

    def test_of_a_model_is_its_gradient(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 3, 2))
        model(torch.randn(9, 3, 9, 9))
        images = torch.randn(2, 3, 17, 20)
        found = effective_receptive_field(model, images, (2, 1))
        x = images.requires_grad_()
        model.eval()(x)[:, :, 2, 1].sum().backward()
        assert x.grad is not None
        expected = np.abs(to_array(x.grad)).mean((0, 1))
        assert_close("field", found, expected / expected.max(), 1e-5)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_nothing_is_left_behind(self, context: Callable) -> None:
        convolutions, norm = (nn.Conv2d(2, 4, 3), nn.Conv2d(4, 1, 3)), nn.BatchNorm2d(4).eval()
        model = nn.Sequential(nn.ReLU(inplace=True), convolutions[0], norm, nn.Dropout(0.9), convolutions[1])
        convolutions[0].weight.requires_grad_(False)
        convolutions[1].weight.grad = torch.ones_like(convolutions[1].weight)
        state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
        with context():
            images = torch.ones(2, 2, 9, 9)
            found = effective_receptive_field(model, images)
        assert found.max() == 1 and not found.requires_grad and images.grad is None
        assert [m for m in model.modules() if not m.training] == [norm]
        assert convolutions[1].weight.grad.eq(1).all() and norm.weight.grad is None
        assert not convolutions[0].weight.requires_grad and norm.weight.requires_grad
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)

    def test_one_of_several_maps(self) -> None:
        images = torch.randn(1, 1, 5, 5)
        for kind, output, count in ((dict, "out", 9), (dict, "aux", 1), (list, 0, 9), (tuple, -1, 1)):
            assert (effective_receptive_field(Maps(kind), images, output=output) > 0).sum() == count
        deep = KMUNetPP(widths=(8, 8), ema_factor=2, d_state=1, deep_supervision=True, backend=BACKEND)
        assert effective_receptive_field(deep, torch.randn(1, 3, 32, 32)).max() == 1


class Labels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1, keepdim=True)


class Fraction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x


def field(
    model: object = nn.Identity(), images: object = torch.zeros(1, 3, 4, 5), *rest: object, **options: object
) -> object:
    return effective_receptive_field(model, images, *rest, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: field(F.relu), TypeError, ("model must", "Module", "function")),
        (lambda: field(images=torch.zeros(3, 4, 5)), ValueError, ("images must", "b, c, h, w", r"\(3, 4, 5\)")),
        (lambda: field(images=torch.zeros(0, 3, 4, 5)), ValueError, ("images must", "at least one", r"\(0, 3, 4, 5\)")),
        (lambda: field(images=torch.zeros(1, 3, 0, 5)), ValueError, ("images must", "pixel", r"\(1, 3, 0, 5\)")),
        (lambda: field(images=torch.zeros(1, 3, 4, 5).byte()), TypeError, ("images must", "uint8", "float")),
        (lambda: field(SS2D(3)), ValueError, ("must", "b, h, w, d_model")),
        (
            lambda: field(SS2D(3), torch.zeros(4, 5, 3)),
            ValueError,
            ("images must", "b, h, w, c", r"\(4, 5, 3\)"),
        ),
        (lambda: field(SS3D(3), torch.zeros(1, 2, 4, 5, 3)), TypeError, ("model must", "SS3D", "volumes", "pass")),
        (lambda: field(position=(4, 0)), ValueError, ("position must", "h = 4", r"\(4, 0\)")),
        (lambda: field(position=(0, 5)), ValueError, ("position must", "w = 5", r"\(0, 5\)")),
        (lambda: field(position=(-1, 0)), ValueError, ("position must", "at least 0", "-1")),
        (lambda: field(position=(1.5, 0)), TypeError, ("position must", "integer", "1.5")),
        (lambda: field(position=3), TypeError, ("position must", "pair", "3", r"\(0, 0\)")),
        (lambda: field(Maps(list)), TypeError, ("model must", "a map", "list of 2", "output")),
        (lambda: field(Maps(dict)), TypeError, ("model must", "'out', 'aux'", "output")),
        (lambda: field(Maps(dict), output="in"), TypeError, ("output='in'", "'out', 'aux'")),
        (lambda: field(Maps(tuple), output=2), TypeError, ("output=2", "tuple of 2")),
        (lambda: field(output=0), TypeError, ("output=0", "one")),
        (lambda: field(nn.Flatten()), TypeError, ("model must", "map", r"\(1, 60\)")),
        (lambda: field(Labels()), ValueError, ("gradient", "model", "images")),
        (lambda: field(Fraction()), ValueError, ("gradient", "finite", "NaN")),
        (lambda: scan_attention(EMA(8), torch.zeros(1, 8, 4, 4)), TypeError, ("layer must", "EMA", "modules")),
        (
            lambda: scan_attention(SS2D(3), torch.zeros(1, 3, 4, 5)),
            ValueError,
            ("x must", "d_model", r"\(1, 3, 4, 5\)"),
        ),
        (
            lambda: scan_attention(SS2D(3), torch.zeros(1, 0, 4, 3)),
            ValueError,
            ("x must", "pixel", r"\(1, 0, 4, 3\)"),
        ),
        (
            lambda: scan_attention(Mamba(3), torch.zeros(1, 0, 3)),
            ValueError,
            ("x must", "position", r"\(1, 0, 3\)"),
        ),
        (
            lambda: scan_attention(Mamba(3), torch.zeros(1, 4, 3), 2),
            TypeError,
            ("positions must", "2", r"\[0\]"),
        ),
        (
            lambda: scan_attention(Mamba(3), torch.zeros(1, 4, 3), []),
            ValueError,
            ("positions must", "at least one"),
        ),
        (
            lambda: scan_attention(Mamba(3), torch.zeros(1, 4, 3), [4]),
            ValueError,
            (r"positions\[0\] must", "l = 4"),
        ),
        (
            lambda: scan_attention(SS2D(3), torch.zeros(1, 4, 4, 3), [(0, 0), 1]),
            TypeError,
            (r"positions\[1\]", "pair"),
        ),
        (
            lambda: scan_attention(SS2D(8), torch.zeros(2, 99, 99, 8)),
            ValueError,
            ("9801 positions", "at most 106 pos"),
        ),
        (
            lambda: scan_attention(Mamba(8, bidirectional=True), torch.zeros(1, 3000, 8)),
            ValueError,
            ("3000 positions", f"at most {2**27 // (2 * 16 * 3000)} pos"),
        ),
        (
            lambda: scan_attention(SS3D(3), torch.zeros(1, 2, 4, 4, 3), [(0, 0)]),
            TypeError,
            (r"positions\[0\]", "slice, row, column", r"\(0, 0, 0\)"),
        ),
        (
            lambda: scan_attention(SS3D(3), torch.zeros(1, 2, 4, 4, 3), [(2, 0, 0)]),
            ValueError,
            (r"positions\[0\] must", "d = 2"),
        ),
        (
            lambda: scan_attention(Mamba(8), torch.zeros(1, 1, 8).expand(1, 9_000_000, 8), [0]),
            ValueError,
            ("fewer",),
        ),
        (
            lambda: scan_attention(OriginalMamba(3, bimamba_type="v3", nslices=2), torch.zeros(1, 4, 3)),
            TypeError,
            ("layer makes 3 scans", "one or two"),
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error, match=says(*parts)):
        call()
