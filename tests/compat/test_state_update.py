"""One step of the scan, against the formula written for one head and channel after the other."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from stand_ins import function, without_originals
from torch import Tensor

from helpers import assert_close, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
B, H, D, N = 2, 4, 3, 5


def make(groups: int) -> dict[str, Tensor]:
    shapes = {
        "state": (B, H, D, N),
        "x": (B, H, D),
        "dt": (B, H, D),
        "A": (H, D, N),
        "B": (B, groups, N),
        "C": (B, groups, N),
        "D": (H, D),
        "z": (B, H, D),
        "dt_bias": (H, D),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def plain(v: dict[str, Tensor], softplus: bool) -> tuple[Tensor, Tensor]:
    out, state = torch.zeros(B, H, D, dtype=torch.float64), v["state"].clone()
    for b in range(B):
        for h in range(H):
            group = h * v["B"].shape[1] // H
            for d in range(D):
                step = float(v["dt"][b, h, d]) + (float(v["dt_bias"][h, d]) if "dt_bias" in v else 0.0)
                step = math.log1p(math.exp(step)) if softplus else step
                x = float(v["x"][b, h, d])
                state[b, h, d] = torch.exp(step * v["A"][h, d]) * state[b, h, d] + step * x * v["B"][b, group]
                y = float(state[b, h, d] @ v["C"][b, group]) + (float(v["D"][h, d]) * x if "D" in v else 0.0)
                z = float(v["z"][b, h, d]) if "z" in v else None
                out[b, h, d] = y if z is None else y * z / (1 + math.exp(-z))
    return out, state


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("absent", [(), ("D",), ("z", "dt_bias")])
def test_heads(groups: int, softplus: bool, absent: tuple[str, ...]) -> None:
    v = {k: x for k, x in make(groups).items() if k not in absent}
    expected, last = plain(v, softplus)
    out = function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")(**v, dt_softplus=softplus)
    assert_close("out", out, expected, 1e-13)
    assert_close("state", v["state"], last, 1e-13)


def test_one_head_and_chosen_rows() -> None:
    update = function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    v = make(1)
    many = {
        k: x[:, :1] if k in ("state", "x", "dt", "z") else x[:1] if k in ("A", "D", "dt_bias") else x
        for k, x in v.items()
    }
    single = {
        k: x[:, 0] if x.ndim > 2 and k != "A" else x[0] if k in ("A", "D", "dt_bias") else x for k, x in many.items()
    }
    single = {k: x.clone() for k, x in single.items()}
    larger = torch.zeros(5, D, N, dtype=torch.float64)
    larger[[4, 1]] = single["state"]
    chosen = {**single, "state": larger}
    expected = update(**many, dt_softplus=True)
    assert_close("out", update(**single, dt_softplus=True), expected[:, 0], 1e-14)
    assert_close("state", single["state"], many["state"][:, 0], 1e-14)
    assert_close(
        "out", update(**chosen, dt_softplus=True, state_batch_indices=torch.tensor([4, 1])), expected[:, 0], 1e-14
    )
    assert_close("state", larger[[4, 1]], single["state"], 1e-14)
    assert not larger[[0, 2, 3]].any()
    kept, rows = larger.clone(), torch.tensor([-1, 2], dtype=torch.int32)
    larger[2] = single["state"][1]
    out = update(**chosen, dt_softplus=True, state_batch_indices=rows)
    assert not out[0].any(), "a negative row is padding"
    assert_close("out", out[1:], update(**single, dt_softplus=True)[1:], 1e-14)
    assert_close("state", larger[2], single["state"][1], 1e-14)
    assert torch.equal(larger[[0, 1, 3, 4]], kept[[0, 1, 3, 4]])


BARE = ("x", "dt", "z", "B", "C", "A", "D", "dt_bias")


@pytest.mark.parametrize(
    ("heads", "bare"), [*product((0, 1), [*((name,) for name in BARE), BARE]), (H, ("B",)), (H, ("B", "C"))], ids=str
)
def test_every_argument_may_lack_the_axis_of_heads(heads: int, bare: tuple[str, ...]) -> None:
    """The state may lack it too, which is 0 heads here; `B` and `C` without the axis are one group."""
    axes = {name: 0 if name in ("A", "D", "dt_bias") else 1 for name in ("state", *BARE)}
    v = {name: x if name in "BC" else x.narrow(axes[name], 0, heads or 1) for name, x in make(1).items()}
    wide = {name: x if name in "BC" else x.expand_as(make(1)[name]) for name, x in v.items()}
    expected, last = (x[:, : heads or 1] for x in plain(wide, True))
    given = {name: x.select(axes[name], 0) if name in bare else x for name, x in v.items()}
    given["state"] = (v["state"] if heads else v["state"][:, 0]).clone()
    update = function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    out = update(**given, dt_softplus=True)
    assert out.shape == given["state"].shape[:-1]
    assert_close("out", out.view_as(expected), expected, 1e-13)
    assert_close("state", given["state"].view_as(last), last, 1e-13)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 0])])
def test_gradients_although_the_state_is_overwritten(rows: Tensor | None) -> None:
    update = function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    v = {k: x.abs() if k == "dt" else x for k, x in make(2).items()}
    names = [name for name in v if name != "state"]

    def run(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return update(v["state"].clone(), **given, dt_softplus=True, state_batch_indices=rows)

    assert torch.autograd.gradcheck(run, [v[name].requires_grad_() for name in names])


def test_half_precision_states() -> None:
    update = function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    v = {k: x.bfloat16() if x.ndim > 2 and k != "A" else x.float() for k, x in make(1).items()}
    expected, last = plain({k: x.double() for k, x in v.items()}, True)
    out = update(**v, dt_softplus=True)
    assert (out.dtype, v["state"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert_close("out", out, expected, 0.005)
    assert_close("state", v["state"], last, 0.005)


def test_wrong_shapes_are_named() -> None:
    update, v = function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"), make(3)
    with pytest.raises(ValueError, match=says("3 groups", "4 heads")):
        update(**v)
    with pytest.raises(ValueError, match=says("dt must", r"\(2, 4, 3\)", r"\(2, 4, 2\)")):
        update(**{**make(1), "dt": torch.zeros(2, 4, 2)})
