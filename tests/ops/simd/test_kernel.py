"""Kernels see the block of a call by names, share out its tasks, and are kept on disk as machine code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import fresh_process

pytest.importorskip("numba")
from kan_mamba_layers.ops.simd import kernel, vector

LAYOUT = kernel.Layout(numbers=("count", "scale"), arrays=("source", "missing", "total"))


def scaled(digest):
    def run(call):
        if digest >= 0:
            task = kernel.next_task(call)
            while task < call.tasks:
                for i in range(task, call.count, call.tasks):
                    known = 0.0 if vector.is_present(call.missing) else 1.0
                    vector.write(call.total, i, vector.read(call.source, i) * call.scale + known)
                task = kernel.next_task(call)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_fields_by_name(dtype: torch.dtype, tasks: int) -> None:
    """Numbers and arrays reach the kernel under their names, in any order; an array that is not given is 0."""
    source, total = torch.randint(-99, 99, (23,)).to(dtype), torch.zeros(23, dtype=dtype)
    function = kernel.c_function(scaled, LAYOUT, dtype, ())
    fields = {"total": total, "scale": 3, "source": source, "count": 20}
    kernel.run_kernel(function, LAYOUT, fields, tasks, 16, dtype)
    assert torch.equal(total[:20], source[:20] * 3 + 1) and not total[20:].any()


def test_unknown_field() -> None:
    with pytest.raises(KeyError, match="no weight"):
        kernel.run_kernel(lambda block: None, LAYOUT, {"weight": 1}, 1, 0, torch.float32)


CODE = (
    "import torch\n"
    "from kan_mamba_layers.ops.simd.kernel import c_function\n"
    "from kan_mamba_layers.ops.selective_scan import cpu\n"
    "from kan_mamba_layers.ops.selective_scan.cpu import block, forward_kernel\n"
    "from kan_mamba_layers import selective_scan\n"
    "u, A, B = torch.rand(1, 3, 40), -torch.rand(3, 2), torch.rand(1, 2, 40)\n"
    "out, expected = (selective_scan(u, u, A, B, B, backend=b) for b in ('cpu', 'reference'))\n"
    "code = c_function(forward_kernel.entry, block.LAYOUT, torch.float32, cpu._KERNELS).code\n"
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


def test_numba_without_its_compiler() -> None:
    code = (
        "import torch\n"
        "from kan_mamba_layers import selective_scan\n"
        "u, A, B = torch.rand(1, 3, 40), -torch.rand(3, 2), torch.rand(1, 2, 40)\n"
        "try:\n"
        "    selective_scan(u, u, A, B, B)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    said = fresh_process(code, NUMBA_DISABLE_JIT="1")
    assert "'cpu' needs numba" in said and "NUMBA_DISABLE_JIT turns its compiler off" in said


def test_what_is_kept_is_outdated_or_damaged(tmp_path: Path) -> None:
    """An index that names a type by another name, or is no index at all, raises many kinds of errors."""
    assert fresh_process(CODE, NUMBA_CACHE_DIR=str(tmp_path)) == "True 0"
    indices = list(tmp_path.rglob("*.nbi"))
    kept = [index.read_bytes() for index in indices]
    assert any(b"Call" in content for content in kept)
    for index, content in zip(indices, kept, strict=True):
        index.write_bytes(content.replace(b"Call", b"Gone"))
    assert fresh_process(CODE, NUMBA_CACHE_DIR=str(tmp_path)) == "True 0"


def test_an_address_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="a kernel for CPUs got a tensor on meta; move all of them"):
        kernel._address(torch.empty(1, device="meta"))
