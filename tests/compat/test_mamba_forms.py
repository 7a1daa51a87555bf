"""The class Mamba in all its published forms, and the functions for a block without its input projection."""

from __future__ import annotations

import ast
import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from stand_ins import ROOT, function, without_originals
from torch import Tensor, nn

from helpers import Golden, assert_close, gradients, max_error, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def mamba(**options: object) -> nn.Module:
    return function("mamba_ssm", "Mamba")(**options)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def convolve(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # b l d
    """The causal filter of every channel, tap by tap, and SiLU."""
    taps, columns = weight.shape[-1], []
    for t in range(u.shape[1]):
        total = sum(weight[:, 0, j] * u[:, t - taps + 1 + j] for j in range(taps) if t - taps + 1 + j >= 0)
        columns.append(total if bias is None else total + bias)
    return silu(torch.stack(columns, 1))


def project(v: Tensor, x_proj: Tensor, dt_proj: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    projected, r = v @ x_proj.T, dt_proj.shape[1]
    return projected[..., :r] @ dt_proj.T, projected[..., r : r + n], projected[..., r + n :]


def recurrence(v: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:  # b l d
    """The gated scan, one position after the other; the step has its bias and softplus already."""
    state, rows = v.new_zeros(v.shape[0], *A.shape), []
    for t in range(v.shape[1]):
        entry = (step[:, t] * v[:, t])[..., None] * B[:, t, None]
        state = (step[:, t, :, None] * A).exp() * state + entry
        rows.append(((state * C[:, t, None]).sum(-1) + D * v[:, t]) * silu(z[:, t]))
    return torch.stack(rows, 1)


def one_scan(p: dict[str, Tensor], u: Tensor, z: Tensor, suffix: str = "", order: list[int] | None = None) -> Tensor:
    """The block with the weights `..._suffix`, on the positions in the given order and back."""
    order = list(range(u.shape[1])) if order is None else order
    A = -p[f"A{suffix}_log"].exp()
    v = convolve(u[:, order], p[f"conv1d{suffix}.weight"], p.get(f"conv1d{suffix}.bias"))
    dt, B, C = project(v, p[f"x_proj{suffix}.weight"], p[f"dt_proj{suffix}.weight"], A.shape[1])
    step = (dt + p[f"dt_proj{suffix}.bias"]).exp().log1p()
    y = recurrence(v, step, A, B, C, p[f"D{suffix}"], z[:, order])
    out = torch.empty_like(y)
    out[:, order] = y
    return out


def expected(layer: nn.Module, x: Tensor, third: bool = False) -> Tensor:
    p = dict(layer.named_parameters())
    u, z = (x @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)).chunk(2, -1)
    length, form = x.shape[1], layer.bimamba_type
    y = one_scan(p, u, z)
    if form in ("v2", "v3"):
        y = y + one_scan(p, u, z, "_b", list(range(length))[::-1])
    if form == "v3":
        slices, size = layer.nslices, length // layer.nslices
        y = y + one_scan(p, u, z, "_s", [part * size + i for i in range(size) for part in range(slices)])
    if third:
        y = y / 3
    if form == "v1":
        v = convolve(u, p["conv1d.weight"], p.get("conv1d.bias"))
        dt, B, C = project(v, p["x_proj.weight"], p["dt_proj.weight"], layer.d_state)
        step = (dt + p["dt_proj.bias"]).exp().log1p()
        reverse = (v.flip(1), step.flip(1), -p["A_b_log"].exp(), B.flip(1), C.flip(1), p["D"], z.flip(1))
        y = y + recurrence(*reverse).flip(1)
    y = y / 2 if layer.if_divide_out else y
    y = y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)
    return y * p["gamma"] if "gamma" in p else y


class TestMamba:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"bimamba_type": "v1", "d_conv": 2},
            {"bimamba_type": "v1", "bias": True, "conv_bias": False, "init_layer_scale": 0.5},
            {"bimamba_type": "v2", "init_layer_scale": 0.1},
            {"bimamba_type": "v2", "if_divide_out": True, "bias": True},
            {"bimamba_type": "v2", "if_devide_out": True},
            {"bimamba": True},
            {"bimamba": False},
            {"bimamba_type": "v3", "nslices": 4},
            {"bimamba_type": "v3", "nslices": 3, "conv_bias": False},
            {"bimamba_type": "v3", "nframes": 4},
            {"bimamba_type": None},
        ],
        ids=str,
    )
    def test_every_form_equals_its_formula(self, options: dict) -> None:
        layer = mamba(d_model=6, d_state=3, dtype=torch.float64, **options)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.startswith("A"):
                    parameter.add_(torch.rand_like(parameter))
        x = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)
        out, true = layer(x), expected(layer, x, "nframes" in options)  # Vivim takes a third of the sum
        assert_close("out", out, true, 1e-12)
        wanted = [x, *layer.parameters()]
        grads, true_grads = (torch.autograd.grad(y.cos().sum(), wanted) for y in (out, true))
        for name, grad, true_grad in zip(["x", *dict(layer.named_parameters())], grads, true_grads, strict=True):
            assert grad.abs().max() > 0, name
            assert_close(f"d{name}", grad, true_grad, 1e-11)

    def test_code_that_calls_the_parts_computes_the_same(self) -> None:
        """As in a subclass with a forward pass of its own: a causal convolution, `act`, projections with their bias."""
        layer, x = mamba(d_model=6, d_state=3, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
        u, z = layer.in_proj(x).mT.chunk(2, 1)
        assert (layer.conv1d.padding, layer.activation) == ((3,), "silu")
        v = layer.act(layer.conv1d(u)[..., :9]).mT
        low, B, C = layer.x_proj(v).split([layer.dt_rank, 3, 3], -1)
        step = layer.dt_proj(low).exp().log1p()
        y = layer.out_proj(recurrence(v, step, -layer.A_log.exp(), B, C, layer.D, z.mT))
        assert_close("y", y, layer(x), 1e-12)

    def test_the_third_form_without_parts_is_told(self) -> None:
        with pytest.warns(UserWarning, match="taken for Vivim's form, a third of the sum; pass nslices"):
            told = mamba(d_model=4, bimamba_type="v3")
        given = mamba(d_model=4, bimamba_type="v3", nframes=5)
        given.load_state_dict(told.state_dict())
        x = torch.randn(1, 10, 4)
        assert torch.equal(told(x), given(x))

    def test_another_linear_layer_may_take_the_place_of_the_step_projection(self) -> None:
        layer, x = mamba(d_model=4), torch.randn(1, 10, 4)
        before, other = layer(x), nn.Linear(layer.dt_rank, layer.d_inner)
        other.load_state_dict(layer.dt_proj.state_dict())
        layer.dt_proj = other
        assert torch.equal(layer(x), before)

    @pytest.mark.parametrize("form", ["none", "v1", "v2", "v3"])
    def test_dynamics_stay_in_float32(self, form: str) -> None:
        layer = mamba(d_model=6, d_state=3, dtype=torch.bfloat16, bimamba_type=form, nslices=5)
        dynamics = {name: p for name, p in layer.named_parameters() if name[0] in "AD"}
        assert {p.dtype for p in dynamics.values()} == {torch.float32}
        assert {p.dtype for name, p in layer.named_parameters() if name not in dynamics} == {torch.bfloat16}
        assert torch.equal(layer.A_log[0], torch.arange(1, 4).float().log())
        assert layer(torch.randn(2, 10, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16

    @pytest.mark.parametrize("form", ["none", "v1", "v2", "v3"])
    def test_hooks_of_all_parts_run(self, form: str) -> None:
        layer, ran = mamba(d_model=6, bimamba_type=form, nslices=2), set()
        for name, part in layer.named_children():
            part.register_forward_hook(lambda *_, name=name: ran.add(name))
        layer(torch.randn(1, 8, 6))
        assert ran == {name for name, _ in layer.named_children()} - {"act"}

    def test_a_cache_of_another_dtype(self) -> None:
        layer, x = mamba(d_model=6, dtype=torch.bfloat16), torch.randn(2, 3, 6, dtype=torch.bfloat16)
        conv, scan = layer.allocate_inference_cache(2, 0, dtype=torch.float32)
        pieces = [layer.step(x[:, t : t + 1], conv, scan)[0] for t in range(3)]
        assert conv.dtype == scan.dtype == torch.float32
        assert_close("y", torch.cat(pieces, 1), layer(x), 0.02)

    @pytest.mark.parametrize("name", ["mamba_0", "mamba_1", "mamba_vim_v2_0", "mamba_vim_v2_1"])
    def test_equals_the_originals(self, name: str) -> None:
        file = Golden.load(ROOT / "tests" / "golden" / f"{name}.npz")
        layer = function("mamba_ssm.modules.mamba_simple", "Mamba")(**ast.literal_eval(file.meta))
        layer.load_state_dict(file.state, strict=True)
        x = file.input.clone().requires_grad_()
        out = layer(x)
        out.backward(file.grad_output)
        assert_close("output", out, file.output, 2e-5)
        for key, grad in {"input": x.grad, **{k: p.grad for k, p in layer.named_parameters()}}.items():
            assert_close(f"grad {key}", grad, file.grad[key], 2e-5)

    def test_arguments_of_the_originals(self) -> None:
        ours = list(inspect.signature(function("mamba_ssm", "Mamba")).parameters)
        assert ours[:5] == ["d_model", "d_state", "d_conv", "expand", "dt_rank"]
        assert ours[5:10] == ["dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"]
        assert ours[10:16] == ["conv_bias", "bias", "use_fast_path", "layer_idx", "device", "dtype"]
        later = {"bimamba_type", "if_divide_out", "init_layer_scale", "nslices", "nframes", "if_devide_out", "bimamba"}
        assert set(ours[16:]) == later
        layer = mamba(d_model=4, layer_idx=3, use_fast_path=False)
        assert (layer.layer_idx, layer.d_inner, layer.dt_rank, layer.expand) == (3, 8, 1, 2)

    def test_generation(self) -> None:
        """A prompt, then position by position, with the cache that `mamba_ssm` hands from layer to layer."""
        layer, x = mamba(d_model=6, layer_idx=2, init_layer_scale=0.5), torch.randn(2, 9, 6)
        memory = function("mamba_ssm.utils.generation", "InferenceParams")(max_seqlen=9, max_batch_size=2)
        memory.lengths_per_sample = torch.ones(2)
        with torch.no_grad():
            for _ in range(2):  # a second prompt begins anew in the same cache
                memory.reset(9, 2)
                assert memory.seqlen_offset == 0 and not memory.lengths_per_sample.any()
                pieces = [layer(x[:, :3], inference_params=memory)]
                for t in range(3, 9):
                    memory.seqlen_offset = t
                    pieces.append(layer(x[:, t : t + 1], inference_params=memory))
                assert max_error(torch.cat(pieces, 1), layer(x)) <= 1e-6
        conv_state, ssm_state = memory.key_value_memory_dict[2]
        assert (tuple(conv_state.shape), tuple(ssm_state.shape)) == ((2, 12, 4), (2, 12, 16))
        assert layer.allocate_inference_cache(2, 100, dtype=torch.bfloat16)[1].dtype == torch.bfloat16
        out, *states = layer.step(x[:, :1], conv_state, ssm_state)
        assert out.shape == (2, 1, 6) and states[0] is conv_state and states[1] is ssm_state

    @pytest.mark.parametrize("length", [1, 5])
    def test_gradients_through_a_cache(self, length: int) -> None:
        """The state is overwritten before the backward pass reads it."""
        layer = mamba(d_model=6, d_state=3, layer_idx=0, dtype=torch.float64)
        x, wanted = torch.randn(2, 5, 6).double(), list(layer.parameters())
        true = torch.autograd.grad(expected(layer, x)[:, :length].cos().sum(), wanted)
        memory = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        cache = layer.allocate_inference_cache(2, 0)
        for out in (layer(x[:, :length], inference_params=memory), layer.step(x[:, :length], *cache)[0]):
            grads = torch.autograd.grad(out.cos().sum(), wanted)
            for name, grad, true_grad in zip(dict(layer.named_parameters()), grads, true, strict=True):
                assert_close(f"d{name}", grad, true_grad, 1e-11)

    def test_steps_without_gradients_copy_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x = mamba(d_model=6), torch.randn(2, 1, 6)
        cache = layer.allocate_inference_cache(2, 0)
        monkeypatch.setattr(Tensor, "clone", None)
        with torch.no_grad():
            layer.step(x, *cache)

    def test_steps_are_scaled_as_the_whole_is(self) -> None:
        layer, x = mamba(d_model=8, init_layer_scale=0.5), torch.randn(2, 3, 8)
        states, outs = layer.allocate_inference_cache(2, 3), []
        for t in range(3):
            out, *states = layer.step(x[:, t : t + 1], *states)
            outs.append(out)
        assert_close("out", torch.cat(outs, 1), layer(x), 1e-6)

    def test_reset_and_copies(self) -> None:
        layer = mamba(d_model=4, bimamba_type="v1", init_layer_scale=0.5, device="meta").to_empty(device="cpu")
        layer.reset_parameters()
        assert (layer.gamma == 0.5).all() and torch.equal(layer.A_b_log, layer.A_log)
        x = torch.randn(1, 5, 4)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    def test_the_second_recurrence_is_marked_in_every_copy(self) -> None:
        layer = copy.deepcopy(mamba(d_model=4, bimamba_type="v1"))
        assert layer.no_weight_decay() == {"A_log", "A_b_log", "D", "dt_proj.bias"}
        assert layer.A_b_log._no_weight_decay

    def test_wrong_calls(self) -> None:
        with pytest.raises(ValueError, match=says("bimamba_type must", "'v4'", "'v3'")):
            mamba(d_model=4, bimamba_type="v4")
        for slices in ({"nslices": 5}, {"nframes": 5}):
            with pytest.raises(ValueError, match=says(f"multiple of {next(iter(slices))}=5", "12")):
                mamba(d_model=4, bimamba_type="v3", **slices)(torch.zeros(1, 12, 4))
        memory = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        with pytest.raises(ValueError, match=says("layer_idx")):
            mamba(d_model=4)(torch.zeros(1, 2, 4), inference_params=memory)
        for form in ("v1", "v2"):
            with pytest.raises(ValueError, match=says("forwards only")):
                mamba(d_model=4, layer_idx=0, bimamba_type=form)(torch.zeros(1, 2, 4), memory)


class TestInnerFunctions:
    """`xz` is b 2d l here, as in the originals."""

    D, N, R = 4, 3, 2

    def inputs(self, *more: str) -> dict[str, Tensor]:
        d, n, r = self.D, self.N, self.R
        shapes = {
            "xz": (2, 2 * d, 7),
            "conv1d_weight": (d, 1, 3),
            "conv1d_bias": (d,),
            "x_proj_weight": (r + 2 * n, d),
            "delta_proj_weight": (d, r),
            "A": (d, n),
            "D": (d,),
            "delta_bias": (d,),
            **{"out_proj_weight": (5, d), "out_proj_bias": (5,), "A_b": (d, n)},
            **{"B_proj_bias": (n,), "C_proj_bias": (n,)},
            **{"b_rms_weight": (n,), "c_rms_weight": (n,), "dt_rms_weight": (d,)},
        }
        names = (*list(shapes)[:8], *more)
        made = {name: torch.randn(shapes[name], dtype=torch.float64) for name in names}
        return {name: -x.abs() if name in ("A", "A_b") else x for name, x in made.items()}

    def plain(self, softplus: bool = True, eps: float = 0.0, **p: Tensor) -> Tensor:
        u, z = p["xz"].mT.chunk(2, -1)  # b l d
        v = convolve(u, p["conv1d_weight"], p["conv1d_bias"])
        dt, B, C = project(v, p["x_proj_weight"], p["delta_proj_weight"], self.N)
        B, C = B + p.get("B_proj_bias", 0.0), C + p.get("C_proj_bias", 0.0)

        def normed(x: Tensor, weight: str) -> Tensor:
            if weight not in p:
                return x
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p[weight]

        dt, B, C = normed(dt, "dt_rms_weight"), normed(B, "b_rms_weight"), normed(C, "c_rms_weight")
        step = dt + p["delta_bias"]
        step = step.exp().log1p() if softplus else step
        y = recurrence(v, step, p["A"], B, C, p["D"], z)
        if "A_b" in p:
            y = y + recurrence(*(x if x.ndim < 3 else x.flip(1) for x in (v, step, p["A_b"], B, C, p["D"], z))).flip(1)
        if "out_proj_weight" not in p:
            return y.mT
        return y @ p["out_proj_weight"].T + p["out_proj_bias"]

    @pytest.mark.parametrize(
        ("name", "more"),
        [
            ("mamba_inner_fn", ("out_proj_weight", "out_proj_bias")),
            ("mamba_inner_fn", ("out_proj_weight", "out_proj_bias", "B_proj_bias", "C_proj_bias")),
            ("mamba_inner_fn", ("out_proj_weight", "out_proj_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight")),
            ("mamba_inner_fn_no_out_proj", ()),
            ("mamba_inner_fn_no_out_proj", ("B_proj_bias", "C_proj_bias")),
            ("bimamba_inner_fn", ("out_proj_weight", "out_proj_bias", "A_b", "B_proj_bias")),
        ],
    )
    def test_values_and_gradients(self, name: str, more: tuple[str, ...]) -> None:
        fn = function(INTERFACE, name)
        for softplus in (True, False):
            options = {"b_c_dt_rms_eps": 0.1} if "b_rms_weight" in more else {}
            inputs = self.inputs(*more)
            out, grads = gradients(lambda **x: fn(**x, delta_softplus=softplus, **options), inputs)  # noqa: B023
            true, true_grads = gradients(lambda **x: self.plain(softplus, 0.1, **x), inputs)  # noqa: B023
            assert_close("out", out, true, 1e-11)
            for key, grad in grads.items():
                assert_close(f"d{key}", grad, true_grads[key], 1e-10)

    def test_given_projections(self) -> None:
        """B and C may be given, constant or not; then the projection makes the step alone."""
        fn, scan = function(INTERFACE, "mamba_inner_fn_no_out_proj"), function(INTERFACE)
        x = self.inputs()
        x["x_proj_weight"] = x["x_proj_weight"][: self.R]
        u, z = x["xz"].chunk(2, 1)
        v = convolve(u.mT, x["conv1d_weight"], x["conv1d_bias"])
        delta = (v @ x["x_proj_weight"].T @ x["delta_proj_weight"].T).mT
        for shape in ((self.D, self.N), (2, self.N, 7), (2, 2, self.N, 7)):
            B, C = torch.randn(2, *shape, dtype=torch.float64)
            true = scan(v.mT, delta, x["A"], B, C, x["D"], z, x["delta_bias"], True)
            assert_close("out", fn(**x, B=B, C=C), true, 1e-12)

    def test_places_of_arguments(self) -> None:
        x = self.inputs("out_proj_weight", "out_proj_bias", "A_b")
        weights = [x[k] for k in ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight")]
        out, ends = [x["out_proj_weight"], x["out_proj_bias"]], [None, None, x["D"], x["delta_bias"], None, None, True]
        one = self.plain(**{k: v for k, v in x.items() if not k.startswith(("out", "A_b"))})
        assert_close(
            "no_out_proj", function(INTERFACE, "mamba_inner_fn_no_out_proj")(*weights, x["A"], *ends), one, 1e-12
        )
        with_out = one.mT @ out[0].T + out[1]
        assert_close("inner", function("mamba_ssm", "mamba_inner_fn")(*weights, *out, x["A"], *ends), with_out, 1e-12)
        both = function("mamba_ssm", "bimamba_inner_fn")(*weights, *out, x["A"], x["A_b"], *ends)
        assert_close("both", both, self.plain(**x), 1e-12)

    @pytest.mark.parametrize("name", ["mamba_inner_fn", "bimamba_inner_fn"])
    def test_autocast(self, name: str) -> None:
        x = self.inputs("out_proj_weight", "out_proj_bias", *(("A_b",) if name.startswith("bi") else ()))
        fn, single = function(INTERFACE, name), {k: v.float().requires_grad_() for k, v in x.items()}
        with torch.autocast("cpu", torch.bfloat16):
            out = fn(**single)
            out.float().sum().backward()
        assert_close("out", out, self.plain(**x), 0.03)
        assert all(v.grad.isfinite().all() and v.grad.abs().max() > 0 for v in single.values())
