"""Transforms of `torch.func`: what `torch.vmap` gives is what a loop gives; forward mode takes the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev

from helpers import FORWARD_MODE, assert_close
from kan_mamba_layers import SS2D, cross_selective_scan, selective_scan
from ops.kan_linear.calls import case
from ops.selective_scan.calls import full_line_inputs, image_inputs

pytest.importorskip("numba")

Function = Callable[..., Tensor]
Tensors = dict[str, Tensor]
FLOAT64 = torch.float64


def kan(backend: str) -> tuple[Function, Tensors, str]:
    return *case(backend, FLOAT64), "x"


def image(backend: str) -> tuple[Function, Tensors, str]:
    return lambda **x: cross_selective_scan(**x, backend=backend), image_inputs(dtype=FLOAT64), "x"


def line(backend: str) -> tuple[Function, Tensors, str]:
    """With the last state, so that an op of two results is mapped too."""

    def function(**x: Tensor) -> Tensor:
        y, state = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
        return torch.cat([y.flatten(), state.flatten()])

    return function, full_line_inputs(dtype=FLOAT64), "u"


OPS = {"kan_linear": kan, "image": image, "line": line}
each = pytest.mark.parametrize("op", OPS)
fused = pytest.mark.parametrize("backend", ["cpu", "chunked"])


def several(inputs: Tensors, count: int = 3) -> list[Tensors]:
    """The inputs, and others like them."""
    return [{name: x * (1 + 0.1 * k) for name, x in inputs.items()} for k in range(count)]


def stacked(inputs: list[Tensors], dim: int = 0) -> Tensors:
    return {name: torch.stack([one[name] for one in inputs], dim) for name in inputs[0]}


@each
@fused
class TestVmap:
    def test_of_all_tensors_along_any_dimension(self, op: str, backend: str) -> None:
        function, inputs, _ = OPS[op](backend)
        reference, *_ = OPS[op]("reference")
        many = several(inputs)
        out = torch.vmap(lambda x: function(**x), in_dims=-1, out_dims=1)(stacked(many, -1))
        assert_close("out", out, torch.stack([reference(**one) for one in many], 1), 1e-13)

    def test_gradients_of_each(self, op: str, backend: str) -> None:
        """Of every tensor, where one is mapped and the others are shared."""
        function, inputs, mapped = OPS[op](backend)
        reference, *_ = OPS[op]("reference")
        many = several({mapped: inputs.pop(mapped)})
        found = torch.vmap(grad(lambda x, shared: function(**x, **shared).square().sum(), (0, 1)), (0, None))(
            stacked(many), inputs
        )
        for k, one in enumerate(many):
            leaves = {name: x.clone().requires_grad_() for name, x in {**one, **inputs}.items()}
            reference(**leaves).square().sum().backward()
            for name, value in {**found[0], **found[1]}.items():
                assert_close(name, value[k], leaves[name].grad, 1e-13)

    def test_gradients_of_all(self, op: str, backend: str) -> None:
        """The tensors require gradients outside the map, which cannot see it."""
        function, inputs, mapped = OPS[op](backend)
        reference, *_ = OPS[op]("reference")
        many = stacked(several({mapped: inputs.pop(mapped)}))

        def over_a_map(leaves: Tensors, shared: Tensors) -> Tensor:
            return torch.vmap(lambda one: function(**one, **shared))(leaves)

        def over_a_loop(leaves: Tensors, shared: Tensors) -> Tensor:
            return torch.stack([reference(**{mapped: x}, **shared) for x in leaves[mapped]])

        results = []
        for run in (over_a_map, over_a_loop):
            leaves, shared = ({k: v.clone().requires_grad_() for k, v in group.items()} for group in (many, inputs))
            run(leaves, shared).square().sum().backward()
            results.append({name: x.grad for name, x in {**leaves, **shared}.items()})
        for name, value in results[0].items():
            assert_close(name, value, results[1][name], 1e-13)

    def test_of_the_backward_pass(self, op: str, backend: str) -> None:
        function, inputs, mapped = OPS[op](backend)
        reference, *_ = OPS[op]("reference")
        x = inputs.pop(mapped)
        found = jacrev(lambda x: function(**{mapped: x}, **inputs).flatten()[:5])(x)
        expected = torch.autograd.functional.jacobian(lambda x: reference(**{mapped: x}, **inputs).flatten()[:5], x)
        assert_close("jacobian", found, expected, 1e-13)

    def test_inside_another(self, op: str, backend: str) -> None:
        function, inputs, mapped = OPS[op](backend)
        x = inputs.pop(mapped)
        factors = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.1, -1.0]], dtype=FLOAT64)
        found = torch.vmap(torch.vmap(lambda factor: function(**{mapped: factor * x}, **inputs)))(factors)
        for k, row in enumerate(factors):
            for m, factor in enumerate(row):
                assert_close("out", found[k, m], function(**{mapped: factor * x}, **inputs), 1e-13)


@each
@pytest.mark.parametrize("transform", FORWARD_MODE)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, in forward mode
def test_auto_has_forward_derivatives(op: str, transform: str) -> None:
    """They are those of reverse mode."""
    function, inputs, mapped = OPS[op]("auto")
    x = inputs.pop(mapped)
    x = x[:2] if op == "kan_linear" else x

    def value(x: Tensor) -> Tensor:
        return function(**{mapped: x}, **inputs).pow(3).sum()

    def formula(x: Tensor) -> Tensor:
        return OPS[op]("reference")[0](**{mapped: x}, **inputs).pow(3).sum()

    found = FORWARD_MODE[transform](value, x)
    found = found[1] if isinstance(found, tuple) else found  # jvp has the value too
    slope, curvature = (
        of(formula, x) for of in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
    )
    expected = {"dual": slope.sum(), "jvp": slope.sum(), "jacfwd": slope}.get(transform, curvature)
    assert_close(transform, found, expected, 1e-13)


def test_a_map_inside_a_compiler_is_refused_with_a_way_out() -> None:
    function, inputs, mapped = image("cpu")
    x = inputs.pop(mapped)
    compiled = torch.compile(lambda x: torch.vmap(lambda one: function(x=one, **inputs))(x), backend="eager")
    with pytest.raises(Exception, match=r"no vmap inside a compiler.*backend='reference'"):
        compiled(x[None])


def test_a_map_over_nothing_is_refused() -> None:
    """As PyTorch's own operators do, less clearly; some of these give wrong shapes instead."""
    function, inputs, _ = image("cpu")
    with pytest.raises(ValueError, match=r"vmap.*size 0"):
        torch.vmap(lambda x: function(**inputs | {"x": x}))(torch.empty(0, *inputs["x"].shape, dtype=FLOAT64))


def test_gradients_of_each_image_through_a_layer() -> None:
    """As for differential privacy, or the influence of single images."""
    layer, x = SS2D(4, d_state=2).double(), torch.randn(3, 5, 6, 4, dtype=FLOAT64)

    def loss(parameters: Tensors, image: Tensor) -> Tensor:
        return functional_call(layer, parameters, (image[None],)).square().sum()

    found = torch.vmap(grad(loss), (None, 0))(dict(layer.named_parameters()), x)
    for k, image in enumerate(x):
        layer.zero_grad()
        layer(image[None]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(name, found[name][k], parameter.grad, 1e-13)
