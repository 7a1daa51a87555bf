"""Stand-in for the class ``Mamba`` of ``mamba_ssm``, with the forms that Vim and SegMamba add to it."""

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers import Mamba as Layer
from kan_mamba_layers._check import check_choice, check_int
from kan_mamba_layers.compat.caches import CachedStates, read_rows
from kan_mamba_layers.compat.inner import Scanned
from kan_mamba_layers.layers.mamba import MambaState, StepProjection
from kan_mamba_layers.ops.precision import compute_dtype

_PARTS = 5
Form = Literal["none", "v1", "v2", "v3"]


class BiasedStepProjection(StepProjection):
    """Adds its bias unless told otherwise, for code that calls it as the ``nn.Linear`` of the originals."""

    def forward(self, low: Tensor, *, add_bias: bool = True) -> Tensor:  # ... r -> ... d
        return F.linear(low, self.weight, self.bias if add_bias else None)


class Mamba(CachedStates, Layer):
    """:class:`kan_mamba_layers.Mamba` with the constructor, the methods and the parts of the originals.

    ``bimamba_type`` is ``"none"`` in ``mamba_ssm``; ``"v1"`` (one convolution, two scans) or ``"v2"`` (two of each) in
    Vim; ``"v3"`` in SegMamba: ``"v2"`` and a third scan, which visits the ``nslices`` equal parts of the sequence in
    turn, first the first position of each part, then the second. ``"v3"`` without ``nslices`` is Vivim's, with
    ``nframes`` parts and a third of the sum; without both a warning says so. ``if_divide_out`` halves the sum in
    ``"v2"``, as does ``if_devide_out``, its name in older versions. ``bimamba=True`` is VideoMamba's name for ``"v2"``,
    and None is ``"none"``.
    ``init_layer_scale`` adds a factor ``gamma`` per output channel. ``use_fast_path`` has no effect: there is one path,
    which runs all directions. ``layer_idx`` is the key of this layer's state in ``inference_params``.
    """

    _step_projection = BiasedStepProjection
    _conv_has_padding = True
    _has_wide_dynamics = True
    A_b_log: nn.Parameter
    gamma: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: Form | None = "none",
        *,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        nslices: int | None = None,
        nframes: int | None = None,
        if_devide_out: bool = False,
        bimamba: bool | None = None,
    ) -> None:
        if bimamba is not None:
            bimamba_type = "v2" if bimamba else "none"
        bimamba_type = "none" if bimamba_type is None else bimamba_type
        check_choice("bimamba_type", bimamba_type, ("none", "v1", "v2", "v3"))
        for name, parts in (("nslices", nslices), ("nframes", nframes)):
            if parts is not None:
                check_int(name, parts, 1)
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            bias=bias,
            bidirectional=bimamba_type in ("v2", "v3"),
            if_divide_out=(if_divide_out or if_devide_out) and bimamba_type == "v2",
            device=device,
            dtype=dtype,
        )
        self.activation, self.act = "silu", nn.SiLU()  # read by subclasses with a forward pass of their own
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.nslices = nslices or nframes or _PARTS
        self._is_averaged = bimamba_type == "v3" and nslices is None
        if self._is_averaged and nframes is None:
            warnings.warn(
                "bimamba_type='v3' without nslices is taken for Vivim's form, a third of the sum; pass nslices for "
                "SegMamba's, or nframes",
                stacklevel=2,
            )
        self.init_layer_scale = init_layer_scale
        self.bidirectional = bimamba_type != "none"
        self.register_parameter("gamma", None)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.empty_like(self.out_proj.weight[:, 0]))
        if bimamba_type == "v1":
            self.undecayed += ("A_b_log",)
            self.A_b_log = nn.Parameter(torch.empty_like(self.A_log))
        if bimamba_type == "v3":
            self._add_direction("_s", conv_bias)
        self._reset_additions()

    def reset_parameters(self) -> None:
        """Reinitialise."""
        super().reset_parameters()
        self._reset_additions()

    @torch.no_grad()
    def _reset_additions(self) -> None:
        if self.gamma is not None and self.init_layer_scale is not None:
            self.gamma.fill_(self.init_layer_scale)
        if self.bimamba_type == "v1":
            self.A_b_log.copy_(self.A_log)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # b l c
        if inference_params is not None:
            return self._continue(hidden_states, inference_params)
        return self._scaled(super().forward(hidden_states))

    def _scaled(self, out: Tensor) -> Tensor:  # b l c
        return out if self.gamma is None else out * self.gamma

    def _convolved(self, conv: nn.Conv1d, u: Tensor, state: MambaState | None) -> Tensor:  # b d l
        if state is None:
            return conv(u)[..., : u.shape[-1]]
        before = self.d_conv - 1
        return conv(torch.cat([state.conv[..., 1:].to(u.dtype), u], -1))[..., before : before + u.shape[-1]]

    def _widened(self, dt_proj: StepProjection, low: Tensor) -> Tensor:  # b l r -> b l d
        if isinstance(dt_proj, BiasedStepProjection):
            return dt_proj(low, add_bias=False)
        return F.linear(low, dt_proj.weight)  # of another linear layer in its place

    def _scan_all(self, u: Tensor, z: Tensor, hidden: Tensor | None) -> Tensor:  # b d l
        if self.bimamba_type == "v1":
            return self._scan_both_ways(u, z)
        y = super()._scan_all(u, z, hidden)
        if self.bimamba_type != "v3":
            return y
        length, slices = u.shape[-1], self.nslices
        if length % slices:
            name = "nframes" if self._is_averaged else "nslices"
            raise ValueError(f"the length of the sequence must be a multiple of {name}={slices}, got {length}")
        u, z = (v.unflatten(-1, (slices, -1)).mT.flatten(-2) for v in (u, z))  # b d l: across the parts
        across, _ = self._scan(u, z, "_s")
        y = y + across.unflatten(-1, (-1, slices)).mT.flatten(-2)
        return y / 3 if self._is_averaged else y

    def _scan_both_ways(self, u: Tensor, z: Tensor) -> Tensor:  # b d l
        """One convolution and projection, then a scan forwards with ``A`` and one backwards with ``A_b``."""
        scanned = Scanned(*self._selected(u, ""), z)
        A, A_b = (-torch.exp(log.to(compute_dtype(u))) for log in (self.A_log, self.A_b_log))
        y = scanned.run(A, self.D, self.dt_proj.bias, True)
        return y + scanned.run(A_b, self.D, self.dt_proj.bias, True, backwards=True)

    def _continue(self, x: Tensor, inference_params: Any) -> Tensor:  # b l c
        """A sequence's beginning, or its next position, with the state in ``inference_params``."""
        cache = self._get_states_from_cache(inference_params, x.shape[0], inference_params.seqlen_offset == 0)
        return self.step(x, *cache)[0]

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the next positions (b l c), update the two states in place, and return the output and them."""
        out, state = super().step(hidden_states, MambaState(conv_state, read_rows(ssm_state, None)))
        with torch.no_grad():
            conv_state.copy_(state.conv)
            ssm_state.copy_(state.scan)
        return self._scaled(out), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        conv, scan = (part.to(dtype or self.conv1d.weight.dtype) for part in self.allocate_state(batch_size))
        return conv, scan
