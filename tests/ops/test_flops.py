"""PyTorch's FLOP counter knows the cost of the fused ops, whichever of the two is imported first."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import fresh_process
from kan_mamba_layers import KANLinear, cross_selective_scan, kan_linear, selective_scan
from ops.kan_linear.calls import FUSED, kan_inputs
from ops.selective_scan.calls import fused_line, image_inputs

pytest.importorskip("numba")


class TestScans:
    def test_operations(self) -> None:
        b, h, w, d, n, r = 2, 5, 8, 6, 3, 2
        inputs = {k: v.requires_grad_() for k, v in image_inputs(b, h, w, d, r, n).items()}
        counter = FlopCounterMode(display=False)
        with counter:
            out = cross_selective_scan(**inputs, backend="cpu")
            forward = counter.get_total_flops()
            out.sum().backward()
        expected = b * h * w * 4 * (9 * d * n + 2 * r * d + 2 * d * (r + 2 * n))
        assert forward == expected and counter.get_total_flops() == 4 * expected

    def test_operations_of_a_sequence(self) -> None:
        b, d, l, n = 2, 4, 37, 3
        with FlopCounterMode(display=False) as counter:
            selective_scan(**fused_line(b, d, l, n), backend="cpu")
        assert counter.get_total_flops() == 9 * b * d * l * n


class TestKanLinear:
    @pytest.mark.parametrize("backend", FUSED)
    @pytest.mark.parametrize("frozen", [(), ("x",), ("base_weight", "spline_weight", "spline_scaler")], ids=str)
    def test_operations(self, backend: str, frozen: tuple[str, ...]) -> None:
        rows, i, o, g, s = 7, 3, 4, 6, 2
        inputs = {k: v.requires_grad_(k not in (*frozen, "grid")) for k, v in kan_inputs(rows, i, o, g, s).items()}
        with FlopCounterMode(display=False) as counter:
            out = kan_linear(**inputs, backend=backend)
            assert counter.get_total_flops() == 2 * rows * o * i * (1 + g + s)
            out.sum().backward()
        assert counter.get_total_flops() == (2 if frozen else 3) * 2 * rows * o * i * (1 + g + s)


@pytest.mark.parametrize("first", ["kan_mamba_layers", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first: str) -> None:
    second = {"kan_mamba_layers": "torch.utils.flop_counter"}.get(first, "kan_mamba_layers")
    printed = fresh_process(
        f"import torch, {first}, {second}, importlib, sys\n"
        "from kan_mamba_layers import selective_scan\n"
        "u, A, B = torch.rand(1, 2, 5), -torch.rand(2, 3), torch.rand(1, 3, 5)\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
        "    selective_scan(u, u, A, B, B, backend='cpu')\n"
        "print(counter.get_total_flops(), sum('kan_mamba_layers' in type(f).__module__ for f in sys.meta_path))\n"
    )
    assert printed == f"{9 * 2 * 5 * 3} 0", "the count, and no finder left behind"


def test_importing_brings_neither_backend_nor_counter() -> None:
    names = ("triton", "numba", "llvmlite", "torch.utils.flop_counter")
    assert fresh_process(f"import sys, kan_mamba_layers\nprint([n for n in {names} if n in sys.modules])") == "[]"


def test_a_formula_of_the_user_stays() -> None:
    layer, x = KANLinear(3, 2, backend="chunked"), torch.randn(4, 3)
    layer(x)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.kan_mamba_layers.kan_linear: lambda *_, **__: 7}
    ) as counter:
        layer(x)
    assert counter.get_total_flops() == 7
