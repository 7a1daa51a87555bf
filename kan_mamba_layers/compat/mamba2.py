"""Stand-ins for the classes ``Mamba2`` and ``Mamba2Simple`` of ``mamba_ssm``."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_divisible, check_int, check_number, check_shape
from kan_mamba_layers.compat.caches import CachedStates
from kan_mamba_layers.compat.convolution import causal_conv1d_update
from kan_mamba_layers.compat.gated_norm import RMSNorm
from kan_mamba_layers.compat.ssd import mamba_split_conv1d_scan_combined
from kan_mamba_layers.compat.state_update import selective_state_update
from kan_mamba_layers.layers.dynamics import check_steps, reset_steps
from kan_mamba_layers.layers.module import Layer
from kan_mamba_layers.ops.precision import compute_dtype

Pair = tuple[float, float]


class Mamba2(CachedStates, Layer):
    """The layer of Mamba-2, with the constructor, the parts and the keys of the original.

    ``d_ssm`` channels are scanned, by default all ``expand * d_model``; the others are a gated layer. ``chunk_size``
    and ``use_mem_eff_path`` tune the original and have no effect. There is no ``process_group``, so
    ``sequence_parallel`` has none either.
    """

    undecayed = ("A_log", "D", "dt_bias", "init_states")
    norm: RMSNorm
    init_states: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: Pair = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Pair = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("process_group has no stand-in; leave it out, or install mamba_ssm itself")
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "headdim": headdim, "ngroups": ngroups}
        for name, size in sizes.items():
            check_int(name, size, 1)
        check_number("expand", expand, 1 / d_model)
        d_inner = round(expand * d_model)
        if abs(expand * d_model - d_inner) > 1e-6:
            raise ValueError(
                f"expand * d_model must be a whole number, got expand={expand} and d_model={d_model}; "
                f"use expand={math.ceil(expand * d_model)}/{d_model}"
            )
        check_number("A_init_range[0]", A_init_range[0], 0.0, open_low=True)
        check_number("A_init_range[1]", A_init_range[1], A_init_range[0])
        check_steps(dt_min, dt_max, dt_init_floor)
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.expand = expand
        self.d_inner = d_inner
        self.headdim = headdim
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups = ngroups
        check_divisible("d_ssm", self.d_ssm, "headdim", headdim)
        self.nheads = self.d_ssm // headdim
        check_divisible("the number of heads", self.nheads, "ngroups", ngroups)
        self.A_init_range = A_init_range
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.steps = (dt_min, dt_max, dt_init_floor)
        self.dt_limit = dt_limit
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_idx = layer_idx
        # Read by subclasses with a forward pass of their own.
        self.activation, self.act = "silu", nn.SiLU()
        self.process_group, self.sequence_parallel = None, sequence_parallel
        self.world_size, self.local_rank = 1, 0
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        convolved = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner - self.d_ssm + convolved + self.nheads, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            convolved, convolved, d_conv, groups=convolved, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **factory))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device, dtype=dtype or torch.float32))
        skips = self.d_ssm if D_has_hdim else self.nheads
        self.D = nn.Parameter(torch.empty(skips, device=device, dtype=compute_dtype(self.A_log)))
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.register_parameter("init_states", None)  # of Mamba2Simple
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reinitialise; initial step sizes are log-uniform in ``[dt_min, dt_max]``, ``-A`` uniform in its range."""
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        reset_steps(self.dt_bias, *self.steps)
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*self.A_init_range).log())
        nn.init.ones_(self.D)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)
        if self.rmsnorm:
            self.norm.reset_parameters()
        self.out_proj.reset_parameters()

    def forward(
        self,
        u: Tensor,  # b l c | (b l) c
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,  # b l
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Mix the positions of sequences, which with ``seqlen`` lie one behind the other in ``u``."""
        if cu_seqlens is not None:
            raise NotImplementedError("cu_seqlens has no stand-in; number the sequences of a row with seq_idx")
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        check_shape("u", x, ("any", "any", self.d_model), "b, l, d_model")
        if inference_params is None:
            y, _ = self._mixed(self.in_proj(x), seq_idx)
            return y if seqlen is None else y.flatten(0, 1)
        conv_state, ssm_state = self._get_states_from_cache(inference_params, len(x))
        if inference_params.seqlen_offset > 0:
            return self.step(u, conv_state, ssm_state)[0]
        projected = self.in_proj(x)
        y, state = self._mixed(projected, seq_idx)
        _, xBC, _ = self._split(projected)
        with torch.no_grad():
            conv_state.copy_(F.pad(xBC.mT, (self.d_conv - x.shape[1], 0)))
            ssm_state.copy_(state)
        return y if seqlen is None else y.flatten(0, 1)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is not convolved (the gated layer and the gate), what is, and the step sizes."""
        convolved = self.d_ssm + 2 * self.ngroups * self.d_state
        rest, xBC, dt = projected.split([2 * self.d_inner - self.d_ssm, convolved, self.nheads], -1)
        return rest, xBC, dt

    def _mixed(self, projected: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:  # b l c, b h p n
        y, state = mamba_split_conv1d_scan_combined(
            projected,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            -self.A_log.to(compute_dtype(self.A_log)).exp(),
            self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            self.chunk_size,
            None if self.init_states is None else self.init_states.expand(projected.shape[0], -1, -1, -1),
            seq_idx,
            self.dt_limit,
            True,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 0.0,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        return self.out_proj(y), state

    def step(
        self,
        hidden_states: Tensor,  # b 1 c
        conv_state: Tensor,  # b d+2gn w
        ssm_state: Tensor,  # b h p n
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the next position, update the two states in place, and return the output and them."""
        check_shape("hidden_states", hidden_states, ("any", 1, self.d_model), "b, 1, d_model")
        rest, xBC, dt = self._split(self.in_proj(hidden_states[:, 0]))
        plain = self.d_inner - self.d_ssm
        gate, skipped, z = rest.split([plain, plain, self.d_ssm], -1)
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        x, B, C = xBC.split([self.d_ssm, *[self.ngroups * self.d_state] * 2], -1)
        heads = (self.nheads, self.headdim)
        A = -self.A_log.to(compute_dtype(self.A_log)).exp()
        dt = F.softplus(dt.to(A.dtype) + self.dt_bias.to(A.dtype)).clamp(*self.dt_limit)  # b h
        y = selective_state_update(
            ssm_state,
            x.unflatten(-1, heads),
            dt[..., None].expand(-1, -1, self.headdim),
            A[:, None, None].expand(*heads, self.d_state),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            self.D.unflatten(0, heads) if self.D_has_hdim else self.D[:, None].expand(heads),
            None if self.rmsnorm else z.unflatten(-1, heads),
        ).flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, z)
        if plain:
            y = torch.cat([F.silu(gate) * skipped, y], -1)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, len(weight), self.d_conv, dtype=dtype)
        return conv, weight.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype)


class Mamba2Simple(Mamba2):
    """The same with other defaults, and states to begin with that can be learned.

    Its norm takes each of ``ngroups`` groups for itself, as the original does with ``use_mem_eff_path=True`` alone.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: Pair = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Pair = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ("silu", "swish"):
            raise ValueError(f"activation must be 'silu' or 'swish', got {activation!r}")
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.learnable_init_states = learnable_init_states
        if learnable_init_states:
            shape = (self.nheads, headdim, d_state)
            self.init_states = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]  # b l c
        return super().forward(u, seq_idx=seq_idx)
