"""Argument checks: every error names the argument, its value and the fix."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def check_tensor(name: str, x: Any) -> None:
    """``x`` is a dense tensor of real floating-point numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; wrap it with torch.as_tensor")
    if x.dtype not in _FLOATS:
        fix = "real" if x.is_complex() else "dequantize()" if x.is_quantized else "float()"
        raise TypeError(f"{name} must be a real floating-point tensor, got {x.dtype}; convert it, e.g. {name}.{fix}")
    if x.layout is not torch.strided or x.is_nested:
        kind, fix = ("nested", "to_padded_tensor(0.0)") if x.is_nested else (x.layout, "to_dense()")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one; convert it, e.g. {name}.{fix}")


def check_shape(name: str, x: Any, shape: Sequence[int | str], letters: str) -> None:
    """``x`` is a floating-point tensor of the given shape; a string stands for any size."""
    check_tensor(name, x)
    sizes = x.shape
    fits = len(sizes) == len(shape)
    if fits:
        for want, got in zip(shape, sizes, strict=True):  # ops ask many times per call, and `all` takes longer
            fits = fits and (isinstance(want, str) or want == got)
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({letters}) = ({wanted}), got {tuple(sizes)}; reshape or slice it")


def check_same_device(name: str, x: Tensor, **others: Tensor | None) -> None:
    """All tensors are on the device of ``x``: a kernel would take an address of another device for one of its own."""
    for other, y in others.items():
        if y is not None and y.device != x.device:
            fix = f"move one of them, e.g. {name}.to({str(y.device)!r})"
            raise ValueError(f"{name} is on {x.device} and {other} on {y.device}; {fix}")


def check_mask(name: str, mask: Any, shape: Sequence[int], letters: str) -> None:
    """``mask`` is a boolean tensor of the given shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, got {kind}; pass True where x counts, e.g. {name}.bool()")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape ({letters}) = {tuple(shape)}, got {tuple(mask.shape)}; reshape it")


def check_int(name: str, value: Any, minimum: int) -> None:
    """``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}; pass an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}; pass an int >= {minimum}")


def check_sizes(name: str, value: Any, least: int, most: int) -> None:
    """``value`` is a sequence of ``least`` to ``most`` positive integers."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}; pass a tuple")
    if not least <= len(value) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{name} must have {wanted} entries, got {value!r}; pass {wanted} positive integers")
    for i, size in enumerate(value):
        check_int(f"{name}[{i}]", size, 1)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """``value`` is a finite real number in ``[low, high]``, without an end that is open."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}; pass a float")
    number = float(value)
    below = number <= low if open_low else number < low
    above = number >= high if open_high else number > high
    if not math.isfinite(number) or below or above:
        left = "(" if open_low or low == -math.inf else "["
        interval = f"{left}{low}, {high}{')' if open_high or high == math.inf else ']'}"
        raise ValueError(f"{name} must be a finite number in {interval}, got {value}; choose one inside")


def check_interval(name: str, value: Any) -> None:
    """``value`` is a pair of finite numbers, the second larger than the first."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of numbers, got {value!r}; pass e.g. (-1.0, 1.0)")
    low, high = value
    check_number(f"{name}[0]", low)
    check_number(f"{name}[1]", high)
    if low >= high:
        raise ValueError(f"{name} must ascend, got {value!r}; pass e.g. (-1.0, 1.0)")


def check_pixels(name: str, x: Tensor, *sizes: int) -> None:
    """``x`` is a batch of images, or of volumes, of that size, which is not zero."""
    for size in sizes:
        if size < 1:
            fix = " and ".join(f"{letter} >= 1" for letter in "dhw"[-len(sizes) :])
            raise ValueError(f"{name} must have at least one pixel, got shape {tuple(x.shape)}; pass {fix}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """``value`` is a multiple of ``divisor``."""
    if value % divisor:
        raise ValueError(
            f"{name} must be divisible by {divisor_name}, got {name}={value} and {divisor_name}={divisor}; "
            f"use {name}={math.ceil(value / divisor) * divisor} or another {divisor_name}"
        )
