"""Stand-ins for the residual block of ``mamba_ssm``, ``x, residual -> mixer(norm(x + residual)), x + residual``."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice
from kan_mamba_layers.compat.mamba2 import Mamba2
from kan_mamba_layers.compat.modules import Mamba
from kan_mamba_layers.compat.normalization import RMSNorm, layer_norm_fn

Make = Callable[[int], nn.Module]
_MIXERS: dict[str, Callable[..., nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}


class Block(nn.Module):
    """Stand in for ``mamba_ssm.modules.block.Block``, of version 2: a mixer, and a second layer unless ``nn.Identity``.

    ``fused_add_norm`` needs a ``LayerNorm`` or an ``RMSNorm``, whose weights it passes to ``layer_norm_fn``.
    """

    layer_idx: int | None = None
    norm: Any
    norm2: Any
    mixer: Any

    def __init__(
        self,
        dim: int,
        mixer_cls: Make,
        mlp_cls: Make,
        norm_cls: Make = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            kind = type(self.norm).__name__
            raise TypeError(f"fused_add_norm=True needs a norm_cls that gives LayerNorm or RMSNorm, got {kind}")

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # b l c, b l c
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(self, norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            options: dict[str, Any] = {"prenorm": True, "residual_in_fp32": self.residual_in_fp32, "eps": norm.eps}
            rms = isinstance(norm, RMSNorm)
            return layer_norm_fn(x, norm.weight, norm.bias, residual, is_rms_norm=rms, **options)  # type: ignore[return-value]
        total = x if residual is None else x + residual
        normalized = norm(total.to(norm.weight.dtype))
        return normalized, total.float() if self.residual_in_fp32 else total

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of the mixer before the first position."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class FirstBlock(Block):
    """Stand in for ``Block`` of ``mamba_ssm.modules.mamba_simple``, of version 1, which has no second layer."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Make,
        norm_cls: Make = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


class GatedMLP(nn.Module):
    """Stand in for ``mamba_ssm.modules.mlp.GatedMLP``: ``fc2(y * activation(gate))``, with both from ``fc1``.

    The hidden width, by default 8/3 of ``in_features``, is rounded up to a multiple of ``multiple_of``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 8 * in_features // 3 if hidden_features is None else hidden_features
        hidden = math.ceil(hidden / multiple_of) * multiple_of
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:  # ... c
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * self.activation(gate))


def create_block(d_model: int, *arguments: Any, d_intermediate: int | None = None, **options: Any) -> Block:
    """Stand in for ``create_block`` of either version: a block of ``Mamba`` and LayerNorm or RMSNorm.

    Version 1 has ``(d_model, ssm_cfg, norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm, layer_idx, device,
    dtype)``. Version 2 has ``d_intermediate`` behind ``d_model``, the width of a ``GatedMLP`` as a second layer unless
    0, and ``attn_layer_idx, attn_cfg`` behind ``ssm_cfg``, in which ``layer`` may be ``"Mamba2"``. There is no
    attention: its arguments must be empty.
    """
    names = ["norm_epsilon", "rms_norm", "residual_in_fp32", "fused_add_norm", "layer_idx", "device", "dtype"]
    if d_intermediate is not None or (arguments and isinstance(arguments[0], int)):
        names = ["d_intermediate", "ssm_cfg", "attn_layer_idx", "attn_cfg", *names]
        options |= {} if d_intermediate is None else {"d_intermediate": d_intermediate}
    else:
        names = ["ssm_cfg", *names]
    given = dict(zip(names, arguments, strict=False))
    if twice := given.keys() & options:
        raise TypeError(f"create_block got {', '.join(sorted(twice))} by position and by name; pass it once")
    given |= options
    if len(arguments) > len(names):
        raise TypeError(f"create_block takes {len(names)} arguments behind d_model, {', '.join(names)}")
    if odd := given.keys() - names:
        raise TypeError(f"create_block takes no {', '.join(sorted(odd))}; its arguments are {', '.join(names)}")
    ssm = dict(given.get("ssm_cfg") or {})
    kind = ssm.pop("layer", "Mamba1")
    check_choice("ssm_cfg['layer']", kind, _MIXERS)
    for name in ("attn_layer_idx", "attn_cfg"):
        if given.get(name):
            raise NotImplementedError(f"create_block has no attention, got {name}={given[name]!r}; leave it out")
    factory: dict[str, Any] = {name: given.get(name) for name in ("device", "dtype")}
    kind_of_norm: Any = RMSNorm if given.get("rms_norm") else nn.LayerNorm
    make_mixer = partial(_MIXERS[kind], layer_idx=given.get("layer_idx"), **ssm, **factory)
    make_norm = partial(kind_of_norm, eps=given.get("norm_epsilon", 1e-5), **factory)
    added = (given.get("fused_add_norm", False), given.get("residual_in_fp32", False))
    if width := given.get("d_intermediate"):
        make_mlp = partial(GatedMLP, hidden_features=width, out_features=d_model, **factory)
        block = Block(d_model, make_mixer, make_mlp, make_norm, *added)
    else:
        block = FirstBlock(d_model, make_mixer, make_norm, *added)
    block.layer_idx = given.get("layer_idx")
    return block


@torch.no_grad()
def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Stand in for ``_init_weights``, for ``Module.apply``: zero biases, and output projections divided by a root.

    ``out_proj.weight`` and ``fc2.weight`` are reinitialised and divided by ``sqrt(n_residuals_per_layer n_layer)``.
    Biases with ``_no_reinit`` stay.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, weight in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.div_(math.sqrt(n_residuals_per_layer * n_layer))
