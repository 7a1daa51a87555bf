"""The machine code of a kernel is kept on disk; shown on the scan's forward kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import fresh_process

pytest.importorskip("numba")

CODE = (
    "import torch\n"
    "from kan_mamba_layers.ops.simd.kernel import c_function\n"
    "from kan_mamba_layers.ops.selective_scan import cpu\n"
    "from kan_mamba_layers.ops.selective_scan.cpu import forward_kernel\n"
    "from kan_mamba_layers import selective_scan\n"
    "u, A, B = torch.rand(1, 3, 40), -torch.rand(3, 2), torch.rand(1, 2, 40)\n"
    "out, expected = (selective_scan(u, u, A, B, B, backend=b) for b in ('cpu', 'reference'))\n"
    "code = c_function(forward_kernel.entry, torch.float32, cpu._KERNELS).code\n"
    "print(torch.allclose(out, expected, atol=1e-5), getattr(code, 'cache_hits', None))\n"
)


def test_code_is_kept_on_disk(tmp_path: Path) -> None:
    assert fresh_process(CODE, NUMBA_CACHE_DIR=str(tmp_path)) == "True 0"
    assert list(tmp_path.rglob("*.nbc"))
    assert fresh_process(CODE, NUMBA_CACHE_DIR=str(tmp_path)) == "True 1"


def test_no_folder_to_keep_it_in() -> None:
    nowhere = (
        "import numba.core.caching as caching\n"
        "def refuse(self):\n"
        "    raise PermissionError('read-only')\n"
        "caching._CacheLocator.ensure_cache_path = refuse\n"
    )
    assert fresh_process(nowhere + CODE) == "True 0"
