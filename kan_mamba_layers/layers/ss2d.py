"""SS2D: the four-direction selective scan as a layer."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_number, check_pixels, check_shape
from kan_mamba_layers.layers.depthwise import depthwise_conv
from kan_mamba_layers.layers.dynamics import check_sizes, check_steps, reset_dynamics
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops import cross_selective_scan
from kan_mamba_layers.ops.backend import Backend, check_backend
from kan_mamba_layers.ops.precision import check_dtype
from kan_mamba_layers.ops.selective_scan.directions import NUM_DIRECTIONS


class SS2D(Layer):
    r"""Mix the pixels of a whole image at linear cost, by selective scans along four directions.

    .. math::
        (u, z) &= W_\mathrm{in}\, x, \qquad
        y = \mathrm{LayerNorm}(\mathrm{scan}_4(\mathrm{SiLU}(\mathrm{DWConv}(u)))) \\
        \mathrm{SS2D}(x) &= \mathrm{Dropout}(W_\mathrm{out}(y \odot \mathrm{SiLU}(z)))

    Without the gate :math:`u = W_\mathrm{in}\, x`, and :math:`\mathrm{SS2D}(x) = \mathrm{Dropout}(W_\mathrm{out}\, y)`.

    Args:
        d_model: channels of input and output, ``c``.
        d_state: state size ``n`` of each channel's recurrence.
        d_conv: size of the depthwise convolution, odd.
        expand: the scan has ``d_inner = expand * d_model`` channels.
        dt_rank: rank of the step projection, or ``"auto"`` for ``ceil(d_model / 16)``.
        gate: whether the output of the scan is multiplied by a gate, as in VMamba v0; VMamba v2 has none.
        dt_min: smallest initial step.
        dt_max: largest initial step.
        dt_init_floor: lower bound of the initial steps.
        dropout: dropout rate of the output, in ``[0, 1)``.
        conv_bias: whether the depthwise convolution has a bias.
        bias: whether the input and output projections have biases.
        backend: implementation of :func:`~kan_mamba_layers.ops.cross_selective_scan`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        Input and output ``(b, h, w, d_model)``, channels last.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, the input is not ``(b, h, w, d_model)``, or it has another dtype than
            the parameters, without autocast.

    Numerics:
        The scan runs in float32 at least; see :func:`~kan_mamba_layers.ops.cross_selective_scan`. ``A_logs``, ``Ds``
        and ``dt_projs_bias`` carry ``_no_weight_decay = True``; :func:`~kan_mamba_layers.param_groups` honours it.

    Example:
        >>> import torch
        >>> SS2D(8)(torch.randn(2, 6, 5, 8)).shape
        torch.Size([2, 6, 5, 8])

    References:
        Liu et al., VMamba, arXiv 2401.10166, section 4; initial values as in Gu and Dao, Mamba, arXiv 2312.00752,
        section 3.6. The parameter names are those of VMamba v0 and its descendants, whose weights load strictly. The
        published VMamba v2 (``v05_noz``) is ``gate=False, conv_bias=False``; see :class:`VSSBlock`.
    """

    undecayed = ("A_logs", "Ds", "dt_projs_bias")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        gate: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dropout: float = 0.0,
        conv_bias: bool = True,
        bias: bool = False,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner, rank = check_sizes(d_model, d_state, d_conv, expand, dt_rank)
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd to keep the size of the image, got {d_conv}; use {d_conv + 1}")
        check_steps(dt_min, dt_max, dt_init_floor)
        check_number("dropout", dropout, 0.0, 0.999)
        check_backend("cross_selective_scan", backend)
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = d_inner
        self.dt_rank = rank
        self.gate = gate
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.dt_init_floor = dt_init_floor
        self.backend: Backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **factory))

        d, n, r = self.d_inner, d_state, rank
        self.in_proj = nn.Linear(d_model, 2 * d if gate else d, bias=bias, **factory)
        self.conv2d = depthwise_conv(d, d_conv, bias=conv_bias, **factory)
        self.x_proj_weight = parameter(NUM_DIRECTIONS, r + 2 * n, d)
        self.dt_projs_weight = parameter(NUM_DIRECTIONS, d, r)
        self.dt_projs_bias = parameter(NUM_DIRECTIONS, d)
        self.A_logs = parameter(NUM_DIRECTIONS * d, n)
        self.Ds = parameter(NUM_DIRECTIONS * d)
        self.out_norm = nn.LayerNorm(d, **factory)
        self.out_proj = nn.Linear(d, d_model, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights; initial steps are log-uniform in ``[dt_min, dt_max]`` and ``A = -(1, ..., n)``."""
        for module in (self.in_proj, self.conv2d, self.out_norm, self.out_proj):
            module.reset_parameters()
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        steps = (self.dt_min, self.dt_max, self.dt_init_floor)
        reset_dynamics(self.dt_projs_bias, self.A_logs, self.Ds, *steps)

    def forward(self, x: Tensor) -> Tensor:  # b h w c
        """Mix the pixels of images of any size: ``(b, h, w, d_model)`` to the same shape."""
        check_shape("x", x, ("any", "any", "any", self.d_model), "b, h, w, d_model")
        check_pixels("x", x, *x.shape[1:3])
        check_dtype("x", x, "conv2d.weight", self.conv2d.weight)
        u = self.in_proj(x)  # b h w d, and as much again for the gate
        if self.gate:
            u, z = u.chunk(2, -1)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # b h w d
        y = cross_selective_scan(
            u,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            backend=self.backend,
        )
        y = self.out_norm(y)
        if self.gate:
            y = y * F.silu(z)
        return self.dropout(self.out_proj(y))

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}, "
            f"gate={self.gate}, backend={self.backend!r}"
        )
