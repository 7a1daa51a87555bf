"""What is measured on a case: the backends of this package, the textbook forms, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import baselines as forms
from benchmarks.cases import Case, make_inputs, make_module
from kan_mamba_layers import cross_selective_scan, resolve, selective_scan

BACKENDS = ("cpu", "triton", "chunked", "reference")
Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = ("forward", "training")
Layout = Mapping[str, tuple[int, ...]]
CHANNELS_FIRST: Layout = {"x": (0, 3, 1, 2)}
CHANNELS_LAST: Layout = dict.fromkeys(("u", "delta", "B", "C", "z", "y"), (0, 2, 1))
# Of scans that take one step at a time. The gradient of a slice `x[:, :, t]` is a tensor of the size of x, at every
# step: the backward pass is quadratic in the length.
BY_STEPS = {"max_length": 1024, "max_backward_length": 256}


@dataclass(frozen=True)
class Bound:
    """A candidate with its inputs in place."""

    run: Callable[[], Tensor]
    leaves: dict[str, Tensor]  # what gets a gradient
    train: Callable[[bool], object] = lambda training: None
    layout: Layout = field(default_factory=dict)
    held: tuple[Tensor, ...] = ()  # what else is in memory before the call
    joint: bool = False  # gradients are compared together: those of a bias before BatchNorm are zero but for rounding

    def step(self, mode: Mode, grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is measured: inference, or output and all gradients."""
        if mode == "forward":
            with torch.no_grad():
                return (self.run(),)
        out = self.run()
        return (out, *torch.autograd.grad(out, list(self.leaves.values()), grad))


@dataclass(frozen=True)
class Candidate:
    """An implementation of a case; `absent` says why it cannot be measured here."""

    name: str
    function: Callable[..., Tensor] | None = None  # of an op
    module: Callable[[Case, str], tuple[nn.Module, Tensor]] | None = None  # a layer or model on a device, and its input
    layout: Layout = field(default_factory=dict)  # of arguments and of the result "y", as permutations of ours
    renamed: Mapping[str, str] = field(default_factory=dict)  # the parameters' names to ours
    same: bool = True  # computes the function of this package; others are compared with themselves
    compiled: str = ""  # the mode of torch.compile
    max_length: int | None = None
    max_backward_length: int | None = None
    max_edges: int | None = None  # rows i o
    copies: int = 0  # tensors of the size of all states, b l k d n, or bases, that live at once in training
    absent: str = ""

    def bind(self, case: Case, device: str, dtype: torch.dtype = torch.float32, exact: bool = False) -> Bound:
        """Put the inputs in place; `exact` computes with the same values in float64.

        In half precision parameters stay float32 and autocast is on: the peers' layers run in no other way.
        """
        if self.function is not None:
            leaves = {}
            for name, value in make_inputs(case, dtype).items():
                value = value.double() if exact else value
                order = self.layout.get(name, tuple(range(value.ndim)))
                leaves[name] = value.permute(order).contiguous().to(device).requires_grad_()
            return Bound(partial(self.function, **leaves), leaves, layout=self.layout)
        if self.module is None:
            raise ValueError(f"candidate {self.name!r} cannot run: {self.absent}")
        module, x = self.module(case, device)
        x = x.to(dtype) if case.op == "kan_linear" else x
        if exact:
            module, x = module.double(), x.double()
        leaves = {"x": x.requires_grad_()} if case.suite != "models" else {}  # an image has none
        leaves |= {self.renamed.get(name, name): p for name, p in module.named_parameters() if p.requires_grad}
        fixed = [p for p in module.parameters() if not p.requires_grad]
        context = torch.autocast(device, dtype) if dtype != torch.float32 and not exact else nullcontext()
        call: Callable[[Tensor], Any] = module
        if self.compiled:
            torch.compiler.reset()  # else, after eight shapes, the layer would silently run as it is
            call = torch.compile(module, mode=self.compiled)

        def run() -> Tensor:
            with context:
                out = call(x)
            if isinstance(out, tuple):  # pykan's layer returns its edges too
                return out[0]
            return torch.stack(out) if isinstance(out, list) else out  # outputs of deep supervision

        joint = case.suite == "models" or case.op == "ema"
        return Bound(run, leaves, module.train, self.layout, held=(x, *fixed, *module.buffers()), joint=joint)

    def skip_reason(self, case: Case, mode: Mode, memory: float = float("inf")) -> str:
        """Why the case is not run, or an empty string."""
        if self.absent:
            return f"not measured ({self.absent})"
        if self.max_length is not None and case.length > self.max_length:
            return f"not run (one step at a time, at most {self.max_length} steps)"
        if mode == "training" and self.max_backward_length is not None and case.length > self.max_backward_length:
            return "not run (its backward is quadratic in the length)"
        if self.max_edges is not None and case.length * case.sizes["in"] * case.sizes["out"] > self.max_edges:
            return "not run (computes each edge by itself, at most 1024 rows of 160 x 160 edges)"
        if self.copies * case.elements * 4 > memory:
            return f"not run (needs about {self.copies * case.elements * 4 / 2**30:.0f} GiB)"
        return ""


def on_backend(case: Case, backend: Any, **limits: int) -> Candidate:
    """The op of a case on a backend, or a layer or model with its scans on that backend."""
    if case.op == "cross_selective_scan":
        return Candidate(backend, partial(cross_selective_scan, backend=backend), **limits)
    if case.op == "selective_scan":
        return Candidate(backend, partial(selective_scan, delta_softplus=True, backend=backend), **limits)
    return Candidate(backend, module=partial(make_module, backend=backend), **limits)


def backends(case: Case, device: str, dtype: torch.dtype = torch.float32) -> list[Candidate]:
    """Every backend that supports the case on the device; the first one is what "auto" takes."""
    names = supported_backends(case.op if case.op == "selective_scan" else "cross_selective_scan", device, dtype)
    if case.suite in ("models", "scaling"):  # too long for one step at a time
        names = [name for name in names if name != "reference"]
    found = [on_backend(case, name, **(BY_STEPS if name == "reference" else {})) for name in names]
    if case.suite == "models":  # what its scans cost
        found.append(Candidate("without SS2D", module=partial(make_module, use_ss2d=False), same=False))
    return found


def whole(case: Case) -> list[Candidate]:
    """A layer or a model with scans and splines on one backend, for each of them; EMA has no backends."""
    if case.op == "ema":
        return [Candidate("pytorch", module=partial(make_module))]
    limits = {} if case.op.startswith("u_kan") else {"reference": BY_STEPS}
    return [Candidate(b, module=partial(make_module, backend=b, splines=b), **limits.get(b, {})) for b in BACKENDS]


def supported_backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that support an op; the first one is what "auto" takes."""
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


def baselines(case: Case) -> list[Candidate]:
    """The textbook forms of an op."""
    if case.op == "cross_selective_scan":
        first, last, layouts = forms.cross_scan_channels_first, forms.cross_scan_channels_last, (CHANNELS_FIRST, {})
    elif case.op == "selective_scan":
        first, last, layouts = forms.sequence_channels_first, forms.sequence_channels_last, ({}, CHANNELS_LAST)
    else:
        return []
    steps, parallel = partial(first, forms.scan_by_steps), partial(last, forms.scan_in_parallel)
    return [
        Candidate("textbook steps", steps, layout=layouts[0], max_backward_length=256, copies=4),
        Candidate("parallel scan", parallel, layout=layouts[1], copies=9),
    ]
