"""Compare with float64, by a budget that comes from the error of the plain formula at the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.tasks import Wrong
from benchmarks.measure import relative_l2

Results = dict[str, Tensor]
CLOSE = 2e-5  # relative L2 of float32 results that are added in another order
# One rounding of a result in half precision; in float32 a rounding for each of the operations along a scan or a sum.
BANDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-12}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 whose factors may be rounded to TF32, or may not."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def moved(inputs: Mapping[str, Tensor | None], *to: object) -> dict[str, Tensor | None]:
    """The same inputs on another device or in another dtype."""
    return {name: None if x is None else x.to(*to) for name, x in inputs.items()}  # type: ignore[call-overload]


def results(function: Callable[..., Tensor], inputs: Mapping[str, Tensor | None]) -> Results:
    """Output, and the gradient of a fixed projection of it by every input; exact in every dtype."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    weights = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(0)) / 8
    wanted = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), weights.to(out))
    return {"output": out.detach(), **{f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}}


def judge(
    actual: Results,
    exact: Results,
    plain: Results,
    inputs: Mapping[str, Tensor | None] | None = None,
    bands: float = 1.0,
) -> dict[str, object]:
    """The error of each result and what is allowed: twice that of the plain formula, and a band of rounding."""
    errors = {name: relative_l2(value, exact[name]) for name, value in actual.items()}
    allowed = {
        name: 2 * relative_l2(plain[name], exact[name]) + bands * BANDS[value.dtype] for name, value in actual.items()
    }
    over = {name: errors[name] / allowed[name] for name in errors if not errors[name] <= allowed[name]}
    found: dict[str, object] = {"errors": _rounded(errors), "allowed": _rounded(allowed)}
    if over:
        worst = max(over, key=lambda name: over[name])
        raise Wrong(
            f"{worst}: relative error {errors[worst]:.2e}, allowed {allowed[worst]:.2e}; wrong: {', '.join(over)}",
            inputs,
            **found,
        )
    return found


def same_numbers(actual: Results, expected: Results, what: str, allowed: float = CLOSE, inputs: Any = None) -> float:
    """Every result is another run's, but for the order of its sums; returns the largest difference."""
    errors = {name: relative_l2(value, expected[name]) for name, value in actual.items()}
    for name, error in errors.items():
        if not error <= allowed:
            raise Wrong(f"{what}: {name} differs by {error:.2e}, allowed {allowed:.2e}", inputs)
    return max(errors.values(), default=0.0)


def same_bits(actual: Results, expected: Results, what: str, inputs: Mapping[str, Tensor | None]) -> None:
    """Every result equals another run's, bit for bit; NaN is never right."""
    for name, value in actual.items():
        if not torch.equal(value, expected[name]):
            error = relative_l2(value, expected[name])
            raise Wrong(f"{what}: {name} differs by {error:.2e}", inputs)


def _rounded(values: Mapping[str, float]) -> dict[str, float | str]:
    return {name: float(f"{value:.3g}") if math.isfinite(value) else "inf" for name, value in values.items()}
