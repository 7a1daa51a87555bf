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
    with pytest.raises(NotImplementedError, match=says("no attention", "got attn_cfg=")):
        create_block(DIM, d_intermediate=0, attn_cfg={"a": 1})
    with pytest.raises(ValueError, match=says("layer", "'Mamba1', 'Mamba2'", "got 'Mamba3'")):
        create_block(DIM, ssm_cfg={"layer": "Mamba3"})
    for options, twice in (({"ssm_cfg": {"d_state": 8}}, "ssm_cfg"), ({"d_intermediate": 0}, "d_intermediate")):
        with pytest.raises(TypeError, match=f"got {twice} by position and by name"):
            create_block(DIM, {"d_state": 4}, **options)
    with pytest.raises(TypeError, match="takes no attn_cfg; its arguments are ssm_cfg, norm_epsilon"):
        create_block(DIM, attn_cfg={})


def test_a_second_layer_with_a_gate() -> None:
    make_mlp = function("mamba_ssm.modules.mlp", "GatedMLP")
    assert [p.shape for p in make_mlp(100).parameters()] == [(768, 100), (100, 384)]  # 266 hidden channels, rounded up
    mlp = make_mlp(DIM, 5, 3, torch.tanh, bias=True, multiple_of=4, dtype=torch.float64)
    x, p = torch.randn(2, 7, DIM).double(), dict(mlp.named_parameters())
    y, gate = (x @ p["fc1.weight"].T + p["fc1.bias"]).chunk(2, -1)
    assert gate.shape[-1] == 8
    assert_close("mlp", mlp(x), (y * gate.tanh()) @ p["fc2.weight"].T + p["fc2.bias"], 1e-13)

    block = function("mamba_ssm.models.mixer_seq_simple", "create_block")(DIM, 8, dtype=torch.float64)
    assert type(block) is function("mamba_ssm.modules.block", "Block")
    hidden, p = block.mixer(normalized(block.norm, x)), dict(block.mlp.named_parameters())
    y, gate = (normalized(block.norm2, x + hidden) @ p["fc1.weight"].T).chunk(2, -1)
    found, residual = block(x)
    assert_close("hidden", found, (y * gate / (1 + (-gate).exp())) @ p["fc2.weight"].T, 1e-6)  # of the scan
    assert_close("residual", residual, x + hidden, 1e-6)


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
