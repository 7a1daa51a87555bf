"""Caches for generation: those of layers in ``inference_params``, and the rows of one that belong to a batch.

Rows may be picked by index; negative indices mark padding.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """Stand in for the class of ``mamba_ssm.utils.generation``: the caches of all layers, and where a sequence is."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin other sequences; the caches stay, and are cleared by the layers."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class CachedStates:
    """A layer whose two states lie in ``inference_params`` under its number."""

    layer_idx: int | None

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The two states before the first position, in the dtype of the weights if none is given."""
        raise NotImplementedError

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The two states, which begin as zeros. The name is that of the originals, whose subclasses call it."""
        if self.layer_idx is None:
            raise ValueError("inference_params needs a layer with a number; pass layer_idx to the constructor")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        if initialize_states:
            for part in memory[self.layer_idx]:
                part.zero_()
        return memory[self.layer_idx]


def read_rows(cache: Tensor, indices: Tensor | None) -> Tensor:
    """The rows of the batch; for padding, an arbitrary row.

    They are a copy if gradients are recorded: a backward pass reads them after the cache is overwritten.
    """
    if indices is None:
        return cache.clone() if torch.is_grad_enabled() else cache
    return cache[indices.clamp_min(0)]


@torch.no_grad()
def write_rows(cache: Tensor, indices: Tensor | None, rows: Tensor) -> None:
    """Write the rows of the batch, but not of padding."""
    if indices is None:
        cache.copy_(rows)
    elif indices.shape[0]:
        # Padding repeats the first row that is used, since a compiler knows no selection of some rows.
        used = indices >= 0
        source = torch.where(used, torch.arange(len(used), device=used.device), used.int().argmax(0))
        places = indices.index_select(0, source).clamp_min(0)
        cache[places] = torch.where(used.any(), rows.index_select(0, source).to(cache.dtype), cache[places])


def without_padding(out: Tensor, indices: Tensor | None) -> Tensor:
    """The outputs of the batch, 0 for padding."""
    return out if indices is None else out.masked_fill((indices < 0).view(-1, *[1] * (out.ndim - 1)), 0)
