"""Stand-ins for the functions of VMamba's file ``csm_triton``: the pixels of an image in four orders, and back.

``scans`` chooses the orders: 0 for rows, columns and both reversed, 1 for rows four times, 2 for rows twice and rows
reversed twice. ``in_channel_first`` and ``out_channel_first`` tell where the channels of the image and of the sequences
are. With ``one_by_one`` every direction has an image of its own. ``force_torch`` has no effect. The file's
earlier versions have autograd Functions for the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kan_mamba_layers._check import check_shape


def cross_scan_fn(
    x: Tensor,  # b c h w | b h w c; one by one: b 4 c h w | b h w 4 c
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:  # b 4 c l | b l 4 c
    """The pixels as four sequences."""
    x = _directions_first(x, in_channel_first, one_by_one)  # b 1 c h w | b 4 c h w
    order = _orders(x.shape[-2], x.shape[-1], scans, x.device)  # 4 l
    y = _reorder(x.flatten(-2), order)  # b 4 c l
    return y if out_channel_first else y.permute(0, 3, 1, 2).contiguous()  # callers take views


def cross_merge_fn(
    y: Tensor,  # b 4 c h w | b h w 4 c
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:  # b c l | b l c; one by one: b 4 c l | b l 4 c
    """The four sequences in the order of the pixels, added unless ``one_by_one``."""
    y = _directions_first(y, out_channel_first, True)  # b 4 c h w
    order = _orders(y.shape[-2], y.shape[-1], scans, y.device)  # 4 l
    x = _reorder(y.flatten(-2), order.argsort(1))  # b 4 c l
    if one_by_one:
        return x if in_channel_first else x.permute(0, 3, 1, 2).contiguous()
    return x.sum(1) if in_channel_first else x.sum(1).mT.contiguous()


class Applied:
    """A function under the name ``apply``, as an autograd Function has it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.apply = function


def get_csm(mode: int = 1) -> tuple[Applied, Applied]:
    """Stand in for ``getCSM``: the two Functions for the orders ``scans=mode``."""
    return Applied(partial(cross_scan_fn, scans=mode)), Applied(partial(cross_merge_fn, scans=mode))


def _directions_first(x: Tensor, channel_first: bool, one_by_one: bool) -> Tensor:
    if not one_by_one:
        check_shape("x", x, ("any",) * 4, "b, c, h, w" if channel_first else "b, h, w, c")
        return (x if channel_first else x.permute(0, 3, 1, 2))[:, None]  # b 1 c h w
    if channel_first:
        check_shape("x", x, ("any", 4, "any", "any", "any"), "b, 4, c, h, w")
        return x
    check_shape("x", x, ("any", "any", "any", 4, "any"), "b, h, w, 4, c")
    return x.permute(0, 3, 4, 1, 2)  # b 4 c h w


def _orders(height: int, width: int, scans: int, device: torch.device) -> Tensor:  # 4 l
    """The pixel, counted row by row, that each direction visits at each step."""
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).T.flatten()
    match scans:
        case 0:
            return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
        case 1:
            return rows.expand(4, -1)
        case 2:
            return torch.stack([rows, rows, rows.flip(0), rows.flip(0)])
        case _:
            raise ValueError(f"scans must be 0, 1 or 2, got {scans!r}")


def _reorder(x: Tensor, order: Tensor) -> Tensor:  # b 1 c l | b 4 c l, 4 l -> b 4 c l
    batch, _, channels, length = x.shape
    return x.expand(-1, 4, -1, -1).gather(3, order[None, :, None].expand(batch, 4, channels, length))
