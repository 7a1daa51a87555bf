"""What a model or layer sees: the effective receptive field, and the scan of a layer as attention."""

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_int, check_pixels, check_shape
from kan_mamba_layers.layers import SS3D, Mamba
from kan_mamba_layers.layers.grid_scan import GridScan
from kan_mamba_layers.layers.module import evaluating
from kan_mamba_layers.layers.vss import takes_channels_last
from kan_mamba_layers.ops import cross_selective_scan, selective_scan
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype
from kan_mamba_layers.walks import Walks, cross

_MOST_VALUES = 2**27


class _Place(NamedTuple):
    """How a position is written."""

    letters: str  # of the sizes
    form: str
    example: str


_PLACES = {  # by the number of sizes
    1: _Place("l", "a number", "0"),
    2: _Place("hw", "a pair (row, column)", "(0, 0)"),
    3: _Place("dhw", "a triple (slice, row, column)", "(0, 0, 0)"),
}


def effective_receptive_field(
    model: nn.Module,
    images: Tensor,
    position: Sequence[int] | None = None,
    *,
    output: int | str | None = None,
    channels_last: bool | None = None,
) -> Tensor:  # h w
    r"""Return how much each pixel of the input influences one position of the output: the effective receptive field.

    .. math::
        R_{ij} = \frac{1}{b\,c} \sum_{b,\,c} \Big| \frac{\partial}{\partial x_{bcij}} \sum_o y_{bo}(p) \Big| , \qquad
        \text{result} = R \,/ \max R ,

    with :math:`x` the images, :math:`y` the map that the model makes of them, and :math:`p` a position of the map.
    The model runs in evaluation mode. Its modes, gradients and parameters stay as they are.

    Args:
        model: maps images to a map of any size and number of channels.
        images: batch ``(b, c, h, w)``, over which the gradients are averaged.
        position: ``(row, column)`` in the output map, counted from 0; by default its centre ``(h // 2, w // 2)``.
        output: where the model returns a list or a dict of maps, the index or the key of one.
        channels_last: whether input and output are ``(b, h, w, c)``; by default only those of an
            :class:`SS2D`, and of a :class:`VSSBlock` that takes such.

    Returns:
        A map ``(h, w)`` of the size of the images, in float32 at least. Its largest value is 1; if no gradient
        arrives, all are 0.

    Raises:
        TypeError: an argument has the wrong type, the model is an :class:`SS3D`, or it does not return one map.
        ValueError: the images are not a batch of at least one pixel, ``position`` is outside the map, or the gradient
            is not finite.

    Numerics:
        The gradient of a sum over channels is 0 up to rounding if they come out of a LayerNorm without weights. Pass
        the part of the model before it.

    Example:
        >>> import torch
        >>> from kan_mamba_layers import SS2D
        >>> field = effective_receptive_field(torch.nn.Conv2d(2, 4, 3, padding=1), torch.randn(1, 2, 9, 9))
        >>> field.shape, int((field > 0).sum())
        (torch.Size([9, 9]), 9)
        >>> field = effective_receptive_field(SS2D(4), torch.randn(1, 9, 9, 4))
        >>> int((field > 0).sum())
        81

    References:
        Luo et al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, arXiv
        1701.04128; with the sum over channels as in Ding et al., RepLKNet, arXiv 2203.06717, section 4.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the module itself")
    if isinstance(model, SS3D):
        raise TypeError("model must map images, got SS3D, which maps volumes; pass an SS2D, or use scan_attention")
    last = takes_channels_last(model) if channels_last is None else channels_last
    letters = "b, h, w, c" if last else "b, c, h, w"
    check_shape("images", images, ("any",) * 4, letters)
    check_pixels("images", images, *_spatial(images, last))
    if not images.numel():
        raise ValueError(f"images must have at least one image and channel, got shape {tuple(images.shape)}; pass one")
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        x = images.detach().clone().requires_grad_()
        y = _pick(model(x.clone()), output)  # a model may write into its input
        if y.ndim != 4 or not y.numel() or y.shape[0] != x.shape[0]:
            raise TypeError(
                f"model must return a map ({letters}) of {x.shape[0]} images, got shape {tuple(y.shape)}; pass the "
                "part of it that does"
            )
        sizes = _spatial(y, last)
        row, column = (size // 2 for size in sizes) if position is None else _place("position", position, sizes)
        point = y[:, row, column] if last else y[:, :, row, column]  # b o
        grad = torch.autograd.grad(point.sum(), x, allow_unused=True)[0] if y.requires_grad else None
    if grad is None:
        raise ValueError("no gradient leads from the output of model to images; pass a part of it that has one")
    field = grad.detach().to(compute_dtype(grad)).abs().mean((0, -1 if last else 1))  # h w
    if not field.isfinite().all():
        raise ValueError("the gradient of model with respect to images is not finite; look for NaN in either")
    return field / field.max() if field.max() > 0 else field


@torch.no_grad()
def scan_attention(layer: GridScan | Mamba, x: Tensor, positions: Sequence[Any] | None = None) -> Tensor:  # b k d q l
    r"""Return how much each position contributes to the scan's output at others: the scan as attention.

    With its step sizes, :math:`B` and :math:`C` given, a scan is linear in its input :math:`u`:

    .. math::
        y_t = \sum_{s \le t} M_{ts}\, u_s , \qquad
        M_{ts} = C_t^\top \exp\Big(A \sum_{s < j \le t} \delta_j\Big)\, \delta_s B_s + D\,[s = t] .

    The matrix is exact and signed, one for every channel and direction. Its rows do not sum to 1. A picture takes
    the sum over the directions and the mean absolute value over the channels.

    Args:
        layer: an :class:`SS2D`, :class:`SS3D` or :class:`Mamba`.
        x: the layer's input, ``(b, h, w, d_model)``, ``(b, d, h, w, d_model)`` or ``(b, l, d_model)``.
        positions: the rows :math:`t` that are wanted, as ``(row, column)`` of the image for ``SS2D``, as
            ``(slice, row, column)`` for ``SS3D``, as numbers for ``Mamba``, from 0; by default all.

    Returns:
        ``M`` of shape ``(b, k, d, q, l)``, in float32 at least: for each of the ``k`` directions (those of the
        layer's walks, 4 of ``SS2D`` and 6 of ``SS3D`` by default; 1 or 2 of ``Mamba``) and the ``d = d_inner``
        channels, the weights of all ``l`` positions for the ``q`` wanted ones. Positions are in the order of the image
        (``l = h w``, row by row), of the volume or of the sequence, in all directions.
        The input is that of the scan, after the layer's convolution and SiLU, and the output that before its norm,
        gate and projection.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``x`` does not fit, a position is outside, or the matrices have more than 134,217,728 values; the
            error says how many positions are possible.

    Numerics:
        The sums of step sizes are float64; decays are exponentials of their differences, so nothing is divided.

    Example:
        >>> import torch
        >>> from kan_mamba_layers import SS2D
        >>> layer, x = SS2D(4), torch.randn(1, 6, 7, 4)
        >>> M = scan_attention(layer, x, positions=[(2, 3), (5, 0)])
        >>> M.shape
        torch.Size([1, 4, 8, 2, 42])
        >>> picture = M.sum(1).abs().mean(1)[0, 0].view(6, 7)  # for the pixel in row 2, column 3

    References:
        Ali, Zimerman and Wolf, The Hidden Attention of Mamba Models, arXiv 2403.01590, section 3.
    """
    if isinstance(layer, GridScan):
        letters, place, directions = ("b", *layer.grid_letters, "d_model"), "pixel", layer.directions
    elif isinstance(layer, Mamba):
        letters, place, directions = ("b", "l", "d_model"), "position", 1 + layer.bidirectional
    else:
        raise TypeError(
            f"layer must be an SS2D, SS3D or Mamba, got {type(layer).__name__}; pass one of model.modules() and its "
            "input"
        )
    check_shape("x", x, ("any",) * (len(letters) - 1) + (layer.d_model,), ", ".join(letters))
    sizes = tuple(x.shape[1:-1])
    if 0 in sizes:
        raise ValueError(f"x must have at least one {place}, got shape {tuple(x.shape)}; pass one or more")
    at = _rows(positions, sizes).to(x.device)
    _check_size(x, len(at), x.shape[0] * directions * layer.d_inner * math.prod(sizes))
    calls = _calls(layer, x)
    with autocast_off(x):
        return torch.stack([scan.matrix(at) for scan in _scans(layer, calls)], 1)


class _Scan(NamedTuple):
    """One scan; its tensors are in the order of positions, whatever the order in which it visits them."""

    step: Tensor  # b d l
    A: Tensor  # d n
    B: Tensor  # b n l
    C: Tensor  # b n l
    D: Tensor  # d
    order: Tensor  # l: the position at each time

    def matrix(self, at: Tensor) -> Tensor:  # q -> b d q l
        """The weights of all positions for those in ``at``."""
        time = self.order.argsort()  # l: the time at each position
        passed = self.step.double()[..., self.order].cumsum(-1)[..., time]  # b d l
        since = (passed[..., at, None] - passed[..., None, :]).to(self.A.dtype)  # b d q l
        weights = torch.zeros_like(since)
        for A, B, C in zip(self.A.unbind(1), self.B.unbind(1), self.C.unbind(1), strict=True):  # d, b l, b l
            weights += torch.exp(A[:, None, None] * since) * (C[:, at, None] * B[:, None])[:, None]
        weights *= self.step[:, :, None]
        weights.masked_fill_(time > time[at][:, None], 0)  # q l
        weights[:, :, torch.arange(len(at), device=at.device), at] += self.D[:, None]
        return weights


def _scans(layer: GridScan | Mamba, calls: list[dict[str, Any]]) -> list[_Scan]:
    """The scans of the calls that a layer made."""
    if isinstance(layer, GridScan):
        (call,) = calls
        return _grid_scans(**call)
    if len(calls) > 2:
        raise TypeError(f"layer makes {len(calls)} scans, of orders that are not known; pass a Mamba with one or two")
    there = torch.arange(calls[0]["u"].shape[-1], device=calls[0]["u"].device)
    return [_line_scan(order, **call) for order, call in zip((there, there.flip(0)), calls, strict=False)]


def _grid_scans(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    walks: Walks | None,
    **others: Any,
) -> list[_Scan]:
    """The directions of a call of :func:`cross_selective_scan` without a mask, each pixel where it is in the grid."""
    dtype, (_, *grid, channels) = compute_dtype(x), x.shape
    rank, states = dt_proj_weight.shape[2], A_log.shape[1]
    orders = (cross(*grid) if walks is None else walks).orders.to(x.device)  # k l
    u = x.to(dtype).flatten(1, -2).mT  # b d l
    A, skip = -torch.exp(A_log.to(dtype)).view(-1, channels, states), D.to(dtype).view(-1, channels)  # k d n, k d
    scans = []
    for k, order in enumerate(orders):
        low, B, C = (x_proj_weight[k].to(dtype) @ u).split([rank, states, states], 1)  # b r l, b n l, b n l
        step = F.softplus(dt_proj_weight[k].to(dtype) @ low + dt_proj_bias[k].to(dtype)[:, None])
        scans.append(_Scan(step, A[k], B, C, skip[k], order))
    return scans


def _line_scan(
    order: Tensor,
    *,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    **others: Any,
) -> _Scan:
    """A call of :func:`selective_scan` with softplus and from no state, whose sequence is the positions in order."""
    dtype = compute_dtype(u)
    step = F.softplus(delta.to(dtype) + delta_bias.to(dtype)[:, None])
    time = order.argsort()
    return _Scan(step[..., time], A.to(dtype), B.to(dtype)[..., time], C.to(dtype)[..., time], D.to(dtype), order)


def _calls(layer: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """The arguments, by name, of the scans that a layer makes of ``x``."""
    calls: list[dict[str, Any]] = []

    class Recorded(Tensor):  # the ops ask it, as PyTorch's functions do
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (cross_selective_scan, selective_scan):
                given = signature(func).bind(*args, **(kwargs or {}))
                given.apply_defaults()
                plain = {k: v.as_subclass(Tensor) if isinstance(v, Tensor) else v for k, v in given.arguments.items()}
                calls.append(plain)
            return super().__torch_function__(func, types, args, kwargs or {})

    with evaluating(layer):
        layer._call_impl(x.as_subclass(Recorded))  # with its hooks, which prune weights, but not compiled
    return calls


def _check_size(x: Tensor, rows: int, per_row: int) -> None:
    """The matrices of so many rows have at most ``_MOST_VALUES`` values."""
    if rows * per_row > _MOST_VALUES:
        most = _MOST_VALUES // per_row
        fix = f"at most {most} positions at a time" if most else "fewer images, or smaller ones"
        raise ValueError(
            f"{rows} positions of x of shape {tuple(x.shape)} would make matrices of {rows * per_row} values, more "
            f"than {_MOST_VALUES}; pass {fix}"
        )


def _rows(positions: Sequence[Any] | None, sizes: tuple[int, ...]) -> Tensor:  # q
    """The wanted positions as numbers, which count the pixels of an image row by row."""
    if positions is None:
        return torch.arange(math.prod(sizes), device="cpu")
    if not isinstance(positions, (tuple, list)):
        example = _PLACES[len(sizes)].example
        raise TypeError(f"positions must be a list of positions, got {positions!r}; pass e.g. [{example}]")
    if not positions:
        raise ValueError("positions must have at least one position, got none; pass None for all")
    given = [p if len(sizes) > 1 else (p,) for p in positions]
    places = [_place(f"positions[{i}]", p, sizes) for i, p in enumerate(given)]
    numbers = [sum(i * math.prod(sizes[n + 1 :]) for n, i in enumerate(place)) for place in places]
    return torch.tensor(numbers, device="cpu")


def _place(name: str, position: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``position`` as a tuple if it is inside of a map or a sequence of these sizes."""
    letters, form, example = _PLACES[len(sizes)]
    if not isinstance(position, (tuple, list)) or len(position) != len(sizes):
        raise TypeError(f"{name} must be {form}, got {position!r}; pass e.g. {example}")
    for index, size, letter in zip(position, sizes, letters, strict=True):
        check_int(name, index, 0)
        if index >= size:
            raise ValueError(f"{name} must be less than {letter} = {size}, got {position!r}; positions count from 0")
    return tuple(int(index) for index in position)


def _spatial(x: Tensor, channels_last: bool) -> tuple[int, int]:
    """Height and width."""
    return (x.shape[1], x.shape[2]) if channels_last else (x.shape[2], x.shape[3])


def _pick(y: Any, output: int | str | None) -> Tensor:
    """The map among what a model returns."""
    picked = y
    if output is not None:
        if isinstance(y, Tensor):
            raise TypeError(f"output={output!r} chooses among several maps, but model returns one; leave it out")
        try:
            picked = y[output]
        except (IndexError, KeyError, TypeError) as error:
            raise TypeError(f"output={output!r} is not in what model returns, {_contents(y)}") from error
    if not isinstance(picked, Tensor):
        raise TypeError(f"model must return a map, got {_contents(picked)}; choose one with output")
    return picked


def _contents(y: Any) -> str:
    if isinstance(y, Mapping):
        return f"a {type(y).__name__} of {', '.join(map(repr, y))}"
    return f"a {type(y).__name__}" + (f" of {len(y)}" if isinstance(y, (tuple, list)) else "")
