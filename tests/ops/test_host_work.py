"""What a call of the Triton backend costs the host, in counts: with small maps a GPU waits for the host.

Kernels are replaced by functions that count their launches, so nothing is compiled and no GPU is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kan_mamba_layers import cross_selective_scan, kan_linear
from kan_mamba_layers.ops import backend
from ops.kan_linear.calls import kan_inputs
from ops.selective_scan.calls import image_inputs

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from kan_mamba_layers.ops.kan_linear import triton as kan
from kan_mamba_layers.ops.selective_scan import triton as scan

KERNELS = {
    kan.forward_kernel: ("kan_forward",),
    kan.backward_kernel: ("grad_input", "grad_weights"),
    scan.forward_kernel: ("scan", "chunk_ends", "carry", "merge"),
    scan.backward_kernel: ("scan_backward",),
    scan.steps_kernel: ("step_sizes", "step_gradients"),
}
ALLOCATIONS = ("empty", "new_empty", "empty_like")


class Work(NamedTuple):
    launches: int  # of Triton kernels
    allocations: int
    operators: int  # of PyTorch, in the launcher, without allocations


class Seen(TorchDispatchMode):
    """Counts PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.names[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


class Launches:
    """Stands for every kernel."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        self.count += 1
        return lambda *arguments, **constants: None


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The work of every call of a launcher."""
    found: list[Work] = []
    launches = Launches()
    monkeypatch.setattr(backend, "_triton_interprets", lambda: True)
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, launches)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before = launches.count
            with Seen() as seen:
                result = function(*arguments)
            allocations = sum(seen.names[name] for name in ALLOCATIONS)
            found.append(Work(launches.count - before, allocations, seen.names.total() - allocations))
            return result

        return call

    for launcher in (kan, scan):
        for name in ("forward", "backward"):
            monkeypatch.setattr(launcher, name, watched(getattr(launcher, name)))
    return found


def run(function: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any) -> None:
    leaves = {k: v.requires_grad_(k != "grid") for k, v in inputs.items()}
    y = function(**leaves, **options, backend="triton")
    y.backward(torch.ones_like(y))


@pytest.mark.parametrize(
    ("size", "forward", "backward"),
    [
        ((8, 8, 8, 32, 1, 16), Work(4, 8, 6), Work(6, 13, 12)),  # cut into chunks; one block of channels
        ((64, 4, 4, 64, 2, 16), Work(2, 6, 7), Work(4, 12, 15)),  # whole sequences; two blocks
    ],
)
def test_cross_selective_scan(size: tuple[int, ...], forward: Work, backward: Work, work: list[Work]) -> None:
    run(cross_selective_scan, image_inputs(*size))
    assert work == [forward, backward]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kan_linear(dtype: torch.dtype, work: list[Work]) -> None:
    inputs = kan_inputs(64, 32, 32, scaler=False, bias=False, dtype=dtype)
    run(kan_linear, inputs, spline_scaler=None, uniform=True)
    assert work == [Work(1, 1, 5), Work(2, 5, 11)]


def test_no_zeros_for_what_is_saved(work: list[Work]) -> None:
    """PyTorch would fill a gradient for the saved states, which are larger than the image."""
    inputs = {k: v.requires_grad_() for k, v in image_inputs(2, 8, 8, 32, 1, 16).items()}
    y = cross_selective_scan(**inputs, backend="triton")
    with Seen() as seen:
        y.backward(torch.ones_like(y))
    assert seen.names["zeros"] == seen.names["new_zeros"] == 0
