"""Causal convolutions tap by tap, in float64, against the stand-ins for `causal_conv1d`."""

from __future__ import annotations

import pytest
import torch
from stand_ins import function, without_originals
from torch import Tensor

from helpers import assert_close, gradients, max_error, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None, *, silu: bool = False):
    """Every output as a sum over the taps that lie in the sequence or in `before`."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    line = torch.cat([before, x], -1)
    columns = []
    for t in range(x.shape[2]):
        total = sum(weight[:, j] * line[:, :, t + j] for j in range(width))
        columns.append(total if bias is None else total + bias)
    out = torch.stack(columns, -1)
    return out / (1 + (-out).exp()) if silu else out


def make(width: int = 4, length: int = 9, bias: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(2, 3, length), "weight": torch.randn(3, width), "bias": torch.randn(3)}
    return {k: v.to(dtype) for k, v in inputs.items() if bias or k != "bias"}


class TestWholeSequences:
    @pytest.mark.parametrize("activation", [None, "silu", "swish"])
    @pytest.mark.parametrize(("width", "length", "bias"), [(4, 9, True), (2, 1, False), (4, 2, True), (1, 5, True)])
    def test_values_and_gradients(self, width: int, length: int, bias: bool, activation: str | None) -> None:
        fn = function("causal_conv1d", "causal_conv1d_fn")
        inputs = {**make(width, length, bias), "before": torch.randn(2, 3, width - 1).double()}
        for given in (inputs, {k: v for k, v in inputs.items() if k != "before"}):
            out, grads = gradients(
                lambda before=None, **x: fn(**x, initial_states=before, activation=activation), dict(given)
            )
            true, true_grads = gradients(lambda **x: plain(**x, silu=activation is not None), dict(given))
            assert_close("out", out, true, 1e-13)
            for name, grad in grads.items():
                assert_close(f"d{name}", grad, true_grads[name], 1e-12)

    @pytest.mark.parametrize("length", [1, 2, 9])
    def test_final_states_continue_the_sequence(self, length: int) -> None:
        fn, x = function("causal_conv1d", "causal_conv1d_fn"), make(length=20)
        whole = plain(**x)
        first, state = fn(x["x"][..., :length], x["weight"], x["bias"], return_final_states=True)
        room = torch.empty_like(state)
        again = fn(x["x"][..., :length], x["weight"], x["bias"], None, None, True, room)[1]
        assert again is room and torch.equal(room, state)
        rest = fn(x["x"][..., length:], x["weight"], x["bias"], initial_states=state)
        assert_close("out", torch.cat([first, rest], -1), whole, 1e-13)

    def test_packed_sequences_do_not_mix(self) -> None:
        fn, x = function("causal_conv1d", "causal_conv1d_fn"), make(length=9)
        seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1], [0] * 9], dtype=torch.int32)
        out, grads = gradients(lambda **x: fn(**x, seq_idx=seq_idx, activation="silu"), dict(x))

        def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            parts = [plain(x[:1, :, a:b], weight, bias, silu=True) for a, b in ((0, 3), (3, 7), (7, 8))]
            first = torch.cat([*parts, torch.zeros(1, 3, 1, dtype=x.dtype)], -1)
            return torch.cat([first, plain(x[1:], weight, bias, silu=True)])

        true, true_grads = gradients(apart, dict(x))
        assert_close("out", out, true, 1e-13)
        for name, grad in grads.items():
            assert_close(f"d{name}", grad, true_grads[name], 1e-12)

    def test_places_of_arguments(self) -> None:
        """The fourth argument was the activation up to version 1.0, and is `seq_idx` since."""
        fn, x = function("causal_conv1d", "causal_conv1d_fn"), make()
        old, new = fn(*x.values(), "silu"), fn(*x.values(), None, None, False, None, "silu")
        assert torch.equal(old, new) and max_error(old, fn(*x.values())) > 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_once(self, dtype: torch.dtype) -> None:
        fn, x = function("causal_conv1d", "causal_conv1d_fn"), make(length=50, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = fn(**x, activation="silu")
        expected = plain(*(v.double() for v in x.values()), silu=True)
        assert out.dtype == dtype
        assert ((out.double() - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()

    def test_wrong_calls(self) -> None:
        fn, x = function("causal_conv1d", "causal_conv1d_fn"), make()
        with pytest.raises(ValueError, match=says("activation must", "'relu'")):
            fn(**x, activation="relu")
        with pytest.raises(ValueError, match=says("weight must", r"\(3, any\)", r"\(4, 2\)")):
            fn(x["x"], torch.zeros(4, 2))
        with pytest.raises(ValueError, match=says("initial_states must", r"\(2, 3, 3\)", r"\(2, 3, 4\)")):
            fn(**x, initial_states=torch.zeros(2, 3, 4))
        with pytest.raises(ValueError, match=says("seq_idx", "initial_states")):
            fn(**x, seq_idx=torch.zeros(2, 9), return_final_states=True)
        for shape in ((2, 3, 4), (1, 3, 3), (2, 3, 1)):
            with pytest.raises(ValueError, match=says("final_states_out must", r"\(2, 3, 3\)")):
                fn(**x, return_final_states=True, final_states_out=torch.zeros(shape).double())

    @pytest.mark.parametrize("name", ["causal_conv1d_fn", "causal_conv1d_update"])
    def test_empty_sequences(self, name: str) -> None:
        state = [torch.zeros(2, 3, 4)] if name == "causal_conv1d_update" else []
        with pytest.raises(ValueError, match=says("x must", "at least one position", r"\(2, 3, 0\)")):
            function("causal_conv1d", name)(torch.zeros(2, 3, 0), *state, torch.zeros(3, 4))


class TestUpdates:
    @pytest.mark.parametrize("slots", [3, 4, 6])
    @pytest.mark.parametrize("ring", [False, True])
    @pytest.mark.parametrize("rows", [False, True])
    def test_step_by_step(self, slots: int, ring: bool, rows: bool) -> None:
        """Pieces of one, several and more positions than there are slots, for one layout of the state or the other."""
        update, x = function("causal_conv1d", "causal_conv1d_update"), make(length=13)
        state = torch.zeros(4 if rows else 2, 3, slots, dtype=torch.float64)
        options = {"conv_state_indices": torch.tensor([3, 1])} if rows else {}
        pieces, t = [], 0
        for length in (1, 2, 1, 8, 1):
            piece = x["x"][..., t] if length == 1 and t else x["x"][..., t : t + length]
            if ring:
                options["cache_seqlens"] = torch.tensor([t, t], dtype=torch.int32)
            out = update(piece, state, x["weight"], x["bias"], "silu", **options)
            assert out.shape == piece.shape
            pieces.append(out if out.ndim == 3 else out[..., None])
            t += length
        assert_close("out", torch.cat(pieces, -1), plain(**x, silu=True), 1e-13)
        held = state[[3, 1]] if rows else state
        times = torch.arange(13 - slots, 13)
        assert torch.equal(held[..., times % slots] if ring else held, x["x"][..., times])
        if rows:
            assert not state[[0, 2]].any()

    @pytest.mark.parametrize("ring", [False, True])
    def test_negative_rows_are_padding(self, ring: bool) -> None:
        update, x = function("causal_conv1d", "causal_conv1d_update"), make()
        options = {"cache_seqlens": torch.tensor([0, 0], dtype=torch.int32)} if ring else {}
        state = torch.randn(4, 3, 4, dtype=torch.float64)
        alone, before = state[1:2].clone(), state.clone()
        alone_options = {name: value[:1] for name, value in options.items()}
        expected = update(x["x"][:1, :, 0], alone, x["weight"], x["bias"], "silu", **alone_options)
        rows = torch.tensor([1, -1], dtype=torch.int32)
        out = update(x["x"][..., 0], state, x["weight"], x["bias"], "silu", conv_state_indices=rows, **options)
        assert torch.equal(out[:1], expected) and not out[1].any()
        assert torch.equal(state[1:2], alone) and torch.equal(state[[0, 2, 3]], before[[0, 2, 3]])

    def test_chosen_rows_are_compiled_whole(self) -> None:
        update, x = function("causal_conv1d", "causal_conv1d_update"), make()
        rows, (one, other) = torch.tensor([-1, 2]), torch.zeros(2, 4, 3, 4, dtype=torch.float64)
        call = (x["weight"], x["bias"], "silu")

        def run(state: Tensor) -> Tensor:
            return update(x["x"][..., 0], state, *call, conv_state_indices=rows)

        assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(one), run(other))
        assert torch.equal(one, other) and one[2].any() and not one[[0, 1, 3]].any()
        nobody = torch.tensor([-1, -1])
        before = one.clone()
        assert not update(x["x"][..., 0], one, *call, conv_state_indices=nobody).any() and torch.equal(one, before)

    def test_too_small_a_state(self) -> None:
        update, x = function("causal_conv1d", "causal_conv1d_update"), make()
        with pytest.raises(ValueError, match=says("conv_state must", "3 positions", "got 2")):
            update(x["x"][..., 0], torch.zeros(2, 3, 2), x["weight"])
