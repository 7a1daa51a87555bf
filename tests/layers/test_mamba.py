"""Mamba: its formula step by step in NumPy, streaming, masks, and what other code expects of it."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import Array, assert_close, largest, max_error, says, to_array
from kan_mamba_layers import Mamba

OPTIONS = [
    {},
    {"d_state": 1, "expand": 1, "d_conv": 1},
    {"d_state": 3, "dt_rank": 5, "d_conv": 2, "expand": 1.5},
    {"conv_bias": False, "bias": True},
    {"bidirectional": True, "bias": True, "d_conv": 3},
    {"bidirectional": True, "if_divide_out": True, "conv_bias": False},
]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def one_direction(p: dict[str, Array], u: Array, z: Array, suffix: str) -> Array:  # b l d
    """The convolution and the recurrence, one position, channel and tap after the other."""
    kernel, bias = p[f"conv1d{suffix}.weight"][:, 0], p.get(f"conv1d{suffix}.bias", 0.0)
    A, D = -np.exp(p[f"A{suffix}_log"]), p[f"D{suffix}"]
    (length, taps), n, rank = (u.shape[1], kernel.shape[1]), A.shape[1], p[f"dt_proj{suffix}.weight"].shape[1]
    h, out = np.zeros((u.shape[0], *A.shape)), np.zeros_like(u)
    for t in range(length):
        v = sum(kernel[:, j] * u[:, t - taps + 1 + j] for j in range(taps) if t - taps + 1 + j >= 0) + bias
        v = silu(v)  # b d
        projected = v @ p[f"x_proj{suffix}.weight"].T
        low, B, C = projected[:, :rank], projected[:, rank : rank + n], projected[:, rank + n :]
        step = np.log1p(np.exp(low @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"]))  # b d
        h = np.exp(step[..., None] * A) * h + (step * v)[..., None] * B[:, None]
        out[:, t] = ((h * C[:, None]).sum(-1) + D * v) * silu(z[:, t])
    return out


def oracle(layer: Mamba, x: Tensor) -> Array:  # b l c
    p = {k: to_array(v) for k, v in layer.state_dict().items()}
    u, z = np.split(to_array(x) @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0), 2, -1)
    y = one_direction(p, u, z, "")
    if layer.bidirectional:
        y = y + one_direction(p, u[:, ::-1], z[:, ::-1], "_b")[:, ::-1]
    if layer.if_divide_out:
        y = y / 2
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)


class TestForward:
    @pytest.mark.parametrize("backend", ["reference", "chunked", "cpu", "auto"])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_equals_the_recurrence(self, options: dict, backend: str) -> None:
        layer = Mamba(6, backend=backend, **options).double()
        for length in (1, 2, 19):
            x = torch.randn(2, length, 6, dtype=torch.float64)
            assert_close("out", layer(x), oracle(layer, x), 1e-12)

    def test_no_position_depends_on_a_later_one(self) -> None:
        layer, x = Mamba(4), torch.randn(1, 12, 4)
        changed = x.clone()
        changed[:, 7:] += 1
        difference = (layer(changed) - layer(x)).abs().amax((0, 2))
        assert difference[:7].max() == 0 and difference[7:].min() > 0

    @pytest.mark.parametrize("backend", ["chunked", "cpu"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradcheck(self, backend: str, masked: bool) -> None:
        layer = Mamba(2, d_state=2, bidirectional=True, backend=backend).double()
        x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([[True, True, False, True, False]]) if masked else None
        assert torch.autograd.gradcheck(lambda x: layer(x, mask), (x,))

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_any_batch_and_layout(self, batch: int) -> None:
        layer, x = Mamba(4, bidirectional=True), torch.randn(batch, 4, 9).mT  # b l c
        assert_close("out", layer(x), layer(x.contiguous()), 1e-6)
        assert layer(x).shape == (batch, 9, 4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        layer, x = Mamba(8, bidirectional=True), torch.randn(2, 40, 8)
        out = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert_close("out", out, layer(x), 0.03)

    @pytest.mark.parametrize("masked", [False, True])
    def test_autocast(self, masked: bool) -> None:
        layer, x = Mamba(8, bidirectional=True), torch.randn(2, 40, 8)
        mask = torch.rand(2, 40) > 0.3 if masked else None
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, mask)
            out.float().square().sum().backward()
        assert_close("out", out, layer(x, mask), 0.03)
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in layer.parameters())


class TestMask:
    @pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
    @pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
    def test_padding_changes_nothing(self, options: dict, backend: str) -> None:
        """Each sequence alone gives the same values and gradients, whatever lies in the padding before and behind."""
        layer = Mamba(5, bias=True, backend=backend, **options).double()
        sequences = [torch.randn(1, length, 5, dtype=torch.float64) for length in (9, 4, 1)]
        mask = torch.zeros(3, 12, dtype=torch.bool)
        batch = torch.full((3, 12, 5), float("nan"), dtype=torch.float64)
        for i, sequence in enumerate(sequences):  # b l c: from position i on
            mask[i, i : i + sequence.shape[1]] = True
            batch[i, mask[i]] = sequence[0]
        batch.requires_grad_()
        together = layer(batch, mask)
        alone = [layer(sequence)[0] for sequence in sequences]
        assert_close("out", together[mask], torch.cat(alone), 1e-13)
        assert largest(together[~mask].detach()) == 0
        grads = torch.autograd.grad(together.sin().sum(), [batch, *layer.parameters()])
        expected = torch.autograd.grad(sum(y.sin().sum() for y in alone), list(layer.parameters()))
        assert largest(grads[0][~mask]) == 0
        for (name, _), grad, true in zip(layer.named_parameters(), grads[1:], expected, strict=True):
            assert_close(f"d{name}", grad, true, 1e-12)

    def test_a_hole_leaves_the_state_and_is_zero_to_the_convolution(self) -> None:
        layer = Mamba(4, d_conv=1).double()
        x, mask = torch.randn(2, 10, 4, dtype=torch.float64), torch.rand(2, 10) > 0.4
        for i in range(2):  # a convolution of size 1 sees no neighbours: a hole is as good as cut out
            assert_close("out", layer(x, mask)[i, mask[i]], layer(x[i : i + 1, mask[i]])[0], 1e-13)
        layer = Mamba(4).double()
        with torch.no_grad():
            layer.conv1d.weight[:, 0, :-1] = 0
        for i in range(2):
            assert_close("out", layer(x, mask)[i, mask[i]], layer(x[i : i + 1, mask[i]])[0], 1e-13)
        layer.conv1d.reset_parameters()
        assert max_error(layer(x, mask)[0, mask[0]], layer(x[:1, mask[0]])[0]) > 1e-6

    def test_all_and_none(self) -> None:
        layer, x = Mamba(4, bidirectional=True, bias=True), torch.randn(2, 7, 4)
        everything = torch.ones(2, 7, dtype=torch.bool)
        assert_close("out", layer(x, everything), layer(x), 1e-6)
        assert largest(layer(x, ~everything)) == 0


class TestStreaming:
    @pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
    @pytest.mark.parametrize("options", [o for o in OPTIONS if not o.get("bidirectional")], ids=str)
    def test_pieces_equal_the_whole(self, options: dict, backend: str) -> None:
        layer = Mamba(6, backend=backend, **options)
        x = torch.randn(3, 11, 6)
        pieces, state = [], layer.allocate_state(3)
        for part in (x[:, 0], x[:, 1:2], x[:, 2:8], x[:, 8], x[:, 9:]):
            y, state = layer.step(part, state)
            assert y.shape == part.shape
            pieces.append(y if y.ndim == 3 else y[:, None])
        whole = layer(x)
        assert max_error(torch.cat(pieces, 1), whole) <= 1e-6
        names, parameters = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(torch.cat(pieces, 1).sin().sum(), parameters)
        for name, grad, true in zip(names, grads, torch.autograd.grad(whole.sin().sum(), parameters), strict=True):
            assert_close(f"d{name}", grad, true, 1e-4)

    @pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
    def test_a_state_keeps_no_memory_but_its_own(self, backend: str) -> None:
        layer = Mamba(4, backend=backend)
        state = layer.allocate_state(2)
        for length in (100, 2, 1):
            _, state = layer.step(torch.randn(2, length, 4), state)
            for part in state:
                assert part.untyped_storage().nbytes() == part.numel() * part.element_size()

    def test_a_state_may_be_used_twice(self) -> None:
        layer, x = Mamba(4), torch.randn(2, 3, 4)
        _, state = layer.step(x[:, :2], layer.allocate_state(2))
        first, second = layer.step(x[:, 2], state), layer.step(x[:, 2], state)
        assert torch.equal(first[0], second[0])
        assert [tuple(s.shape) for s in state] == [(2, 8, 4), (2, 8, 16)]

    @pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_dtypes(self, dtype: torch.dtype, wide: torch.dtype) -> None:
        layer = Mamba(4, dtype=dtype)
        state = layer.allocate_state(2)
        for _ in range(2):
            y, state = layer.step(torch.randn(2, 4, dtype=dtype), state)
            assert (y.dtype, state.conv.dtype, state.scan.dtype) == (dtype, dtype, wide)

    def test_autocast(self) -> None:
        layer, x = Mamba(8), torch.randn(2, 6, 8)
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer.step(x[:, :3], layer.allocate_state(2))
            later, _ = layer.step(x[:, 3:], state)
        assert_close("out", torch.cat([y, later], 1), layer(x), 0.03)


class TestParameters:
    def test_keys_and_shapes(self) -> None:
        direction = {
            "conv1d{}.weight": (64, 1, 4),
            "conv1d{}.bias": (64,),
            "x_proj{}.weight": (2 + 16, 64),
            "dt_proj{}.weight": (64, 2),
            "dt_proj{}.bias": (64,),
            "A{}_log": (64, 8),
            "D{}": (64,),
        }
        both = {"in_proj.weight": (128, 32), "out_proj.weight": (32, 64)}
        for options, suffixes in (({}, [""]), ({"bidirectional": True}, ["", "_b"])):
            expected = both | {k.format(s): v for s in suffixes for k, v in direction.items()}
            assert {k: tuple(v.shape) for k, v in Mamba(32, d_state=8, **options).state_dict().items()} == expected

    def test_biases_are_options(self) -> None:
        keys = set(Mamba(4, bias=True, conv_bias=False, bidirectional=True).state_dict())
        assert {"in_proj.bias", "out_proj.bias"} <= keys and not {"conv1d.bias", "conv1d_b.bias"} & keys

    @pytest.mark.parametrize("suffix", ["", "_b"])
    def test_initial_dynamics(self, suffix: str) -> None:
        layer = Mamba(64, d_state=4, dt_min=0.002, dt_max=0.05, dt_rank=4, dt_scale=0.5, bidirectional=True)
        projection = layer.get_submodule(f"dt_proj{suffix}")
        step = F.softplus(projection.bias.detach())
        assert 0.0019 < step.min() < 0.005 and 0.02 < step.max() < 0.0501
        assert 0.2 < largest(projection.weight) <= 0.25 and projection.weight.min() < -0.2
        expected = torch.arange(1.0, 5).log().expand(128, 4)
        assert_close("A_log", layer.get_parameter(f"A{suffix}_log"), expected, 1e-6)
        assert (layer.get_parameter(f"D{suffix}") == 1).all()
        constant = Mamba(64, dt_init="constant", dt_rank=4, dt_min=1e-6, dt_max=1e-5, dt_init_floor=0.01)
        assert (constant.dt_proj.weight == 0.5).all()
        assert_close("step", F.softplus(constant.dt_proj.bias.detach()), torch.full((128,), 0.01), 1e-4)

    @pytest.mark.parametrize("dt_init", ["random", "constant"])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_a_reset_of_each_part_draws_as_the_constructor(self, dt_init: str, reverse: bool) -> None:
        """In the order of `modules()`, which resets a layer before its parts, and in that of `apply`."""
        layer = Mamba(64, dt_init=dt_init, dt_scale=0.5, dt_min=0.01, dt_max=0.02, bidirectional=True)
        for module in list(layer.modules())[:: -1 if reverse else 1]:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for suffix in ("", "_b"):
            dt_proj = getattr(layer, f"dt_proj{suffix}")
            steps, bound = F.softplus(dt_proj.bias), 0.5 * layer.dt_rank**-0.5
            assert 0.00999 < steps.min() < 0.0105 and 0.019 < steps.max() < 0.02001
            assert dt_proj.weight.min() < -0.9 * bound if dt_init == "random" else (dt_proj.weight == bound).all()
            assert dt_proj.weight.max() <= bound

    def test_automatic_rank_rounds_up(self) -> None:
        for d_model in (1, 16, 17, 100):
            assert Mamba(d_model, d_state=1).dt_proj.weight.shape[1] == math.ceil(d_model / 16)

    def test_dynamics_are_marked_for_optimizers_and_initialisers(self) -> None:
        parameters = dict(Mamba(4, bidirectional=True).named_parameters())
        marked = {k for k, p in parameters.items() if getattr(p, "_no_weight_decay", False)}
        kept = {k for k, p in parameters.items() if getattr(p, "_no_reinit", False)}
        assert kept == {"dt_proj.bias", "dt_proj_b.bias"}
        assert marked == {"A_log", "D", "A_b_log", "D_b"} | kept

    def test_round_trips(self) -> None:
        layer, x = Mamba(4, bidirectional=True), torch.randn(1, 6, 4)
        other = Mamba(4, bidirectional=True)
        other.load_state_dict(layer.state_dict(), strict=True)
        for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))

    def test_meta_device_and_dtype(self) -> None:
        layer = Mamba(4, bidirectional=True, device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
        assert layer(torch.empty(2, 5, 4, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 4)
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert all(p.isfinite().all() for p in layer.parameters())

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_hooks_of_the_convolution_run(self) -> None:
        """Weight norm of the old kind recomputes the weight in a hook of the module."""
        layer, x = Mamba(4), torch.randn(1, 6, 4)
        expected = layer(x)
        torch.nn.utils.weight_norm(layer.conv1d)
        assert_close("same", layer(x), expected, 1e-6)
        with torch.no_grad():
            layer.conv1d.weight_g.mul_(2)
        assert max_error(layer(x), expected) > 1e-4

    @pytest.mark.filterwarnings("ignore:torch")
    def test_dynamic_quantisation(self) -> None:
        layer, x = Mamba(16), torch.randn(2, 20, 16)
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {torch.nn.Linear})
        assert type(quantised.in_proj) is not torch.nn.Linear
        assert_close("out", quantised(x), layer(x), 0.05)
        assert_close("out", quantised.step(x, quantised.allocate_state(2))[0], layer(x), 0.05)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_a_mask_trains_under_a_compiler(self, bidirectional: bool) -> None:
        layer, x = Mamba(4, d_state=2, bidirectional=bidirectional), torch.randn(3, 5, 4)
        mask = torch.tensor([[True] * 5, [True, True, True, False, False], [False, True, True, True, True]])
        found = []
        for call in (layer, torch.compile(layer, backend="aot_eager")):
            given = x.clone().requires_grad_()
            found.append(torch.autograd.grad(call(given, mask).square().sum(), [given, *layer.parameters()]))
        for n, (eager, compiled) in enumerate(zip(*found, strict=True)):
            assert_close(f"gradient {n}", compiled, eager, 1e-6)

    def test_is_traced_whole(self) -> None:
        layer, x = Mamba(4, bidirectional=True), torch.randn(2, 6, 4)
        mask = torch.rand(2, 6) > 0.3
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert_close("out", compiled(x, mask), layer(x, mask), 1e-6)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"d_model": 0}, ("d_model must", "0", ">= 1")),
            ({"d_state": 0}, ("d_state must", "0", ">= 1")),
            ({"d_conv": 0}, ("d_conv must", "0", ">= 1")),
            ({"expand": 0.01}, ("expand must", "0.01")),
            ({"dt_rank": "full"}, ("dt_rank must", "'full'", "'auto'")),
            ({"dt_rank": 0}, ("dt_rank must", "0")),
            ({"dt_min": 0.1, "dt_max": 0.01}, ("dt_max must", "0.01", "0.1")),
            ({"dt_init": "zero"}, ("dt_init must", "'zero'", "'constant'")),
            ({"if_divide_out": True}, ("if_divide_out", "bidirectional=True")),
            ({"backend": "mamba_ssm"}, ("backend", "'mamba_ssm'", "choose")),
        ],
    )
    def test_construction(self, options: dict, parts: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=says(*parts)):
            Mamba(**{"d_model": 4, **options})

    @pytest.mark.parametrize(
        ("arguments", "error", "parts"),
        [
            ((torch.zeros(2, 5, 3),), ValueError, ("x must", r"\(2, 5, 3\)", "b, l, d_model")),
            ((torch.zeros(5, 4),), ValueError, ("x must", r"\(5, 4\)", "b, l, d_model")),
            ((torch.zeros(2, 0, 4),), ValueError, ("x must", r"\(2, 0, 4\)", "l >= 1")),
            ((torch.zeros(2, 5, 4).long(),), TypeError, ("x must", "int64")),
            ((torch.zeros(2, 5, 4), torch.ones(2, 5)), TypeError, ("mask must", "float32", "mask.bool")),
            ((torch.zeros(2, 5, 4), [True] * 5), TypeError, ("mask must", "list")),
            ((torch.zeros(2, 5, 4), torch.ones(1, 5).bool()), ValueError, ("mask must", r"\(2, 5\)", r"\(1, 5\)")),
        ],
    )
    def test_forward(self, arguments: tuple, error: type[Exception], parts: tuple[str, ...]) -> None:
        with pytest.raises(error, match=says(*parts)):
            Mamba(4)(*arguments)

    def test_streaming(self) -> None:
        layer = Mamba(4)
        with pytest.raises(ValueError, match=says("state.conv must", r"\(2, 8, 4\)", r"\(3, 8, 4\)")):
            layer.step(torch.zeros(2, 4), layer.allocate_state(3))
        with pytest.raises(TypeError, match=says("state must", "allocate_state", "Tensor")):
            layer.step(torch.zeros(2, 4), torch.zeros(2, 8, 4))
        with pytest.raises(ValueError, match=says("x must", r"\(2, 1, 5\)")):
            layer.step(torch.zeros(2, 5), layer.allocate_state(2))
        with pytest.raises(ValueError, match=says("step", "bidirectional=True")):
            Mamba(4, bidirectional=True).step(torch.zeros(2, 4), layer.allocate_state(2))
