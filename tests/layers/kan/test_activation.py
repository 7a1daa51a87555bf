"""The activation of a KAN layer: what it may be, what it may do, and what it must return."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kan_layers import BACKENDS
from torch import Tensor, nn

from helpers import assert_close, says, to_array
from kan_mamba_layers import KANConv2d, KANLinear

# What the constructor takes, and the function that is meant, in NumPy.
GOOD: list[tuple[Any, Callable[[np.ndarray], np.ndarray]]] = [
    (torch.tanh, np.tanh),
    (F.relu, lambda x: np.maximum(x, 0)),
    (nn.Tanh, np.tanh),
    (nn.Identity, lambda x: x),
    (lambda: nn.PReLU(init=0.5), lambda x: np.where(x > 0, x, 0.5 * x)),
    (lambda x: x * x, np.square),
    (lambda x: x.sin_(), np.sin),
    (lambda x: x.double().cos(), np.cos),
    (lambda x: x.new_zeros(x.shape[-1]), np.zeros_like),
    (functools.partial(nn.ReLU, inplace=True), lambda x: np.maximum(x, 0)),
    (functools.partial(F.leaky_relu, negative_slope=0.5), lambda x: np.where(x > 0, x, 0.5 * x)),
]


def base_only(layer: Any) -> Any:
    with torch.no_grad():
        layer.spline_weight.zero_()
        layer.base_weight.fill_(1.0)
    return layer


@pytest.mark.parametrize(("given", "function"), GOOD)
class TestWhatItMayBe:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_in_a_map(self, given: Any, function: Callable[[np.ndarray], np.ndarray], backend: str) -> None:
        layer, x = base_only(KANLinear(5, 2, base_activation=given, backend=backend)), torch.randn(7, 5)
        kept = x.clone()
        assert_close("out", layer(x), function(to_array(x)).sum(1, keepdims=True).repeat(2, 1), 1e-5)
        assert torch.equal(x, kept)

    def test_in_a_convolution_and_on_edges(self, given: Any, function: Callable[[np.ndarray], np.ndarray]) -> None:
        layer, image = base_only(KANConv2d(2, 1, 1, base_activation=given)), torch.randn(1, 2, 4, 3)
        points = torch.linspace(-1, 1, 2001)
        kept, kept_points = image.clone(), points.clone()
        assert_close("out", layer(image), function(to_array(image)).sum(1, keepdims=True), 1e-5)
        assert_close("edge", layer.edge_function(points, (0, 0, 0, 0)), function(to_array(points)), 1e-5)
        size = np.sqrt(np.mean(function(to_array(points)) ** 2))
        assert_close("size", layer.edge_sizes(), np.full((1, 2, 1, 1), size), 2e-3)
        layer.plot()
        assert torch.equal(image, kept) and torch.equal(points, kept_points)


def test_the_splines_do_not_see_what_it_wrote() -> None:
    inplace = KANConv2d(2, 3, 3, base_activation=functools.partial(nn.ReLU, inplace=True))
    plain = KANConv2d(2, 3, 3, base_activation=nn.ReLU)
    plain.load_state_dict(inplace.state_dict())
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    assert torch.equal(inplace(x), plain(x))
    (grad,), (expected,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (inplace, plain))
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("silu", TypeError, ("base_activation must", "'silu'", "nn.SiLU")),
        (None, TypeError, ("base_activation must", "None")),
        (nn.SiLU(), TypeError, ("base_activation must", "class", r"SiLU\(\)")),
        (dict, TypeError, ("base_activation", "dict", "made")),
        (nn.Threshold, TypeError, ("base_activation", "Threshold", "partial")),
    ],
)
def test_what_it_may_not_be(given: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    for build in (lambda: KANLinear(4, 3, base_activation=given), lambda: KANConv2d(4, 3, 3, base_activation=given)):
        with pytest.raises(error, match=says(*words)):
            build()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (nn.GLU, ValueError, ("elementwise", "GLU", r"\(6, 4\)", r"\(6, 2\)")),
        (lambda x: x[:1], ValueError, ("elementwise", r"\(1, 4\)")),
        (lambda x: x.mean(-1, keepdim=True), ValueError, ("elementwise", r"\(6, 1\)")),
        (lambda x: x[..., None], ValueError, ("elementwise", r"\(6, 4, 1\)")),
        (lambda x: x.to("meta"), ValueError, ("elementwise", "'meta'")),
        (lambda x: x.to_sparse(), ValueError, ("elementwise", "sparse")),
        (lambda x: x > 0, TypeError, ("floating-point", "bool")),
        (lambda x: torch.complex(x, x), TypeError, ("floating-point", "complex")),
        (lambda x: None, TypeError, ("floating-point", "NoneType")),
    ],
)
def test_what_it_may_not_return(given: Any, error: type[Exception], words: tuple[str, ...], backend: str) -> None:
    layer = KANLinear(4, 3, base_activation=given, backend=backend)
    for call in (lambda: layer(torch.randn(6, 4)), lambda: layer.edge_sizes()):
        with pytest.raises(error, match="base_activation must"):
            call()
    with pytest.raises(error, match=says("base_activation must", *words)):
        layer(torch.randn(6, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("built", [True, False])
def test_weights_have_the_dtype_of_the_layer(dtype: torch.dtype, built: bool) -> None:
    for make, x in (
        (KANLinear, torch.randn(5, 4)),
        (functools.partial(KANConv2d, kernel_size=1), torch.randn(4, 3, 2)),
    ):
        layer = make(4, 3, base_activation=nn.PReLU, **({"dtype": dtype} if built else {}))
        layer = layer if built else layer.to(dtype)
        assert layer.base_activation.weight.dtype == dtype
        out = layer(x.to(dtype))
        expected = copy.deepcopy(layer).double()(x.to(dtype).double())
        assert out.dtype == dtype
        assert_close("out", out, expected, max(4 * torch.finfo(dtype).eps, 1e-6))
        out.sum().backward()
        assert layer.base_activation.weight.grad.dtype == dtype
        layer.edge_sizes()


def test_weights_are_on_the_device_of_the_layer() -> None:
    layer = KANLinear(4, 3, base_activation=nn.PReLU, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_fire_for_silu_too(backend: str) -> None:
    layer, x, seen = KANLinear(4, 3, backend=backend), torch.randn(5, 4), []
    expected = layer(x)
    handle = layer.base_activation.register_forward_hook(lambda module, args, out: seen.append(out))
    assert_close("out", layer(x), expected, 1e-6)
    assert len(seen) == 1 and isinstance(seen[0], Tensor)
    assert_close("silu", seen[0], to_array(x) / (1 + np.exp(-to_array(x))), 1e-6)
    handle.remove()
    assert torch.equal(layer(x), expected)
