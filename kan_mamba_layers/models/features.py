"""What the feature maps of an encoder are, as timm describes them."""

from collections.abc import Sequence
from typing import Any

from kan_mamba_layers._check import check_int


class FeatureInfo:
    """The maps of an encoder, finest first, and which of them a model with ``features_only=True`` returns.

    ``feature_info[i]`` is a dictionary about the map ``i``: ``num_chs``, its channels; ``reduction``, how many times
    smaller than the image it is; ``module``, the name of the module that computes it. The methods list these for the
    returned maps.

    Args:
        info: the dictionaries.
        out_indices: the returned maps, negative ones counted from the end; None for all.

    Raises:
        TypeError: ``out_indices`` is not a sequence of integers, or it is empty.
        ValueError: ``out_indices`` has an index of no map.

    References:
        ``FeatureInfo`` of timm, whose names these are.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int] | None = None) -> None:
        self.info = list(info)
        self.out_indices = _indices(range(len(info)) if out_indices is None else out_indices, len(info))

    @property
    def depth(self) -> int:
        """The number of maps up to the deepest returned one, which are those that have to be computed."""
        return max(self.out_indices) + 1

    def channels(self) -> list[int]:
        """Return the channels of each returned map."""
        return [self.info[i]["num_chs"] for i in self.out_indices]

    def reduction(self) -> list[int]:
        """Return how many times smaller than the image each returned map is."""
        return [self.info[i]["reduction"] for i in self.out_indices]

    def module_name(self) -> list[str]:
        """Return the name of the module that computes each returned map."""
        return [self.info[i]["module"] for i in self.out_indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


def _indices(out_indices: Any, count: int) -> tuple[int, ...]:
    if not isinstance(out_indices, Sequence) or isinstance(out_indices, str) or not out_indices:
        raise TypeError(f"out_indices must be a sequence of integers, got {out_indices!r}; pass e.g. (0, {count - 1})")
    for i, index in enumerate(out_indices):
        check_int(f"out_indices[{i}]", index, -count)
        if index >= count:
            raise ValueError(f"out_indices[{i}] must be less than {count}, the number of maps, got {index}; pass less")
    return tuple(int(index) % count for index in out_indices)
