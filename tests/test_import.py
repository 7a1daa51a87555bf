"""What importing the package does and does not load, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "triton",
    "numba",
    "lightning",
    "pytorch_lightning",
    "monai",
    "safetensors",
    "scipy",
    "matplotlib",
    "jsonargparse",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that sees this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def test_importing_loads_no_optional_dependency() -> None:
    result = run(f"import sys, kan_mamba_layers\nprint([name for name in {OPTIONAL} if name in sys.modules])\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_importing_is_silent() -> None:
    result = run("import kan_mamba_layers")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_works_where_no_optional_dependency_can_be_imported() -> None:
    result = run(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import torch, kan_mamba_layers as kml\n"
        "for name in ('km_unet_tiny', 'km_unet_pp_tiny', 'u_kan_tiny'):\n"
        "    kml.create_model(name)(torch.randn(2, 3, 32, 32)).sum().backward()\n"
        "layer = kml.KANLinear(4, 3)\n"
        "layer.update_grid(torch.randn(20, 4))\n"
        "try:\n"
        "    kml.create_model('u_kan_tiny').save_pretrained(sys.argv[0] or 'never-written')\n"
        "except ImportError as error:\n"
        "    print('safetensors' in str(error))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


def test_importing_changes_no_global_state() -> None:
    result = run(
        "import random, torch, torch.utils.checkpoint, warnings\n"  # PyTorch 2.4 imports SymPy there
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),\n"
        "            random.getstate(), tuple(warnings.filters))\n"
        "before = state()\n"
        "import kan_mamba_layers\n"
        "print(before == state())\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


@pytest.mark.parametrize(
    "module", ["ops", "layers", "models", "ops.backend", "layers.kan", "models.levels", "models.vmamba", "compat"]
)
def test_every_part_can_be_imported_first(module: str) -> None:
    result = run(f"import kan_mamba_layers.{module}")
    assert result.returncode == 0, result.stderr
