"""Published VMamba checkpoints: the keys that belong to them, and the shapes that our layers have."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kan_mamba_layers.ops.selective_scan.directions import NUM_DIRECTIONS

_AFFINE = r"\.(weight|bias)"
_BLOCK = (
    rf"((norm2?|mlp\.fc[12]|op\.(in_proj|conv2d|out_norm|out_proj)){_AFFINE}"
    r"|op\.(A_logs|Ds|dt_projs_bias|(x_proj|dt_projs)[._]weight))"
)
KEYS = {
    "vss_block": re.compile(_BLOCK),
    "vmamba": re.compile(
        rf"(patch_embed\.[0257]|layers\.\d+\.downsample\.[13]|classifier\.(norm|head)){_AFFINE}"
        rf"|layers\.\d+\.blocks\.\d+\.{_BLOCK}"
    ),
}
_STACKED = re.compile(r"(.*\bop\.(?:x_proj|dt_projs))\.weight")  # the weights of all directions, one below the other
_LINEAR = re.compile(r".*(in_proj|out_proj|fc1|fc2)\.weight")  # a linear layer, or a 1x1 convolution


def our_weight(key: str, value: Tensor) -> tuple[str, Tensor]:
    """Return the name and the shape of a published weight in :class:`VSSBlock` and :class:`VMamba`."""
    if stacked := _STACKED.fullmatch(key):  # k*m d ... -> k m d
        if value.ndim < 2 or value.shape[0] % NUM_DIRECTIONS:
            raise ValueError(
                f"state_dict[{key!r}] must stack {NUM_DIRECTIONS} directions in its first dimension, got shape "
                f"{tuple(value.shape)}; pass the whole weight"
            )
        return f"{stacked[1]}_weight", value.flatten(1).unflatten(0, (NUM_DIRECTIONS, -1))
    if _LINEAR.fullmatch(key) and value.shape[2:] == (1, 1):
        value = value.flatten(1)  # o i 1 1 -> o i
    return key, value


def arguments_of(state: Mapping[str, Tensor], lacking: str) -> dict[str, Any]:
    """Read off a converted state the arguments of the :class:`VMamba` that it belongs to.

    ``lacking`` is the error for a state without a weight, with its name in braces.
    """

    def size(name: str, dim: int = 0) -> int:
        if name not in state:
            raise ValueError(lacking.format(name))
        return state[name].shape[dim]

    norms = [match for name in state if (match := re.fullmatch(r"layers\.(\d+)\.blocks\.\d+\.norm\.weight", name))]
    depths = Counter(int(match[1]) for match in norms)
    stages = range(max(depths, default=0) + 1)
    dims = tuple(size(f"layers.{i}.blocks.0.norm.weight") for i in stages)
    first = "layers.0.blocks.0"
    return {
        "depths": tuple(depths[i] for i in stages),
        "dims": dims,
        "d_state": size(f"{first}.op.A_logs", 1),
        "expand": size(f"{first}.op.in_proj.weight") / dims[0],
        "mlp_ratio": size(f"{first}.mlp.fc1.weight") / dims[0] if f"{first}.mlp.fc1.weight" in state else 0.0,
    }
