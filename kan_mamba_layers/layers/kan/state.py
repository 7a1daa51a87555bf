"""Replace what a KAN layer holds: its knots and coefficients, of the same size or of another one."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from kan_mamba_layers.ops.bspline import Extrapolation
from kan_mamba_layers.ops.spacing import forget


class Splines(Protocol):
    """What a KAN layer holds, as far as its knots and coefficients are concerned."""

    grid: Tensor  # i g+2s+1
    spline_weight: nn.Parameter  # o i ... g+s
    spline_order: int
    grid_mode: Literal["uniform", "adaptive"]
    grid_eps: float
    extrapolation: Extrapolation
    _parameters: dict[str, nn.Parameter | None]

    @property
    def grid_size(self) -> int: ...


def check_whole(layer: Splines, *names: str) -> None:
    """Each name is a parameter of its own: none that ``torch.nn.utils`` recomputes in every pass, and no shard."""
    for name in names:
        if name not in layer._parameters:
            raise RuntimeError(
                f"{name} is pruned or parametrised, so a change of it would be lost; first call "
                f"torch.nn.utils.prune.remove(layer, {name!r}) or parametrize.remove_parametrizations"
            )
        check_local(name, layer._parameters[name])


def check_local(name: str, parameter: Tensor | None) -> None:
    """A parameter is all on this process, not a ``DTensor``."""
    if not torch.compiler.is_compiling() and hasattr(parameter, "full_tensor"):
        raise RuntimeError(
            f"{name} is a DTensor, which is spread over processes; do this before the layer is sharded, e.g. before "
            "fully_shard, or on a copy with its full_tensor()"
        )


def write(layer: Splines, grid: Tensor, spline_weight: Tensor) -> None:  # i g+2s+1, o i ... g+s
    """Write knots and coefficients in place where they fit, so that whoever holds these tensors sees them."""
    old = layer.spline_weight
    if old.shape != spline_weight.shape:
        layer.spline_weight = _successor(old, spline_weight.to(old.dtype))
    else:
        _copy(old, spline_weight)
    if layer.grid.shape != grid.shape or not layer.grid.is_contiguous():
        _replace_grid(layer, grid.to(layer.grid.dtype).contiguous())
    else:
        _copy(layer.grid, grid)


def take_size(layer: Splines, state_dict: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
    """Take over the number of intervals of a checkpoint, whose values are yet to be loaded."""
    forget(layer.grid)
    grid, spline_weight = (
        getattr(state_dict.get(f"{prefix}{name}"), "shape", torch.Size()) for name in ("grid", "spline_weight")
    )
    own = layer._parameters.get("spline_weight")
    if own is None or len(grid) != 2 or len(spline_weight) != own.ndim:
        return  # PyTorch reports it
    bases, knots = spline_weight[-1], grid[1]
    if knots - 1 - bases != layer.spline_order or bases <= layer.spline_order:
        errors.append(
            f"{prefix}grid has {knots} knots and {prefix}spline_weight {bases} bases, which are those of splines of "
            f"degree {knots - 1 - bases} on {2 * bases - knots + 1} intervals; the layer has "
            f"spline_order={layer.spline_order}, so build it with the degree of the checkpoint."
        )
    elif bases != own.shape[-1] and grid[0] == len(layer.grid) and spline_weight[:-1] == own.shape[:-1]:
        with torch.inference_mode(layer.grid.is_inference()):
            layer.spline_weight = _successor(own, own.detach().new_empty(spline_weight))
            _replace_grid(layer, layer.grid.detach().new_empty(grid))


def keep_exact(layer: Splines, exact: Tensor) -> None:
    """Take these knots where those of the layer are in half precision: rounded, they would be another function.

    Knots that are learned stay a leaf, whose gradient has their dtype.
    """
    grid = layer.grid
    if grid.dtype.itemsize >= torch.float32.itemsize:
        if not grid.is_leaf:  # a buffer after its conversion
            layer.grid = grid.detach().requires_grad_()
    elif isinstance(grid, nn.Parameter):
        grid.data = exact.to(grid.device)
        grid.grad = None if grid.grad is None else grid.grad.to(grid.dtype)
    else:
        layer.grid = exact.to(grid.device).requires_grad_(grid.requires_grad)


def _replace_grid(layer: Splines, grid: Tensor) -> None:
    """Take knots of another shape, which are trained if the old ones are."""
    old = layer.grid
    is_parameter = isinstance(old, nn.Parameter)
    layer.grid = _successor(old, grid) if is_parameter else grid.requires_grad_(old.requires_grad)


def _successor(old: Tensor, value: Tensor) -> nn.Parameter:
    """A new parameter in place of one of another shape, with its attributes and hooks."""
    new = nn.Parameter(value, old.requires_grad)
    new.__dict__.update(old.__dict__)
    new._backward_hooks = old._backward_hooks
    new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    return new


def _copy(into: Tensor, value: Tensor) -> None:
    with torch.inference_mode(into.is_inference()), torch.no_grad():  # outside of it, its tensors cannot be written
        into.copy_(value)
