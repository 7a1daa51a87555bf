"""The memory that a process needs for the chunked scan, which its allocator could multiply by leaving holes."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource", reason="needs the peak memory of a process, which Windows does not tell")

STEP = """
import resource, torch
from kan_mamba_layers import cross_selective_scan

b, h, w, d, n, r = 8, 128, 128, 32, 16, 2
draw = lambda *shape: torch.randn(*shape, requires_grad=True)
inputs = draw(b, h, w, d), draw(4, r + 2 * n, d), draw(4, d, r), draw(4, d), draw(4 * d, n), draw(4 * d)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
cross_selective_scan(*inputs, backend="chunked").mean().backward()
print(peak() - before)
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count in other units and have other allocators")
def test_a_training_step_needs_less_than_a_gigabyte() -> None:
    found = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True).stdout
    assert int(found) < 1_000_000  # kilobytes
