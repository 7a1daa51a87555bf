"""Tensors as text, so that a journal can keep them."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> str:
    """Tensors as text."""
    buffer = io.BytesIO()
    torch.save({name: x.detach().cpu().clone() for name, x in tensors.items()}, buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def unpack(text: str) -> dict[str, Tensor]:
    """The tensors of `pack`."""
    buffer = io.BytesIO(zlib.decompress(base64.b64decode(text)))
    tensors: dict[str, Tensor] = torch.load(buffer, weights_only=True)
    return tensors
