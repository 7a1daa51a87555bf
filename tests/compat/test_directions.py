"""The four orders of VMamba's `csm_triton`, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from stand_ins import function, without_originals
from torch import Tensor

from helpers import assert_close, gradients, pixel_order, says

pytestmark = [without_originals, pytest.mark.usefixtures("stand_ins")]
H, W = 3, 4
ORDERS = {0: (0, 1, 2, 3), 1: (0, 0, 0, 0), 2: (0, 0, 2, 2)}


def scanned(x: Tensor, scans: int) -> Tensor:  # b 4 c h w -> b 4 c l
    paths = [pixel_order(k, H, W) for k in ORDERS[scans]]
    return torch.stack([torch.stack([x[:, k, :, i, j] for i, j in path], -1) for k, path in enumerate(paths)], 1)


def merged(y: Tensor, scans: int) -> Tensor:  # b 4 c l -> b 4 c l
    x = torch.zeros(2, 4, 3, H, W, dtype=y.dtype)
    for k, direction in enumerate(ORDERS[scans]):
        for t, (i, j) in enumerate(pixel_order(direction, H, W)):
            x[:, k, :, i, j] = y[:, k, :, t]
    return x.flatten(-2)


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_values_and_gradients(inner: bool, outer: bool, one_by_one: bool, scans: int) -> None:
    options = {"in_channel_first": inner, "out_channel_first": outer, "one_by_one": one_by_one, "scans": scans}
    scan, merge = function("csm_triton", "cross_scan_fn"), function("csm_triton", "cross_merge_fn")

    def run_scan(x: Tensor) -> Tensor:  # b 4 c h w
        if one_by_one:
            y = scan(x if inner else x.permute(0, 3, 4, 1, 2), **options)
        else:
            y = scan(x[:, 0] if inner else x[:, 0].permute(0, 2, 3, 1), **options)
        return y if outer else y.permute(0, 2, 3, 1)

    def run_merge(y: Tensor) -> Tensor:  # b 4 c l
        y = y.unflatten(-1, (H, W))
        x = merge(y if outer else y.permute(0, 3, 4, 1, 2), **options)
        if one_by_one:
            return x if inner else x.permute(0, 2, 3, 1)
        return x if inner else x.mT

    x, y = torch.randn(2, 4, 3, H, W).double(), torch.randn(2, 4, 3, H * W).double()
    images = (lambda x: x) if one_by_one else (lambda x: x[:, :1].expand(-1, 4, -1, -1, -1))
    found, (true, true_grads) = gradients(run_scan, {"x": x}), gradients(lambda x: scanned(images(x), scans), {"x": x})
    assert torch.equal(found[0], true) and torch.allclose(found[1]["x"], true_grads["x"], rtol=1e-12)
    sums = (lambda x: x) if one_by_one else (lambda x: x.sum(1))
    found, (true, true_grads) = gradients(run_merge, {"y": y}), gradients(lambda y: sums(merged(y, scans)), {"y": y})
    assert torch.allclose(found[0], true, rtol=1e-12) and torch.equal(found[1]["y"], true_grads["y"])


def test_functions_of_earlier_versions() -> None:
    """Under the name `apply`, with the layout behind the map; `getCSM` has the orders of the ablations."""
    x, y = torch.randn(2, 4, 3, H, W), torch.randn(2, 4, 3, H, W)
    for name in ("CrossScanTriton", "CrossScanTritonF", "CrossScanF"):
        scan = function("csm_triton", name).apply
        assert torch.equal(scan(x[:, 0]), scanned(x[:, :1].expand_as(x), 0))
        assert torch.equal(scan(x[:, 0].permute(0, 2, 3, 1), False), scan(x[:, 0]))
    for name in ("CrossMergeTriton", "CrossMergeTritonF", "CrossMergeF"):
        merge = function("csm_triton", name).apply
        assert_close("merged", merge(y), merged(y.flatten(-2), 0).sum(1), 1e-6)
        assert torch.equal(merge(y, False), merge(y).mT)
    for name in ("CrossScanTriton1b1", "CrossScanTriton1b1F"):
        each = function("csm_triton", name).apply
        assert torch.equal(each(x), scanned(x, 0))
        assert torch.equal(each(x.permute(0, 3, 4, 1, 2), False), each(x))
    for mode in (1, 2):
        scan, merge = function("csm_triton", "getCSM")(mode)
        assert torch.equal(scan.apply(x[:, 0]), scanned(x[:, :1].expand_as(x), mode))
        assert_close("merged", merge.apply(y), merged(y.flatten(-2), mode).sum(1), 1e-6)


def test_wrong_calls() -> None:
    scan = function("csm_triton", "cross_scan_fn")
    with pytest.raises(ValueError, match=says("scans must be 0, 1 or 2", "3")):
        scan(torch.zeros(1, 2, 3, 4), scans=3)
    with pytest.raises(ValueError, match=says("x must", r"\(1, 2, 3, 4\)", "b, 4, c, h, w")):
        scan(torch.zeros(1, 2, 3, 4), one_by_one=True)
