"""The stand-ins for mamba_ssm and its relatives: importing them, code that uses them, the command line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close, largest, says
from kan_mamba_layers import compat

ROOT = Path(__file__).resolve().parents[1]
TOP = ("mamba_ssm", "selective_scan", "selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")
FUNCTIONS = {
    "mamba_ssm": ["selective_scan_fn"],
    "mamba_ssm.ops.selective_scan_interface": ["selective_scan_fn", "selective_scan_ref"],
    "selective_scan": ["selective_scan_fn", "selective_scan_ref"],
    **{name: ["fwd", "bwd"] for name in TOP[2:]},
}
REAL = [name for name in TOP if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(REAL), reason=f"the real {REAL} are installed; nothing stands in for them")


@pytest.fixture
def stand_ins() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


def function(module: str, name: str = "selective_scan_fn") -> Callable:
    return getattr(importlib.import_module(module), name)


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter that sees this checkout and, apart from that, starts as a user's does."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


class TestInstalling:
    def test_before_during_and_after(self) -> None:
        assert [name for name in TOP if importlib.util.find_spec(name)] == []
        compat.install()
        try:
            for module, names in FUNCTIONS.items():
                made = importlib.import_module(module)
                assert importlib.util.find_spec(module) is made.__spec__
                assert made.__version__ and "Stand-in" in made.__doc__
                assert all(callable(getattr(made, name)) for name in names)
            modules = [sys.modules[name] for name in FUNCTIONS]
            compat.install()
            assert modules == [sys.modules[name] for name in FUNCTIONS]
            assert len([finder for finder in sys.meta_path if finder is made.__spec__.loader]) == 1
        finally:
            compat.uninstall()
        assert [name for name in sys.modules if name.split(".")[0] in TOP] == []
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm")
        compat.uninstall()

    def test_nothing_happens_without_the_call(self, tmp_path: Path) -> None:
        code = (
            "import sys, importlib.util, kan_mamba_layers\n"
            "print('kan_mamba_layers.compat' in sys.modules)\n"
            "before = list(sys.meta_path)\n"
            "import kan_mamba_layers.compat\n"
            f"print(before == sys.meta_path, [n for n in {TOP} if importlib.util.find_spec(n)])\n"
        )
        result = python("-c", code, cwd=tmp_path)
        assert (result.stdout.split("\n")[:2], result.stderr) == (["False", "True []"], "")

    @pytest.mark.parametrize("name", TOP)
    @pytest.mark.parametrize("form", ["package", "file"])
    def test_does_not_shadow_an_installation(
        self, name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / name / "__init__.py" if form == "package" else tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match=says(name, path.name, "uninstall")):
            compat.install()
        assert not set(TOP) & set(sys.modules)

    def test_does_not_replace_an_imported_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = ModuleType("selective_scan")
        monkeypatch.setitem(sys.modules, "selective_scan", theirs)
        with pytest.raises(ImportError, match=says("selective_scan", "already imported")):
            compat.install()
        compat.uninstall()
        assert sys.modules["selective_scan"] is theirs

    def test_a_folder_of_sources_is_no_installation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "selective_scan" / "csrc").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        compat.install()
        assert function("selective_scan").__module__ == "kan_mamba_layers.compat"
        compat.uninstall()


@pytest.mark.usefixtures("stand_ins")
class TestWhatIsMissing:
    @pytest.mark.parametrize(
        ("statement", "present"),
        [
            ("from mamba_ssm import Mamba", "selective_scan_fn"),
            ("from mamba_ssm.modules.mamba_simple import Mamba", "ops"),
            ("import mamba_ssm.ops.triton.layer_norm", "selective_scan_interface"),
            ("from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn", "selective_scan_ref"),
            ("from selective_scan_cuda_core import backward", "bwd"),
        ],
    )
    def test_import_says_what_there_is(self, statement: str, present: str) -> None:
        with pytest.raises(ImportError, match=says("stand-in", "which has", present)):
            exec(statement, {})

    def test_attribute_says_what_there_is(self) -> None:
        module = importlib.import_module("mamba_ssm")
        assert not hasattr(module, "Mamba")
        with pytest.raises(AttributeError, match=says("'Mamba'", "selective_scan_fn, ops")):
            _ = module.Mamba


# Code that is not ours, in its own file

BLOCKS = """
import torch
import torch.nn.functional as F
from torch import nn

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from selective_scan import selective_scan_fn as selective_scan_fn_v1
except ImportError:
    pass

SPLIT = [2, 4, 4]  # rank, states, states


class Mamba(nn.Module):
    def __init__(self, dim=8, inner=16):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj = nn.Linear(inner, sum(SPLIT), bias=False)
        self.dt_proj = nn.Linear(SPLIT[0], inner)
        self.A_log = nn.Parameter(torch.arange(1.0, SPLIT[1] + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, tokens):  # b l dim
        x, z = self.in_proj(tokens).mT.chunk(2, 1)
        x = F.silu(self.conv(x)[..., : tokens.shape[1]])
        low, B, C = self.x_proj(x.mT).split(SPLIT, -1)
        y, last = selective_scan_fn(
            x, (low @ self.dt_proj.weight.T).mT, -self.A_log.exp(), B.mT, C.mT, self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True, return_last_state=True,
        )
        return self.out_proj(y.mT) + last.mean()


class SS2D(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.x_proj = nn.Parameter(torch.randn(4, sum(SPLIT), dim) * dim**-0.5)
        self.dt_proj = nn.Parameter(torch.randn(4, dim, SPLIT[0]))
        self.dt_bias = nn.Parameter(torch.randn(4, dim))
        self.A_logs = nn.Parameter(torch.rand(4 * dim, SPLIT[1]))
        self.Ds = nn.Parameter(torch.ones(4 * dim))

    def forward(self, x):  # b dim h w
        b, d, h, w = x.shape
        walks = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
        xs = torch.cat([walks, walks.flip(-1)], 1)  # b k d l
        low, B, C = (self.x_proj @ xs).split(SPLIT, 2)
        y = selective_scan_fn_v1(
            xs.flatten(1, 2), (self.dt_proj @ low).flatten(1, 2), -self.A_logs.exp(), B, C, self.Ds,
            delta_bias=self.dt_bias.flatten(), delta_softplus=True,
        ).view(b, 4, d, h * w)
        y = y[:, :2] + y[:, 2:].flip(-1)
        return y[:, 0].view(b, d, h, w) + y[:, 1].view(b, d, w, h).mT
"""


def textbook(u, delta, A, B, C, D, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The recurrence as the paper prints it, for B and C of the forms b n l and b g n l."""
    delta = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
    B, C = ((x if x.ndim == 4 else x[:, None]) for x in (B, C))
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))  # b d n l
    state, y = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        y.append((C[..., t] * state).sum(-1) + D * u[:, :, t])
    out = torch.stack(y, 2) if z is None else torch.stack(y, 2) * F.silu(z)
    return (out, state) if return_last_state else out


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("block", "shape"), [("Mamba", (2, 9, 8)), ("SS2D", (2, 6, 4, 5))])
def test_foreign_blocks_run_unedited(
    block: str, shape: tuple, dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_blocks.py").write_text(BLOCKS)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = importlib.import_module("foreign_blocks")
    monkeypatch.delitem(sys.modules, "foreign_blocks")
    model, double = getattr(blocks, block)().to(dtype), getattr(blocks, block)().double()
    double.load_state_dict(model.state_dict())

    def run(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = model(x.requires_grad_())
        return out, list(torch.autograd.grad((out * out.detach().cos()).sum(), [x, *model.parameters()]))

    x = torch.randn(shape, dtype=dtype)
    out, grads = run(model, x)
    monkeypatch.setattr(blocks, "selective_scan_fn", textbook)
    monkeypatch.setattr(blocks, "selective_scan_fn_v1", textbook)
    true, true_grads = run(double, x.detach().double())
    assert_close("out", out, true, tolerance)
    for name, grad, true_grad in zip(["x", *dict(model.named_parameters())], grads, true_grads, strict=True):
        assert largest(true_grad) > 0
        assert_close(f"d{name}", grad, true_grad, tolerance)


# The command line

PROGRAM = """
import sys
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from neighbour import VALUE
print(__name__, VALUE, sys.argv[1:], sys.modules["__main__"].__file__ == __file__)
u = torch.ones(1, 2, 3)
print(selective_scan_fn(u, u, -torch.ones(2, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3)).shape)
if "fail" in sys.argv:
    raise ValueError("planted")
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.py").write_text(PROGRAM)
    (folder / "neighbour.py").write_text("VALUE = 7")
    return folder / "train.py"


class TestCommandLine:
    RUNNER = ("-m", "kan_mamba_layers.compat")

    def test_script(self, program: Path, tmp_path: Path) -> None:
        plain = python(program, cwd=tmp_path)
        assert plain.returncode == 1 and "No module named 'mamba_ssm'" in plain.stderr
        result = python(*self.RUNNER, "repository/train.py", "-m", "--lr", "1", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (3, "")
        assert result.stdout.splitlines() == ["__main__ 7 ['-m', '--lr', '1'] True", "torch.Size([1, 2, 3])"]

    def test_module(self, program: Path) -> None:
        result = python(*self.RUNNER, "-m", "train", "--lr", "1", cwd=program.parent)
        assert (result.returncode, result.stderr) == (3, "")
        assert result.stdout.splitlines() == ["__main__ 7 ['--lr', '1'] True", "torch.Size([1, 2, 3])"]

    def test_traceback(self, program: Path, tmp_path: Path) -> None:
        result = python(*self.RUNNER, program, "fail", cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.endswith("ValueError: planted\n") and f'"{program}", line' in result.stderr

    def test_missing_script(self, tmp_path: Path) -> None:
        result = python(*self.RUNNER, "absent.py", cwd=tmp_path)
        assert result.returncode == 2
        assert "absent.py" in result.stderr and "Traceback" not in result.stderr

    def test_refuses_to_shadow(self, program: Path, tmp_path: Path) -> None:
        (program.parent / "mamba_ssm").mkdir()
        (program.parent / "mamba_ssm" / "__init__.py").write_text("")
        result = python(*self.RUNNER, program, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert "ImportError" in result.stderr and "will not stand in for 'mamba_ssm'" in result.stderr
