"""The extension of `causal_conv1d`, called as each version of the package does, against convolutions tap by tap."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from stand_ins import function, without_originals
from test_convolution import make, plain
from torch import Tensor

from helpers import assert_close, gradients, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
VERSIONS = ("1.0", "1.1", "1.2", "1.5")


def forward(version: str, x: Tensor, weight: Tensor, bias: Tensor | None, states: tuple, silu: bool) -> Tensor:
    before, final = states
    rest: tuple[Any, ...] = {
        "1.0": (silu,),
        "1.1": (None, silu),
        "1.2": (None, before, final, silu),
        "1.5": (None, before, torch.full_like(x, torch.nan), final, silu),
    }[version]
    out = importlib.import_module("causal_conv1d_cuda").causal_conv1d_fwd(x, weight, bias, *rest)
    assert version != "1.5" or out is rest[2]
    return out


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_values_and_gradients(version: str, bias: bool, silu: bool) -> None:
    inputs = make(bias=bias)
    given, shape = {"bias": None, **inputs}, (2, 3, 3)
    late = version in ("1.2", "1.5")
    before = torch.randn(shape).double() if late else None
    expected = {**inputs, "before": before} if late else inputs

    def both(**x: Tensor) -> Tensor:
        """The output and the last positions, which carry a gradient too."""
        final = torch.cat([x.get("before", x["x"].new_zeros(shape)), x["x"]], -1)[..., -3:]
        return torch.cat([plain(**x, silu=silu), final], -1)

    true, true_grads = gradients(both, expected)
    weights = torch.randint(-8, 9, true.shape, generator=torch.Generator().manual_seed(0)).double() / 8
    dout, dfinal = weights[..., :-3], weights[..., -3:] if late else None
    if not late:
        true_grads = gradients(lambda **x: torch.cat([plain(**x, silu=silu), torch.zeros(shape)], -1), expected)[1]
    final = torch.full(shape, torch.nan, dtype=torch.float64) if late else None
    arguments = [given[name] for name in ("x", "weight", "bias")]
    out = forward(version, *arguments, (before, final), silu)
    assert_close("out", out, true[..., :-3], 1e-13)
    if final is not None:
        assert torch.equal(final, true[..., -3:])
    room = torch.full((2, 6, 9), torch.nan, dtype=torch.float64)
    targets = [room[:, 3:], *(torch.full_like(x, torch.nan) for x in inputs.values() if x.ndim < 3)]
    dx, dweight, dbias = targets if bias else (*targets, None)
    rest: tuple[Any, ...] = {
        "1.0": (dx, silu),
        "1.1": (None, dx, silu),
        "1.2": (None, before, dfinal, dx, True, silu),
        "1.5": (None, before, dfinal, dx, dweight, dbias, None if before is None else torch.empty(shape), silu),
    }[version]
    grads = importlib.import_module("causal_conv1d_cuda").causal_conv1d_bwd(*arguments, dout, *rest)
    assert grads[0] is dx and room[:, :3].isnan().all()
    assert len(grads) == (4 if late else 3) and (grads[2] is None) == (not bias)
    for name, grad in zip(("x", "weight", "bias", "before"), grads, strict=False):
        if grad is not None:
            assert_close(f"d{name}", grad, true_grads[name], 1e-6 if grad.dtype == torch.float32 else 1e-12)


def test_packed_sequences_and_wrong_numbers_of_arguments() -> None:
    module, x = importlib.import_module("causal_conv1d_cuda"), make(length=9)
    numbers = torch.tensor([[0] * 4 + [1] * 5] * 2)
    parts = [plain(x["x"][..., s], x["weight"], x["bias"]) for s in (slice(4), slice(4, 9))]
    assert_close("out", module.causal_conv1d_fwd(*x.values(), numbers, False), torch.cat(parts, -1), 1e-13)
    with pytest.raises(TypeError, match=says("causal_conv1d_fwd", r"\[1, 2, 4, 5\]", "got 3")):
        module.causal_conv1d_fwd(*x.values(), None, None, True)


def test_the_next_positions() -> None:
    x = make(length=9)
    line = plain(**x, silu=True)
    update = function("causal_conv1d_cuda", "causal_conv1d_update")
    for late in (False, True):
        state = torch.zeros(2, 3, 4).double()
        for t in range(9):
            now = x["x"][..., t]
            out = update(now, state, x["weight"], x["bias"], *([torch.empty_like(now)] if late else []), True)
            assert_close("out", out, line[..., t], 1e-13)


def test_the_next_positions_build_no_graph() -> None:
    x = {name: value.requires_grad_() for name, value in make(length=9).items()}
    room, update = torch.empty(2, 3).double(), function("causal_conv1d_cuda", "causal_conv1d_update")
    out = update(x["x"][..., 0], torch.zeros(2, 3, 4).double(), x["weight"], x["bias"], room, True)
    assert out is room and not room.requires_grad


def test_wrappers_take_the_names_of_their_arguments() -> None:
    module, x = importlib.import_module("causal_conv1d.cpp_functions"), make(length=9)
    before = torch.randn(2, 3, 3).double()
    line, grads = gradients(lambda **v: plain(**v, silu=True), {**x, "before": before})
    x = {name: value.detach() for name, value in x.items()}
    rest = {"seq_idx": None, "initial_states": before.detach(), "silu_activation": True}
    assert_close("out", module.causal_conv1d_fwd_function(**x, **rest, final_states_out=None), line, 1e-13)
    dout = torch.randint(-8, 9, line.shape, generator=torch.Generator().manual_seed(0)).double() / 8
    for wanted in (True, False):
        *found, dbefore = module.causal_conv1d_bwd_function(
            **x, **rest, dout=dout, dfinal_states=None, dx=None, return_dinitial_states=wanted
        )
        for name, grad in zip(x, found, strict=True):
            assert_close(f"d{name}", grad, grads[name], 1e-12)
        assert (dbefore is not None) is wanted
        if wanted:
            assert_close("dbefore", dbefore, grads["before"], 1e-12)
    last = {name: value[..., -1] if name == "x" else value for name, value in x.items()}
    now = module.causal_conv1d_update_function(
        **last, conv_state=x["x"][..., 4:8].clone(), silu_activation=True, cache_seqlens=None, conv_state_indices=None
    )
    assert_close("now", now, line[..., -1], 1e-13)


def test_results_have_the_shape_of_their_place() -> None:
    module, x = importlib.import_module("causal_conv1d_cuda"), make(length=9)
    wide, state = torch.empty(2, 2, 3, 9).double(), torch.zeros(2, 3, 4).double()
    with pytest.raises(ValueError, match=says("out must", r"\(2, 3, 9\)")):
        module.causal_conv1d_fwd(*x.values(), None, None, wide, None, True)
    with pytest.raises(ValueError, match=says("out must", r"\(2, 3\)")):
        module.causal_conv1d_update(x["x"][..., 0], state, x["weight"], None, wide[..., 0], True)
    for place, name in ((0, "dx"), (1, "dweight"), (2, "dbias"), (3, "dinitial_states")):
        targets = [wide if i == place else None for i in range(4)]
        with pytest.raises(ValueError, match=says(f"{name} must")):
            module.causal_conv1d_bwd(*x.values(), x["x"], None, torch.zeros(2, 3, 3).double(), None, *targets, True)


def test_states_of_packed_sequences() -> None:
    x = torch.randn(9, 3, requires_grad=True)
    found = function("causal_conv1d", "causal_conv1d_varlen_states")(x, torch.tensor([0, 1, 1, 9]), 4)
    zeros = torch.zeros(3, 3)
    expected = [torch.cat([zeros, x[:1]]), torch.cat([zeros, zeros[:1]]), x[5:]]
    assert torch.equal(found, torch.stack([rows.T for rows in expected])) and not found.requires_grad
