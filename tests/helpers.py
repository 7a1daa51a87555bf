"""Independent oracles, error budgets and input generators that the tests share.

The oracles are NumPy and SciPy in float64, written from the definitions and slow on purpose; they share no code with
the package. What is here can fail, and `test_helpers.py` shows that it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch import Tensor
from torch.autograd import forward_ad

Array = np.ndarray

# No result may be looser than this, whatever the error budget says: (rtol, atol).
CEILING = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


def to_array(x: Tensor) -> Array:
    """A float64 copy of `x`."""
    return x.detach().to("cpu", torch.float64).numpy().copy()


# Oracles


def softplus(x: Array) -> Array:
    return np.logaddexp(x, 0.0)


def silu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))


def per_step(weight: Array, b: int, d: int, length: int) -> Array:
    """B or C in any of the three accepted layouts, as (b, d, n, l)."""
    if weight.ndim == 2:  # d n: constant in time
        return np.broadcast_to(weight[None, :, :, None], (b, d, weight.shape[1], length))
    if weight.ndim == 3:  # b n l: shared by all channels
        return np.broadcast_to(weight[:, None], (b, d, *weight.shape[1:]))
    return np.repeat(weight, d // weight.shape[1], axis=1)  # b g n l: channel c belongs to group c // (d / g)


def scan_oracle(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
) -> tuple[Array, Array]:
    """The selective scan as a loop over channels and steps: (out, last_state)."""
    b, d, length = u.shape
    n = A.shape[1]
    if delta_bias is not None:
        delta = delta + delta_bias[None, :, None]
    if delta_softplus:
        delta = softplus(delta)
    b_steps, c_steps = per_step(B, b, d, length), per_step(C, b, d, length)
    out, last = np.zeros((b, d, length)), np.zeros((b, d, n))
    for c in range(d):
        h = np.zeros((b, n)) if initial_state is None else initial_state[:, c]
        for t in range(length):
            h = np.exp(delta[:, c, t, None] * A[c]) * h + delta[:, c, t, None] * b_steps[:, c, :, t] * u[:, c, t, None]
            out[:, c, t] = (h * c_steps[:, c, :, t]).sum(-1)
        last[:, c] = h
    if D is not None:
        out = out + D[None, :, None] * u
    if z is not None:
        out = out * silu(z)
    return out, last


def pixel_order(direction: int, h: int, w: int) -> list[tuple[int, int]]:
    """The pixels in the order in which a direction visits them: rows, columns, rows reversed, columns reversed."""
    rows = [(i, j) for i in range(h) for j in range(w)]
    columns = [(i, j) for j in range(w) for i in range(h)]
    return [rows, columns, rows[::-1], columns[::-1]][direction]


def cross_scan_oracle(
    x: Array, x_proj_weight: Array, dt_proj_weight: Array, dt_proj_bias: Array, A_log: Array, D: Array
) -> Array:
    """The four-direction scan of b h w d, one direction after the other through explicit lists of pixels."""
    _, h, w, d = x.shape
    n, r = A_log.shape[1], dt_proj_weight.shape[2]
    out = np.zeros_like(x)
    for k in range(4):
        order = pixel_order(k, h, w)
        sequence = np.stack([x[:, i, j] for i, j in order], axis=1)  # b l d
        projected = sequence @ x_proj_weight[k].T  # b l r+2n
        low, B, C = projected[..., :r], projected[..., r : r + n], projected[..., r + n :]
        y, _ = scan_oracle(
            sequence.transpose(0, 2, 1),
            (low @ dt_proj_weight[k].T).transpose(0, 2, 1),
            -np.exp(A_log[k * d : (k + 1) * d]),
            B.transpose(0, 2, 1),
            C.transpose(0, 2, 1),
            D[k * d : (k + 1) * d],
            delta_bias=dt_proj_bias[k],
            delta_softplus=True,
        )
        for t, (i, j) in enumerate(order):
            out[:, i, j] += y[:, :, t]
    return out


def basis_oracle(x: Array, grid: Array, spline_order: int, derivative: int = 0) -> Array:
    """SciPy's basis elements: x (..., i) and knots (i, m) give (..., i, m - spline_order - 1); 0 outside."""
    features, knots = grid.shape
    out = np.zeros((*x.shape, knots - spline_order - 1))
    for i in range(features):
        for c in range(out.shape[-1]):
            element = BSpline.basis_element(grid[i, c : c + spline_order + 2], extrapolate=False)
            out[..., i, c] = np.nan_to_num(element(x[..., i], nu=derivative), nan=0.0)
    return out


def kan_oracle(
    x: Array,
    base_weight: Array,
    spline_weight: Array,
    spline_scaler: Array | None,
    grid: Array,
    bias: Array | None = None,
    extrapolation: str = "zero",
) -> Array:
    """KANLinear's formula with SiLU as base: silu(x) W + sum over features and bases of scaler * weight * basis."""
    order = grid.shape[1] - spline_weight.shape[2] - 1
    low, high = grid[:, order], grid[:, -order - 1]
    inside = x if extrapolation == "zero" else np.clip(x, low, high)
    basis = basis_oracle(inside, grid, order)
    if extrapolation == "linear":  # the end tangents are those of the first and the last interval, seen from inside
        just_inside = np.clip(x, np.nextafter(low, high), np.nextafter(high, low))
        basis = basis + (x - inside)[..., None] * basis_oracle(just_inside, grid, order, derivative=1)
    scaled = spline_weight if spline_scaler is None else spline_weight * spline_scaler[..., None]
    out = silu(x) @ base_weight.T + np.einsum("...ic,oic->...o", basis, scaled)
    return out if bias is None else out + bias


# Errors, budgets


def max_error(actual: Tensor | Array, expected: Tensor | Array) -> float:
    """Largest absolute difference; infinite where `actual` is not finite, 0 for empty tensors."""
    a = to_array(actual) if isinstance(actual, Tensor) else np.asarray(actual, dtype=np.float64)
    e = to_array(expected) if isinstance(expected, Tensor) else np.asarray(expected, dtype=np.float64)
    if a.shape != e.shape:
        raise AssertionError(f"shapes differ: {a.shape} and {e.shape}")
    if not np.isfinite(a).all():
        return float("inf")
    return float(np.abs(a - e).max(initial=0.0))


def largest(x: Tensor | Array) -> float:
    values = to_array(x) if isinstance(x, Tensor) else np.asarray(x)
    return float(np.abs(values).max(initial=0.0))


def relative_error(actual: Tensor | Array, expected: Tensor | Array) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    return max_error(actual, expected) / max(largest(expected), 1e-30)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    a, e = to_array(actual), to_array(expected)
    if not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm(a - e) / max(float(np.linalg.norm(e)), 1e-30))


def assert_close(name: str, actual: Tensor | Array, expected: Tensor | Array, tolerance: float) -> None:
    """Relative to the largest absolute expected value."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"


def assert_budget(
    name: str,
    actual: Tensor,
    reference: Tensor,
    oracle: Tensor | Array,
    dtype: torch.dtype,
    bands: float = 1.0,
    terms: float = 0.0,
) -> None:
    """err(actual) <= 2 err(reference at the same dtype) + `bands` roundings of the largest value, under CEILING.

    `terms` is the size of the terms where the values are sums that may cancel.
    """
    scale = max(largest(oracle), terms)
    error, budget = max_error(actual, oracle), 2 * max_error(reference, oracle) + bands * torch.finfo(dtype).eps * scale
    rtol, atol = CEILING[dtype]
    allowed = min(budget, rtol * scale + atol)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g}, {dtype})"


def dual_tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of a function along ones, in forward mode without `torch.func`."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


# Transforms of a function of one tensor that take forward-mode derivatives of it, at a point.
FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "dual": dual_tangent,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "jacfwd twice": lambda function, x: torch.func.jacfwd(torch.func.jacfwd(function))(x),
    "hessian": lambda function, x: torch.func.hessian(function)(x),
}


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor | None], *, absolute: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradient of a random projection of it with respect to every floating input.

    The weights depend on the shape alone and are exact in every dtype, so all backends and dtypes see one loss;
    `absolute` takes their absolute values.
    """
    leaves = {k: v if v is None else v.detach().requires_grad_() for k, v in inputs.items()}
    out = function(**leaves)
    weights = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(0)) / 8
    weights = weights.abs() if absolute else weights
    wanted = {k: v for k, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), weights.to(out))
    return out.detach(), dict(zip(wanted, grads, strict=True))


# Inputs


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":  # first and last dimension swapped in memory
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # every second element of a wider buffer whose other elements are NaN
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":  # one batch entry read many times (stride 0): the values of entry 0
        return x[:1].expand_as(x) if x.shape[0] else x
    raise ValueError(f"layout is {layout!r}; choose contiguous, transposed, sliced or expanded")


LAYOUTS: Sequence[str] = ("contiguous", "transposed", "sliced", "expanded")


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Make every uninitialised floating tensor NaN, also those that PyTorch's own kernels allocate."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Golden:
    """One file of golden values, in float32."""

    meta: str
    input: Tensor
    output: Tensor | None
    outputs: dict[str, Tensor]  # of a model with several
    state: dict[str, Tensor]
    grad_output: Tensor | None
    grad: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Golden:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        tensors = {k: torch.from_numpy(v) for k, v in arrays.items() if k != "meta"}
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        return cls(
            meta=str(arrays["meta"]),
            input=tensors["input"],
            output=tensors.get("output"),
            outputs=under("output/"),
            state=under("state/"),
            grad_output=tensors.get("grad_output"),
            grad=under("grad/"),
        )


def ellipses(count: int = 4, size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy RGB images of one bright ellipse each, and their masks: (count, 3, size, size), (count, 1, size, size)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size - 0.5
    images, masks = [], []
    for _ in range(count):
        cy, cx = rng.uniform(-0.15, 0.15, 2)
        ry, rx = rng.uniform(0.15, 0.35, 2)
        mask = ((rows - cy) / ry) ** 2 + ((columns - cx) / rx) ** 2 <= 1
        images.append(0.6 * mask + 0.2 * rng.standard_normal((3, size, size)))
        masks.append(mask[None])
    return torch.tensor(np.stack(images), dtype=torch.float32), torch.tensor(np.stack(masks), dtype=torch.float32)


def dice(logits: Tensor, mask: Tensor) -> float:
    """Dice of the thresholded prediction, pooled over all pixels."""
    prediction = (logits > 0).float()
    return float(2 * (prediction * mask).sum() / (prediction.sum() + mask.sum()))


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(i)`` on ``count`` threads at the same time, each of which must end within two minutes."""
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def fresh_process(code: str, **environment: str) -> str:
    """What `code` prints in a new interpreter that sees this checkout."""
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def release(package: str) -> tuple[int, ...]:
    """The installed major and minor version."""
    return tuple(map(int, version(package).split(".")[:2]))


def says(*parts: str) -> str:
    """A regular expression that matches a message holding every part, in any order and any case."""
    return "(?is)" + "".join(f"(?=.*{part})" for part in parts)
