"""What the layers around a selective scan share: checks of their sizes, and initial values of the recurrence."""

import math

import torch
from torch import Tensor, nn

from kan_mamba_layers._check import check_choice, check_int, check_number


def inner_sizes(d_model: int, d_state: int, d_conv: int, expand: float, dt_rank: int | str) -> tuple[int, int]:
    """The channels of the scan and the rank of the step projection, from arguments that are checked."""
    check_int("d_model", d_model, 1)
    check_int("d_state", d_state, 1)
    check_int("d_conv", d_conv, 1)
    d_inner = multiple("expand", expand, d_model)
    if isinstance(dt_rank, str):
        check_choice("dt_rank", dt_rank, ("auto",))
        dt_rank = math.ceil(d_model / 16)
    check_int("dt_rank", dt_rank, 1)
    return d_inner, dt_rank


def multiple(name: str, factor: float, channels: int) -> int:
    """``factor * channels``, rounded down to at least 1. A product that rounding left just below an integer is one."""
    check_number(name, factor, 1 / channels)
    return int(factor * channels + 1e-6)


def check_steps(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Raise if the range of the initial steps does not fit."""
    check_number("dt_min", dt_min, 0.0, open_low=True)
    check_number("dt_max", dt_max, dt_min)
    check_number("dt_init_floor", dt_init_floor, 0.0, open_low=True)


def reset_steps(bias: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Draw step sizes that are log-uniform in ``[dt_min, dt_max]``."""
    low, high = math.log(dt_min), math.log(dt_max)
    share = torch.rand(bias.shape, device=bias.device, dtype=torch.float32)
    step = share.mul(high - low).add(low).exp().clamp_min(dt_init_floor)
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def reset_recurrence(A_log: Tensor, D: Tensor) -> None:
    """Set ``A = -(1, ..., n)`` and skips of 1."""
    rates = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    A_log.copy_(rates.log().expand_as(A_log))
    nn.init.ones_(D)
