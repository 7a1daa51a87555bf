"""The residual blocks of `mamba_ssm`, against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from stand_ins import function, without_originals
from torch import Tensor, nn

from helpers import assert_close, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
DIM = 6


class Mixer(nn.Linear):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor, inference_params: object = None) -> Tensor:
        return super().forward(x).tanh() + (0 if inference_params is None else inference_params)

    def allocate_inference_cache(self, batch: int, length: int, dtype: object = None) -> tuple:
        return batch, length, dtype


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    if norm.bias is not None:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (({"d_state": 3}, 1e-3, True, True, True, 2), {}),
        ((0, {"d_state": 3, "layer": "Mamba1"}, None, None, 1e-3, True, True, True, 2), {}),
        (
            (),
            {"ssm_cfg": {"d_state": 3}, "norm_epsilon": 1e-3, "rms_norm": True, "residual_in_fp32": True}
            | {"fused_add_norm": True, "layer_idx": 2, "d_intermediate": 0},
        ),
    ],
)
def test_blocks_of_either_version(arguments: tuple, options: dict) -> None:
    create_block = function("mamba_ssm.models.mixer_seq_simple", "create_block")
    block = create_block(DIM, *arguments, **options, dtype=torch.float64)
    assert (block.layer_idx, block.mixer.layer_idx, block.mixer.d_state, block.norm.eps) == (2, 2, 3, 1e-3)
    assert block.residual_in_fp32 and block.fused_add_norm and block.norm.bias is None
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    x = torch.randn(2, 5, DIM).double()
    assert_close("hidden", block(x)[0], block.mixer(normalized(block.norm, x)), 1e-6)


def test_blocks_that_there_are_not() -> None:
    create_block = function("mamba_ssm.models.mixer_seq_simple", "create_block")
    assert type(create_block(DIM).norm) is nn.LayerNorm
    second = create_block(DIM, 0, {"layer": "Mamba2", "headdim": 4}).mixer
    assert type(second) is function("mamba_ssm", "Mamba2") and second.nheads == 3
    for options in (
        {"d_intermediate": 8},
        {"ssm_cfg": {"layer": "Mamba3"}},
        {"d_intermediate": 0, "attn_cfg": {"a": 1}},
    ):
        with pytest.raises(NotImplementedError, match="no second layer and no attention"):
            create_block(DIM, **options)
    with pytest.raises(TypeError, match="takes no attn_cfg; its arguments are ssm_cfg, norm_epsilon"):
        create_block(DIM, attn_cfg={})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_two_blocks_in_a_row(second: bool, rms: bool, fused: bool) -> None:
    norm = function("mamba_ssm.ops.triton.layer_norm", "RMSNorm") if rms else nn.LayerNorm
    first = function("mamba_ssm.modules.mamba_simple", "Block")(DIM, Mixer, norm, fused, True)
    make_mlp = (lambda dim: nn.Linear(dim, dim)) if second else nn.Identity
    block = function("mamba_ssm.modules.block", "Block")(DIM, Mixer, make_mlp, norm, fused, True)
    for weight in (*first.parameters(), *block.parameters()):
        nn.init.normal_(weight)
    first, block = first.double(), block.double()
    x = torch.randn(2, 5, DIM).double()
    hidden = first.mixer(normalized(first.norm, x))
    total = x + hidden
    expected = block.mixer(normalized(block.norm, total), 2.0)
    if second:
        total = total + expected
        expected = block.mlp(normalized(block.norm2, total))
    found, residual = block(*first(x), inference_params=2.0)
    assert_close("hidden", found, expected, 1e-6)  # residual_in_fp32 rounds
    assert_close("residual", residual, total, 1e-6)
    half, kept = first.bfloat16()(x.bfloat16())
    assert (half.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    assert block.allocate_inference_cache(2, 7) == (2, 7, None)


def test_mamba_as_the_mixer_and_wrong_norms() -> None:
    mamba, make = function("mamba_ssm", "Mamba"), function("mamba_ssm.modules.mamba_simple", "Block")
    hidden, residual = make(DIM, mamba)(torch.randn(1, 4, DIM))
    assert hidden.shape == residual.shape == (1, 4, DIM)
    with pytest.raises(TypeError, match=says("fused_add_norm", "BatchNorm1d")):
        make(DIM, mamba, nn.BatchNorm1d, True)


def test_initial_weights() -> None:
    init = function("mamba_ssm.models.mixer_seq_simple", "_init_weights")
    model = nn.ModuleDict({"out_proj": nn.Linear(600, 50), "other": nn.Linear(600, 50), "words": nn.Embedding(200, 90)})
    model.other.bias._no_reinit = True
    weight, bias = model.other.weight.clone(), model.other.bias.clone()
    model.apply(lambda module: init(module, n_layer=8, n_residuals_per_layer=2))
    assert not model.out_proj.bias.any() and torch.equal(model.other.bias, bias)
    bound = 600**-0.5 / math.sqrt(16)
    assert 0.9 * bound < model.out_proj.weight.abs().max() <= bound and torch.equal(model.other.weight, weight)
    assert_close("std", model.words.weight.std(), torch.tensor(0.02), 0.1)
