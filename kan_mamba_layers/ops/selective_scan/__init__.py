"""The selective scan in one dimension and its fused form along several walks through a grid.

For every channel ``d`` and state ``n`` the scan is the linear recurrence

    h[t, d, n] = exp(delta[t, d] A[d, n]) h[t-1, d, n] + delta[t, d] B[t, n] u[t, d]
    y[t, d]    = sum_n C[t, n] h[t, d, n] + D[d] u[t, d]

with ``h = 0`` before the first step. ``reference`` and ``chunked`` implement it in plain PyTorch, for ``k`` groups of
``d`` channels that share ``B`` and ``C``: Mamba's groups in ``selective_scan``, the directions in
``cross_selective_scan``. The backends ``cpu`` and ``triton`` fuse more: they take a :class:`.call.ScanCall`.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kan_mamba_layers._check import check_mask, check_pixels, check_same_device, check_shape, check_tensor
from kan_mamba_layers.ops.backend import Backend, check_backend, select
from kan_mamba_layers.ops.precision import autocast_off, compute_dtype
from kan_mamba_layers.ops.selective_scan import chunked, looped, reference
from kan_mamba_layers.ops.selective_scan.call import Line, ScanCall
from kan_mamba_layers.ops.selective_scan.directions import NUM_DIRECTIONS
from kan_mamba_layers.ops.selective_scan.formula import Scan, coefficients, formula
from kan_mamba_layers.ops.selective_scan.fused import fused_scan
from kan_mamba_layers.ops.selective_scan.orders import orders_on
from kan_mamba_layers.ops.subclasses import accepts_subclasses
from kan_mamba_layers.walks import Walks

__all__ = ["cross_selective_scan", "selective_scan"]

_FUSED = ("cpu", "triton")
# Without it, before PyTorch 2.7, torch.export writes one size of "chunked".
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_SCANS: dict[str, Scan] = {"reference": reference.scan, "chunked": chunked.scan}


@accepts_subclasses()
def selective_scan(
    u: Tensor,  # b d l
    delta: Tensor,  # b d l
    A: Tensor,  # d n
    B: Tensor,  # d n | b n l | b g n l
    C: Tensor,  # d n | b n l | b g n l
    D: Tensor | None = None,  # d
    z: Tensor | None = None,  # b d l
    delta_bias: Tensor | None = None,  # d
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,  # b d n
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Run Mamba's selective scan over a sequence, with the arguments of ``mamba_ssm``'s ``selective_scan_fn``.

    .. math::
        \delta &\leftarrow \mathrm{softplus}(\delta + \delta_\mathrm{bias})
            \quad\text{(softplus only if } \texttt{delta\_softplus}) \\
        h_t &= \exp(\delta_t A)\, h_{t-1} + \delta_t B_t u_t \\
        y_t &= \big(C_t^\top h_t + D u_t\big)\,\mathrm{SiLU}(z_t) \quad\text{(gate only if } z \text{ is given)}

    Args:
        u: input, shape ``(b, d, l)``, ``l >= 1``.
        delta: step sizes, shape ``(b, d, l)``; positive after bias and softplus for a decaying state.
        A: real transition, shape ``(d, n)``; negative for a decaying state.
        B: input projection, shape ``(d, n)`` if constant in time, ``(b, n, l)``, or ``(b, g, n, l)`` where ``g``
            divides ``d``: channels ``[i d/g, (i+1) d/g)`` use group ``i``.
        C: output projection, shapes as for ``B``.
        D: skip connection, shape ``(d,)``.
        z: gate, shape ``(b, d, l)``.
        delta_bias: added to ``delta``, shape ``(d,)``.
        delta_softplus: whether ``delta`` passes through softplus.
        return_last_state: whether ``h`` after the last step is returned too.
        initial_state: ``h`` before the first step, shape ``(b, d, n)``; zero if not given.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"chunked"`` or ``"reference"``; see :func:`resolve`. If ``B`` or
            ``C`` is constant in time, ``"auto"`` takes ``"chunked"``: a fused backend would treat every channel as a
            group.

    Returns:
        ``y`` of shape ``(b, d, l)`` in ``u``'s dtype, or ``(y, h)`` with ``h`` of shape ``(b, d, n)`` in the compute
        dtype.

    Raises:
        TypeError: an argument is not a real floating-point tensor (complex ``A`` is not supported).
        ValueError: a shape does not fit, tensors are on several devices, or the backend cannot run the call.

    Numerics:
        Everything is computed in float32 (float64 if ``u`` is float64), also for half precision and under autocast.
        With ``delta >= 0`` and ``A <= 0`` no factor exceeds 1, so the state cannot overflow by the recurrence itself.

    Example:
        >>> import torch
        >>> u, delta = torch.randn(2, 8, 10), torch.rand(2, 8, 10)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 10), torch.randn(2, 4, 10)
        >>> selective_scan(u, delta, A, B, C).shape
        torch.Size([2, 8, 10])

    References:
        Gu and Dao, Mamba, arXiv 2312.00752, equation 2 and section 3.2.
    """
    given = Line(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus)
    given.check()
    if z is not None:
        check_shape("z", z, tuple(u.shape), "b, d, l")
        check_same_device("u", u, z=z)
    check_backend("selective_scan", backend)
    chosen = select("selective_scan", backend, u, A=A, B=B, C=C)
    dtype = compute_dtype(u)
    with autocast_off(u):
        # With a gate, y is rounded once, after it: a fused backend must not round y to half precision before.
        line = given.prepared(rounds=z is None)
        y, state = _scan_fused(line, chosen) if chosen in _FUSED else _scan_plain(line, _plain(chosen))
        if z is not None:
            y = y.to(dtype) * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def _plain(backend: str) -> Scan:
    """A backend in plain PyTorch; while a graph is exported, ``"chunked"`` keeps its loops as loops."""
    to_onnx = torch.onnx.is_in_onnx_export()
    if to_onnx and torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            "dynamo=False writes a scan of one size only; use kan_mamba_layers.export_onnx, or torch.onnx.export with "
            "dynamo=True"
        )
    if backend == "chunked" and (to_onnx or _is_exporting()):
        return looped.scan
    return _SCANS[backend]


def _scan_plain(line: Line, scan: Scan) -> tuple[Tensor, Tensor]:  # b d l, b d n
    groups = line.B.shape[1]
    u = line.u.to(line.delta.dtype)
    step = line.delta if line.delta_bias is None else line.delta + line.delta_bias[:, None]  # b d l
    if line.softplus:
        step = F.softplus(step)
    inputs, steps = (x.unflatten(1, (groups, -1)).transpose(2, 3) for x in (u, step))  # b g l d/g
    start = None if line.initial_state is None else line.initial_state.unflatten(1, (groups, -1))  # b g d/g n
    y, last = scan(inputs, steps, line.A.unflatten(0, (groups, -1)), line.B, line.C, start)  # b g l d/g, b g d/g n
    y = y.transpose(2, 3).flatten(1, 2)  # b d l
    return y if line.D is None else y + line.D[:, None] * u, last.flatten(1, 2)


def _scan_fused(line: Line, backend: str) -> tuple[Tensor, Tensor]:  # b d l, b d n
    (_, channels, length), A, bias, state = line.u.shape, line.A, line.delta_bias, line.initial_state
    call = ScanCall(
        u=_for_fused(line.u.mT, backend),  # b l d
        coeffs=torch.cat([line.B, line.C], -1).transpose(1, 2),  # b l g 2n
        x_proj_weight=None,
        delta=line.delta.mT[:, :, None],  # b l 1 d
        dt_proj_weight=A.new_empty(1, channels, 0),
        dt_proj_bias=A.new_zeros(1, channels) if bias is None else bias[None],
        A=A[None],
        D=A.new_zeros(channels) if line.D is None else line.D,
        initial_state=None if state is None else state[:, None],
        height=1,
        width=length,
        softplus=line.softplus,
    )
    y, last = fused_scan(call, backend)
    return y.mT, last[:, 0]


def _for_fused(x: Tensor, backend: str) -> Tensor:
    """The Triton kernels read half precision themselves."""
    return x if backend == "triton" else x.to(compute_dtype(x))


@accepts_subclasses()
def cross_selective_scan(
    x: Tensor,  # b *grid d
    x_proj_weight: Tensor,  # k r+2n d
    dt_proj_weight: Tensor,  # k d r
    dt_proj_bias: Tensor,  # k d
    A_log: Tensor,  # k*d n
    D: Tensor,  # k*d
    *,
    walks: Walks | None = None,
    mask: Tensor | None = None,  # b *grid
    backend: Backend = "auto",
) -> Tensor:  # b *grid d
    r"""Scan a grid of positions selectively along several walks, and sum the results in the order of the grid.

    Let :math:`\pi_k(t)` be the position that direction ``k`` visits at time ``t``. Without ``walks`` the grid is an
    image, and the directions are its rows, its columns, and both reversed. With :math:`x_t` at :math:`\pi_k(t)`,
    :math:`A = -\exp(A_\mathrm{log})` and :math:`m_t` from the mask (1 without one), direction ``k`` computes

    .. math::
        (\delta^\mathrm{low}_t, B_t, C_t) &= W^k_x x_t, \qquad
        \delta_t = m_t\, \mathrm{softplus}(W^k_\delta \delta^\mathrm{low}_t + b^k_\delta) \\
        h_t &= \exp(\delta_t A^k)\, h_{t-1} + \delta_t B_t x_t, \qquad
        y_t = m_t \big(C_t^\top h_t + D^k x_t\big) .

    Args:
        x: channels-last image, shape ``(b, h, w, d)``, ``h, w >= 1``; with ``walks``, ``(b, *walks.grid, d)``.
        x_proj_weight: ``W_x``, shape ``(k, r + 2n, d)``; rows are ``delta`` (r), ``B`` (n), ``C`` (n).
        dt_proj_weight: ``W_delta``, shape ``(k, d, r)``.
        dt_proj_bias: ``b_delta``, shape ``(k, d)``.
        A_log: logarithm of ``-A``, shape ``(k d, n)``, direction after direction.
        D: skip connection, shape ``(k d,)``.
        walks: the ``k`` directions, from :mod:`kan_mamba_layers.walks`; by default the four of an image, as from
            ``walks.cross(h, w)``.
        mask: the positions that count, bool, shape ``(b, *grid)``. Others leave the state as it is, add nothing to any
            gradient whatever ``x`` is there, NaN included, and have the output 0. All count by default.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"chunked"`` or ``"reference"``; see :func:`resolve`.

    Returns:
        A tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: an argument is not a real floating-point tensor, ``mask`` not a bool tensor or ``walks`` no walks.
        ValueError: a shape does not fit, tensors are on several devices, or the backend cannot run the call.

    Numerics:
        Everything is computed in float32 (float64 if ``x`` is float64), also for half precision and under autocast.

    Example:
        >>> import torch
        >>> from kan_mamba_layers import walks
        >>> x = torch.randn(1, 5, 7, 8)
        >>> weights = (torch.randn(4, 1 + 2 * 4, 8), torch.randn(4, 8, 1), torch.zeros(4, 8), torch.zeros(32, 4),
        ...            torch.ones(32))
        >>> cross_selective_scan(x, *weights).shape
        torch.Size([1, 5, 7, 8])
        >>> cross_selective_scan(x, *weights, walks=walks.hilbert(5, 7), mask=x[..., 0] > 0).shape
        torch.Size([1, 5, 7, 8])

    References:
        Liu et al., VMamba, arXiv 2401.10166, section 4.2 (SS2D).
    """
    _check_cross_selective_scan(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, walks, mask)
    check_backend("cross_selective_scan", backend)
    chosen = select("cross_selective_scan", backend, x, dt_proj_weight=dt_proj_weight, A_log=A_log)
    dtype, (_, *grid, channels), directions = compute_dtype(x), x.shape, x_proj_weight.shape[0]
    if walks is not None and torch.jit.is_tracing():  # type: ignore[attr-defined]
        x = x.expand(-1, *walks.grid, -1)  # stays in the trace, and fails for an image of another size than the walks
    orders = None if walks is None or walks.is_cross else orders_on(walks, x.device)
    height, width = (1, prod(grid)) if orders is not None else grid
    with autocast_off(x):
        call = ScanCall(
            u=(x if mask is None else x.masked_fill(~mask[..., None], 0)).flatten(1, -2),  # b l d
            coeffs=None,
            x_proj_weight=x_proj_weight.to(dtype),
            delta=None,
            dt_proj_weight=dt_proj_weight.to(dtype),
            dt_proj_bias=dt_proj_bias.to(dtype),
            A=-torch.exp(A_log.to(dtype)).view(directions, channels, A_log.shape[1]),  # k d n
            D=D.to(dtype).view(directions, channels).sum(0),  # d
            initial_state=None,
            height=height,
            width=width,
            softplus=True,
            orders=orders,
            mask=None if mask is None else mask.flatten(1).to(dtype),
        )
        y = _cross_scan_fused(call, chosen) if chosen in _FUSED else formula(call, _plain(chosen))[0]  # b l d
        y = y.to(x.dtype).unflatten(1, grid)  # b *grid d
        return y if mask is None else y.masked_fill(~mask[..., None], 0)


def _cross_scan_fused(call: ScanCall, backend: str) -> Tensor:  # b l d
    u = call.u.contiguous()  # or the projection, the forward and the backward pass would each make a copy
    weight, coeffs = call.x_proj_weight, None
    if backend == "triton":
        weight, coeffs = None, coefficients(u.to(call.A.dtype), call)  # b l k r+2n
    # PyTorch 2.4 compiles no ``_replace``.
    y, _ = fused_scan(ScanCall(_for_fused(u, backend), coeffs, weight, *call[3:]), backend)
    return y


def _check_cross_selective_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    walks: Walks | None,
    mask: Tensor | None,
) -> None:
    if walks is None:
        check_shape("x", x, ("any", "any", "any", "any"), "b, h, w, d")
        check_pixels("x", x, *x.shape[1:3])
        k, wanted = NUM_DIRECTIONS, "4"
    else:
        check_tensor("x", x)
        if not isinstance(walks, Walks):
            raise TypeError(f"walks must be a Walks, got {walks!r}; pass e.g. kan_mamba_layers.walks.snake(h, w)")
        if tuple(x.shape[1:-1]) != walks.grid:
            raise ValueError(
                f"x of shape {tuple(x.shape)} has the positions {tuple(x.shape[1:-1])}, and walks={walks!r} visits "
                f"those of a grid of {walks.grid}; make walks of the sizes of x, which is b, *grid, d"
            )
        k, wanted = len(walks), "k"
    channels = x.shape[-1]
    check_shape("A_log", A_log, (k * channels, "any"), f"{wanted}*d, n")
    check_shape("dt_proj_weight", dt_proj_weight, (k, channels, "any"), f"{wanted}, d, r")
    states, rank = A_log.shape[1], dt_proj_weight.shape[2]
    check_shape("x_proj_weight", x_proj_weight, (k, rank + 2 * states, channels), f"{wanted}, r+2n, d")
    check_shape("dt_proj_bias", dt_proj_bias, (k, channels), f"{wanted}, d")
    check_shape("D", D, (k * channels,), f"{wanted}*d")
    if mask is not None:
        check_mask("mask", mask, x.shape[:-1], "b, *grid")
    weights = {"x_proj_weight": x_proj_weight, "dt_proj_weight": dt_proj_weight, "dt_proj_bias": dt_proj_bias}
    check_same_device("x", x, **weights, A_log=A_log, D=D, mask=mask)
