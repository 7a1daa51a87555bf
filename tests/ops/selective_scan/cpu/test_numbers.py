"""Results of the scans' CPU backend: every shape against the recurrence, accuracy on real sizes, stress, NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers import assert_close, gradients, nan_filled_empty, relative_error, relative_l2
from kan_mamba_layers import SS2D, cross_selective_scan, selective_scan
from kan_mamba_layers.ops.selective_scan import cpu
from ops.selective_scan.calls import (
    Call,
    Inputs,
    full_line_inputs,
    image_inputs,
    line_inputs,
    on_images,
    on_lines,
    on_lines_with_state,
)

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Relative L2 errors in float32 against float64.
FORWARD_BAR, GRADIENT_BAR = 2e-7, 2e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


def as_in_a_new_layer(inputs: Inputs) -> Inputs:
    """The same image with the initial weights of an `SS2D`."""
    d, n = inputs["x"].shape[-1], inputs["A_log"].shape[1]
    layer = SS2D(d, d_state=n, expand=1, dt_rank=inputs["dt_proj_weight"].shape[2])
    weights = (layer.x_proj_weight, layer.dt_projs_weight, layer.dt_projs_bias, layer.A_logs, layer.Ds)
    return {"x": inputs["x"], **{k: w.detach() for k, w in zip(list(inputs)[1:], weights, strict=True)}}


def compare(function: Callable[[str], Call], inputs: Inputs) -> None:
    """Compares the CPU backend in the inputs' dtype with the recurrence in float64."""
    out, grads = gradients(function("cpu"), inputs)
    expected, expected_grads = gradients(function("reference"), {k: v.double() for k, v in inputs.items()})
    assert_close("out", out, expected, TOLERANCE[out.dtype])
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close(f"d{name}", grad, expected_grads[name], TOLERANCE[out.dtype])


class TestShapes:
    @DTYPES
    @pytest.mark.parametrize(
        ("h", "w"), [(1, 1), (1, 31), (32, 1), (3, 11), (1, 33), (63, 1), (8, 8), (5, 13), (9, 7), (31, 2), (2, 48)]
    )
    def test_lengths_around_the_chunk(self, h: int, w: int, dtype: torch.dtype) -> None:
        compare(on_images, image_inputs(2, h, w, 5, 2, 3, dtype=dtype))

    @DTYPES
    @pytest.mark.parametrize("l", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100])
    def test_sequences_around_the_chunk(self, l: int, dtype: torch.dtype) -> None:
        compare(on_lines_with_state, full_line_inputs(2, 4, l, 3, groups=2, dtype=dtype))

    @DTYPES
    @pytest.mark.parametrize("d", [1, 7, 15, 16, 17, 32, 33, 130, 160])
    def test_channels_around_the_tile(self, d: int, dtype: torch.dtype) -> None:
        """130 channels need more tiles than one thread takes at once."""
        compare(on_images, image_inputs(1, 5, 7, d, 2, 3, dtype=dtype))

    @DTYPES
    @pytest.mark.parametrize(("d", "groups"), [(6, 1), (6, 2), (6, 6), (32, 2), (34, 2), (51, 3), (48, 3), (320, 2)])
    def test_groups(self, d: int, groups: int, dtype: torch.dtype) -> None:
        """Groups of less than a tile, whole tiles, a tile and a bit, and more tiles than a thread takes at once."""
        compare(on_lines_with_state, full_line_inputs(2, d, 35, 2, groups=groups, dtype=dtype))

    @DTYPES
    @pytest.mark.parametrize("n", [1, 4, 16, 17])
    @pytest.mark.parametrize("r", [1, 2, 10])
    def test_states_and_ranks(self, r: int, n: int, dtype: torch.dtype) -> None:
        compare(on_images, image_inputs(1, 6, 7, 18, r, n, dtype=dtype))

    @pytest.mark.parametrize("case", ["images", "sequences"])
    def test_no_batch(self, case: str) -> None:
        if case == "images":
            out, grads = gradients(on_images("cpu"), image_inputs(0, 3, 4, 5, 2, 3))
            assert out.shape == (0, 3, 4, 5)
        else:
            out, grads = gradients(on_lines_with_state("cpu"), full_line_inputs(0, 5, 40, 3))
            assert out.shape == (0, 5, 43)
        assert all(not grad.any() and grad.isfinite().all() for grad in grads.values())

    def test_more_images_than_are_worked_on_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kan_mamba_layers.ops.selective_scan import cpu

        inputs = image_inputs(7, 5, 6, 20, 2, 3, dtype=torch.float64)
        whole = gradients(on_images("cpu"), inputs)
        monkeypatch.setattr(cpu, "_COEFFS_BYTES", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # so blocks of 3, 3 and 1
        out, grads = gradients(on_images("cpu"), inputs)
        assert_close("out", out, whole[0], 1e-13)
        for name, grad in grads.items():
            assert_close(name, grad, whole[1][name], 1e-13)

    @DTYPES
    def test_without_softplus_bias_or_skip_and_with_any_sign(self, dtype: torch.dtype) -> None:
        inputs = line_inputs(2, 5, 40, 3, positive=False, skip=False, dtype=dtype)
        inputs["A"], inputs["delta"] = inputs["A"] * 0.1, inputs["delta"] * 0.3  # steps of both signs

        compare(on_lines, inputs)
        compare(on_lines, {**inputs, "A": -inputs["A"]})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_single(self, dtype: torch.dtype) -> None:
        inputs = image_inputs(1, 6, 7, 18, 2, 4, dtype=dtype)
        out, grads = gradients(on_images("cpu"), inputs)
        single, single_grads = gradients(on_images("cpu"), {k: v.float() for k, v in inputs.items()})
        assert out.dtype == dtype and torch.equal(out, single.to(dtype))
        for name, grad in grads.items():
            assert torch.equal(grad, single_grads[name].to(dtype)), name


class TestAccuracy:
    @staticmethod
    def errors(function: Callable[[str], Call], inputs: Inputs, backend: str = "cpu") -> tuple[float, dict[str, float]]:
        out, grads = gradients(function(backend), inputs)
        expected, expected_grads = gradients(function("chunked"), {k: v.double() for k, v in inputs.items()})
        return relative_l2(out, expected), {k: relative_l2(grad, expected_grads[k]) for k, grad in grads.items()}

    SIZES = pytest.mark.parametrize(
        ("h", "w", "d", "r", "n"),
        [(8, 8, 64, 4, 16), (32, 32, 48, 3, 16), (56, 24, 17, 1, 5), (128, 128, 32, 1, 16), (1, 4096, 16, 2, 4)],
    )

    @SIZES
    def test_images(self, h: int, w: int, d: int, r: int, n: int) -> None:
        error, grad_errors = self.errors(on_images, as_in_a_new_layer(image_inputs(1, h, w, d, r, n)))
        assert error <= FORWARD_BAR
        assert max(grad_errors.values()) <= GRADIENT_BAR, grad_errors

    @SIZES
    def test_images_under_rough_weights(self, h: int, w: int, d: int, r: int, n: int) -> None:
        """Where float32 is less accurate, the plain form is less accurate too."""
        inputs = image_inputs(1, h, w, d, r, n)
        (error, grad_errors), (plain, plain_grads) = (self.errors(on_images, inputs, b) for b in ("cpu", "chunked"))
        assert error <= plain + FORWARD_BAR
        for name, grad_error in grad_errors.items():
            assert grad_error <= plain_grads[name] + GRADIENT_BAR, name

    @pytest.mark.parametrize(("d", "l", "n"), [(32, 256, 16), (9, 2000, 4), (16, 16384, 2)])
    def test_sequences(self, d: int, l: int, n: int) -> None:
        error, grad_errors = self.errors(on_lines_with_state, full_line_inputs(1, d, l, n))
        assert error <= FORWARD_BAR
        assert max(grad_errors.values()) <= GRADIENT_BAR, grad_errors


class TestStress:
    """Rates from 1e-4 to 64, steps from 1e-6 to 10, inputs of 1e4, 16,384 steps: no NaN, no infinity."""

    @DTYPES
    @pytest.mark.parametrize(("h", "w"), [(128, 128), (1, 16384), (16384, 1)])
    def test_images(self, h: int, w: int, dtype: torch.dtype) -> None:
        inputs = image_inputs(1, h, w, 4, 1, 3)
        draw = torch.Generator().manual_seed(1)
        inputs["x"] = (2 * torch.rand(1, h, w, 4, generator=draw).double() - 1) * 1e4
        inputs["A_log"] = torch.linspace(np.log(1e-4), np.log(64), 48).view(16, 3).double()
        inputs["x_proj_weight"][:, :1] *= 1e-4  # steps of moderate spread around those that the bias asks for
        inputs["dt_proj_bias"] = torch.linspace(-13.8, 10, 16).view(4, 4).double()
        self.check(on_images, inputs, dtype)

    @DTYPES
    def test_sequences(self, dtype: torch.dtype) -> None:
        length, d, n = 16384, 6, 4
        inputs = full_line_inputs(1, d, length, n, groups=2)
        draw = torch.Generator().manual_seed(1)
        steps = torch.exp(torch.empty(1, d, length).uniform_(np.log(1e-6), np.log(10), generator=draw)).double()
        inputs["delta"] = steps + torch.log(-torch.expm1(-steps))  # inverse of softplus
        inputs["delta_bias"] = torch.zeros(d).double()
        inputs["u"] *= 1e4 / inputs["u"].abs().max()
        inputs["A"] = -torch.logspace(-4, np.log10(64), d * n).view(d, n).double()
        self.check(on_lines_with_state, inputs, dtype)

    @staticmethod
    def check(function: Callable[[str], Call], inputs: Inputs, dtype: torch.dtype) -> None:
        inputs = {k: v.float().double() for k, v in inputs.items()}
        out, grads = gradients(function("cpu"), {k: v.to(dtype) for k, v in inputs.items()})
        expected, expected_grads = gradients(function("chunked"), inputs)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads.values())
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
        errors = {name: relative_error(grad, expected_grads[name]) for name, grad in grads.items()}
        assert relative_error(out, expected) <= tolerance
        assert max(errors.values()) <= 20 * tolerance, errors

    @DTYPES
    def test_a_growing_state_overflows_to_infinity(self, dtype: torch.dtype) -> None:
        u, ones = torch.ones(1, 17, 80, dtype=dtype), torch.ones(1, 2, 80, dtype=dtype)
        A = torch.full((17, 2), 30.0 if dtype is torch.float32 else 300.0, dtype=dtype)
        out = selective_scan(u, u, A, ones, ones, backend="cpu")
        expected = selective_scan(u, u, A, ones, ones, backend="reference")
        assert out[..., -1].isposinf().all()
        assert torch.equal(out.isfinite(), expected.isfinite())


@pytest.mark.parametrize("tiles", range(1, 30))
def test_groups_of_tiles_share_no_part_of_a_group_of_channels(tiles: int) -> None:
    """For every number of groups of channels and of tiles, by going through all tiles."""
    for groups in (number for number in range(1, tiles + 1) if tiles % number == 0):
        launch = object.__new__(cpu._Launch)
        launch.tiles, launch.groups = tiles, groups
        for tile_groups in range(1, tiles + 1):
            meeting: dict[int, set[int]] = {}  # groups of tiles in each group of channels
            for number in range(tile_groups):
                for tile in range(tiles * number // tile_groups, tiles * (number + 1) // tile_groups):
                    meeting.setdefault(tile * groups // tiles, set()).add(number)
            parts = launch.parts(tile_groups)
            assert all(len({number % parts for number in numbers}) == len(numbers) for numbers in meeting.values())
            assert parts <= 2 * max(map(len, meeting.values()))


class TestNotANumber:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", ["u", "delta", "B", "C", "initial_state"])
    def test_spreads_as_in_the_recurrence(self, name: str, value: float) -> None:
        """Exactly what is not finite in the recurrence is not finite here; the other sequence does not change."""
        inputs = full_line_inputs(2, 18, 50, 3, gate=False)
        clean = on_lines_with_state("cpu")(**inputs)
        inputs[name][(0, *(s // 2 for s in inputs[name].shape[1:]))] = value
        out, expected = on_lines_with_state("cpu")(**inputs), on_lines_with_state("reference")(**inputs)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isposinf(), expected.isposinf())
        assert out[0].isfinite().all() == (name == "delta" and value == -float("inf")), "which is a step of 0"
        assert torch.equal(out[1], clean[1])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_one_image_does_not_touch_another(self, value: float) -> None:
        inputs = image_inputs(3, 6, 7, 18, 2, 3)
        clean = on_images("cpu")(**inputs)
        inputs["x"][1, 2, 3, 4] = value
        leaf = inputs["x"].detach().requires_grad_()
        out = cross_selective_scan(**{**inputs, "x": leaf}, backend="cpu")
        expected = cross_selective_scan(**inputs, backend="reference")
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert not out[1].isfinite().any(), "every pixel of an image sees every other"
        assert torch.equal(out[[0, 2]], clean[[0, 2]])
        (grad,) = torch.autograd.grad(out[[0, 2]].sum(), leaf, retain_graph=True)
        assert grad[[0, 2]].isfinite().all()

    def test_gradients(self) -> None:
        """A NaN in the incoming gradient reaches its own step and the steps before it, in its channel."""
        inputs = full_line_inputs(1, 18, 70, 3, gate=False, dtype=torch.float64)
        inputs = {k: v.requires_grad_() for k, v in inputs.items()}
        weights = torch.ones(1, 18, 70).double()
        weights[0, 5, 40] = float("nan")
        results = []
        for backend in ("cpu", "reference"):
            y = selective_scan(**inputs, delta_softplus=True, backend=backend)
            results.append(torch.autograd.grad(y, list(inputs.values()), weights))
        for name, actual, expected in zip(inputs, *results, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan()), name
            assert actual.isnan().any()


def test_nothing_unwritten_is_read() -> None:
    """Filling uninitialised memory with NaN does not change a bit of the results."""
    inputs = image_inputs(2, 5, 7, 21, 3, 5)
    torch.use_deterministic_algorithms(False)
    plain = gradients(on_images("cpu"), inputs)
    with nan_filled_empty():
        filled = gradients(on_images("cpu"), inputs)
    assert torch.equal(plain[0], filled[0])
    assert all(torch.equal(plain[1][k], filled[1][k]) for k in plain[1])
