"""Values and gradients of the stand-ins for Python functions, against the reference backend of our scan."""

from __future__ import annotations

import inspect

import pytest
import torch
from stand_ins import assert_equals_reference, function, make_inputs, without_originals

from helpers import says
from kan_mamba_layers import selective_scan

NAMES = ("selective_scan_fn", "selective_scan_ref")
pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]


class TestFunctions:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("form", ["dn", "bnl", "bgnl"])
    @pytest.mark.parametrize("name", NAMES)
    def test_mamba_ssm(self, name: str, form: str, dtype: torch.dtype) -> None:
        scan = function("mamba_ssm.ops.selective_scan_interface", name)
        for z in (False, True):
            for softplus in (False, True):
                options = {"delta_softplus": softplus}
                inputs = make_inputs(dtype, form=form, z=z)
                assert_equals_reference(lambda **x: scan(**x, **options), inputs, **options)  # noqa: B023
        for bare in ({"z", "D"}, {"z", "delta_bias"}):
            inputs = {k: v for k, v in make_inputs(dtype, form=form).items() if k not in bare}
            assert_equals_reference(scan, inputs)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("form", ["bnl", "bgnl"])
    @pytest.mark.parametrize("name", NAMES)
    def test_selective_scan(self, name: str, form: str, dtype: torch.dtype) -> None:
        scan = function("selective_scan", name)
        for softplus in (False, True):
            options = {"delta_softplus": softplus}
            assert_equals_reference(lambda **x: scan(**x, **options), make_inputs(dtype, form=form), **options)  # noqa: B023

    def test_backends_and_positions(self) -> None:
        """`fn` is the op as it is, `ref` its reference; arguments stand where the originals' do."""
        x = make_inputs(torch.float32, z=True)
        common, bias = [x[k] for k in ("u", "delta", "A", "B", "C", "D")], x["delta_bias"]
        for name, backend in (("selective_scan_fn", "auto"), ("selective_scan_ref", "reference")):
            out, last = function("mamba_ssm.ops.selective_scan_interface", name)(*common, x["z"], bias, True, True)
            expected = selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend)
            assert torch.equal(out, expected[0]) and torch.equal(last, expected[1])
            out = function("selective_scan", name)(*common, bias, True)
            assert torch.equal(out, selective_scan(*common, None, bias, True, backend=backend))
        assert list(inspect.signature(function("selective_scan")).parameters)[-2:] == ["delta_softplus", "nrows"]
        assert function("mamba_ssm") is function("mamba_ssm.ops.selective_scan_interface")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        x = make_inputs(dtype, z=True)
        out, last = function("mamba_ssm")(**x, return_last_state=True)
        assert (out.dtype, last.dtype, last.shape) == (dtype, torch.float32, (2, 6, 3))

    def test_complex_states_are_refused(self) -> None:
        x = make_inputs(torch.float32)
        x["A"] = x["A"].to(torch.complex64)
        with pytest.raises(TypeError, match=says("A must be real", "complex64")):
            function("mamba_ssm")(**x)
