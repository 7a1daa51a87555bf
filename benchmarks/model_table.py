"""Print the Markdown table of the README: parameters and operations of every model at 256x256.

Matrix products and convolutions are counted by PyTorch's own counter (two floating-point operations make one
multiply-add). The inside of SS2D is replaced by its formula, because the counter would see the matrix products of one
particular backend and miss the recurrence: projections of four directions, and 9 b l d n operations for each scan.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kan_mamba_layers import SS2D, create_model

FAMILIES = ("km_unet", "km_unet_pp", "u_kan")
SIZES = ("tiny", "small", "base")
PIXELS = 256
DIRECTIONS = 4


def main() -> None:
    """Print one row for every model."""
    print(f"| model | parameters | multiply-adds at {PIXELS}x{PIXELS} | scans |")
    print("|---|---:|---:|---:|")
    for name in (f"{family}_{size}" for family in FAMILIES for size in SIZES):
        model = create_model(name).eval()
        parameters = sum(p.numel() for p in model.parameters())
        multiply_adds, scans = count(model, torch.zeros(1, 3, PIXELS, PIXELS))
        gflop = f"{scans / 1e9:.2f} GFLOP" if scans else "none"
        print(f"| `{name}` | {parameters:,} | {multiply_adds / 1e9:.2f} G | {gflop} |")


def count(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Multiply-adds outside the scans, and floating-point operations of the scans."""
    pixels: dict[str, int] = {}  # of each SS2D, by its name
    scan_layers = {name: module for name, module in model.named_modules() if isinstance(module, SS2D)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: pixels.update({name: args[0].shape[:3].numel()}))
        for name, module in scan_layers.items()
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    for hook in hooks:
        hook.remove()

    by_module = counter.get_flop_counts()
    prefix = type(model).__name__
    flops = counter.get_total_flops()
    multiply_adds = flops // 2
    scans = 0
    for name, layer in scan_layers.items():
        multiply_adds -= sum(by_module[f"{prefix}.{name}"].values()) // 2
        outside, scan = _scan_layer(layer, pixels[name])
        multiply_adds += outside
        scans += scan
    return multiply_adds, scans


def _scan_layer(layer: SS2D, pixels: int) -> tuple[int, int]:
    """Multiply-adds of the maps of one SS2D, and floating-point operations of its scans."""
    channels, rank = layer.dt_projs_weight.shape[1:]
    states = layer.A_logs.shape[1]
    pointwise = layer.in_proj.weight.numel() + layer.out_proj.weight.numel() + layer.conv2d.weight.numel()
    projections = DIRECTIONS * channels * ((rank + 2 * states) + rank)
    return pixels * (pointwise + projections), DIRECTIONS * 9 * pixels * channels * states


if __name__ == "__main__":
    main()
