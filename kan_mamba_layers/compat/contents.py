"""What can be imported where."""

from collections.abc import Callable
from functools import partial
from typing import Any

from kan_mamba_layers.compat import (
    blocks,
    caches,
    convolution,
    convolution_extension,
    directions,
    extensions,
    functions,
    gated_norm,
    grids,
    inner,
    language,
    mamba2,
    modules,
    normalization,
    ssd,
    state_update,
)


def _named(*objects: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {found.__name__: found for found in objects}


_CONVOLUTION = _named(convolution.causal_conv1d_fn, convolution.causal_conv1d_update)
_STATES = _named(convolution.causal_conv1d_varlen_states)
_WRAPPERS = _named(
    convolution_extension.causal_conv1d_fwd_function,
    convolution_extension.causal_conv1d_bwd_function,
    convolution_extension.causal_conv1d_update_function,
)
_CONVOLUTION_EXTENSION: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fwd": convolution_extension.causal_conv1d_fwd,
    "causal_conv1d_bwd": convolution_extension.causal_conv1d_bwd,
    "causal_conv1d_update": convolution_extension.causal_conv1d_update_extension,
}
_INNER = _named(inner.mamba_inner_fn, inner.bimamba_inner_fn)
_STEP = _named(state_update.selective_state_update)
_NORMS = _named(normalization.RMSNorm, normalization.layer_norm_fn, normalization.rms_norm_fn)
_SSD = _named(ssd.mamba_chunk_scan_combined, ssd.mamba_split_conv1d_scan_combined)
_EXTENSION: dict[str, Callable[..., Any]] = {"fwd": extensions.oflex_fwd, "bwd": extensions.oflex_bwd}

# Of earlier versions of VMamba's file.
_FUNCTIONS: dict[str, Any] = {
    **dict.fromkeys(
        ("CrossScanTriton", "CrossScanTritonF", "CrossScanF"), directions.Applied(directions.cross_scan_fn)
    ),
    **dict.fromkeys(
        ("CrossMergeTriton", "CrossMergeTritonF", "CrossMergeF"), directions.Applied(directions.cross_merge_fn)
    ),
    **dict.fromkeys(
        ("CrossScanTriton1b1", "CrossScanTriton1b1F"),
        directions.Applied(partial(directions.cross_scan_fn, one_by_one=True)),
    ),
    "getCSM": directions.get_csm,
}

# Every module, its parents before it, and the names in it besides its submodules.
MODULES: dict[str, dict[str, Any]] = {
    "mamba_ssm": _named(modules.Mamba, mamba2.Mamba2, functions.selective_scan_fn) | _INNER,
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": _named(blocks.Block),
    # With the functions that the originals import, because programs import them from here.
    "mamba_ssm.modules.mamba_simple": _named(modules.Mamba, functions.selective_scan_fn, inner.mamba_inner_fn)
    | {"Block": blocks.FirstBlock}
    | _CONVOLUTION
    | _STEP
    | _NORMS,
    "mamba_ssm.modules.mamba2": _named(mamba2.Mamba2)
    | {"RMSNormGated": gated_norm.RMSNorm}
    | _CONVOLUTION
    | _STATES
    | _STEP
    | _SSD,
    "mamba_ssm.modules.mamba2_simple": _named(mamba2.Mamba2Simple),
    "mamba_ssm.modules.mlp": _named(blocks.GatedMLP),
    "mamba_ssm.models": {},
    "mamba_ssm.models.mixer_seq_simple": _named(blocks.create_block, modules.Mamba, normalization.RMSNorm)
    | {"_init_weights": blocks.init_weights, "Block": blocks.FirstBlock},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _named(
        functions.selective_scan_fn, functions.selective_scan_ref, inner.mamba_inner_fn_no_out_proj
    )
    | {"SelectiveScanFn": directions.Applied(functions.selective_scan_fn)}
    | _INNER,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORMS | {"_layer_norm_fwd": normalization.layer_norm_fwd},
    "mamba_ssm.ops.triton.layernorm": {
        "RMSNorm": normalization.RMSNorm,
        "layer_norm_fn": normalization.layernorm_layer_norm_fn,
        "rms_norm_fn": normalization.layernorm_rms_norm_fn,
    },
    "mamba_ssm.ops.triton.layernorm_gated": _named(
        gated_norm.LayerNorm, gated_norm.RMSNorm, gated_norm.layernorm_fn, gated_norm.rmsnorm_fn
    ),
    "mamba_ssm.ops.triton.ssd_combined": _SSD,
    "mamba_ssm.ops.triton.selective_state_update": _STEP,
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _named(caches.InferenceParams, language.GenerationMixin),
    "mamba_ssm.utils.hf": _named(language.load_config_hf, language.load_state_dict_hf),
    "causal_conv1d": _CONVOLUTION | _STATES,
    "causal_conv1d.causal_conv1d_interface": _CONVOLUTION,
    "causal_conv1d.causal_conv1d_varlen": _STATES,
    "causal_conv1d.cpp_functions": _WRAPPERS,
    "causal_conv1d_cuda": _CONVOLUTION_EXTENSION,
    "selective_scan": {
        "selective_scan_fn": functions.vmamba_selective_scan_fn,
        "selective_scan_ref": functions.vmamba_selective_scan_ref,
    },
    "selective_scan_cuda": {"fwd": extensions.mamba_fwd, "bwd": extensions.mamba_bwd},
    "selective_scan_cuda_core": _EXTENSION,
    "selective_scan_cuda_oflex": _EXTENSION,
    "selective_scan_cuda_oflex_rh": {"fwd": extensions.states_fwd, "bwd": extensions.states_bwd},
    "v2dmamba_scan": {"fwd": grids.grid_fwd, "bwd": grids.grid_bwd},
    "csm_triton": _named(directions.cross_scan_fn, directions.cross_merge_fn) | _FUNCTIONS,
}
# A file of VMamba and its descendants, not a package: the stand-in is for where theirs is not on the path.
YIELDING = frozenset({"csm_triton"})
