"""The oracles agree with cases solved by hand, and the checks that other tests rely on do fail when they should."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from helpers import (
    CEILING,
    LAYOUTS,
    assert_budget,
    assert_close,
    basis_oracle,
    cross_scan_oracle,
    dice,
    ellipses,
    gradients,
    kan_oracle,
    max_error,
    nan_filled_empty,
    pixel_order,
    relative_l2,
    says,
    scan_oracle,
    silu,
    softplus,
    strided,
)


class TestOracles:
    def test_scan_of_a_constant_input_is_a_geometric_sum(self) -> None:
        u, delta = np.ones((1, 1, 5)), np.full((1, 1, 5), 0.5)
        out, last = scan_oracle(u, delta, np.array([[-1.0]]), np.array([[2.0]]), np.array([[3.0]]))
        a = np.exp(-0.5)
        states = np.array([sum(a**k for k in range(t + 1)) for t in range(5)])  # each step adds 0.5 * 2 * 1
        np.testing.assert_allclose(out[0, 0], 3 * states, rtol=1e-14)
        np.testing.assert_allclose(last[0, 0], states[-1:], rtol=1e-14)

    def test_scan_options(self) -> None:
        rng = np.random.default_rng(0)
        u, delta, z = rng.standard_normal((3, 2, 4, 3))
        A, weight, D, bias = -rng.random((4, 2)), rng.standard_normal((4, 2)), rng.random(4), rng.random(4)
        plain, _ = scan_oracle(u, softplus(delta + bias[:, None]), A, weight, weight)
        full, _ = scan_oracle(u, delta, A, weight, weight, D, z, bias, delta_softplus=True)
        np.testing.assert_allclose(full, (plain + D[:, None] * u) * silu(z), rtol=1e-14)

    def test_scan_reads_the_groups_in_blocks_of_channels(self) -> None:
        u = delta = np.ones((1, 4, 1))
        B = np.array([1.0, 10.0]).reshape(1, 2, 1, 1)
        out, _ = scan_oracle(u, delta, -np.ones((4, 1)), B, np.ones((4, 1)))
        np.testing.assert_allclose(out[0, :, 0], [1, 1, 10, 10])

    def test_every_direction_visits_every_pixel_once(self) -> None:
        for k in range(4):
            assert sorted(pixel_order(k, 3, 2)) == [(i, j) for i in range(3) for j in range(2)]
        assert pixel_order(0, 2, 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert pixel_order(1, 2, 2) == [(0, 0), (1, 0), (0, 1), (1, 1)]
        assert pixel_order(3, 2, 2) == [(1, 1), (0, 1), (1, 0), (0, 0)]

    def test_cross_scan_without_state_is_the_skip(self) -> None:
        x, zeros = np.random.default_rng(0).standard_normal((1, 2, 3, 2)), np.zeros((4, 3, 2))
        out = cross_scan_oracle(x, zeros, np.zeros((4, 2, 1)), np.zeros((4, 2)), np.zeros((8, 1)), np.arange(8.0))
        np.testing.assert_allclose(out, x * np.array([0 + 2 + 4 + 6, 1 + 3 + 5 + 7]), rtol=1e-14)

    def test_basis_is_the_hat_and_the_cubic_of_the_textbook(self) -> None:
        x = np.array([[0.25], [1.0], [2.0], [9.0]])
        np.testing.assert_allclose(basis_oracle(x, np.arange(3.0)[None], 1)[:, 0, 0], [0.25, 1, 0, 0], atol=1e-15)
        cubic = basis_oracle(x, np.arange(5.0)[None], 3)[:, 0, 0]
        np.testing.assert_allclose(cubic, [0.25**3 / 6, 1 / 6, 4 / 6, 0], atol=1e-15)

    def test_kan_extrapolation(self) -> None:
        grid, zero = np.linspace(-1.6, 1.6, 9)[None], np.zeros((1, 1))  # order 3, two intervals of 0.4 on [-0.4, 0.4]
        weight = np.arange(5.0).reshape(1, 1, 5)  # equally spaced coefficients: a straight line inside
        x = np.array([[-0.4], [0.4], [0.8]])
        line = kan_oracle(x, zero, weight, None, grid, extrapolation="linear")[:, 0]
        np.testing.assert_allclose(np.diff(line), [2, 1], rtol=1e-12)
        clamped = kan_oracle(x, zero, weight, None, grid, extrapolation="clamp")[:, 0]
        np.testing.assert_allclose(clamped[1], clamped[2], rtol=1e-14)


class TestChecks:
    def test_max_error_sees_nan_and_shapes(self) -> None:
        assert max_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
        assert relative_l2(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
        assert max_error(torch.zeros(0), torch.zeros(0)) == 0
        with pytest.raises(AssertionError, match="shapes differ"):
            max_error(torch.ones(2), torch.ones(1, 2))

    def test_assert_close_fails(self) -> None:
        assert_close("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0)
        with pytest.raises(AssertionError, match=r"relative error 0\.5"):
            assert_close("x", torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]), 0.49)

    @pytest.mark.parametrize("dtype", CEILING)
    def test_budget_fails_just_above_and_passes_just_below(self, dtype: torch.dtype) -> None:
        eps, oracle = torch.finfo(dtype).eps, np.array([1.0, -0.5])
        reference = torch.tensor(oracle)
        assert_budget("x", torch.tensor(oracle + eps), reference, oracle, dtype)
        with pytest.raises(AssertionError, match="allowed"):
            assert_budget("x", torch.tensor(oracle + 2 * eps), reference, oracle, dtype)

    def test_budget_of_a_sum_that_cancels(self) -> None:
        oracle, eps = np.array([1e-3]), torch.finfo(torch.float32).eps
        assert_budget("x", torch.tensor(oracle + eps), torch.tensor(oracle), oracle, torch.float32, terms=1.1)
        with pytest.raises(AssertionError, match="allowed"):
            assert_budget("x", torch.tensor(oracle + eps), torch.tensor(oracle), oracle, torch.float32, terms=0.9)

    @pytest.mark.parametrize("dtype", CEILING)
    def test_budget_has_a_ceiling(self, dtype: torch.dtype) -> None:
        oracle, wrong = np.ones(2), torch.full((2,), 1.1)
        with pytest.raises(AssertionError, match="allowed"):
            assert_budget("x", wrong, wrong, oracle, dtype)  # a bad reference excuses nothing

    def test_gradients_use_one_loss_for_all_dtypes(self) -> None:
        inputs = {"x": torch.ones(3, dtype=torch.float64), "y": None}
        _, double = gradients(lambda x, y: 2 * x, inputs)
        _, single = gradients(lambda x, y: 2 * x, {"x": torch.ones(3), "y": None})
        assert list(double) == ["x"]
        torch.testing.assert_close(double["x"].float(), single["x"])

    def test_says(self) -> None:
        pattern = says("factor", "10", "divisible")
        assert re.search(pattern, "channels is 10;\nit must be Divisible by factor")
        assert not re.search(pattern, "channels is 11; it must be divisible by factor")


class TestInputs:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strided_keeps_the_values(self, layout: str) -> None:
        x = torch.randn(2, 3, 4)
        y = strided(x, layout)
        torch.testing.assert_close(y, x[:1].expand_as(x) if layout == "expanded" else x, rtol=0, atol=0)
        assert y.is_contiguous() == (layout == "contiguous")

    def test_unknown_layout(self) -> None:
        with pytest.raises(ValueError, match="diagonal"):
            strided(torch.ones(2), "diagonal")

    def test_empty_is_nan_inside_and_restored_after(self) -> None:
        with nan_filled_empty():
            assert torch.are_deterministic_algorithms_enabled()
            for x in (torch.empty(99), torch.empty_like(torch.ones(99)), torch.ones(1).new_empty(99)):
                assert x.isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()

    def test_ellipses_are_fixed_and_neither_empty_nor_full(self) -> None:
        images, masks = ellipses()
        assert images.shape == (4, 3, 64, 64) and masks.shape == (4, 1, 64, 64)
        torch.testing.assert_close(images, ellipses()[0], rtol=0, atol=0)
        share = masks.mean(dim=(1, 2, 3))
        assert (share > 0.05).all() and (share < 0.6).all()

    def test_dice(self) -> None:
        mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
        assert dice(torch.tensor([1.0, 1.0, -1.0, -1.0]), mask) == 1
        assert dice(torch.tensor([1.0, -1.0, 1.0, -1.0]), mask) == 0.5
