"""Tensors that are not plain: subclasses give the values of plain ones, and what is not served is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from helpers import release, says
from kan_mamba_layers import EMA, SS2D, KANConv2d, KANLinear, bspline_basis, cross_selective_scan, kan_linear
from kan_mamba_layers import selective_scan as scan
from ops.kan_linear.calls import kan_inputs
from ops.selective_scan.calls import image_inputs, line_inputs

BACKENDS = ("auto", "cpu", "chunked", "reference")


class Own(Tensor):
    """Overrides a method with another signature, as MONAI's MetaTensor does."""

    def new_empty(self, size: Any, dtype: Any = None) -> Tensor:
        raise AssertionError("an engine sees the subclass")


class Off(Own):
    """Has no `__torch_function__`, so results are plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Counted(Own):
    """Records the functions that ask it."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def last_state(**inputs: Any) -> Tensor:
    return scan(**inputs, return_last_state=True)[1]


OPS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "selective_scan": (scan, line_inputs(length=5)),
    "last_state": (last_state, line_inputs(length=5)),
    "cross_selective_scan": (cross_selective_scan, image_inputs()),
    "kan_linear": (kan_linear, kan_inputs(5, 3, 4)),
}


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], kind: type) -> list[Tensor]:
    leaves = {name: x.detach().clone().as_subclass(kind).requires_grad_(name != "grid") for name, x in inputs.items()}
    y = function(**leaves)
    assert type(y) is (Tensor if kind is Off else kind)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [
        x.as_subclass(Tensor) for x in (y, *torch.autograd.grad(y.sum(), wanted, allow_unused=True)) if x is not None
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_are_those_of_plain_tensors(op: str, backend: str) -> None:
    function, inputs = OPS[op]
    expected = gradients(lambda **x: function(**x, backend=backend), inputs, Tensor)
    for kind in (Own, Off, Counted):
        found = gradients(lambda **x: function(**x, backend=backend), inputs, kind)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), kind


def test_a_subclass_is_asked_for_the_public_op() -> None:
    Counted.seen.clear()
    function, inputs = OPS["kan_linear"]
    function(**{name: x.as_subclass(Counted) if name == "x" else x for name, x in inputs.items()})
    bspline_basis(torch.zeros(1, 2).as_subclass(Counted), torch.linspace(-2, 2, 12).expand(2, -1), 3)
    assert Counted.seen[0] is kan_linear and bspline_basis in Counted.seen


def test_a_class_with_dispatch_decides_itself() -> None:
    layer, a, b = KANLinear(3, 2), torch.randn(4, 3), torch.randn(4, 3)
    y = layer(TwoTensor(a, b))
    assert torch.equal(y.a, layer(a)) and torch.equal(y.b, layer(b))


def test_jagged_rows() -> None:
    layer = KANLinear(3, 2)
    rows = [torch.randn(n, 3) for n in (2, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    y = layer(x)
    assert y.shape == (*x.shape[:2], 2), "of the same ragged dimension"
    for found, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(found, layer(row))
    y.values().sum().backward()
    plain = torch.cat(rows).requires_grad_()
    layer(plain).sum().backward()
    torch.testing.assert_close(x.grad.values(), plain.grad)


@pytest.mark.skipif(release("torch") < (2, 5), reason="PyTorch 2.4 has no gradient of such a tensor's rows")
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_nan_between_jagged_rows_is_no_part_of_them(backend: str) -> None:
    """A batch that is padded with NaN, as a jagged tensor with lengths."""
    layer, padded = KANLinear(3, 2, backend=backend), torch.full((3, 6, 3), torch.nan)
    starts, lengths = torch.tensor([0, 2, 1]), torch.tensor([3, 4, 2])
    for row, start, length in zip(padded, starts.tolist(), lengths.tolist(), strict=True):
        row[start : start + length] = torch.randn(length, 3)
    y = layer(torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged))
    sum(row.square().sum() for row in y.unbind()).backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(padded[padded.isfinite().all(-1)]).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=layout)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "sparse": (Tensor.to_sparse, ("dense", "sparse_coo", r"to_dense\(\)")),
    "mkldnn": (lambda x: x.detach().to_mkldnn(), ("dense", "_mkldnn", r"to_dense\(\)")),
    "nested": (nested(torch.strided), ("dense", "nested", "to_padded_tensor")),
    "jagged": (nested(torch.jagged), ("dense", "nested", "to_padded_tensor")),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), ("real", "quint8", r"dequantize\(\)")),
    "complex": (lambda x: x.cfloat(), ("real", "complex64", "x.real")),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), ("real", "float8", r"x.float\(\)")),
}
LAYERS = {
    "SS2D": (SS2D(4), (2, 3, 3, 4)),
    "EMA": (EMA(8), (2, 8, 3, 3)),
    "KANConv2d": (KANConv2d(4, 4, 1), (2, 4, 3, 3)),
    "KANLinear": (KANLinear(4, 3), (2, 5, 4)),
}


@pytest.mark.filterwarnings("ignore")  # some of these kinds are deprecated
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", LAYERS)
def test_others_are_refused_by_name(name: str, kind: str) -> None:
    if (name, kind) == ("KANLinear", "jagged"):
        pytest.skip("served")
    layer, shape = LAYERS[name]
    make, parts = REFUSED[kind]
    with pytest.raises(TypeError, match=says("x must be a", *parts)):
        layer(make(torch.zeros(shape)))


@pytest.mark.skipif(release("torch") < (2, 5), reason="PyTorch 2.4 keeps distributed tensors in a private module")
@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors_are_refused_by_name() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.zeros(3, 4), DeviceMesh("cpu", [0]), [Replicate()])
        layer = KANLinear(4, 3)
        layer.base_weight = nn.Parameter(weight)
        with pytest.raises(TypeError, match=says("base_weight must be", "DTensor", "to_local", "full_tensor")):
            layer(torch.zeros(2, 4))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_device_and_dtype_play_no_part(backend: str) -> None:
    layers = (KANLinear(4, 3, backend=backend), torch.randn(5, 4)), (SS2D(4, backend=backend), torch.randn(1, 3, 4, 4))
    for layer, x in layers:
        expected = layer(x)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                y = layer(x.requires_grad_())
                y.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(y, expected) and x.grad.device.type == "cpu"


class TestMonai:
    """The default tensors of MONAI's loaders."""

    @pytest.fixture
    def image(self) -> Any:
        data = pytest.importorskip("monai.data")
        return data.MetaTensor(torch.rand(2, 4, 33, 32), meta={"filename_or_obj": "a.nii"})

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_metatensor_comes_back_with_its_metadata(self, image: Any, backend: str, training: bool) -> None:
        calls = [
            (KANLinear(32, 3, backend=backend), image),
            (SS2D(32, backend=backend), image[..., :3, :]),
            (EMA(4, 4), image),
            (KANConv2d(4, 3, 1), image),
        ]
        for layer, x in calls:
            layer.train(training)
            with torch.set_grad_enabled(training):
                y = layer(x)
                assert type(y) is type(image) and y.meta["filename_or_obj"] == "a.nii"
                torch.testing.assert_close(y.as_tensor(), layer(x.as_tensor()), atol=0, rtol=0)
            if training:
                y.sum().backward()
                assert all(type(p.grad) is Tensor for p in layer.parameters())

    @pytest.mark.parametrize("layer", [KANLinear(32, 3, grid_mode="adaptive"), KANConv2d(4, 3, 1)])
    def test_a_refit_leaves_plain_tensors_in_the_layer(self, image: Any, layer: Any) -> None:
        layer.update_grid(image)
        assert all(type(x) is Tensor for x in layer.state_dict().values())
