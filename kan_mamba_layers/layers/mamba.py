"""Mamba: the selective scan along a sequence as a layer."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice, check_int, check_mask, check_number, check_shape
from kan_mamba_layers.layers.dynamics import check_steps, inner_sizes, reset_recurrence, reset_steps
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops import selective_scan
from kan_mamba_layers.ops.backend import Backend, check_backend
from kan_mamba_layers.ops.precision import check_dtype, compute_dtype


class MambaState(NamedTuple):
    """What :meth:`Mamba.step` remembers of the positions before."""

    conv: Tensor  # b d d_conv: the last inputs of the convolution
    scan: Tensor  # b d n: the state of the recurrence


class StepProjection(Layer, nn.Linear):
    """The product alone: the scan adds the bias, in float32 at least.

    ``bounds`` are those of the initial weights, ``steps`` are the least and the greatest initial step size and a floor.
    """

    undecayed = ("bias",)

    def __init__(
        self, rank: int, channels: int, bounds: tuple[float, float], steps: tuple[float, float, float], **factory: Any
    ) -> None:
        self.bounds, self.steps = bounds, steps  # first, since nn.Linear draws its weights when it is made
        super().__init__(rank, channels, **factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, *self.bounds)
        reset_steps(self.bias, *self.steps)

    def forward(self, low: Tensor) -> Tensor:  # ... r -> ... d
        return F.linear(low, self.weight)

    def _mark(self) -> None:
        super()._mark()
        if (bias := self._parameters.get("bias")) is not None:
            bias._no_reinit = True  # type: ignore[attr-defined]


class Mamba(Layer):
    r"""Mix the positions of a sequence at linear cost, by a gated selective scan.

    .. math::
        (u, z) &= W_\mathrm{in}\, x, \qquad v = \mathrm{SiLU}(\mathrm{DWConv}(u)) \\
        (\delta^\mathrm{low}_t, B_t, C_t) &= W_x v_t, \qquad
        \delta_t = \mathrm{softplus}(W_\delta \delta^\mathrm{low}_t + b_\delta), \qquad A = -e^{A_\mathrm{log}} \\
        h_t &= \exp(\delta_t A)\, h_{t-1} + \delta_t B_t v_t, \qquad
        y_t = (C_t^\top h_t + D v_t) \odot \mathrm{SiLU}(z_t) \\
        \mathrm{Mamba}(x) &= W_\mathrm{out}\, y

    The convolution is depthwise and causal: position ``t`` sees ``t - d_conv + 1`` to ``t``. With
    ``bidirectional=True`` a second convolution and scan, with weights of their own, run from the end of the sequence
    to its beginning, and ``y`` is the sum of both (Vision Mamba's ``bimamba_type="v2"``).

    Args:
        d_model: channels of input and output, ``c``.
        d_state: state size ``n`` of each channel's recurrence.
        d_conv: size of the convolution.
        expand: the scan has ``d_inner = expand * d_model`` channels.
        dt_rank: rank of the step projection, or ``"auto"`` for ``ceil(d_model / 16)``.
        dt_min: smallest initial step.
        dt_max: largest initial step.
        dt_init: initial values of the step projection: ``"random"`` for uniform ones, ``"constant"`` for equal ones.
        dt_scale: multiplies the initial values of the step projection.
        dt_init_floor: lower bound of the initial steps.
        conv_bias: whether the convolution has a bias.
        bias: whether the input and output projections have biases.
        bidirectional: whether a second scan runs backwards.
        if_divide_out: whether the sum of the two directions is halved; needs ``bidirectional=True``.
        backend: implementation of :func:`~kan_mamba_layers.ops.selective_scan`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input and output ``(b, l, d_model)``, ``l >= 1``. ``mask``, if given, is a boolean tensor ``(b, l)``, False
        where a position is to be left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or an input has the wrong shape.

    Numerics:
        The scan runs in float32 at least; see :func:`~kan_mamba_layers.ops.selective_scan`. ``A_log``, ``D`` and
        ``dt_proj.bias`` of each direction carry ``_no_weight_decay = True`` for optimisers that honour it, and
        ``dt_proj.bias`` has ``_no_reinit = True``, as in ``mamba_ssm``.

        A position with ``mask`` False has a step of exactly 0, so it leaves the state as it is, and its output is 0,
        even if its input is not finite. The convolution sees it as an input of 0. If only positions before or after a
        sequence are masked, the outputs of the others are those of the sequence alone. At masked positions inside a
        sequence the convolution sees zeros instead of the next valid neighbours.

    Example:
        >>> import torch
        >>> Mamba(8)(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])

        Position by position:

        >>> layer, x = Mamba(8), torch.randn(2, 10, 8)
        >>> state = layer.allocate_state(2)
        >>> for t in range(10):
        ...     y, state = layer.step(x[:, t], state)
        >>> torch.allclose(y, layer(x)[:, -1], atol=1e-5)
        True

    References:
        Gu and Dao, Mamba, arXiv 2312.00752, section 3.4; Zhu et al., Vision Mamba, arXiv 2401.09417, section 3.3, for
        the two directions. The parameter names are those of ``mamba_ssm`` and of Vim, whose weights load strictly.
    """

    # Overridden by compat.modules.Mamba, whose submodules are called from outside, as those of the original are.
    _step_projection: type[StepProjection] = StepProjection
    _conv_has_padding = False
    _has_wide_dynamics = False  # A_log and D in float32 at least, whatever the other weights are in
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: StepProjection
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        bidirectional: bool = False,
        if_divide_out: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner, rank = inner_sizes(d_model, d_state, d_conv, expand, dt_rank)
        check_steps(dt_min, dt_max, dt_init_floor)
        check_choice("dt_init", dt_init, ("random", "constant"))
        check_number("dt_scale", dt_scale, 0.0)
        if if_divide_out and not bidirectional:
            raise ValueError("if_divide_out=True halves the sum of two directions; pass bidirectional=True too")
        check_backend("selective_scan", backend)
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = d_inner
        self.dt_rank = rank
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.dt_init = dt_init
        self.dt_scale = dt_scale
        self.dt_init_floor = dt_init_floor
        self.bidirectional = bidirectional
        self.if_divide_out = if_divide_out
        self.backend: Backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self._suffixes: tuple[str, ...] = ()
        for suffix in ("", "_b") if bidirectional else ("",):
            self._add_direction(suffix, conv_bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _add_direction(self, suffix: str, conv_bias: bool) -> None:
        """Make the parameters of one more scan, whose names end in ``suffix``."""
        like, d = self.in_proj.weight, self.d_inner
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        bound, steps = self.dt_scale * self.dt_rank**-0.5, (self.dt_min, self.dt_max, self.dt_init_floor)
        bounds = (bound if self.dt_init == "constant" else -bound, bound)
        dt_proj = self._step_projection(self.dt_rank, d, bounds, steps, **factory)
        self.undecayed += (f"A{suffix}_log", f"D{suffix}")
        padding = self.d_conv - 1 if self._conv_has_padding else 0
        conv = nn.Conv1d(d, d, self.d_conv, padding=padding, groups=d, bias=conv_bias, **factory)
        self.add_module(f"conv1d{suffix}", conv)
        self.add_module(f"x_proj{suffix}", nn.Linear(d, self.dt_rank + 2 * self.d_state, bias=False, **factory))
        self.add_module(f"dt_proj{suffix}", dt_proj)
        if self._has_wide_dynamics:
            factory["dtype"] = torch.promote_types(like.dtype, torch.float32)
        A_log, D = (nn.Parameter(torch.empty(*shape, **factory)) for shape in ((d, self.d_state), (d,)))
        self.register_parameter(f"A{suffix}_log", A_log)
        self.register_parameter(f"D{suffix}", D)
        self._suffixes += (suffix,)
        self._reset_direction(suffix)

    def _direction(self, suffix: str) -> tuple[nn.Conv1d, nn.Linear, StepProjection, nn.Parameter, nn.Parameter]:
        conv, x_proj, dt_proj = (getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        return conv, x_proj, dt_proj, getattr(self, f"A{suffix}_log"), getattr(self, f"D{suffix}")

    def reset_parameters(self) -> None:
        """Reinitialise; initial step sizes are log-uniform in ``[dt_min, dt_max]`` and ``A = -(1, ..., n)``."""
        self.in_proj.reset_parameters()
        for suffix in self._suffixes:
            self._reset_direction(suffix)
        self.out_proj.reset_parameters()

    @torch.no_grad()
    def _reset_direction(self, suffix: str) -> None:
        conv, x_proj, dt_proj, A_log, D = self._direction(suffix)
        conv.reset_parameters()
        x_proj.reset_parameters()
        dt_proj.reset_parameters()
        reset_recurrence(A_log, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # b l c
        """Mix the positions of a sequence; where ``mask`` is False they are left out, and the output is 0."""
        self._check_input(x)
        hidden = None if mask is None else _hidden(x, mask)  # b l
        if hidden is not None:
            x = x.masked_fill(hidden[..., None], 0)
        u, z = self.in_proj(x).mT.chunk(2, 1)  # b d l, b d l
        y = self._scan_all(u, z, hidden)
        y = self.out_proj(y.mT)
        return y if hidden is None else y.masked_fill(hidden[..., None], 0)

    def _scan_all(self, u: Tensor, z: Tensor, hidden: Tensor | None) -> Tensor:  # b d l
        """All directions, added."""
        y, _ = self._scan(u, z, "", hidden)
        if not self.bidirectional:
            return y
        back, _ = self._scan(u.flip(-1), z.flip(-1), "_b", None if hidden is None else hidden.flip(-1))
        y = y + back.flip(-1)
        return y / 2 if self.if_divide_out else y

    def _scan(
        self,
        u: Tensor,  # b d l
        z: Tensor,  # b d l
        suffix: str,
        hidden: Tensor | None = None,  # b l
        state: MambaState | None = None,
    ) -> tuple[Tensor, Tensor]:  # y: b d l, last state: b d n
        """The convolution and the gated scan of one direction, which begins after ``state``."""
        _, _, dt_proj, A_log, D = self._direction(suffix)
        if hidden is not None:
            u = u.masked_fill(hidden[:, None], 0)  # the input projection may have a bias
        u, delta, B, C = self._selected(u, suffix, state)
        bias, dtype = dt_proj.bias, compute_dtype(u)
        if hidden is not None:
            # The mask is laid out as the linear layer's result: PyTorch 2.13 cannot compile the gradient otherwise.
            delta = F.softplus(delta.mT.to(dtype) + bias.to(dtype)).masked_fill(hidden[..., None], 0).mT
        y, last = selective_scan(
            u,
            delta,
            -torch.exp(A_log.to(dtype)),
            B,
            C,
            D,
            z,
            delta_bias=bias if hidden is None else None,
            delta_softplus=hidden is None,
            return_last_state=True,
            initial_state=None if state is None else state.scan,
            backend=self.backend,
        )
        return y, last

    def _selected(
        self, u: Tensor, suffix: str, state: MambaState | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # b d l, b d l, b n l, b n l
        """The convolved input, and the step sizes before the bias, ``B`` and ``C``, which are selected by it."""
        conv, x_proj, dt_proj, _, _ = self._direction(suffix)
        u = F.silu(self._convolved(conv, u, state))
        low, B, C = x_proj(u.mT).split([self.dt_rank, self.d_state, self.d_state], -1)  # b l r, b l n, b l n
        return u, self._widened(dt_proj, low).mT, B.mT, C.mT

    def _convolved(self, conv: nn.Conv1d, u: Tensor, state: MambaState | None) -> Tensor:  # b d l
        before = self.d_conv - 1
        return conv(F.pad(u, (before, 0)) if state is None else torch.cat([state.conv[..., 1:].to(u.dtype), u], -1))

    def _widened(self, dt_proj: StepProjection, low: Tensor) -> Tensor:  # b l r -> b l d
        return dt_proj(low)

    def allocate_state(self, batch: int) -> MambaState:
        """The state before the first position, for :meth:`step`: zeros ``conv`` (b d d_conv) and ``scan`` (b d n)."""
        check_int("batch", batch, 0)
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch, self.d_inner, self.d_conv)
        return MambaState(conv, weight.new_zeros(batch, self.d_inner, self.d_state, dtype=compute_dtype(weight)))

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Run the next position, or the next few, of a sequence that arrives piece by piece.

        The outputs are those of the whole sequence at once, up to rounding, and so are the gradients.

        Args:
            x: one position ``(b, d_model)``, or ``l >= 1`` of them ``(b, l, d_model)``.
            state: what the call before returned; before the first, :meth:`allocate_state`. It is not changed.

        Returns:
            The output, shaped as ``x``, and the state for the next call.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a shape does not fit, or the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError(
                "step needs a layer that runs forwards only; a layer with bidirectional=True needs all of x"
            )
        single = isinstance(x, Tensor) and x.ndim == 2
        x = x[:, None] if single else x  # b l c
        self._check_input(x)
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"state must be what allocate_state or step returned, got {type(state).__name__}")
        batch, (conv, scan) = x.shape[0], state
        check_shape("state.conv", conv, (batch, self.d_inner, self.d_conv), "b, d, d_conv")
        check_shape("state.scan", scan, (batch, self.d_inner, self.d_state), "b, d, n")
        u, z = self.in_proj(x).mT.chunk(2, 1)  # b d l, b d l
        y, scan = self._scan(u, z, "", state=MambaState(conv, scan))
        y = self.out_proj(y.mT)
        # A slice of all the inputs would keep them in memory.
        conv = torch.cat([conv[..., u.shape[-1] :], u[..., -self.d_conv :]], -1)
        return y[:, 0] if single else y, MambaState(conv, scan)

    def _check_input(self, x: Tensor) -> None:
        check_shape("x", x, ("any", "any", self.d_model), "b, l, d_model")
        if x.shape[1] < 1:
            raise ValueError(f"x must have at least one position, got shape {tuple(x.shape)}; pass l >= 1")
        check_dtype("x", x, "conv1d.weight", getattr(self.conv1d, "weight", None))

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, d_inner={self.d_inner}, "
            f"dt_rank={self.dt_rank}, bidirectional={self.bidirectional}, backend={self.backend!r}"
        )


def _hidden(x: Tensor, mask: Tensor) -> Tensor:  # b l
    """Where ``mask`` leaves a position out."""
    check_mask("mask", mask, x.shape[:2], "b, l")
    return ~mask
