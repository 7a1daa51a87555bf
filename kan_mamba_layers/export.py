"""Export to ONNX, checked against PyTorch before the file is written."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kan_mamba_layers._check import check_int, check_tensor
from kan_mamba_layers.layers import EMA, SS2D, SS3D, KANConv2d, KANLinear, Mamba, VSSBlock
from kan_mamba_layers.layers.vss import takes_channels_last
from kan_mamba_layers.models.model import Model

_TOLERANCE = 1e-4
_LEAST_OPSET = 18

Sizes = Mapping[int, str]


class OnnxReport(NamedTuple):
    """What :func:`export_onnx` wrote, and how well it agrees with PyTorch."""

    path: Path
    opset: int
    nodes: int  # of the graph; a loop counts as one
    error: float  # the largest difference, as a part of the largest output
    shapes: tuple[tuple[int, ...], ...]  # of the first input, where it was checked


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: Tensor | Sequence[Tensor] | None = None,
    *,
    sizes: Sizes | Sequence[Sizes] | None = None,
    opset: int = 20,
) -> OnnxReport:
    """Write a model to an ONNX file that takes any batch and any image size.

    Every scan becomes three ``Scan`` nodes, every spline plain arithmetic, every set of walks a table, or arithmetic
    where sizes vary (``walks.hilbert`` has none and needs fixed sizes): the file needs no operators but those of
    ONNX, whichever backend the model has. Before it is written, onnxruntime runs the graph at the size of the example,
    with a batch of one, at a larger size and, if the model takes it, at a smaller one. The results must be those of
    PyTorch.

    Args:
        model: a module in evaluation mode, with float32 or float64 parameters.
        path: the file. Weights are inside it.
        example: the input, or inputs, to trace with; no size may be 1. Models and layers of this library that take
            one tensor need none.
        sizes: the dimensions of each input that vary, with names, such as ``{0: "batch", 2: "height", 3: "width"}``.
            Dimensions of one name are equal. By default all but the channels vary for modules of this library, and
            the first, third and fourth dimension for others.
        opset: version of ONNX's operators, at least 18.

    Returns:
        The path, the opset, the number of nodes, the largest relative error, and the shapes at which it was measured.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        FileNotFoundError: the folder of ``path`` does not exist.
        TypeError: an argument has the wrong type.
        ValueError: the model is in training mode or in half precision, an argument does not fit, the model does not
            take a batch of one or a larger size, or the graph is not the model: its results differ by more than 1e-4,
            or other values are infinite or NaN. Then no file is written.

    Numerics:
        Errors are around 1e-6 in float32. Scans run in float32 at least, in chunks of 64 steps side by side.

    Example:
        >>> from kan_mamba_layers import create_model
        >>> model = create_model("km_unet_tiny").eval()
        >>> report = export_onnx(model, "km_unet_tiny.onnx")  # doctest: +SKIP
        >>> print(report.nodes, report.error)  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the module itself")
    if any(module.training for module in model.modules()):
        raise ValueError("model is in training mode, or a part of it, which ONNX cannot express; call model.eval()")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path {str(path)!r} is in a folder that does not exist; create it")
    if path.is_dir():
        raise ValueError(f"path {str(path)!r} is a folder; name a file in it, such as model.onnx")
    check_int("opset", opset, _LEAST_OPSET)
    halves = {x.dtype for x in (*model.parameters(), *model.buffers()) if x.is_floating_point() and x.itemsize < 4}
    if halves:
        raise ValueError(f"model has weights in {halves.pop()}; export model.float() and convert the file afterwards")
    inputs = _inputs(model, example)
    names = _names(model, sizes, inputs)
    runtime = _onnxruntime()
    with torch.no_grad():
        model(*_copies(inputs))  # an input that does not fit is refused here, in the model's own words
        program = _program(model, _copies(inputs), names, opset)
        graph = program.model_proto.SerializeToString()
        session = _session(runtime, graph)
        error, shapes = 0.0, []
        for case, optional in _cases(inputs, names):
            shape = tuple(case[0].shape)
            try:
                wanted = pytree.tree_leaves(model(*_copies(case)))
            except (RuntimeError, ValueError) as refused:
                if isinstance(refused, torch.cuda.OutOfMemoryError):
                    raise
                if optional:
                    continue
                raise ValueError(
                    f"model refuses an input of {shape} ({refused}); leave the dimensions whose size it fixes out of "
                    "sizes"
                ) from refused
            feeds = {given.name: x.cpu().numpy() for given, x in zip(session.get_inputs(), case, strict=True)}
            for want, got in zip(wanted, session.run(None, feeds), strict=True):
                error = max(error, _error(want.cpu(), torch.from_numpy(got)))
            if not error <= _TOLERANCE:
                raise ValueError(
                    f"the graph of model differs from PyTorch by {error:.1e} of the largest output at an input of "
                    f"{shape}, more than {_TOLERANCE:.0e}; nothing was written. Look for sizes that the code of the "
                    "model turns into numbers, and for dimensions that vary but are not in sizes"
                )
            shapes.append(shape)
    path.write_bytes(graph)
    return OnnxReport(path, opset, len(program.model_proto.graph.node), error, tuple(shapes))


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a model is given, which may write into it."""
    return tuple(x.clone() for x in inputs)


def _session(runtime: ModuleType, graph: bytes) -> Any:
    try:
        return runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    except runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise ValueError(
            f"onnxruntime lacks an operator of model ({error}); if it is a convolution in float64, export model.float()"
        ) from error


def _program(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[dict[int, str], ...], opset: int) -> Any:
    try:
        program: Any = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=names, opset_version=opset, verbose=False, external_data=False
        )
    except Exception as error:
        if "kan_mamba_layers.walk_orders" not in str(error):
            raise
        raise ValueError(
            "model scans along walks.hilbert, which has no arithmetic for an ONNX file of any size; leave height and "
            "width out of sizes, or take another walk"
        ) from error
    (written,) = (used.version for used in program.model_proto.opset_import if used.domain in ("", "ai.onnx"))
    if written != opset:
        raise ValueError(f"torch.onnx cannot write model with opset={opset} and took {written}; pass opset={written}")
    return program


def _inputs(model: nn.Module, example: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if example is None:
        shape = _shape(model)
        if shape is None:
            raise ValueError(f"example is None, and a {type(model).__name__} has no input of its own; pass a tensor")
        like = next(model.parameters())
        draw = torch.Generator().manual_seed(0)
        return (torch.randn(shape, generator=draw, device="cpu").to(like),)
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs:
        raise ValueError(f"example must have at least one tensor, got {example!r}; pass the inputs of model")
    for n, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.is_floating_point():
            check_tensor(f"example[{n}]", x)
        elif x.is_complex() or x.is_quantized or x.layout is not torch.strided:
            raise TypeError(f"example[{n}] must be a dense tensor of real numbers, got {x.dtype}, {x.layout}; pass one")
    return inputs


def _shape(model: nn.Module) -> tuple[int, ...] | None:
    """An input of a module of this library."""
    match model:
        case Model():
            return (2, model.config["in_channels"], 64, 96)
        case EMA():
            return (2, model.channels, 18, 14)
        case KANConv2d():
            return (2, model.in_channels, 32, 40)
        case SS2D():
            return (2, 10, 12, model.d_model)
        case SS3D():
            return (2, 4, 5, 6, model.d_model)
        case VSSBlock():
            return (2, model.dim, 10, 12) if model.channels_first else (2, 10, 12, model.dim)
        case Mamba():
            return (2, 12, model.d_model)
        case KANLinear():
            return (6, model.in_features)
        case _:
            return None


def _names(
    model: nn.Module, sizes: Sizes | Sequence[Sizes] | None, inputs: tuple[Tensor, ...]
) -> tuple[dict[int, str], ...]:
    """The names of the sizes of every input that vary."""
    if sizes is None:
        given: Sequence[Sizes] = [_default_names(model, x) for x in inputs]
    else:
        given = [sizes] if isinstance(sizes, Mapping) else list(sizes)
    if len(given) != len(inputs):
        raise ValueError(f"sizes has {len(given)} entries for {len(inputs)} inputs; give one mapping for each input")
    traced: dict[str, int] = {}
    for n, (names, x) in enumerate(zip(given, inputs, strict=True)):
        for dim, name in names.items():
            if not 0 <= dim < x.ndim:
                raise ValueError(
                    f"sizes[{n}] names dimension {dim} of an input of shape {tuple(x.shape)}; count from 0"
                )
            size = x.shape[dim]
            if size < 2:
                raise ValueError(
                    f"example[{n}] has size {size} in dimension {dim} ({name}), and an exporter takes a size below 2 "
                    "for a constant; pass an example of 2 or more there"
                )
            if traced.setdefault(name, size) != size:
                raise ValueError(f"sizes calls {size} and {traced[name]} both {name!r}; use two names, or equal sizes")
    return tuple(dict(names) for names in given)


def _default_names(model: nn.Module, x: Tensor) -> Sizes:
    if isinstance(model, KANLinear):
        return {dim: f"rows_{dim}" for dim in range(x.ndim - 1)}
    if isinstance(model, Mamba):
        return {0: "batch", 1: "length"}
    if isinstance(model, SS3D):
        return {0: "batch", 1: "depth", 2: "height", 3: "width"}
    if isinstance(model, KANConv2d) and x.ndim == 3:  # an image without batch
        return {1: "height", 2: "width"}
    is_mask = isinstance(model, VSSBlock) and x.ndim == 3
    dims = (0, 1, 2) if is_mask or takes_channels_last(model) else (0, 2, 3)
    return {dim: name for dim, name in zip(dims, ("batch", "height", "width"), strict=True) if dim < x.ndim}


def _cases(inputs: tuple[Tensor, ...], names: tuple[dict[int, str], ...]) -> list[tuple[tuple[Tensor, ...], bool]]:
    """The inputs themselves, and others of other sizes made of their values; and whether the model may refuse them."""
    traced = {name: x.shape[dim] for x, of_input in zip(inputs, names, strict=True) for dim, name in of_input.items()}
    batch = {names[0][0]: 1} if names and 0 in names[0] else {}
    larger = {name: size + size // 2 + 1 for name, size in traced.items()}
    smaller = {name: max(1, size - size // 4 - 1) for name, size in traced.items()} | batch
    draw = torch.Generator().manual_seed(0)

    def resized(x: Tensor, of_input: dict[int, str], sizes: dict[str, int]) -> Tensor:
        shape = [sizes[of_input[dim]] if dim in of_input else size for dim, size in enumerate(x.shape)]
        return x.flatten()[torch.randint(x.numel(), shape, generator=draw, device="cpu").to(x.device)]

    def case(sizes: dict[str, int]) -> tuple[Tensor, ...]:
        return tuple(resized(x, of_input, sizes) for x, of_input in zip(inputs, names, strict=True))

    return [(inputs, False), (case(traced | batch), False), (case(larger), False), (case(smaller), True)]


def _error(want: Tensor, got: Tensor) -> float:
    """The largest difference as a part of the largest value; infinite if shapes or what is not finite differ."""
    if want.shape != got.shape:
        return math.inf
    if not want.is_floating_point():
        return 0.0 if torch.equal(want, got) else math.inf
    finite = want.isfinite() & got.isfinite()
    if not torch.allclose(want[~finite], got[~finite], equal_nan=True):
        return math.inf
    want, got = want[finite], got[finite]
    if not want.numel():
        return 0.0
    return float((want - got).abs().max() / want.abs().max().clamp_min(torch.finfo(want.dtype).tiny))


def _onnxruntime() -> ModuleType:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export to ONNX needs {error.name}: install the extra 'onnx' (onnx, onnxscript, onnxruntime)"
        ) from error
    return onnxruntime
