"""SS2D and SS3D along any walks and under masks: their formula pixel by pixel, symmetries, padding, and what wraps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from shutil import which
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import assert_close, largest
from kan_mamba_layers import SS2D, SS3D, VSSBlock, selective_scan, walks


def inwards(h: int, w: int) -> walks.Walks:
    """From the border to the centre."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    ring = torch.stack([rows, columns, h - 1 - rows, w - 1 - columns]).amin(0)
    return walks.from_order(ring.flatten().argsort(stable=True), (h, w))


WINDOWS, STRIDED = partial(walks.windows, size=2), partial(walks.strided, step=2)
IMAGES: dict[str, Any] = {
    "default": None,
    "snake": walks.snake,
    "diagonal": walks.diagonal,
    "windows": WINDOWS,
    "strided": STRIDED,
    "hilbert": walks.hilbert,
    "both": lambda h, w: walks.cross(h, w) + walks.diagonal(h, w),
    "own": inwards,
}
LAYERS: dict[str, tuple[Callable[..., SS2D | SS3D], tuple[int, ...]]] = {
    **{name: (partial(SS2D, walks=of), (3, 5)) for name, of in IMAGES.items()},
    "volume": (SS3D, (2, 3, 2)),
    "along the depth": (partial(SS3D, walks=lambda d, h, w: walks.from_order(range(d * h * w), (d, h, w))), (3, 2, 2)),
}


def shaken(layer: SS2D | SS3D) -> Any:
    """In float64, with weights in which no two directions, channels or places are alike."""
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rebuilt(layer: SS2D | SS3D, x: Tensor, mask: Tensor) -> Tensor:  # b *grid c
    """The layer from its weights alone, one image, direction and position after the other."""
    state = dict(layer.named_parameters())
    conv = F.conv2d if x.ndim == 4 else F.conv3d
    name, counts = ("conv2d", "conv3d")[x.ndim - 4], mask[..., None].to(x)
    d, n, r = layer.d_inner, layer.A_logs.shape[1], layer.dt_rank
    u, *z = (x @ state["in_proj.weight"].T + state.get("in_proj.bias", 0.0)).split(d, -1)
    size = state[f"{name}.weight"].shape[-1]
    v = conv((u * counts).movedim(-1, 1), state[f"{name}.weight"], state.get(f"{name}.bias"), 1, size // 2, 1, d)
    v = F.silu(v.movedim(1, -1))
    of = walks.cross if layer.walks is None else layer.walks
    outputs = []
    for image, counting in zip(v.flatten(1, -2), mask.flatten(1), strict=True):  # l d, l
        y = torch.zeros_like(image)
        for k, order in enumerate(of(*x.shape[1:-1]).orders):
            A, h = -state["A_logs"].unflatten(0, (-1, d))[k].exp(), image.new_zeros(d, n)
            for p in order[counting[order]]:
                low, B, C = (state["x_proj_weight"][k] @ image[p]).split([r, n, n])
                step = F.softplus(state["dt_projs_weight"][k] @ low + state["dt_projs_bias"][k])
                h = torch.exp(step[:, None] * A) * h + (step * image[p])[:, None] * B
                y = y.index_add(0, p[None], (h @ C + state["Ds"].view(-1, d)[k] * image[p])[None])
        outputs.append(y)
    y = torch.stack(outputs).view_as(v)
    y = F.layer_norm(y, (d,), state["out_norm.weight"], state["out_norm.bias"])
    y = y * F.silu(z[0]) if z else y
    return (y @ state["out_proj.weight"].T + state.get("out_proj.bias", 0.0)) * counts


class TestFormula:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_output_and_every_gradient(self, name: str, masked: bool) -> None:
        """Where the mask is False, x is not finite."""
        make, grid = LAYERS[name]
        layer = shaken(make(3, d_state=2, bias=masked, gate=name != "snake"))
        x, mask = randn(2, *grid, 3), torch.ones(2, *grid, dtype=torch.bool)
        given = x
        if masked:
            mask = torch.rand(2, *grid) > 0.3
            given = torch.where(mask[..., None], x, torch.tensor([torch.nan, torch.inf, 1e300]))
        names, parameters = zip(*layer.named_parameters(), strict=True)
        found = layer(given.requires_grad_(), mask if masked else None)
        expected = rebuilt(layer, x.requires_grad_(), mask)
        assert_close("out", found, expected, 1e-11)
        weight = torch.randn_like(found)
        grads = torch.autograd.grad((found * weight).sum(), [given, *parameters])
        wanted = torch.autograd.grad((expected * weight).sum(), [x, *parameters])
        for parameter, grad, want in zip(("x", *names), grads, wanted, strict=True):
            assert largest(grad) > 0, f"{parameter} gets a gradient"
            assert_close(f"d{parameter}", grad, want, 1e-11)
        assert not found[~mask].any() and not grads[0][~mask].any()

    def test_a_volume_is_six_sequences(self) -> None:
        layer, x = shaken(SS3D(3, d_state=2, gate=False)), randn(2, 3, 4, 5, 3)
        u = F.silu(layer.conv3d(layer.in_proj(x).movedim(-1, 1)))  # b c d h w
        total = torch.zeros_like(u)
        for k in range(6):
            axes = ((2, 3, 4), (3, 4, 2), (4, 2, 3))[k % 3]
            turned = u.permute(0, 1, *axes)
            line = turned.flatten(2) if k < 3 else turned.flatten(2).flip(-1)  # b c l
            low, B, C = (layer.x_proj_weight[k] @ line).split([1, 2, 2], 1)
            own = slice(k * 6, k * 6 + 6)
            y = selective_scan(
                line,
                layer.dt_projs_weight[k] @ low,
                -layer.A_logs[own].exp(),
                B,
                C,
                layer.Ds[own],
                delta_bias=layer.dt_projs_bias[k],
                delta_softplus=True,
            )
            y = (y if k < 3 else y.flip(-1)).view_as(turned)
            total += y.permute(0, 1, *(2 + axes.index(axis) for axis in (2, 3, 4)))
        expected = layer.out_proj(layer.out_norm(total.movedim(1, -1)))
        assert_close("out", layer(x), expected, 1e-12)

    def test_a_volume_of_one_slice_is_an_image(self) -> None:
        """Two of its orders are then the rows, of which one is made silent here, and one is the columns."""
        image, volume, x = shaken(SS2D(3, d_state=2)), shaken(SS3D(3, d_state=2)), randn(2, 4, 5, 3)
        places = [0, 2, 3, 5]  # rows, columns, and both reversed
        state = volume.state_dict()
        for name, value in image.state_dict().items():
            if name == "conv2d.weight":
                state["conv3d.weight"][:, :, 1] = value
            elif name in ("A_logs", "Ds", "x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
                state[name].unflatten(0, (6, -1))[places] = value.unflatten(0, (4, -1))
            else:
                state[name.replace("conv2d", "conv3d")].copy_(value)
        state["x_proj_weight"][[1, 4], -2:] = 0  # C
        state["Ds"].view(6, -1)[[1, 4]] = 0
        assert_close("out", volume(x[:, None])[:, 0], image(x), 1e-12)


class TestCross:
    def test_it_is_the_default_to_the_bit(self) -> None:
        torch.manual_seed(1)
        default, x = SS2D(4), torch.randn(2, 5, 7, 4)
        torch.manual_seed(1)
        cross, same = SS2D(4, walks=walks.cross), torch.randn(2, 5, 7, 4)
        assert torch.equal(x, same)
        for layer in (default, cross):
            layer(x).square().sum().backward()
        assert torch.equal(default(x), cross(x))
        for (name, p), q in zip(default.named_parameters(), cross.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize(
    ("name", "turn", "places"),
    [
        *((name, lambda x, i, j: x.flip(i, j), [2, 3, 0, 1]) for name in ("default", "snake", "diagonal")),
        *((name, torch.transpose, [1, 0, 3, 2]) for name in ("default", "snake", "windows", "strided", "hilbert")),
    ],
)
def test_a_turned_image(name: str, turn: Callable[[Tensor, int, int], Tensor], places: list[int]) -> None:
    """The directions change places, and the kernel turns with the image. The sizes are odd, as a snake's must be."""
    layer, x = shaken(SS2D(3, d_state=2, walks=IMAGES[name])), randn(2, 5, 7, 3)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.conv2d.weight.copy_(turn(layer.conv2d.weight, 2, 3))
        for key in ("A_logs", "Ds", "x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            weight = getattr(layer, key)
            getattr(other, key).copy_(weight.unflatten(0, (4, -1))[places].view_as(weight))
    assert_close("out", other(turn(x, 1, 2)), turn(layer(x), 1, 2), 1e-12)


class TestMask:
    @pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("hilbert", "own", "along the depth")])
    def test_padded_images_get_what_each_gets_alone(self, name: str) -> None:
        make, grid = LAYERS[name]
        layer = shaken(make(3, d_state=2, d_conv=5, bias=True))
        alone = [randn(1, *(size - less for size in grid), 3) for less in (0, 1)]
        batch, mask = torch.full((2, *grid, 3), torch.nan, dtype=torch.float64), torch.zeros(2, *grid).bool()
        for i, x in enumerate(alone):
            place = (i, *(slice(size) for size in x.shape[1:-1]))
            batch[place], mask[place] = x[0], True
        out, expected = layer(batch, mask), [layer(x) for x in alone]
        assert_close("out", out[mask], torch.cat([y.flatten(0, -2) for y in expected]), 1e-12)
        parameters = list(layer.parameters())
        grads = torch.autograd.grad(out.square().sum(), parameters)
        wanted = torch.autograd.grad(sum(y.square().sum() for y in expected), parameters)
        for grad, want in zip(grads, wanted, strict=True):
            assert_close("gradient", grad, want, 1e-11)

    def test_all_and_nothing(self) -> None:
        layer, x = SS2D(4, d_state=2, walks=walks.snake), torch.randn(2, 3, 5, 4)
        assert_close("all", layer(x, torch.ones(2, 3, 5).bool()), layer(x), 1e-6)
        out = layer(x / 0, torch.zeros(2, 3, 5).bool())
        out.sum().backward()
        assert not out.any() and all(not p.grad.any() for p in layer.parameters())


class TestSizesAndDtypes:
    @pytest.mark.parametrize("name", LAYERS)
    def test_any_size(self, name: str) -> None:
        make, grid = LAYERS[name]
        layer = make(4, d_state=2)
        for sizes in [(1,) * len(grid), (1,) * (len(grid) - 1) + (9,), (9,) + (1,) * (len(grid) - 1), (6,) * len(grid)]:
            for batch in (0, 1, 3):
                out = layer(torch.randn(batch, *sizes, 4))
                assert out.shape == (batch, *sizes, 4) and out.isfinite().all()

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("name", ["snake", "volume"])
    def test_autocast(self, name: str, masked: bool) -> None:
        make, grid = LAYERS[name]
        layer, x = make(8, d_state=4), torch.randn(2, *grid, 8)
        mask = torch.rand(2, *grid) > 0.3 if masked else None
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, mask)
            out.float().square().sum().backward()
        assert_close("out", out, layer(x, mask), 0.03)
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize("autocast", [False, True])
    def test_volumes_in_half_precision_are_convolved_in_float32(self, autocast: bool) -> None:
        """In bfloat16 PyTorch 2.13 gets the gradient of the weight wrong here, and now and then NaN."""
        layer, u = SS3D(8, d_state=1), torch.randn(2, 16, 2, 3, 2)
        conv = layer.conv3d if autocast else layer.bfloat16().conv3d
        u = (u if autocast else u.bfloat16()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = conv(u)
            out.float().square().sum().backward()
        weight, bias, x = (p.detach().float().requires_grad_() for p in (conv.weight, conv.bias, u))
        expected = F.conv3d(x, weight, bias, padding=1, groups=16)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16())
        expected.backward(2 * out.detach().float())
        for name, got, want in (("weight", conv.weight, weight), ("bias", conv.bias, bias), ("u", u, x)):
            assert_close(name, got.grad.float(), want.grad, 1e-5 if autocast else 0.01)


class TestCopies:
    @pytest.mark.parametrize("make", [partial(SS2D, walks=WINDOWS), SS3D], ids=["SS2D", "SS3D"])
    def test_round_trips(self, make: Callable[..., SS2D | SS3D]) -> None:
        layer = make(4, d_state=2)
        x = torch.randn(1, *(4, 5, 3)[: 2 + isinstance(layer, SS3D)], 4)
        other = make(4, d_state=2)
        other.load_state_dict(layer.state_dict(), strict=True)
        for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))
            marked = {name for name, p in twin.named_parameters() if getattr(p, "_no_weight_decay", False)}
            assert marked == layer.no_weight_decay() == {"A_logs", "Ds", "dt_projs_bias"}

    def test_keys_and_shapes(self) -> None:
        image, volume = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (SS2D(4), SS3D(4)))
        assert volume.pop("conv3d.weight") == (*image.pop("conv2d.weight"), 3)
        assert volume.pop("conv3d.bias") == image.pop("conv2d.bias")
        ours = {k: (6 * v[0] // 4, *v[1:]) if ("_" in k and "." not in k) or k == "Ds" else v for k, v in image.items()}
        assert volume == ours
        assert SS2D(4, walks=IMAGES["both"]).Ds.shape == (8 * 8,) and SS2D(4, walks=inwards).Ds.shape == (8,)

    def test_walks_are_named(self) -> None:
        for layer, text in (
            (SS2D(4, walks=walks.snake), "walks=walks.snake,"),
            (SS2D(4, walks=WINDOWS), "walks=partial(walks.windows, size=2),"),
            (SS2D(4, walks=inwards), "walks=inwards,"),
            (SS3D(4), "walks=walks.volume,"),
        ):
            assert text in repr(layer)
        assert "walks" not in repr(SS2D(4))

    def test_orders_are_made_where_a_model_has_no_values(self) -> None:
        with torch.device("meta"):
            layer = SS2D(4, walks=inwards)
        assert layer.Ds.is_meta and layer.directions == 1

    def test_the_block_passes_them_on(self) -> None:
        block, x = VSSBlock(4, walks=IMAGES["both"]), torch.randn(1, 3, 4, 4)
        assert block.op.directions == 8 and block(x).shape == x.shape


class TestGraphs:
    def test_one_compiled_graph_serves_every_size(self) -> None:
        pytest.importorskip("numba", reason="plain backends make a graph of each size")
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        layer = SS2D(4, d_state=2, walks=WINDOWS)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        with torch.no_grad():
            for b, h, w in [(2, 5, 8), (3, 9, 7), (4, 12, 3)]:
                x, mask = torch.randn(b, h, w, 4), torch.rand(b, h, w) > 0.3
                assert_close(f"out at {h}, {w}", compiled(x, mask), layer(x, mask), 1e-6)
        assert counter.frame_count <= 2, "as without walks"

    def test_the_chunked_scan_makes_a_graph_of_each_size(self) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        layer = SS2D(4, d_state=2, backend="chunked")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        sizes = [(2, 2, 3), (3, 4, 2), (1, 2, 2), (2, 2, 3)]
        for size in sizes:
            x = torch.randn(*size, 4)
            out, expected = compiled(x), layer(x)
            assert_close(f"out at {size}", out, expected, 1e-6)
            grads, wanted = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (out, expected))
            for grad, want in zip(grads, wanted, strict=True):
                assert_close("gradient", grad, want, 1e-5)
        assert counter.frame_count <= len(set(sizes))

    @pytest.mark.nightly
    @pytest.mark.skipif(not (which("c++") or which("g++") or which("clang++")), reason="no C++ compiler")
    @pytest.mark.parametrize("gate", [False, True])
    @pytest.mark.parametrize("kind", [SS2D, SS3D])
    def test_inductor_with_a_mask(self, kind: type[SS2D | SS3D], gate: bool) -> None:
        torch._dynamo.reset()
        layer, grid = kind(4, d_state=2, gate=gate), (3, 4, 5)[: 2 + (kind is SS3D)]
        x, mask = torch.randn(2, *grid, 4), torch.rand(2, *grid) > 0.3
        out, expected = torch.compile(layer, fullgraph=True, dynamic=True)(x, mask), layer(x, mask)
        assert_close("out", out, expected, 1e-6)
        grads, wanted = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (out, expected))
        for grad, want in zip(grads, wanted, strict=True):
            assert_close("gradient", grad, want, 1e-5)

    def test_an_exported_volume_of_any_size(self) -> None:
        layer, dynamic = SS3D(4, d_state=2).eval(), torch.export.Dim.DYNAMIC
        shapes = ({0: dynamic, 1: dynamic, 2: dynamic, 3: dynamic},)
        module = torch.export.export(layer, (torch.randn(2, 3, 4, 5, 4),), dynamic_shapes=shapes).module()
        for grid in [(3, 4, 5), (2, 7, 3), (5, 6, 6)]:
            x = torch.randn(3, *grid, 4)
            assert_close(f"out at {grid}", module(x), layer(x), 1e-6)
