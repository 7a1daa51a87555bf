"""What all layers and models share: parameters without weight decay, the groups of an optimiser, TorchScript."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

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
    Mamba,
    VSSBlock,
    param_groups,
    walks,
)

DYNAMICS = {"A_logs", "Ds", "dt_projs_bias"}


def tiny(cls: type[KMUNet] | type[KMUNetPP] = KMUNet, **options: Any) -> Any:
    return cls(widths=(4, 4, 4, 4, 4), d_state=1, expand=1, ema_factor=2, **options)


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 32, 32)


def marked(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}


def assigned(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    return other


def made_on_meta(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta").to_empty(device="cpu")


def swapped(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        other = copy.deepcopy(model).double()
        other.load_state_dict(model.state_dict())
        return other
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "assign": assigned,
    "to_empty": made_on_meta,
    "swap": swapped,
    "bfloat16": lambda model: copy.deepcopy(model).bfloat16(),
}


class TestWeightDecay:
    @pytest.mark.parametrize("way", COPIES)
    def test_marks_survive(self, way: str) -> None:
        model = nn.Sequential(nn.Linear(2, 4), SS2D(4))
        found = COPIES[way](model)
        assert marked(found) == marked(model) == {f"1.{name}" for name in DYNAMICS}

    @pytest.mark.parametrize("way", COPIES)
    def test_the_step_bias_keeps_its_mark_for_initialisers(self, way: str) -> None:
        model = COPIES[way](nn.Sequential(nn.Linear(2, 4), Mamba(4)))
        assert [name for name, p in model.named_parameters() if hasattr(p, "_no_reinit")] == ["1.dt_proj.bias"]

    def test_names(self) -> None:
        assert SS2D(4).no_weight_decay() == DYNAMICS
        for layer in (KANLinear(2, 2), KANConv2d(2, 2, 1), KANLayer(2), KANBlock(2), EMA(8)):
            assert layer.no_weight_decay() == set()
        for cls in (KMUNet, KMUNetPP):
            model = tiny(cls)
            names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in DYNAMICS}
            assert model.no_weight_decay() == marked(model) == names != set()

    def test_a_parametrised_parameter_keeps_its_name(self) -> None:
        layer = SS2D(4)
        torch.nn.utils.parametrize.register_parametrization(layer, "A_logs", nn.Identity())
        assert layer.no_weight_decay() == {"parametrizations.A_logs.original", "Ds", "dt_projs_bias"}

    def test_a_pruned_parameter_keeps_its_name(self) -> None:
        layer = Mamba(4)
        prune.l1_unstructured(layer, "A_log", 0.5)
        assert layer.no_weight_decay() == {"A_log_orig", "D", "dt_proj.bias"}


class TestParamGroups:
    def test_every_trainable_parameter_once(self) -> None:
        model = tiny()
        model.head.requires_grad_(False)
        decayed, rest = param_groups(model, 0.1)
        assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        found = [id(p) for group in (decayed, rest) for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        without = {id(p) for p in rest["params"]}
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert (id(p) in without) == (p.ndim < 2 or name.endswith(tuple(DYNAMICS))), name

    def test_a_model_of_others(self) -> None:
        class Theirs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.position = nn.Parameter(torch.zeros(3, 4))
                self.mix = nn.ModuleList([SS2D(4), nn.Linear(4, 4)])
                self.A = nn.Parameter(torch.zeros(3, 4))
                self.A._no_weight_decay = True

            def no_weight_decay(self) -> set[str]:
                return {"position"}

        model = nn.Sequential(Theirs())
        _, rest = param_groups(nn.parallel.DataParallel(model), 0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        expected = {name for name, p in model.named_parameters() if p.ndim < 2}
        expected |= {"0.position", "0.A", *(f"0.mix.0.{name}" for name in DYNAMICS)}
        assert {names[id(p)] for p in rest["params"]} == expected

    def test_shared_parameters_once_and_without_decay_if_one_name_says_so(self) -> None:
        layer = SS2D(4)
        model = nn.ModuleDict({"first": nn.Linear(4, 4), "tied": nn.Linear(4, 4), "scan": layer})
        model["tied"].weight = model["first"].weight
        model.register_parameter("rates", layer.A_logs)
        decayed, rest = param_groups(model, 0.1)
        assert [id(p) for p in decayed["params"]].count(id(model["first"].weight)) == 1
        assert id(layer.A_logs) in {id(p) for p in rest["params"]}
        assert len(decayed["params"] + rest["params"]) == len(list(model.parameters()))

    @pytest.mark.parametrize("bad", [-0.1, math.inf, "0.1"])
    def test_wrong_weight_decay(self, bad: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=says("weight_decay must", str(bad))):
            param_groups(nn.Linear(2, 2), bad)


class Tokens(nn.Module):
    """A KAN layer on the pixels of a map, whose sizes a trace records."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # b c h w -> b h*w c
        return self.layer(x.flatten(2).mT, *x.shape[2:])


TRACED: dict[str, tuple[Callable[[Any], nn.Module], Callable[[int, int], tuple[int, ...]]]] = {
    "SS2D": (lambda backend: SS2D(4, d_state=2, backend=backend), lambda b, h: (b, h, 3, 4)),
    "KANLinear": (lambda backend: KANLinear(4, 3, backend=backend), lambda b, h: (b, h, 4)),
    "KANLayer": (lambda backend: Tokens(KANLayer(4, backend=backend)), lambda b, h: (b, 4, h, 3)),
    "KMUNetPP": (
        lambda backend: KMUNetPP(widths=(4, 4), d_state=1, expand=1, ema_factor=2, backend=backend),
        lambda b, h: (b, 3, 27 + h, 32),
    ),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's: TorchScript is deprecated, and checks of sizes are not recorded
class TestTorchScript:
    @pytest.mark.parametrize(
        ("name", "backend"),
        [
            *(("SS2D", backend) for backend in ("auto", "cpu", "chunked", "reference")),
            *(("KANLinear", backend) for backend in ("cpu", "chunked")),
            ("KANLayer", "auto"),
            ("KMUNetPP", "auto"),
        ],
    )
    def test_a_trace_can_be_saved_and_serves_other_sizes(self, name: str, backend: str) -> None:
        make, shape = TRACED[name]
        model = make(backend).eval()
        file = io.BytesIO()
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(model, torch.randn(shape(1, 5))), file)
            file.seek(0)
            loaded = torch.jit.load(file)
            for x in (torch.randn(shape(1, 5)), torch.randn(shape(3, 7))):
                torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
        assert "kan_mamba_layers::" not in str(loaded.inlined_graph), "it runs without this package"

    def test_the_steps_of_a_trace_are_a_loop(self) -> None:
        traced = torch.jit.trace(SS2D(4).eval(), torch.randn(1, 9, 9, 4))
        assert "prim::Loop" in str(traced.inlined_graph) and len(str(traced.inlined_graph)) < 1e5

    @pytest.mark.parametrize("layer", [SS2D(4), KANLinear(2, 2), EMA(8), KANConv2d(2, 2, 1), KANLayer(2), tiny()])
    def test_scripts_are_refused(self, layer: nn.Module) -> None:
        text = says("torch.jit.script cannot compile", type(layer).__name__, "torch.jit.trace")
        for module in (layer, nn.Sequential(layer)):
            with pytest.raises(TypeError, match=text):
                torch.jit.script(module)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_gradients_have_the_strides_of_their_parameters(backend: Any) -> None:
    """DDP compares them, also in dimensions of size 1."""
    calls = [(SS2D(8, 1, walks=of, backend=backend), (torch.randn(2, 3, 4, 8),)) for of in (None, walks.snake)]
    calls += [(SS3D(8, 1, backend=backend), (torch.randn(2, 2, 3, 4, 8),))]
    calls += [(KANLinear(i, o, backend=backend), (torch.randn(6, i),)) for i, o in ((4, 1), (1, 3))]
    calls += [(KANBlock(8, backend=backend), (torch.randn(2, 12, 8), 3, 4)), (KANConv2d(3, 1, 3), (image(3),))]
    calls += [(EMA(8), (image(8),)), (Mamba(8), (torch.randn(2, 5, 8),))]
    calls += [(tiny(cls, in_channels=1, backend=backend), (image(1),)) for cls in (KMUNet, KMUNetPP)]
    for layer, inputs in calls:
        out = layer(*inputs)
        sum(y.square().sum() for y in (out if isinstance(out, list) else [out])).backward()
        for name, p in layer.named_parameters():
            assert p.grad.stride() == p.stride(), f"{name} of {type(layer).__name__}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_change_initial_values(dtype: torch.dtype) -> None:
    calls = (SS2D, SS3D, Mamba, KANLinear, KANConv2d, EMA)
    sizes = {KANLinear: (6, 5), KANConv2d: (4, 3, 3)}

    def make(call: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return call(*sizes.get(call, (8,)), dtype=torch.float32).state_dict()

    expected = [make(call) for call in calls]
    torch.set_default_dtype(dtype)
    try:
        found = [make(call) for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], x) for name, x in other.items())


@pytest.mark.parametrize("wide", ["x", "weights"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SS2D(8), (1, 4, 4, 8)),
        (SS3D(8), (1, 2, 2, 2, 8)),
        (Mamba(8), (1, 5, 8)),
        (EMA(8), (1, 8, 4, 4)),
        (VSSBlock(8), (1, 4, 4, 8)),
        (KANConv2d(4, 4, 3), (1, 4, 4, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_autocast_does_not_excuse_float64_which_it_leaves_alone(layer: nn.Module, shape: tuple, wide: str) -> None:
    layer, x = copy.deepcopy(layer).to(torch.float64 if wide == "weights" else torch.float32), torch.randn(shape)
    x = x.double() if wide == "x" else x
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=says("x is", "float64", "convert one$")),
    ):
        layer(x)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_the_default_device_does_not_matter(backend: Any) -> None:
    """What works on tensors given is made beside them, not on the device for new ones."""
    free = KANLinear(3, 2, backend=backend, extrapolation="linear", grid_mode="adaptive")
    model, x = tiny(KMUNet, backend=backend), torch.randn(20, 3)
    pixels = image(3)
    with torch.device("meta"):
        free.update_grid(x)
        free.extend_grid(7)
        free.prune_edges(free.edge_sizes().min().item())
        (free(x).square().sum() + free.regularization_loss() + model(pixels).square().sum()).backward()
    for module in (free, model):
        assert all(p.grad.device.type == "cpu" and p.grad.isfinite().all() for p in module.parameters())
