"""Who is measured on a case: the backends of this package, the textbook forms, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import cross_scan_channels_first, cross_scan_channels_last, scan_by_steps, scan_in_parallel
from benchmarks.cases import Case, make_inputs, make_module
from kan_mamba_layers import cross_selective_scan, resolve, selective_scan

BACKENDS = ("cpu", "triton", "chunked", "reference")
Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = ("forward", "training")
Layout = Mapping[str, tuple[int, ...]]
CHANNELS_FIRST = {"x": (0, 3, 1, 2)}
# The gradient of a slice `x[:, :, t]` is a tensor of the size of x, at every step: quadratic in the length.
QUADRATIC = "not run (its backward is quadratic in the length)"

BY_STEPS = {"max_length": 1024, "max_backward_length": 256}  # of a scan that takes one step at a time


@dataclass(frozen=True)
class Bound:
    """A candidate with its inputs in place."""

    run: Callable[[], Tensor]
    leaves: dict[str, Tensor]  # what gets a gradient
    train: Callable[[bool], object] = lambda training: None
    layout: Layout = field(default_factory=dict)
    held: tuple[Tensor, ...] = ()  # what else is there before the call
    joint: bool = False  # gradients are judged together: those of a bias before BatchNorm are zero but for rounding

    def step(self, mode: Mode, grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is measured: inference, or output and all gradients."""
        if mode == "forward":
            with torch.no_grad():
                return (self.run(),)
        out = self.run()
        return (out, *torch.autograd.grad(out, list(self.leaves.values()), grad))


@dataclass(frozen=True)
class Candidate:
    """Something that computes a case; `absent` says why it cannot be measured here."""

    name: str
    function: Callable[..., Tensor] | None = None  # of an op; None for layers and models
    module: dict[str, Any] | None = None  # arguments of make_module
    layout: Layout = field(default_factory=dict)  # of arguments and of the result "y", as permutations of ours
    max_length: int | None = None
    max_backward_length: int | None = None
    copies: int = 0  # tensors of the size of all states, b l k d n, or bases, that live at once in training
    compiled: bool = False  # by torch.compile
    absent: str = ""

    def bind(self, case: Case, device: str, dtype: torch.dtype = torch.float32, exact: bool = False) -> Bound:
        """Put the inputs in place; `exact` takes the same values in float64."""
        if self.module is not None:
            module, x = make_module(case, **self.module)
            module, x = module.to(device), x.to(device)
            if exact:
                module, x = module.double(), x.double()
            half = dtype != torch.float32 and not exact

            def run_module() -> Tensor:
                with torch.autocast(device, dtype) if half else nullcontext():
                    out = module(x)
                return torch.stack(out) if isinstance(out, list) else out  # outputs of deep supervision

            return Bound(
                run_module,
                dict(module.named_parameters()),
                module.train,
                held=(x, *module.buffers()),
                joint=case.suite == "models" or case.op == "ema",
            )

        if self.function is None:
            raise ValueError(f"candidate {self.name!r} cannot run: {self.absent}")
        leaves = {}
        for name, value in make_inputs(case, dtype).items():
            value = value.double() if exact else value
            order = self.layout.get(name, tuple(range(value.ndim)))
            leaves[name] = value.permute(order).contiguous().to(device).requires_grad_()
        return Bound(partial(self.function, **leaves), leaves, layout=self.layout)

    def oracle(self, case: Case) -> Candidate:
        """What is run in float64 to compare with: the chunked form, which the tests compare with the recurrence."""
        return self if self.name == "without SS2D" else _own(case, "chunked")

    def refuses(self, case: Case, mode: Mode, memory: float = float("inf")) -> str:
        """Why the case is not run, or an empty string."""
        if self.absent:
            return f"not measured ({self.absent})"
        if self.max_length is not None and case.length > self.max_length:
            return f"not run (one step at a time, at most {self.max_length} steps)"
        backward = self.max_backward_length
        if mode == "training" and backward is not None and case.length > backward:
            return QUADRATIC
        if self.copies * case.elements * 4 > memory:
            return f"not run (needs about {self.copies * case.elements * 4 / 2**30:.0f} GiB)"
        return ""


def own(case: Case, device: str, dtype: torch.dtype = torch.float32) -> list[Candidate]:
    """Every backend that serves the case on the device; the first one is what "auto" takes."""
    op = case.op if case.op == "selective_scan" else "cross_selective_scan"
    found = []
    for backend in serving(op, device, dtype):
        found.append(_own(case, backend, **(BY_STEPS if backend == "reference" else {})))
    if case.suite in ("models", "scaling"):  # too long for one step at a time
        found = [candidate for candidate in found if candidate.name != "reference"]
    if case.suite == "models":  # what its scans cost
        found.append(Candidate("without SS2D", module={"use_ss2d": False}))
    return found


def whole(case: Case) -> list[Candidate]:
    """A layer or a model with all of it on one backend, for each of them; EMA has no backends."""
    if case.op == "ema":
        return [Candidate("pytorch", module={})]
    by_steps = {} if case.op.startswith("u_kan") else BY_STEPS
    limits = {"reference": by_steps}
    return [Candidate(b, module={"backend": b, "splines": b}, **limits.get(b, {})) for b in BACKENDS]


def serving(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that serve an op; the first one is what "auto" takes."""
    x = torch.zeros(1, device=device, dtype=dtype)
    found = []
    for backend in BACKENDS:
        try:
            resolve(op, backend, x)
        except ValueError:
            continue
        found.append(backend)
    auto = resolve(op, "auto", x)
    return sorted(found, key=lambda backend: backend != auto)


def _own(case: Case, backend: str, **limits: int) -> Candidate:
    if case.op == "cross_selective_scan":
        return Candidate(backend, partial(cross_selective_scan, backend=backend), **limits)
    if case.op == "selective_scan":
        function = partial(selective_scan, delta_softplus=True, backend=backend)
        return Candidate(backend, function, **limits)
    return Candidate(backend, module={"backend": backend}, **limits)


def baselines(case: Case) -> list[Candidate]:
    """The textbook forms of an op."""
    if case.op == "cross_selective_scan":
        steps, parallel = (
            partial(cross_scan_channels_first, scan_by_steps),
            partial(cross_scan_channels_last, scan_in_parallel),
        )
        layout: Layout = CHANNELS_FIRST
    elif case.op == "selective_scan":
        steps, parallel, layout = _steps_1d, _parallel_1d, {}
    else:
        return []
    return [
        Candidate("textbook steps", steps, layout=layout, max_backward_length=256, copies=4),
        Candidate("parallel scan", parallel, copies=9),
    ]


def gated(y: Tensor, z: Tensor) -> Tensor:
    """The gate of Mamba's block, for scans that have none."""
    return y * F.silu(z)


def _steps_1d(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    return gated(scan_by_steps(u, delta, A, B[:, None], C[:, None], D, delta_bias), z)


def _parallel_1d(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    u, delta, B, C = (x.transpose(1, 2)[:, :, None] for x in (u, delta, B, C))  # b l 1 d, b l 1 n
    y = scan_in_parallel(u, delta, A, B, C, D, delta_bias)[:, :, 0]  # b l d
    return gated(y.transpose(1, 2), z)


def describe_layout(candidate: Candidate) -> str:
    """The memory order of the map that a candidate is given."""
    if candidate.module is not None:
        return ""
    return {"x": "b d h w", "u": "b l d"}.get(next(iter(candidate.layout), ""), "ours")
