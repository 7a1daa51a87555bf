"""A fused op made from the record of its calls: registered with PyTorch, opaque to it, with a fused gradient.

PyTorch knows an operator's signature, the shapes of its results and its cost, so it runs under ``torch.compile`` and
``torch.export``. Its gradient is an ``autograd.Function`` around it: one registered with ``torch.library`` does not
work under ``torch.func``, and would answer a second differentiation with silent zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, Protocol, get_type_hints

import torch
from torch import Tensor

from kan_mamba_layers.ops.flops import count_flops, register_formula
from kan_mamba_layers.ops.precision import autocast_off

Call = Any  # a NamedTuple of tensors, some of them optional, and numbers
Tensors = Sequence[Tensor]
Grads = Sequence[Tensor | None]

_LIBRARY = torch.library.Library("kan_mamba_layers", "DEF")
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool", bool | None: "bool?", str: "str"}


class FusedBackend(Protocol):
    """What a backend of a fused op exports."""

    def forward(self, call: Call, save: bool) -> Tensors:
        """Return the results and, behind them, what the backward pass needs of them: empty unless ``save``."""

    def backward(self, call: Call, saved: Tensors, grads: Grads, wanted: Sequence[bool]) -> Grads:
        """Return the gradients of the call's tensors in the order of its fields, None or any where not wanted.

        ``grads`` are those of the results, None for a result that nothing depends on, but not all of them None.
        """


class FusedOp(NamedTuple):
    """What an op adds to the record of its calls."""

    name: str
    load: Callable[[str], FusedBackend]  # a backend by its name, imported at its first use
    results: int
    saved: int  # tensors behind the results, for the backward pass alone
    shapes: Callable[[Call, bool, str], Tensors]  # empty tensors like those that ``forward`` returns
    flops: Callable[[Call], int]  # of a call that holds shapes instead of tensors
    gradient_flops: Callable[[Call, Sequence[bool]], int]
    formula: Callable[[Call], Tensors]  # the results in PyTorch's operators, for higher derivatives
    # Gradients that need no backend, by field and from those of the results; they can be differentiated again.
    plain: Mapping[str, Callable[[Tensors], Tensor]] = {}


def register(record: type, op: FusedOp) -> Callable[[Call, str], Tensors]:
    """Register an op and its gradient; returns the function that runs a call in a backend."""
    hints = get_type_hints(record)
    fields = [f"{_TYPES[hint]} {name}" for name, hint in hints.items()]
    tensors = [i for i, hint in enumerate(hints.values()) if hint in (Tensor, Tensor | None)]
    width = len(fields)
    returned, kept = op.results, op.saved  # numbers, since PyTorch 2.4 compiles no function that closes over ``op``
    plain = {list(hints).index(name): gradient for name, gradient in op.plain.items()}

    def forward(*arguments: Any) -> Any:
        call, (save, backend) = record(*arguments[:width]), arguments[width:]
        with torch.no_grad(), autocast_off(call[0]):
            return _unpacked(op.load(backend).forward(call, save))

    def forward_shapes(*arguments: Any) -> Any:
        return _unpacked(op.shapes(record(*arguments[:width]), *arguments[width:]))

    def backward(*arguments: Any) -> Any:
        call, (*rest, wanted, backend) = record(*arguments[:width]), arguments[width:]
        with torch.no_grad(), autocast_off(call[0]):
            grads = op.load(backend).backward(call, rest[: op.saved], rest[op.saved :], wanted)
        return _unpacked(
            [
                _in_order(grad) if want and grad is not None else _like(call[i], call[0], False)
                for i, grad, want in zip(tensors, grads, wanted, strict=True)
            ]
        )

    def backward_shapes(*arguments: Any) -> Any:
        call, wanted = arguments[:width], arguments[-2]
        return _unpacked([_like(call[i], call[0], want) for i, want in zip(tensors, wanted, strict=True)])

    given = [f"Tensor saved_{i}" for i in range(op.saved)] + [f"Tensor? grad_{i}" for i in range(op.results)]
    operator = _define(op.name, [*fields, "bool save", "str backend"], op.results + op.saved, forward, forward_shapes)
    arguments = [*fields, *given, "bool[] wanted", "str backend"]
    gradient = _define(f"{op.name}_backward", arguments, len(tensors), backward, backward_shapes)
    register_formula(operator, lambda *shapes, **_: op.flops(record(*shapes[:width])))
    register_formula(gradient, lambda *shapes, **_: op.gradient_flops(record(*shapes[:width]), shapes[-2]))

    def refuse_vmap(*_: Any) -> None:
        raise RuntimeError(
            f"the fused {op.name} has no vmap inside a compiler; put the mapped dimension into the batch, or call it "
            "with backend='reference'"
        )

    refuse_forward_mode = refusal_of_forward_mode(f"the fused {op.name}")

    for name in (op.name, f"{op.name}_backward"):
        _LIBRARY.impl(name, refuse_vmap, "FuncTorchBatched")

    def gradient_of_formula(*arguments: Any) -> Tensors:
        """The gradients that are wanted."""
        call, grads, wanted = list(arguments[:width]), arguments[width + op.saved : -2], arguments[-2]
        chosen = [i for i, want in zip(tensors, wanted, strict=True) if want]

        def results(*inputs: Tensor) -> Tensors:
            found = op.formula(record(*replaced(call, chosen, inputs)))
            return [y for y, grad in zip(found, grads, strict=True) if grad is not None]

        with autocast_off(call[0]):
            return pull_back(results, [call[i] for i in chosen], [grad for grad in grads if grad is not None])

    class Gradient(torch.autograd.Function):
        """The gradient as a node of its own, whose derivative is that of the formula's gradient."""

        vmap = staticmethod(one_by_one(lambda *arguments: Gradient.apply(*arguments)))
        jvp = staticmethod(refuse_forward_mode)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return gradient(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            saved = range(width, width + op.saved)  # which the formula does without
            ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and i not in saved]
            ctx.save_for_backward(*(inputs[i] for i in ctx.places))
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            arguments = replaced(ctx.others, ctx.places, ctx.saved_tensors)
            chosen = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            found = pull_back(
                lambda *inputs: gradient_of_formula(*replaced(arguments, chosen, inputs)),
                [arguments[i] for i in chosen],
                [grad for grad, want in zip(grads, arguments[-2], strict=True) if want],
            )
            return tuple(replaced([None] * len(arguments), chosen, found))

    class Fused(torch.autograd.Function):
        """The op with its gradient."""

        vmap = staticmethod(one_by_one(lambda *arguments: differentiable(*arguments)))

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            saved = output[returned:] if kept else ()
            if saved:
                ctx.mark_non_differentiable(*saved)
            ctx.save_for_backward(*(inputs[i] for i in tensors), *saved)
            ctx.numbers = [None if i in tensors else value for i, value in enumerate(inputs[:width])]
            ctx.backend = inputs[-1]
            if not torch.compiler.is_compiling():
                ctx.set_materialize_grads(False)  # or zeros of the size of what is saved would be made

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            of_argument: list[Tensor | None] = [None] * (width + 2)
            if all(grad is None for grad in grads[:returned]):
                return tuple(of_argument)
            saved = ctx.saved_tensors
            call = replaced(ctx.numbers, tensors, saved[: len(tensors)])
            wanted = [ctx.needs_input_grad[i] and i not in plain for i in tensors]
            # Only with a graph can it be differentiated again, which a compiled backward pass refuses by itself.
            graph = (torch.is_grad_enabled() or transformed()) and not torch.compiler.is_compiling()
            differentiate = Gradient.apply if graph else gradient
            found = differentiate(*call, *saved[len(tensors) :], *grads[:returned], wanted, ctx.backend)
            for i, grad in zip(tensors, found, strict=True):
                if ctx.needs_input_grad[i]:
                    of_argument[i] = plain[i](grads) if i in plain else grad
            return tuple(of_argument)

    class Eager(Fused):
        """The same outside a compiler, which takes no function with ``jvp``."""

        jvp = staticmethod(refuse_forward_mode)

    def differentiable(*arguments: Any) -> Any:
        """One call of ``vmap``, whose tensors may require a gradient where the mapped ones do not."""
        call, (save, backend) = arguments[:width], arguments[width:]
        return Eager.apply(*call, save or differentiated(call), backend)

    def differentiated(call: Sequence[Any]) -> bool:
        return torch.is_grad_enabled() and any(call[i] is not None and call[i].requires_grad for i in tensors)

    Fused.forward.__signature__ = signature(Fused.forward)  # type: ignore[attr-defined]  # or found at each call

    def run(call: Call, backend: str) -> Tensors:
        save = differentiated(call)
        if torch.compiler.is_compiling():
            # Without gradients a compiler would look for a context among the arguments of ``Fused.forward``.
            found = Fused.apply(*call, save, backend) if save else operator(*call, save, backend)
        else:
            count_flops()
            found = Eager.apply(*call, save, backend)
        return found[:returned] if isinstance(found, tuple) else (found,)

    return run


def explained(load: Callable[[str], FusedBackend]) -> Callable[[str], FusedBackend]:
    """The same, with an error that says what to do where a package is installed but cannot be imported."""

    @wraps(load)
    def loaded(backend: str) -> FusedBackend:
        try:
            return load(backend)
        except (ImportError, OSError) as error:
            package = {"cpu": "numba", "triton": "triton"}[backend]
            raise ImportError(
                f"backend {backend!r} needs {package}, which is installed but cannot be imported ({error}); repair or "
                f"uninstall {package}, or choose another backend"
            ) from error

    return loaded


def contiguous(values: Sequence[Any]) -> list[Any]:
    """The same arguments, tensors among them contiguous."""
    return [x.contiguous() if isinstance(x, Tensor) else x for x in values]


def refusal_of_forward_mode(name: str) -> Callable[..., Any]:
    """A ``jvp`` that raises."""

    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        raise RuntimeError(
            f"{name} has no forward-mode derivatives; differentiate in reverse mode, or call it with "
            "backend='reference'"
        )

    return jvp


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _define(name: str, arguments: Sequence[str], results: int, run: Any, shapes: Any) -> Any:
    returned = ", ".join(["Tensor"] * results)
    schema = f"{name}({', '.join(arguments)}) -> " + (f"({returned})" if results > 1 else returned)
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kan_mamba_layers::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.kan_mamba_layers, name)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rule of ``torch.vmap``: call after call, each with its slice of the mapped tensors, and the results stacked."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError("torch.vmap over a dimension of size 0 has no call to run; leave out empty inputs")
        found = []
        for i in range(info.batch_size):
            mapped = zip(arguments, in_dims, strict=True)
            found.append(function(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in mapped)))
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    return rule


def replaced(values: Sequence[Any], places: Sequence[int], by: Sequence[Any]) -> list[Any]:
    """The same values, those at some places replaced."""
    replaced = list(values)
    for i, value in zip(places, by, strict=True):
        replaced[i] = value
    return replaced


def pull_back(function: Callable[..., Tensors], inputs: Tensors, grads: Tensors) -> Tensors:
    """The gradients of the inputs from those of the results, which can be differentiated again."""
    if transformed():  # then no tensor may be told to require a gradient
        return torch.func.vjp(lambda *x: tuple(function(*x)), *inputs)[1](tuple(grads))
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of aliases: an input may have been computed from another one, whose gradient is not to include that.
        inputs = [x.view_as(x) for x in inputs]
        results = [(y, grad) for y, grad in zip(function(*inputs), grads, strict=True) if y.requires_grad]
        if not results:  # constants: the slopes of lines
            return [torch.zeros_like(x) for x in inputs]
        outputs, weights = zip(*results, strict=True)
        return torch.autograd.grad(outputs, inputs, weights, create_graph=graph, materialize_grads=True)


def _unpacked(results: Tensors) -> Any:
    """An operator of one result returns it, not a tuple of it."""
    return tuple(results) if len(results) > 1 else results[0]


def _in_order(x: Tensor) -> Tensor:
    """The strides of a contiguous tensor in dimensions of size 1 too, where others count as contiguous: DDP asks."""
    return x.flatten().view(x.shape) if 1 in x.shape else x


def _like(x: Tensor | None, other: Tensor, whole: bool) -> Tensor:
    """An empty tensor like ``x``, or of its dtype and without elements."""
    if x is None:
        return other.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format) if whole else x.new_empty(0)
