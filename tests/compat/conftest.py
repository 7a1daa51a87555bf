"""The stand-ins, installed for one test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kan_mamba_layers import compat


@pytest.fixture
def stand_ins() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()
