"""The scan of Mamba-2, its layer and its norm, against the recurrence in float64, one position after the other."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from stand_ins import function, without_originals
from torch import Tensor, nn

from helpers import assert_close, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
SSD = "mamba_ssm.ops.triton.ssd_combined"
H, P, G, N = 6, 3, 2, 4


def make(length: int, batch: int = 2) -> dict[str, Tensor]:
    shapes = {"x": (batch, length, H, P), "dt": (batch, length, H), "B": (batch, length, G, N)}
    shapes |= {"C": (batch, length, G, N), "D": (H,), "z": (batch, length, H, P), "dt_bias": (H,)}
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return v | {"A": -3 * torch.rand(H, dtype=torch.float64), "initial_states": torch.randn(batch, H, P, N).double()}


def plain(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    initial_states: Tensor, seq_idx: Tensor | None = None, limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state, rows = initial_states, []
    step = (dt + dt_bias).exp().log1p().clamp(*limit)
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        entry, read = (v[:, t].repeat_interleave(H // G, 1)[:, :, None] for v in (B, C))  # b h 1 n
        state = (step[:, t] * A).exp()[..., None, None] * state + (step[:, t, :, None] * x[:, t])[..., None] * entry
        rows.append((state * read).sum(-1) + D.view(H, -1) * x[:, t])
    return torch.stack(rows, 1) * z / (1 + (-z).exp()), state


class TestScan:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
    def test_values_and_gradients(self, length: int, packed: bool) -> None:
        v = make(length)
        rows = {"seq_idx": torch.randint(0, 4, (2, length)).sort(1)[0].int()} if packed else {}
        options = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "return_final_states": True}
        scan, found, true = function(SSD, "mamba_chunk_scan_combined"), [], []
        for out, run in (
            (found, lambda: scan(chunk_size=256, **v, **rows, **options)),
            (true, lambda: plain(**v, **rows, limit=(0.1, 2.0))),
        ):
            for value in v.values():
                value.requires_grad_().grad = None
            y, state = run()
            (y.cos().sum() + state.sin().sum()).backward()
            out += [y, state, *(value.grad for value in v.values())]
        for name, a, b in zip(["y", "state", *v], found, true, strict=True):
            assert_close(name, a, b, 1e-11)

    def test_what_may_be_left_out(self) -> None:
        v, scan = make(9), function(SSD, "mamba_chunk_scan_combined")
        bare = scan(v["x"], v["dt"].exp(), v["A"], v["B"], v["C"], 64)
        zero = {"D": torch.zeros(H), "dt_bias": torch.zeros(H), "initial_states": torch.zeros(2, H, P, N)}
        steps = (v["dt"].exp().exp() - 1).log()  # whose softplus is exp(dt)
        ungated = plain(**v | zero | {"dt": steps, "z": torch.full_like(v["z"], 1e9)})[0] / 1e9
        assert_close("y", bare, ungated, 1e-12)
        by_channel = torch.randn(H, P).double()
        more = scan(v["x"], v["dt"].exp(), v["A"], v["B"], v["C"], 64, by_channel)
        assert_close("D", more - bare, by_channel * v["x"], 1e-12)

    @pytest.mark.parametrize("rate", [-1e4, -1e7, -1e30])
    def test_a_step_that_forgets_everything_costs_no_digits(self, rate: float) -> None:
        v = {name: x.float() for name, x in make(70).items()}
        v |= {"A": torch.full((H,), rate / 100), "dt_bias": torch.zeros(H)}
        v["dt"][:, :20] = v["dt"][:, 21:] = -math.log(-rate)  # steps of about 1 / |rate|
        v["dt"][:, 20] = 100.0
        for value in v.values():
            value.requires_grad_()
        y = function(SSD, "mamba_chunk_scan_combined")(chunk_size=64, **v, dt_softplus=True)
        true, _ = plain(**{name: x.detach().double() for name, x in v.items()})
        assert_close("y", y, true, 1e-5)
        y.sum().backward()
        assert all(value.grad.isfinite().all() for value in v.values())

    def test_few_graphs_serve_every_length(self) -> None:
        graphs = []

        def count(module: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            graphs.append(module)
            return module

        scan = function(SSD, "mamba_chunk_scan_combined")
        compiled = torch.compile(lambda **v: scan(chunk_size=64, dt_softplus=True, **v), backend=count, fullgraph=True)
        for length in (5, 70, 200, 64, 129, 700, 31):
            v = make(length)
            assert_close("y", compiled(**v), scan(chunk_size=64, dt_softplus=True, **v), 1e-12)
        assert len(graphs) <= 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        v = {name: x.to(dtype) if name in ("x", "B", "C", "z", "dt") else x.float() for name, x in make(70).items()}
        y, state = function(SSD, "mamba_chunk_scan_combined")(
            chunk_size=64, **v, dt_softplus=True, return_final_states=True
        )
        true, last = plain(**{name: x.double() for name, x in v.items()})
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        assert_close("y", y, true, 1e-5 if dtype == torch.float32 else 0.006)
        assert_close("state", state, last, 1e-5)

    def test_wrong_calls(self) -> None:
        v, scan = make(5), function(SSD, "mamba_chunk_scan_combined")
        with pytest.raises(ValueError, match=says("C must have shape", "b, l, g, n")):
            scan(chunk_size=64, **v | {"C": v["C"][:, :4]})
        with pytest.raises(ValueError, match=says("heads of x", "groups of B")):
            scan(chunk_size=64, **v | {name: v[name][:, :, :1].expand(-1, -1, 4, -1) for name in ("B", "C")})
        with pytest.raises(ValueError, match=says("seq_idx must have shape", "b, l")):
            scan(chunk_size=64, **v, seq_idx=torch.zeros(2, 4, dtype=torch.int32))
        with pytest.raises(ValueError, match=says("D must have shape", "h, p")):
            scan(chunk_size=64, **v | {"D": torch.zeros(H, P + 1).double()})
        with pytest.raises(ValueError, match="at least one position"):
            scan(chunk_size=64, **make(0))
        with pytest.raises(NotImplementedError, match="return_varlen_states"):
            scan(chunk_size=64, **v, return_varlen_states=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_with_a_gate(kind: str, groups: int, before: bool) -> None:
    make_norm = function("mamba_ssm.ops.triton.layernorm_gated", kind)
    norm = make_norm(6, 1e-3, 6 // groups, before, dtype=torch.float64)
    for p in norm.parameters():
        nn.init.normal_(p)
    x, z = torch.randn(2, 2, 5, 6, dtype=torch.float64)

    def normalized(x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (groups, -1))
        if kind == "LayerNorm":
            parts = parts - parts.mean(-1, keepdim=True)
        parts = parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return parts.flatten(-2) * norm.weight + (0 if norm.bias is None else norm.bias)

    gate = z / (1 + (-z).exp())
    assert_close("plain", norm(x), normalized(x), 1e-13)
    assert_close("gated", norm(x, z), normalized(x) * gate if before else normalized(x * gate), 1e-13)
    assert norm.float().bfloat16()(x.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


def layer(name: str = "Mamba2", **options: object) -> nn.Module:
    module = {"Mamba2": "mamba_ssm", "Mamba2Simple": "mamba_ssm.modules.mamba2_simple"}[name]
    made = function(module, name)(**{"d_model": 6, "d_state": N, "headdim": P, "dtype": torch.float64} | options)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def expected(made: nn.Module, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """The layer from its parameters: the parts of the projection, taps, recurrence, norm."""
    p, heads, groups, inner = dict(made.named_parameters()), made.nheads, made.ngroups, made.d_ssm
    convolved, plain_width = inner + 2 * groups * N, made.d_inner - inner
    projected = u @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)
    gate, skipped, z, xBC, dt = projected.split([plain_width, plain_width, inner, convolved, heads], -1)
    columns = []
    for t in range(u.shape[1]):
        taps = [(j, t - made.d_conv + 1 + j) for j in range(made.d_conv) if t - made.d_conv + 1 + j >= 0]
        if seq_idx is not None:
            kept = {s: (seq_idx[:, s] == seq_idx[:, t])[:, None] for _, s in taps}
        total = sum(p["conv1d.weight"][:, 0, j] * xBC[:, s] * (1 if seq_idx is None else kept[s]) for j, s in taps)
        columns.append(F.silu(total + p.get("conv1d.bias", 0.0)))
    x, B, C = torch.stack(columns, 1).split([inner, groups * N, groups * N], -1)
    x, z_heads = (v.unflatten(-1, (heads, -1)) for v in (x, z))
    B, C = (v.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for v in (B, C))  # b l h n
    step = (dt + p["dt_bias"]).exp().log1p().clamp(*made.dt_limit)
    state = p["init_states"] if "init_states" in p else torch.zeros(heads, P, N).double()
    state, rows = state.expand(len(u), -1, -1, -1), []
    for t in range(u.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        entry = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = (-step[:, t] * p["A_log"].exp()).exp()[..., None, None] * state + entry
        rows.append((state * C[:, t, :, None]).sum(-1) + p["D"].view(heads, -1) * x[:, t])
    y = torch.stack(rows, 1)  # b l h p
    if made.rmsnorm:
        y, parts = y.flatten(-2), inner // groups
        y = y if made.norm_before_gate else y * F.silu(z)
        normalized = y.unflatten(-1, (-1, parts))
        normalized = normalized / (normalized.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = normalized.flatten(-2) * p["norm.weight"]
        y = y * F.silu(z) if made.norm_before_gate else y
    else:
        y = (y * F.silu(z_heads)).flatten(-2)
    y = torch.cat([F.silu(gate) * skipped, y], -1)
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)


OPTIONS = [
    {},
    {"ngroups": 2, "D_has_hdim": True, "bias": True},
    {"rmsnorm": False, "conv_bias": False, "d_conv": 3},
    {"d_ssm": 6, "norm_before_gate": True, "dt_limit": (0.1, 0.9)},
    {"name": "Mamba2Simple", "learnable_init_states": True, "ngroups": 2},
]


class TestLayer:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_equals_its_formula(self, options: dict, packed: bool) -> None:
        made, u = layer(**options), torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
        rows = torch.randint(0, 3, (2, 11)).sort(1)[0].int() if packed else None
        out, true = made(u, seq_idx=rows), expected(made, u, rows)
        assert_close("y", out, true, 1e-11)
        wanted = {"u": u, **dict(made.named_parameters())}
        found, grads = (torch.autograd.grad(y.cos().sum(), list(wanted.values())) for y in (out, true))
        for name, a, b in zip(wanted, found, grads, strict=True):
            assert_close(f"d{name}", a, b, 1e-9)

    @pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
    def test_positions_one_by_one_equal_the_whole(self, options: dict) -> None:
        made, u = layer(**options, layer_idx=3), torch.randn(2, 9, 6, dtype=torch.float64)
        memory = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        pieces = [made(u[:, :5], inference_params=memory)]
        for t in range(5, 9):
            memory.seqlen_offset = t
            pieces.append(made(u[:, t : t + 1], inference_params=memory))
        assert_close("y", torch.cat(pieces, 1), made(u), 1e-11)
        assert list(memory.key_value_memory_dict) == [3]

    def test_gradients_through_a_cache(self) -> None:
        """The state is overwritten before the backward pass reads it."""
        made, u = layer(layer_idx=0), torch.randn(2, 1, 6).double()
        wanted = list(made.parameters())
        true = torch.autograd.grad(expected(made, u).cos().sum(), wanted)
        out = made.step(u, *made.allocate_inference_cache(2, 0))[0]
        for name, a, b in zip(
            dict(made.named_parameters()), torch.autograd.grad(out.cos().sum(), wanted), true, strict=True
        ):
            assert_close(f"d{name}", a, b, 1e-11)

    def test_attributes_of_the_originals(self) -> None:
        made = layer(sequence_parallel=False)
        assert (made.process_group, made.sequence_parallel, made.world_size, made.local_rank) == (None, False, 1, 0)
        simple = layer("Mamba2Simple", activation="swish", use_mem_eff_path=False)
        assert (simple.activation, simple.use_mem_eff_path) == ("swish", False)

    def test_rates_stay_in_float32_under_another_default(self) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            made = layer(dtype=None)
        finally:
            torch.set_default_dtype(before)
        assert (made.A_log.dtype, made.in_proj.weight.dtype) == (torch.float32, torch.bfloat16)

    def test_flat_sequences(self) -> None:
        made, u = layer(), torch.randn(2, 5, 6, dtype=torch.float64)
        assert torch.equal(made(u.flatten(0, 1), seqlen=5), made(u).flatten(0, 1))

    def test_initial_values_and_marks(self) -> None:
        made = function("mamba_ssm.modules.mamba2", "Mamba2")(64, d_state=8, headdim=8, dtype=torch.bfloat16)
        assert made.D.dtype == torch.float32 and (made.D == 1).all()
        steps, rates = F.softplus(made.dt_bias.float()), made.A_log.float().exp()
        assert steps.min() > 0.0009 and steps.max() < 0.11 and rates.min() > 0.99 and rates.max() < 16.2
        assert made.no_weight_decay() == {"A_log", "D", "dt_bias"}
        keys = ["dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight"]
        assert list(made.state_dict()) == [*keys, "out_proj.weight"]
        assert made(torch.randn(1, 3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_arguments_of_the_originals(self) -> None:
        ours = list(inspect.signature(function("mamba_ssm", "Mamba2")).parameters)
        assert ours[:8] == ["d_model", "d_state", "d_conv", "conv_init", "expand", "headdim", "d_ssm", "ngroups"]
        assert ours[8:12] == ["A_init_range", "D_has_hdim", "rmsnorm", "norm_before_gate"]
        assert ours[12:18] == ["dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias", "conv_bias"]
        assert ours[18:21] == ["chunk_size", "use_mem_eff_path", "layer_idx"]
        assert ours[21:] == ["process_group", "sequence_parallel", "device", "dtype"]

    def test_wrong_calls(self) -> None:
        with pytest.raises(ValueError, match=says("d_ssm", "headdim")):
            layer(headdim=5)
        for options, told in (
            ({"expand": 1.25}, ("expand", "d_model=6", "whole number")),
            ({"A_init_range": (0, 1)}, (r"A_init_range\[0\]", "got 0")),
            ({"A_init_range": (2, 1)}, (r"A_init_range\[1\]", "got 1")),
            ({"dt_min": 0.0}, ("dt_min", "got 0.0")),
            ({"ngroups": 0}, ("ngroups", "got 0")),
        ):
            with pytest.raises(ValueError, match=says(*told)):
                layer(**options)
        with pytest.raises(ValueError, match=says("number of heads", "ngroups")):
            layer(ngroups=3)
        with pytest.raises(NotImplementedError, match="process_group"):
            layer(process_group=object())
        with pytest.raises(NotImplementedError, match="cu_seqlens"):
            layer()(torch.zeros(1, 4, 6).double(), cu_seqlens=torch.tensor([0, 4]))
        with pytest.raises(ValueError, match=says("u must have shape", "d_model")):
            layer()(torch.zeros(1, 4, 5).double())
        with pytest.raises(ValueError, match="activation must be"):
            layer("Mamba2Simple", activation="relu")
        with pytest.raises(ValueError, match="pass headdim"):
            function(SSD, "mamba_split_conv1d_scan_combined")(
                torch.zeros(1, 4, 30), torch.zeros(12, 4), None, torch.zeros(2), torch.zeros(2), torch.zeros(2), 64
            )
