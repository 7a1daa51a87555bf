"""cross_selective_scan against four explicit directions over the pixels in float64 NumPy; symmetries and numerics."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import LAYOUTS, assert_budget, assert_close, gradients, largest
from kan_mamba_layers import cross_selective_scan, resolve, selective_scan
from ops.selective_scan.calls import image_inputs, image_oracle, on_images

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ("reference", "chunked", "cpu")
TWICE_DIFFERENTIABLE = ("reference", "chunked")
make_inputs = partial(image_inputs, dtype=torch.float64)
WEIGHTS = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")


@st.composite
def cases(draw: st.DrawFn) -> dict:
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    half = dtype in (torch.bfloat16, torch.float16)
    return {
        "b": draw(st.integers(0, 2)),
        "h": draw(st.one_of(st.just(1), st.integers(1, 9))),
        "w": draw(st.one_of(st.just(1), st.integers(1, 9))),
        "d": draw(st.integers(1, 5)),
        "r": draw(st.integers(1, 3)),
        "n": draw(st.integers(1, 4)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": dtype,
        "weight_dtype": torch.float32 if half and draw(st.booleans()) else dtype,
        "seed": draw(st.integers(0, 2**31)),
    }


class TestAgainstTheOracle:
    @given(cases())
    @example({"b": 1, "h": 1, "w": 1, "d": 1, "r": 1, "n": 1, "dtype": torch.float32})
    @example({"b": 2, "h": 1, "w": 9, "dtype": torch.float32})
    @example({"b": 2, "h": 9, "w": 1, "dtype": torch.bfloat16, "weight_dtype": torch.float32})
    def test_output_and_every_gradient(self, case: dict) -> None:
        inputs = make_inputs(**case)
        dtype = case["dtype"]
        expected = image_oracle(inputs)
        double = {k: v.double() for k, v in inputs.items()}

        # The size of the summed terms, from the same problem with absolute values: under cancellation, rounding errors
        # are relative to the terms.
        positive = {k: v.abs() if k in ("x", "D", "x_proj_weight") else v for k, v in double.items()}
        terms, grad_terms = gradients(on_images("reference"), positive, absolute=True)
        _, true_grads = gradients(on_images("reference"), double)
        reference, reference_grads = gradients(on_images("reference"), inputs)
        for backend in BACKENDS:
            out, grads = gradients(on_images(backend), inputs)
            assert out.dtype == dtype and out.shape == inputs["x"].shape
            assert_budget(f"{backend} out", out, reference, expected, dtype, bands=2, terms=largest(terms))
            for name, grad in grads.items():
                assert grad.dtype == inputs[name].dtype
                size = largest(grad_terms[name])
                compare = (grad, reference_grads[name], true_grads[name], grad.dtype)
                assert_budget(f"{backend} d{name}", *compare, bands=8, terms=size)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_one_direction_is_selective_scan(self, backend: str) -> None:
        """With three directions silenced by C = 0 and D = 0 the op is one 1-D scan of the rows."""
        x = make_inputs()
        x["x_proj_weight"][1:, 4:] = 0
        x["D"].zero_()
        sequence = x["x"].flatten(1, 2)  # b l d
        low, B, C = (sequence @ x["x_proj_weight"][0].T).split([2, 2, 2], -1)
        expected = selective_scan(
            sequence.mT,
            (low @ x["dt_proj_weight"][0].T).mT,
            -x["A_log"][:3].exp(),
            B.mT,
            C.mT,
            delta_bias=x["dt_proj_bias"][0],
            delta_softplus=True,
            backend="reference",
        )
        out = cross_selective_scan(**x, backend=backend)
        assert_close("out", out.flatten(1, 2).mT, expected, 1e-13)


def permuted(inputs: dict[str, Tensor], order: list[int], x: Tensor) -> dict[str, Tensor]:
    """The same op on another image, with the weights of the four directions permuted."""
    weights = {k: inputs[k].unflatten(0, (4, -1))[order].flatten(0, 1) for k in WEIGHTS}
    return {"x": x, **weights}


@pytest.mark.parametrize("backend", BACKENDS)
class TestSymmetries:
    @settings(max_examples=30)
    @given(seed=st.integers(0, 2**31), h=st.integers(1, 6), w=st.integers(1, 6))
    def test_turning_by_180_degrees_exchanges_the_reversed_directions(
        self, backend: str, seed: int, h: int, w: int
    ) -> None:
        inputs = make_inputs(h=h, w=w, seed=seed)
        out = cross_selective_scan(**inputs, backend=backend)
        turned = permuted(inputs, [2, 3, 0, 1], inputs["x"].flip(1, 2))
        assert_close("out", cross_selective_scan(**turned, backend=backend).flip(1, 2), out, 1e-12)

    @settings(max_examples=30)
    @given(seed=st.integers(0, 2**31), h=st.integers(1, 6), w=st.integers(1, 6))
    def test_transposing_exchanges_rows_and_columns(self, backend: str, seed: int, h: int, w: int) -> None:
        inputs = make_inputs(h=h, w=w, seed=seed)
        out = cross_selective_scan(**inputs, backend=backend)
        transposed = permuted(inputs, [1, 0, 3, 2], inputs["x"].transpose(1, 2))
        assert_close("out", cross_selective_scan(**transposed, backend=backend).transpose(1, 2), out, 1e-12)

    def test_directions_with_shared_weights_commute_with_turning(self, backend: str) -> None:
        """Shared weights: turning by 180 degrees and both transpositions commute with the op; a mirror does not."""
        inputs = permuted(make_inputs(h=5, w=5), [0, 0, 0, 0], make_inputs(h=5, w=5)["x"])

        def run(x: Tensor) -> Tensor:
            return cross_selective_scan(**{**inputs, "x": x}, backend=backend)

        out, x = run(inputs["x"]), inputs["x"]
        assert_close("turned", run(torch.rot90(x, 2, (1, 2))), torch.rot90(out, 2, (1, 2)), 1e-12)
        assert_close("transposed", run(x.transpose(1, 2)), out.transpose(1, 2), 1e-12)
        anti = torch.rot90(x, 2, (1, 2)).transpose(1, 2)
        assert_close("anti-transposed", run(anti), torch.rot90(out, 2, (1, 2)).transpose(1, 2), 1e-12)
        assert not torch.allclose(run(x.flip(2)), out.flip(2))

    def test_the_skips_of_the_four_directions_add_up(self, backend: str) -> None:
        inputs = make_inputs()
        without = cross_selective_scan(**{**inputs, "D": torch.zeros_like(inputs["D"])}, backend=backend)
        skip = inputs["D"].view(4, 3).sum(0) * inputs["x"]
        assert_close("out", cross_selective_scan(**inputs, backend=backend), without + skip, 1e-13)

    def test_an_image_of_the_batch_does_not_see_the_others(self, backend: str) -> None:
        inputs = make_inputs(3, 6, 7)
        out = cross_selective_scan(**inputs, backend=backend)
        alone = cross_selective_scan(**{**inputs, "x": inputs["x"][1:2]}, backend=backend)
        assert_close("out", alone, out[1:2], 1e-13)

    def test_every_pixel_sees_every_pixel(self, backend: str) -> None:
        inputs = make_inputs(1, 4, 5)
        inputs["x"].requires_grad_()
        out = cross_selective_scan(**inputs, backend=backend)
        for i, j in [(0, 0), (3, 4), (2, 1)]:
            (seen,) = torch.autograd.grad(out[0, i, j].sum(), inputs["x"], retain_graph=True)
            assert (seen.abs().amax(-1) > 0).all()


class TestDerivatives:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(("h", "w"), [(2, 3), (1, 4), (1, 1)])
    def test_gradcheck(self, backend: str, h: int, w: int) -> None:
        inputs = tuple(v.requires_grad_() for v in make_inputs(1, h, w, 2, 1, 2).values())
        assert torch.autograd.gradcheck(lambda *v: cross_selective_scan(*v, backend=backend), inputs)

    @pytest.mark.parametrize("backend", TWICE_DIFFERENTIABLE)
    def test_gradgradcheck(self, backend: str) -> None:
        inputs = tuple(v.requires_grad_() for v in make_inputs(1, 2, 2, 1, 1, 1).values())
        assert torch.autograd.gradgradcheck(lambda *v: cross_selective_scan(*v, backend=backend), inputs)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradient_of_frozen_inputs_is_not_needed(self, backend: str) -> None:
        inputs = make_inputs(1, 5, 5)
        inputs["D"].requires_grad_()
        cross_selective_scan(**inputs, backend=backend).sum().backward()
        expected = inputs["x"].sum((0, 1, 2)).repeat(4)
        assert_close("dD", inputs["D"].grad, expected, 1e-12)


class TestNumerics:
    @pytest.mark.parametrize("backend", ["chunked", "cpu"])
    def test_equals_reference_on_a_real_map(self, backend: str) -> None:
        inputs = make_inputs(1, 48, 40, 32, 2, 16, dtype=torch.float32)
        inputs["A_log"] = torch.arange(1.0, 17).log().expand(128, 16).contiguous()
        out, grads = gradients(on_images(backend), inputs)
        double = {k: v.double() for k, v in inputs.items()}
        expected, expected_grads = gradients(on_images("reference"), double)
        assert_close("out", out, expected, 1e-5)
        for name, grad in grads.items():
            assert_close(f"d{name}", grad, expected_grads[name], 1e-5)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_extreme_steps_and_decays(self, backend: str, dtype: torch.dtype) -> None:
        inputs = make_inputs(1, 12, 12, 4, 1, 4, dtype=dtype, weight_dtype=torch.float32)
        inputs["A_log"] = torch.linspace(-9, 4, 64).view(16, 4)
        inputs["dt_proj_bias"] = torch.linspace(-14, 10, 16).view(4, 4)
        out, grads = gradients(on_images(backend), inputs)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads.values())
        rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert_close("out", out, image_oracle(inputs), rtol)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_autocast_does_not_reach_inside(self, backend: str) -> None:
        inputs = make_inputs(1, 6, 6, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = cross_selective_scan(**inputs, backend=backend)
        assert torch.equal(inside, cross_selective_scan(**inputs, backend=backend))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_same_bits_again(self, backend: str) -> None:
        inputs = make_inputs(2, 20, 20, 8, 2, 4, dtype=torch.float32)
        first, second = (gradients(on_images(backend), inputs) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])

    def test_auto_is_the_cpu_backend(self) -> None:
        pytest.importorskip("numba")
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            inputs = make_inputs(dtype=dtype)
            assert resolve("cross_selective_scan", "auto", inputs["x"]) == "cpu"
            assert torch.equal(cross_selective_scan(**inputs), cross_selective_scan(**inputs, backend="cpu"))
