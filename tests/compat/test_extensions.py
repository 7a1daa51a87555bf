"""Values and gradients of the stand-ins for compiled extensions, called from an autograd Function, as users do."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from stand_ins import EXTENSIONS, assert_equals_reference, function, make_inputs, without_originals
from torch import Tensor

from helpers import assert_close, gradients, says
from kan_mamba_layers import selective_scan

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]


class Scan(torch.autograd.Function):
    """`module` is one of the three extensions; only selective_scan_cuda knows `z`, and not `nrows`."""

    @staticmethod
    def forward(ctx, module, softplus, u, delta, A, B, C, D, bias, z):
        gate, nrows = ([z], []) if module.__name__ == "selective_scan_cuda" else ([], [1])
        out, x, *gated = module.fwd(u, delta, A, B, C, D, *gate, bias, softplus, *nrows)
        ctx.module, ctx.softplus = module, softplus
        ctx.save_for_backward(u, delta, A, B, C, D, bias, z, x, out)
        return gated[0] if gated else out

    @staticmethod
    def backward(ctx, dout):
        *inputs, bias, z, x, out = ctx.saved_tensors
        if ctx.module.__name__ == "selective_scan_cuda":
            grads = ctx.module.bwd(*inputs, z, bias, dout, x, out, None, ctx.softplus, False)
        else:
            grads = ctx.module.bwd(*inputs, bias, dout, x, ctx.softplus, 1)
        return None, None, *grads, *([None] if z is None else [])


def scan_with(name: str, softplus: bool = False) -> Callable[..., Tensor]:
    module = importlib.import_module(name)

    def run(u, delta, A, B, C, D=None, delta_bias=None, z=None) -> Tensor:
        return Scan.apply(module, softplus, u, delta, A, B, C, D, delta_bias, z)

    return run


class TestExtensions:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("softplus", [False, True])
    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_equals_the_reference(self, name: str, softplus: bool, dtype: torch.dtype) -> None:
        run = scan_with(name, softplus)
        assert_equals_reference(run, make_inputs(dtype), delta_softplus=softplus)
        for absent in ("D", "delta_bias"):
            inputs = {k: v for k, v in make_inputs(dtype).items() if k != absent}
            assert_equals_reference(run, inputs, delta_softplus=softplus)
        if name == "selective_scan_cuda":
            assert_equals_reference(run, make_inputs(dtype, z=True), delta_softplus=softplus)
            assert_equals_reference(run, make_inputs(dtype, form="dn"), delta_softplus=softplus)

    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_gradcheck(self, name: str) -> None:
        x = make_inputs()
        run = scan_with(name, True)
        inputs = tuple(v[..., :2].requires_grad_() if v.ndim > 2 else v.requires_grad_() for v in x.values())
        assert torch.autograd.gradcheck(run, inputs)

    @pytest.mark.parametrize("name", EXTENSIONS[1:])
    def test_neighbouring_channels_may_share_a_row_of_delta(self, name: str) -> None:
        x = make_inputs(rows=2)
        out, grads = gradients(scan_with(name, True), x)

        def expected(delta: Tensor, delta_bias: Tensor, **rest: Tensor) -> Tensor:
            full = {"delta": delta.repeat_interleave(3, 1), "delta_bias": delta_bias.repeat_interleave(3)}
            return selective_scan(**rest, **full, delta_softplus=True, backend="reference")

        true, true_grads = gradients(expected, x)
        assert_close("out", out, true, 1e-12)
        for k, grad in grads.items():
            assert_close(f"d{k}", grad, true_grads[k], 1e-12)

    @pytest.mark.parametrize("name", EXTENSIONS)
    def test_results_are_the_originals(self, name: str) -> None:
        """Dtypes, None for what was not given, the last state inside `x`, and no graph through `fwd`."""
        module = importlib.import_module(name)
        x = {k: v.requires_grad_() for k, v in make_inputs(torch.bfloat16).items()}
        common = [x[k] for k in ("u", "delta", "A", "B", "C", "D")]
        gate = [None] if name == "selective_scan_cuda" else []
        out, states = module.fwd(*common, *gate, x["delta_bias"], True)
        last = selective_scan(**x, delta_softplus=True, return_last_state=True)[1]
        assert (out.dtype, out.requires_grad, states.dtype) == (torch.bfloat16, False, torch.float32)
        assert torch.equal(states[:, :, -1, 1::2], last)
        rest = [None, None, True, False] if gate else [True]
        grads = module.bwd(*common[:5], None, *gate, None, out, states, *rest)
        assert [None if g is None else g.dtype for g in grads] == [*(v.dtype for v in common[:5]), None, None]

    def test_oflex_keeps_float_output(self) -> None:
        fwd, x = function("selective_scan_cuda_oflex", "fwd"), make_inputs(torch.float16)
        expected = selective_scan(**{**x, "u": x["u"].float()}, delta_softplus=True)
        assert torch.equal(fwd(*x.values(), True, 1, True)[0], expected)
        assert torch.equal(fwd(*x.values(), True, 1, False)[0], expected.half())

    @pytest.mark.parametrize("softplus", [False, True])
    def test_states_of_oflex_rh(self, softplus: bool) -> None:
        """Every state of the recurrence, one step after the other, and the gradients of all of them."""
        module = importlib.import_module("selective_scan_cuda_oflex_rh")
        x = {k: v for k, v in make_inputs().items() if k != "C"}

        def plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor, D: Tensor) -> Tensor:
            step = delta + delta_bias[:, None]  # b d l
            step = step.exp().log1p() if softplus else step
            state, states = torch.zeros(2, 6, 3, dtype=u.dtype), []
            for t in range(u.shape[2]):
                entry = (step * u)[:, :, t, None] * B[..., t].repeat_interleave(3, 1)
                state = (step[:, :, t, None] * A).exp() * state + entry  # b d n
                states.append(state)
            return torch.stack(states, -1) + 0 * D.sum()  # b d n l

        out, grads = gradients(plain, x)
        arguments = [x[k] for k in ("u", "delta", "A", "B", "D", "delta_bias")]
        found, packed = module.fwd(*arguments, softplus, 1, True)
        assert_close("states", found, out, 1e-12)
        assert_close("last", packed[:, :, -1, 1::2], out[..., -1], 1e-12)
        weights = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(0)) / 8
        back = module.bwd(*arguments, weights.double(), packed, softplus, 1)
        for name, grad in zip(("u", "delta", "A", "B", "D", "delta_bias"), back, strict=True):
            assert_close(f"d{name}", grad, grads[name], 1e-11)
        half = [v.bfloat16() if v.ndim > 2 else v.float() for v in arguments[:4]]
        assert [module.fwd(*half, None, None, softplus, 1, wide)[0].dtype for wide in (True, False)] == [
            torch.float32,
            torch.bfloat16,
        ]
        assert module.bwd(*half, None, None, weights, None, softplus, 1)[4:] == [None, None]

    def test_gate_gradient_goes_where_the_caller_wants_it(self) -> None:
        module = importlib.import_module("selective_scan_cuda")
        x = make_inputs(z=True)
        common = [x[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        out, states, gated = module.fwd(*common, True)
        both = torch.zeros(2, 12, 11, dtype=torch.float64)
        target = both[:, 6:]
        *grads, dz, again = module.bwd(*common, torch.ones_like(out), states, out, target, True, True)
        assert len(grads) == 7 and dz is target and target.abs().min() > 0 and not both[:, :6].any()
        assert_close("out_z", again, gated, 1e-14)
        silu = x["z"].sigmoid() * (1 + x["z"] * (1 - x["z"].sigmoid()))
        assert_close("dz", dz, out * silu, 1e-12)
        with pytest.raises(ValueError, match=says("dz must", r"\(2, 6, 11\)")):
            module.bwd(*common, torch.ones_like(out), states, out, both[None, :, :6], True, False)
