"""Equal state, equal function: whoever copied it, and also where a graph was compiled before. And replacing state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kan_layers import convolution, exported, layer_oracle, on_nonuniform_knots, with_large_splines
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune

from helpers import assert_close, release, says
from kan_mamba_layers import KANConv2d, KANLinear, from_pretrained
from kan_mamba_layers.layers.kan import SplineLayer
from kan_mamba_layers.models import create_model

State = dict[str, Tensor]


def in_place(layer: nn.Module, state: State) -> None:
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            value.copy_(state[name])


def through_data(layer: nn.Module, state: State) -> None:
    for name, value in layer.state_dict(keep_vars=True).items():
        value.data.copy_(state[name])


def new_data(layer: nn.Module, state: State) -> None:
    for name, value in layer.state_dict(keep_vars=True).items():
        value.data = state[name].clone()


def one_by_one(layer: nn.Module, state: State) -> None:
    for name, value in state.items():
        kind = layer._buffers if name in layer._buffers else layer._parameters
        kind[name] = value.clone() if kind is layer._buffers else nn.Parameter(value.clone())


def by_averaging(layer: nn.Module, state: State) -> None:
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.module = layer
    other = copy.deepcopy(layer)
    other.load_state_dict(state)
    average.update_parameters(other)


def in_inference_mode(layer: nn.Module, state: State) -> None:
    with torch.inference_mode():
        in_place(layer, state)


WAYS = (in_place, through_data, new_data, one_by_one, by_averaging, in_inference_mode)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_equal_state_is_the_same_function(backend: str, way: Callable[[nn.Module, State], None]) -> None:
    """From even knots to others and back, on one layer that has run before."""
    x, layer = torch.randn(20, 8), with_large_splines(backend=backend)
    for source in (on_nonuniform_knots(backend=backend), with_large_splines(backend=backend)):
        layer(x)
        way(layer, source.state_dict())
        assert torch.equal(layer(x), source(x))
        assert torch.equal(layer.b_splines(x), source.b_splines(x))
        assert torch.equal(layer.edge_function(x[:, 0]), source.edge_function(x[:, 0]))
        assert_close("out", layer(x), layer_oracle(source, x), 1e-5)


@pytest.mark.parametrize("way", [in_place, through_data, one_by_one], ids=lambda way: way.__name__)
def test_equal_state_of_a_convolution(way: Callable[[nn.Module, State], None]) -> None:
    layer, source, x = KANConv2d(2, 3, 3), convolution(2, 3, 3, knots="nonuniform"), torch.randn(2, 2, 6, 5)
    layer(x)
    way(layer, source.state_dict())
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_a_compiled_graph_sees_new_knots(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, source, x = with_large_splines(backend=backend), on_nonuniform_knots(), torch.randn(20, 8)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    assert_close("before", compiled(x), layer_oracle(layer, x), 1e-5)
    through_data(layer, source.state_dict())
    assert_close("after", compiled(x), layer_oracle(source, x), 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_exported_graph_sees_new_knots(backend: str) -> None:
    layer, source, x = with_large_splines(backend=backend), on_nonuniform_knots(), torch.randn(20, 8)
    module = exported(layer, x, {0: torch.export.Dim("b")}, strict=False)
    module.load_state_dict(source.state_dict())
    assert_close("out", module(x), layer_oracle(source, x), 1e-5)


def test_functional_calls_with_the_state_of_another_layer() -> None:
    layers = [on_nonuniform_knots(backend="reference"), with_large_splines(backend="reference")]
    skeleton, x = with_large_splines(backend="reference"), torch.randn(20, 8)
    state = [{k: v.detach() for k, v in layer.state_dict().items()} for layer in layers]
    for values, layer in zip(state, layers, strict=True):
        assert torch.equal(torch.func.functional_call(skeleton, values, (x,)), layer(x))
    stacked = {k: torch.stack([values[k] for values in state]) for k in state[0]}
    out = torch.vmap(lambda values: torch.func.functional_call(skeleton, values, (x,)))(stacked)
    for y, layer in zip(out, layers, strict=True):
        assert_close("out", y, layer_oracle(layer, x), 1e-5)
    # A copy of the knots that a transform made must not outlive it.
    knots = state[0]["grid"].clone()
    torch.func.grad(lambda p: torch.func.functional_call(skeleton, {**state[0], "grid": knots, **p}, (x,)).sum())(
        {"base_weight": state[0]["base_weight"]}
    )
    assert torch.equal(torch.func.functional_call(skeleton, {**state[0], "grid": knots}, (x,)), layers[0](x))


@pytest.mark.parametrize("call", [lambda f, x: f.update_grid(x), lambda f, x: f.extend_grid(10)])
@pytest.mark.parametrize("built", ["normal", "inference"])
def test_replacing_state_in_inference_mode(call: Callable[[KANLinear, Tensor], None], built: str) -> None:
    with torch.inference_mode(built == "inference"):
        layer = KANLinear(8, 6, grid_mode="adaptive", backend="reference")
    expected = copy.deepcopy(layer)
    x = torch.randn(64, 8)
    call(expected, x)
    with torch.inference_mode():
        call(layer, x.clone())
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in layer.state_dict().items())
    if built == "normal":
        layer(x).sum().backward()
        assert layer.spline_weight.grad.isfinite().all()
    call(layer, x)  # and outside of it again


def test_loading_another_size_in_inference_mode_leaves_parameters_that_train() -> None:
    layer, grown, x = KANLinear(8, 6), KANLinear(8, 6, grid_size=10), torch.randn(5, 8)
    with torch.inference_mode():
        layer.load_state_dict(grown.state_dict())
    layer(x).sum().backward()
    grown(x).sum().backward()
    assert torch.equal(layer.spline_weight.grad, grown.spline_weight.grad)


class TestGrownGrids:
    @pytest.mark.parametrize("make", [lambda: with_large_splines(bias=True), lambda: convolution(4, 6, 3, groups=2)])
    @pytest.mark.parametrize("assign", [False, True])
    def test_load_into_a_layer_as_it_was_built(self, make: Callable[[], SplineLayer], assign: bool) -> None:
        grown, layer = make(), make()
        x = torch.randn(5, 8) if isinstance(layer, KANLinear) else torch.randn(2, 4, 6, 5)
        layer.spline_weight.mark = "kept"
        smaller = layer.state_dict()
        grown.extend_grid(12)
        layer.load_state_dict(grown.state_dict(), assign=assign)
        assert layer.grid_size == 12 and torch.equal(layer(x), grown(x))
        assert assign or layer.spline_weight.mark == "kept"
        layer.update_grid(x)
        assert layer.grid_size == 12
        layer.load_state_dict(smaller)
        assert layer.grid_size == 5

    def test_load_from_the_folder_of_a_model(self, tmp_path) -> None:
        pytest.importorskip("safetensors")
        model = create_model("u_kan_tiny", in_channels=1, num_classes=1).eval()
        for module in model.modules():
            if isinstance(module, SplineLayer):
                module.extend_grid(7)
        model.save_pretrained(tmp_path)
        other, x = from_pretrained(tmp_path), torch.randn(1, 1, 32, 32)
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            (lambda: KANLinear(8, 6, spline_order=2).state_dict(), ("spline_order=3", "degree 2", "10 knots")),
            (lambda: KANLinear(7, 6, grid_size=9).state_dict(), ("size mismatch for spline_weight", "size .* grid")),
            (lambda: KANLinear(8, 5, grid_size=9).state_dict(), ("size mismatch for spline_weight",)),
            (lambda: {**KANLinear(8, 6).state_dict(), "grid": torch.zeros(8, 17)}, ("17 knots", "8 bases")),
        ],
    )
    def test_a_wrong_shape_is_refused_by_name(self, state: Callable[[], State], words: tuple[str, ...]) -> None:
        layer = KANLinear(8, 6)
        for word in words:
            with pytest.raises(RuntimeError, match=word):
                layer.load_state_dict(state())
        assert layer.grid_size == 5

    def test_hooks_and_attributes_move_to_the_new_parameter(self) -> None:
        layer, seen = KANLinear(8, 6, backend="reference"), []
        layer.spline_weight.no_decay = True
        layer.spline_weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
        handle = layer.spline_weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
        layer.extend_grid(10)
        layer(torch.randn(5, 8)).sum().backward()
        assert seen == [(6, 8, 13), "after"] and layer.spline_weight.no_decay
        handle.remove()
        layer(torch.randn(5, 8)).sum().backward()
        assert seen == [(6, 8, 13), "after", "after"]

    def test_an_optimiser_that_needs_flat_parameters(self) -> None:
        layer, x = KANLinear(8, 6, backend="reference"), torch.randn(20, 8)
        layer.extend_grid(10)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=3)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (layer(x) - 1).square().mean()
            value.backward()
            return value

        before = optimizer.step(loss).item()
        assert loss().item() < before


def test_half_precision_checkpoints_leave_the_knots_in_float32() -> None:
    source = with_large_splines()
    half = {k: v.half() for k, v in source.state_dict().items()}
    layer = KANLinear(8, 6, dtype=torch.float16)
    layer.load_state_dict(half, assign=True)
    assert layer.grid.dtype == torch.float32 and layer.spline_weight.dtype == torch.float16
    assert torch.equal(layer.grid, half["grid"].float())


def test_a_device_by_name_wins_over_the_default_one() -> None:
    with torch.device("meta"):
        for layer in (KANLinear(4, 3, device="cpu", base_activation=nn.PReLU), KANConv2d(4, 3, 3, device="cpu")):
            assert {v.device.type for v in layer.state_dict().values()} == {"cpu"}
            layer.reset_parameters()


class TestWeight:
    """Code for nn.Linear looks at `weight`: it may ask for its shape, dtype and device, and nothing else."""

    @pytest.mark.parametrize("bias", [False, True])
    def test_a_transformer_in_evaluation_calls_the_layer(self, bias: bool) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        layer.linear1, layer.linear2 = KANLinear(16, 32, bias=bias), KANLinear(32, 16, bias=bias)
        x = torch.randn(2, 5, 16)
        expected = layer(x).detach()
        model = nn.TransformerEncoder(layer.eval(), 1, enable_nested_tensor=False).eval()
        with torch.inference_mode():
            assert_close("layer", layer(x), expected, 1e-6)
            assert_close("model", model(x), expected, 1e-6)

    @pytest.mark.parametrize(
        "strict",
        [
            False,
            pytest.param(
                True, marks=pytest.mark.skipif(release("torch") < (2, 5), reason="Dynamo of PyTorch 2.4 fails")
            ),
        ],
    )
    def test_code_that_asks_for_it_can_be_exported(self, strict: bool) -> None:
        class Converting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = KANLinear(8, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.to(self.fc.weight.dtype))

        model, x = Converting(), torch.randn(5, 8)
        assert_close("out", exported(model, x, {}, strict)(x), layer_oracle(model.fc, x), 1e-5)

    def test_tells_where_and_how_large_it_would_be(self) -> None:
        weight = KANLinear(4, 3, dtype=torch.bfloat16, device="meta").weight
        assert (weight.shape, weight.dtype, weight.device.type) == ((3, 4), torch.bfloat16, "meta")
        assert weight.dim() == 2 and weight.size(1) == 4
        assert f"{weight}" == str(weight) == "EdgeWeight(shape=(3, 4), dtype=torch.bfloat16, device='meta')"
        assert "weight" not in dict(KANLinear(4, 3).named_parameters())
        assert torch.zeros(1).to(KANConv2d(4, 3, 3).half().weight.dtype).dtype == torch.float16

    @pytest.mark.parametrize(
        "use",
        [
            lambda f: nn.functional.linear(torch.ones(4), f.weight),
            lambda f: f.weight.data,
            lambda f: nn.init.xavier_uniform_(f.weight),
            lambda f: setattr(f.weight, "requires_grad", False),
            lambda f: nn.utils.weight_norm(f),
            lambda f: parametrizations.weight_norm(f),
            lambda f: parametrizations.spectral_norm(f),
            lambda f: prune.l1_unstructured(f, "weight", 0.3),
            lambda f: setattr(f, "weight", nn.Parameter(torch.ones(3, 4))),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_has_no_values(self, use: Callable[[KANLinear], object]) -> None:
        with pytest.raises(TypeError, match=says("KAN layer", "base_weight")):
            use(KANLinear(4, 3))

    @pytest.mark.parametrize("name", ["requires_grad", "grad", "T", "data", "is_leaf"])
    def test_an_attribute_that_it_lacks_is_named(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"^{name} was used on the weight of a KAN layer"):
            getattr(KANLinear(4, 3).weight, name)

    def test_attention_refuses_it_as_its_output(self) -> None:
        attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
        attention.out_proj = KANLinear(8, 8, bias=True)
        for mode in (True, False):
            with pytest.raises(TypeError, match=says("out_proj", "KAN layer")):
                attention.train(mode)(x, x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantising_the_other_layers_of_a_model() -> None:
    model, x = nn.Sequential(KANLinear(8, 6), nn.Linear(6, 4)), torch.randn(5, 8)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert torch.equal(quantised[0](x), model[0](x)) and quantised(x).shape == (5, 4)


def test_a_sharded_layer_says_so() -> None:
    class Shard(nn.Parameter):
        def full_tensor(self) -> Tensor:
            return self

    layer, x = KANLinear(4, 3), torch.randn(5, 4)
    layer.base_weight, layer.spline_weight = Shard(layer.base_weight.data), Shard(layer.spline_weight.data)
    calls = (
        lambda: layer.update_grid(x),
        lambda: layer.extend_grid(10),
        lambda: layer.edge_function(x),
        lambda: layer.edge_sizes(),
        lambda: layer.prune_edges(0.1),
        lambda: layer.reset_parameters(),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=says("weight is a DTensor", "before")):
            call()
