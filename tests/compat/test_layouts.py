"""What stand-ins return is laid out as the results of the originals, so that callers may ask for a view."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from stand_ins import EXTENSIONS, function, make_inputs, without_originals

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
INTERFACE = "mamba_ssm.ops.selective_scan_interface"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (INTERFACE, "selective_scan_fn"),
        (INTERFACE, "selective_scan_ref"),
        ("selective_scan", "selective_scan_fn"),
        ("selective_scan", "selective_scan_ref"),
    ],
)
def test_functions(module: str, name: str) -> None:
    out = function(module, name)(**make_inputs(), delta_softplus=True)
    assert out.view(2, -1).shape == (2, 66)
    if module == INTERFACE:
        inputs = make_inputs(z=True)
        assert torch.equal(function(module, "SelectiveScanFn").apply(**inputs), function(module)(**inputs))


@pytest.mark.parametrize("name", [*EXTENSIONS, "selective_scan_cuda_oflex_rh"])
def test_extensions(name: str) -> None:
    v = make_inputs(torch.float32)
    inputs = [v[key] for key in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    gate = [None] if name == "selective_scan_cuda" else []
    if name.endswith("_rh"):
        del inputs[4]
    fwd, bwd = (partial(function(name, way), *inputs[:-1], *gate, inputs[-1]) for way in ("fwd", "bwd"))
    out, x = fwd(True)[:2]
    more = [None, None] if gate else []
    grads = bwd(torch.ones_like(out), x, *more, True, *([False] if gate else [1]))
    assert all(y is None or y.is_contiguous() for y in (out, x, *grads))


def test_the_block_without_its_output_projection() -> None:
    xz, A = torch.randn(2, 12, 11), -torch.rand(6, 3)
    weights = torch.randn(6, 1, 4), None, torch.randn(8, 6), torch.randn(6, 2)
    assert function(INTERFACE, "mamba_inner_fn_no_out_proj")(xz, *weights, A).view(2, -1).shape == (2, 66)
