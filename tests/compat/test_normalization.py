"""Normalisation with residual addition, against the formula in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
from stand_ins import function, without_originals
from torch import Tensor

from helpers import assert_close, gradients, max_error, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
MODULE, OLD = "mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.layernorm"
CASES = [(module, name) for module in (MODULE, OLD) for name in ("layer_norm_fn", "rms_norm_fn")]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, name: str) -> Tensor:
    if name == "layer_norm_fn":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def make(*names: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    sizes = {"weight": (8,), "bias": (8,), "weight1": (8,), "bias1": (8,), "rowscale": (2, 5)}
    return {name: torch.randn(sizes.get(name, (2, 5, 8))).to(dtype) for name in names}


@pytest.mark.parametrize(("module", "name"), CASES)
def test_values_and_gradients(module: str, name: str) -> None:
    fn = function(module, name)
    for given in (("x", "weight", "bias", "residual"), ("x", "weight", "bias"), ("x", "weight", "residual")):
        for prenorm in (False, True):
            inputs = make(*given)

            def run(prenorm: bool = prenorm, **x: Tensor) -> Tensor:
                result = fn(**{"bias": None, **x}, eps=0.1, prenorm=prenorm)
                return torch.stack(result) if prenorm else result

            def expected(x, weight, bias=None, residual=None, prenorm: bool = prenorm) -> Tensor:
                total = x if residual is None else x + residual
                y = plain(total, weight, bias, 0.1, name)
                return torch.stack([y, total]) if prenorm else y

            (out, grads), (true, true_grads) = gradients(run, inputs), gradients(expected, inputs)
            assert_close("out", out, true, 1e-12)
            for key, grad in grads.items():
                assert_close(f"d{key}", grad, true_grads[key], 1e-11)


@pytest.mark.parametrize("name", ["layer_norm_fn", "rms_norm_fn"])
def test_two_branches_and_row_scales(name: str) -> None:
    fn = function(MODULE, name)
    x = make("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    total = x["x"] + x["x1"] + x["residual"]
    y, y1, kept = fn(**x, eps=0.1, prenorm=True)
    assert_close("y", y, plain(total, x["weight"], x["bias"], 0.1, name), 1e-12)
    assert_close("y1", y1, plain(total, x["weight1"], x["bias1"], 0.1, name), 1e-12)
    assert_close("sum", kept, total, 1e-14)
    x = make("x", "weight", "bias", "rowscale")
    expected = plain(x["x"] * x["rowscale"][..., None], x["weight"], x["bias"], 0.1, name)
    assert_close("y", fn(**x, eps=0.1), expected, 1e-12)
    with pytest.raises(ValueError, match=says("rowscale", "x1")):
        fn(**x, x1=x["x"])


@pytest.mark.parametrize("name", ["layer_norm_fn", "rms_norm_fn"])
def test_dropout(name: str) -> None:
    x = make("x", "weight", "bias", "residual", "x1")
    y, total, mask, mask1 = function(MODULE, name)(**x, eps=0.1, dropout_p=0.25, prenorm=True, return_dropout_mask=True)
    assert_close("sum", total, (x["x"] * mask + x["x1"] * mask1) / 0.75 + x["residual"], 1e-12)
    assert_close("y", y, plain(total, x["weight"], x["bias"], 0.1, name), 1e-12)
    assert 0.1 < 1 - torch.cat([mask, mask1]).double().mean() < 0.4 and not torch.equal(mask, mask1)


@pytest.mark.parametrize("name", ["layer_norm_fn", "rms_norm_fn"])
def test_dropped_values_are_zeros_whatever_they_were(name: str) -> None:
    fn = function(MODULE, name)
    x = {**make("weight", "bias"), "x": torch.full((2, 5, 8), torch.inf, dtype=torch.float64, requires_grad=True)}
    _, total, kept, _ = fn(**x, dropout_p=0.5, prenorm=True, return_dropout_mask=True)
    assert torch.equal(total, torch.where(kept, torch.inf, 0.0)) and kept.any() and not kept.all()
    x["x"] = make("x")["x"].requires_grad_()
    y, total = fn(**x, eps=0.1, dropout_p=1.0, prenorm=True)
    assert not total.any()
    assert_close("y", y, plain(total, x["weight"], x["bias"], 0.1, name), 1e-12)
    y.square().sum().backward()
    assert not x["x"].grad.any()


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_the_function_beneath(is_rms_norm: bool) -> None:
    """`mamba_ssm` calls it itself, for the first of its results."""
    fn, x = function(MODULE, "_layer_norm_fwd"), make("x", "weight", "bias", "residual")
    name = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    for residual in (None, x["residual"]):
        total = x["x"] if residual is None else x["x"] + residual
        y = fn(x["x"], x["weight"], x["bias"], 0.1, residual, residual_dtype=None, is_rms_norm=is_rms_norm)[0]
        assert_close("y", y, plain(total, x["weight"], x["bias"], 0.1, name), 1e-12)


@pytest.mark.parametrize(("module", "name"), CASES)
def test_dtypes(module: str, name: str) -> None:
    """The sum keeps the residual's dtype; the first of a chain is widened on request; nothing is rounded on the way."""
    fn = function(module, name)
    x = make("x", "weight", "bias", "residual", dtype=torch.bfloat16)
    first = {k: v for k, v in x.items() if k != "residual"}
    for inputs, options, expected in (
        (first, {}, torch.bfloat16),
        (first, {"residual_in_fp32": True}, torch.float32),
        (x, {"residual_in_fp32": True}, torch.bfloat16),
        ({**x, "residual": x["residual"].float()}, {}, torch.float32),
    ):
        y, total = fn(**inputs, prenorm=True, **options)
        assert (y.dtype, total.dtype) == (torch.bfloat16, expected)
    double = {k: v.double() for k, v in x.items()}
    true = plain(double["x"] + double["residual"], double["weight"], double["bias"], 1e-6, name)
    error = (fn(**x).double() - true).abs()
    assert (error <= 0.51 * torch.finfo(torch.bfloat16).eps * true.abs() + 1e-5).all()


def test_places_of_arguments() -> None:
    """The modules list the options in different orders, and blocks pass some of them by position."""
    wide = [*("x", "weight", "bias", "residual", "x1", "weight1", "bias1", "eps", "dropout_p", "rowscale")]
    ends = ["prenorm", "residual_in_fp32"]
    orders = {
        (MODULE, "layer_norm_fn"): [*wide, *ends, "is_rms_norm", "return_dropout_mask"],
        (MODULE, "rms_norm_fn"): [*wide, *ends, "return_dropout_mask"],
        (OLD, "layer_norm_fn"): [*wide[:4], "eps", *ends, "is_rms_norm"],
        (OLD, "rms_norm_fn"): [*wide[:4], *ends, "eps"],
    }
    for key, order in orders.items():
        assert list(inspect.signature(function(*key)).parameters) == order
    x = make("x", "weight", "bias", "residual")
    y, total = function(OLD, "rms_norm_fn")(*x.values(), True, False, 0.1)
    assert_close("y", y, plain(total, x["weight"], x["bias"], 0.1, "rms_norm_fn"), 1e-12)


@pytest.mark.parametrize("module", [MODULE, OLD])
def test_the_module(module: str) -> None:
    norm = function(module, "RMSNorm")(8, eps=0.1, dtype=torch.float64)
    assert {k: tuple(v.shape) for k, v in norm.state_dict().items()} == {"weight": (8,)} and norm.bias is None
    assert (norm.weight == 1).all()
    x = make("x", "residual")
    y, total = norm(x["x"], x["residual"], prenorm=True)
    assert_close("sum", total, x["x"] + x["residual"], 1e-14)
    assert_close("y", y, plain(total, norm.weight, None, 0.1, "rms_norm_fn"), 1e-12)


def test_the_modules_differ_in_the_third_argument() -> None:
    x, norm = make("x", dtype=torch.float32)["x"], function(MODULE, "RMSNorm")
    dropped = norm(8, 1e-5, 0.5)
    assert max_error(dropped(x), dropped.eval()(x)) > 0.1
    old = function(OLD, "RMSNorm")(8, 1e-5, "cpu", torch.float16)
    assert type(old) is norm and old.weight.dtype == torch.float16
