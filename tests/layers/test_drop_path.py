"""Branches that are left out at random."""

import pytest
import torch

from kan_mamba_layers.layers.drop_path import DropPath


def test_evaluation_leaves_everything() -> None:
    x = torch.randn(50, 3)
    assert DropPath(0.5).eval()(x) is x


def test_a_rate_of_zero_draws_nothing() -> None:
    x, before = torch.randn(5, 3), torch.get_rng_state()
    assert DropPath(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(4000,), (4000, 2), (4000, 2, 3, 1)])
def test_training_drops_whole_samples_and_keeps_the_mean(shape: tuple[int, ...]) -> None:
    y = DropPath(0.2)(torch.ones(shape)).flatten(1) if len(shape) > 1 else DropPath(0.2)(torch.ones(shape))[:, None]
    kept = y[:, 0] > 0
    assert torch.equal(y, torch.where(kept[:, None], torch.tensor(1 / 0.8), torch.tensor(0.0)).expand_as(y))
    assert 0.77 < kept.float().mean() < 0.83, "more than four deviations"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_rate(dtype: torch.dtype) -> None:
    dropped = (DropPath(0.002)(torch.ones(200_000, 1, dtype=dtype)) == 0).float().mean()
    assert abs(dropped - 0.002) < 0.0005, "five deviations"


def test_vmap_may_draw_once_for_all() -> None:
    y = torch.vmap(DropPath(0.5), randomness="same")(torch.ones(7, 40, 3))
    assert torch.equal(y, y[:1].expand_as(y)) and 0 < (y > 0).float().mean() < 1


def test_samples_under_vmap_are_drawn_apart() -> None:
    y = torch.vmap(DropPath(0.2), randomness="different")(torch.ones(4000, 1, 3))
    assert 0.77 < (y[:, 0, 0] > 0).float().mean() < 0.83
    assert torch.equal(y, y[..., :1].expand_as(y))
