"""Results that a caller wants in a tensor of its own."""

from torch import Tensor

from kan_mamba_layers._check import check_shape


def put(name: str, value: Tensor, target: Tensor | None, letters: str) -> Tensor:
    """The value, written into ``target`` if there is one, which is not filled by broadcasting."""
    if target is None:
        return value
    check_shape(name, target, value.shape, letters)
    return target.copy_(value)
