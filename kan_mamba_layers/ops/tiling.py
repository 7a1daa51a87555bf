"""Arithmetic of tiles, for what launches kernels."""


def ceil_div(size: int, block: int) -> int:
    """``ceil(size / block)``. Triton's own function takes microseconds."""
    return -(-size // block)


def padded(size: int, block: int) -> int:
    """The smallest multiple of ``block`` that is at least ``size``."""
    return ceil_div(size, block) * block


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()
