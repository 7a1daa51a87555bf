"""Installing and removing the stand-ins, and asking them for what they lack."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from stand_ins import EXTENSIONS, TOP, function, python, without_originals

from helpers import says
from kan_mamba_layers import compat

INNER = ["mamba_inner_fn", "bimamba_inner_fn"]
CONVOLUTION = ["causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"]
NORMS, STEP = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"], ["selective_state_update"]
SSD = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]
CONVOLUTIONS = ["causal_conv1d_fn", "causal_conv1d_update"]
FUNCTIONS = {
    "mamba_ssm": ["Mamba", "Mamba2", "selective_scan_fn", *INNER],
    "mamba_ssm.modules.block": ["Block"],
    "mamba_ssm.modules.mlp": ["GatedMLP"],
    "mamba_ssm.modules.mamba_simple": [
        *("Mamba", "Block", "selective_scan_fn", "mamba_inner_fn"),
        *(*CONVOLUTIONS, *NORMS, *STEP),
    ],
    "mamba_ssm.modules.mamba2": [
        *("Mamba2", "RMSNormGated", "causal_conv1d_varlen_states"),
        *(*CONVOLUTIONS, *SSD, *STEP),
    ],
    "mamba_ssm.modules.mamba2_simple": ["Mamba2Simple"],
    "mamba_ssm.models.mixer_seq_simple": ["_init_weights", "create_block", "Block", "Mamba", "RMSNorm"],
    "mamba_ssm.ops.selective_scan_interface": [
        "selective_scan_fn",
        "selective_scan_ref",
        "mamba_inner_fn_no_out_proj",
        *INNER,
    ],
    "mamba_ssm.ops.triton.layer_norm": [*NORMS, "_layer_norm_fwd"],
    "mamba_ssm.ops.triton.layernorm": NORMS,
    "mamba_ssm.ops.triton.layernorm_gated": ["LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"],
    "mamba_ssm.ops.triton.ssd_combined": SSD,
    "mamba_ssm.ops.triton.selective_state_update": STEP,
    "mamba_ssm.utils.generation": ["GenerationMixin", "InferenceParams"],
    "mamba_ssm.utils.hf": ["load_config_hf", "load_state_dict_hf"],
    "causal_conv1d": [*CONVOLUTIONS, "causal_conv1d_varlen_states"],
    "causal_conv1d.causal_conv1d_interface": CONVOLUTIONS,
    "causal_conv1d.causal_conv1d_varlen": ["causal_conv1d_varlen_states"],
    "causal_conv1d.cpp_functions": [f"{name}_function" for name in CONVOLUTION],
    "causal_conv1d_cuda": CONVOLUTION,
    "csm_triton": ["cross_scan_fn", "cross_merge_fn", "getCSM"],
    "selective_scan": ["selective_scan_fn", "selective_scan_ref"],
    **{name: ["fwd", "bwd"] for name in (*EXTENSIONS, "selective_scan_cuda_oflex_rh", "v2dmamba_scan")},
}
# What the sources of mamba_ssm, from version 1.0 to 2.3, import of the files that have stand-ins.
IMPORTS = (
    "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states",
    *(f"from causal_conv1d.cpp_functions import {name}_function" for name in CONVOLUTION),
    "from causal_conv1d import causal_conv1d_fn, causal_conv1d_update",
    "from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn",
    "from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn",
    "from mamba_ssm.ops.triton.layer_norm import _layer_norm_fwd",
    "from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated, LayerNorm",
    "from mamba_ssm.ops.triton.selective_state_update import selective_state_update",
    "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined",
    "import causal_conv1d_cuda, selective_scan_cuda",
)
pytestmark = without_originals


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `mamba_ssm` of a repository, with files in Triton."""
    for folder in ("mamba_ssm", "mamba_ssm/modules", "mamba_ssm/ops", "mamba_ssm/ops/triton"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    for name in ("layernorm", "another"):
        (tmp_path / f"mamba_ssm/ops/triton/{name}.py").write_text("kernel = True")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mamba_ssm"
    compat.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


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

    def test_yields_to_a_file_of_the_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "csm_triton.py").write_text("theirs = True")
        monkeypatch.syspath_prepend(tmp_path)
        compat.install()
        try:
            assert "csm_triton" not in sys.modules and importlib.import_module("csm_triton").theirs
        finally:
            compat.uninstall()
            del sys.modules["csm_triton"]

    def test_shadows_an_installation_by_force(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mamba_ssm" / "modules").mkdir(parents=True)
        for file in ("mamba_ssm/__init__.py", "mamba_ssm/modules/__init__.py"):
            (tmp_path / file).write_text("theirs = True")
        monkeypatch.syspath_prepend(tmp_path)
        assert importlib.import_module("mamba_ssm.modules").theirs
        compat.install(force=True)
        assert function("mamba_ssm").__module__ == "kan_mamba_layers.compat.functions"
        with pytest.raises(ImportError, match=says("stand-in", "mamba_ssm")):
            exec("from mamba_ssm import theirs", {})
        compat.uninstall()
        assert importlib.import_module("mamba_ssm").theirs
        del sys.modules["mamba_ssm"]

    def test_shadows_a_file_of_a_package_by_force(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """VMamba imports `models.csm_triton`, whose kernels need a GPU."""
        (tmp_path / "their_models").mkdir()
        (tmp_path / "their_models" / "__init__.py").write_text("from .csm_triton import *")
        (tmp_path / "their_models" / "csm_triton.py").write_text("theirs = True")
        monkeypatch.syspath_prepend(tmp_path)
        name = "their_models.csm_triton"
        for force in (False, True, False):
            compat.install(force=force)
            module = importlib.import_module(name)
            assert hasattr(module, "theirs") is not force and hasattr(module, "cross_scan_fn") is force
            if force:
                with pytest.raises(AttributeError, match=says("stand-in", "csm_triton", "cross_merge_fn")):
                    _ = module.another
            compat.uninstall()
            assert (name in sys.modules) is not force
            sys.modules.pop("their_models", None)
            sys.modules.pop(name, None)

    def test_a_package_hands_out_the_file_in_force(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "their_models").mkdir()
        (tmp_path / "their_models" / "__init__.py").write_text("")
        (tmp_path / "their_models" / "csm_triton.py").write_text("theirs = True")
        monkeypatch.syspath_prepend(tmp_path)
        found: dict = {}
        for force in (False, True, False):
            if force:
                compat.install(force=True)
            else:
                compat.uninstall()
            exec("from their_models import csm_triton", found)
            assert hasattr(found["csm_triton"], "cross_scan_fn") is force
        for name in ("their_models", "their_models.csm_triton"):
            del sys.modules[name]

    @pytest.mark.parametrize("force", [False, True])
    def test_keeps_a_mamba_ssm_without_its_kernels(self, force: bool, fork: Path) -> None:
        simple = "import selective_scan_cuda, causal_conv1d_cuda\nfrom mamba_ssm.ops.triton.layernorm import RMSNorm\n"
        (fork / "modules/mamba_simple.py").write_text(simple + "class Mamba:\n    theirs = True")
        with pytest.raises(ImportError, match=says("mamba_ssm", "keep=True")):
            compat.install()
        for _ in range(2):
            compat.install(keep=True, force=force)
        simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
        assert simple.Mamba.theirs
        assert simple.RMSNorm.__module__ == "kan_mamba_layers.compat.normalization"
        assert "Stand-in" in simple.selective_scan_cuda.__doc__ and callable(
            simple.causal_conv1d_cuda.causal_conv1d_fwd
        )
        assert importlib.import_module("mamba_ssm.ops.triton.another").kernel
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.models")
        with pytest.raises(ImportError, match=says("stand-in", "layernorm", "which has RMSNorm")):
            exec("from mamba_ssm.ops.triton.layernorm import layer_norm_ref", {})
        compat.uninstall()
        assert set(TOP) & set(sys.modules) == {"mamba_ssm"}
        kept = importlib.import_module("mamba_ssm.ops.triton.layernorm")
        assert kept.kernel and importlib.import_module("mamba_ssm.ops.triton").layernorm is kept

    @pytest.mark.parametrize("line", IMPORTS)
    def test_a_kept_mamba_ssm_finds_what_it_imports(self, line: str, fork: Path) -> None:
        (fork / "modules/mamba2.py").write_text(line)
        compat.install(keep=True)
        assert "mamba_ssm" not in sys.modules
        importlib.import_module("mamba_ssm.modules.mamba2")

    def test_kernels_imported_before_are_replaced_by_force_alone(self, fork: Path) -> None:
        (fork / "modules/mamba_simple.py").write_text("from mamba_ssm.ops.triton import layernorm")
        simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
        assert simple.layernorm.kernel
        with pytest.raises(ImportError, match=says("layernorm", "already imported", "keep=True, force=True")):
            compat.install(keep=True)
        for _ in range(2):
            compat.install(keep=True, force=True)
            made: dict = {}
            exec("from mamba_ssm.ops.triton import layernorm", made)
            assert callable(made["layernorm"].rms_norm_fn)
            assert sys.modules["mamba_ssm.modules.mamba_simple"] is simple

    def test_keep_is_refused_after_the_package_was_replaced(self, fork: Path) -> None:
        compat.install(force=True)
        with pytest.raises(ImportError, match=says("keep=True", "call uninstall")):
            compat.install(keep=True)
        compat.uninstall()
        compat.install(keep=True)
        assert str(fork) in importlib.import_module("mamba_ssm").__file__

    def test_force_after_keep_replaces_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mamba_ssm").mkdir()
        (tmp_path / "mamba_ssm" / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        compat.install(keep=True)
        compat.install(force=True)
        assert function("mamba_ssm").__module__ == "kan_mamba_layers.compat.functions"
        compat.uninstall()

    def test_there_are_all_stand_ins_where_nothing_is_to_be_kept(self) -> None:
        compat.install(keep=True)
        assert function("mamba_ssm").__module__ == "kan_mamba_layers.compat.functions"
        compat.uninstall()

    def test_a_second_call_leaves_what_was_put_in_a_place_since(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compat.install()
        try:
            theirs = ModuleType("mamba_ssm.modules.mamba_simple")
            monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
            compat.install()
            assert sys.modules[theirs.__name__] is theirs
        finally:
            compat.uninstall()

    def test_a_folder_of_sources_is_no_installation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "selective_scan" / "csrc").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        compat.install()
        assert function("selective_scan").__module__ == "kan_mamba_layers.compat.functions"
        compat.uninstall()


@pytest.mark.usefixtures("stand_ins")
class TestWhatIsMissing:
    @pytest.mark.parametrize(
        ("statement", "present"),
        [
            ("from mamba_ssm import Mamba3", "selective_scan_fn"),
            ("from mamba_ssm.modules.mamba3 import Mamba3", "mamba_simple"),
            ("import mamba_ssm.ops.triton.ssd_bmm", "layer_norm"),
            ("from mamba_ssm.ops.selective_scan_interface import rms_norm_forward", "selective_scan_ref"),
            ("from causal_conv1d import causal_conv1d_ref", "causal_conv1d_fn"),
            ("from selective_scan_cuda_core import backward", "bwd"),
        ],
    )
    def test_import_says_what_there_is(self, statement: str, present: str) -> None:
        with pytest.raises(ImportError, match=says("stand-in", "which has", present)):
            exec(statement, {})

    def test_attribute_says_what_there_is(self) -> None:
        module = importlib.import_module("mamba_ssm")
        assert not hasattr(module, "Mamba3")
        with pytest.raises(AttributeError, match=says("'Mamba3'", "Mamba, Mamba2, selective", "modules, models, ops")):
            _ = module.Mamba3

    def test_language_models_are_refused_by_name(self) -> None:
        with pytest.raises(NotImplementedError, match=says("load_config_hf", "language models")):
            function("mamba_ssm.utils.hf", "load_config_hf")("state-spaces/mamba-130m")
        with pytest.raises(NotImplementedError, match=says("generate", "language models")):
            function("mamba_ssm.utils.generation", "GenerationMixin")().generate()
