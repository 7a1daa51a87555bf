"""Who may import whom, read from the source: examples -> public names; models -> layers -> ops -> walks -> _check."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kan_mamba_layers"
STOREYS = ("_check", "walks", "ops", "layers", "models")  # each may use itself and what stands before it
BACKENDS = ("reference", "chunked", "cpu", "triton")  # files or folders of an op
CORE = {"torch", "numpy", "einops"}
# Modules that are imported when a backend is first used, and what they may import besides.
COMPILED = {"cpu": {"numba", "llvmlite"}, "simd": {"numba", "llvmlite"}, "triton": {"triton"}}
MAX_LINES = 400
# The files outside the package that may reach into it, and how far: checks and searches beneath the public ops start at
# the launchers, and the limit of the machine has the exponential of the kernels.
INNER_DOORS = {
    ROOT / "benchmarks" / "gpu" / "launchers.py": f"{PACKAGE}.ops",
    ROOT / "benchmarks" / "limit.py": f"{PACKAGE}.ops.simd.vector",
}
# What a module of the examples may import of theirs, by the first of these that its dotted name begins with.
FORMATS = "segmentation.data.formats."
INNER = {
    FORMATS: tuple(f"segmentation.{name}." for name in ("tasks", "data.item", "data.pixels", "data.ellipse"))
    + tuple(f"{FORMATS}{name}." for name in ("files", "voxels")),
    "segmentation.data.": ("segmentation.data.", "segmentation.tasks.", "segmentation.runs."),
    "segmentation.tasks.": (),
    "segmentation.runs.": (),
}
EXAMPLE_FLOORS = 5  # modules in the longest chain of imports, from a script down to one that imports no other


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module with its line; `from a import b` counts as `a.b` too where b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or ""), node.lineno
            else:
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def storey(module: str) -> int:
    """Where `kan_mamba_layers.<storey>...` stands; the package's own __init__ stands on top."""
    part = module.split(".")[1] if "." in module else ""
    return STOREYS.index(part) if part in STOREYS else len(STOREYS)


def family(module: str, names: Collection[str] = BACKENDS) -> str | None:
    """The backend that a module of the package belongs to."""
    package, *parts = module.split(".")
    return next((part for part in parts if package == PACKAGE and part in names), None)


def violations(name: str, source: str) -> list[str]:
    """What the module `name` of the package (dotted, without __init__) must not do, one line each."""
    found = []
    tree = ast.parse(source)
    parts = name.split(".")
    at_top = {id(node) for node in tree.body}
    lines_at_top = {node.lineno for node in tree.body}
    backend = family(name, COMPILED)
    for target, line in imports(tree):
        if family(target, COMPILED) and backend is None and line in lines_at_top:
            found.append(f"{name}:{line} imports the compiled backend {target} at its top")
    for target, line in imports(tree):
        if target.startswith("."):
            found.append(f"{name}:{line} relative import {target}")
        if target.split(".")[0] != PACKAGE:
            continue
        if storey(target) > storey(name):
            found.append(f"{name}:{line} imports {target} from a storey above")
        steps = target.split(".")
        same_op = len(parts) > 2 and steps[:3] == parts[:3]
        if family(target) and not (same_op and family(name) in (None, family(target))):
            found.append(f"{name}:{line} imports the backend {target}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"{name}:{node.lineno} bare assert")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{name}:{node.lineno} print")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            found.append(f"{name}:{node.lineno} environment variable")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) in at_top:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            allowed = CORE | COMPILED.get(backend or "", set()) | {PACKAGE}
            for top in {n.split(".")[0] for n in names} - allowed - sys.stdlib_module_names:
                found.append(f"{name}:{node.lineno} imports {top} at its top; only torch, numpy and einops may be")
    return found


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of the given modules each of them imports, at its top, inside a function or for types alone."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        graph[name] = set()
        for target, _ in imports(ast.parse(source)):
            module = target if target in sources else target.rpartition(".")[0]
            graph[name] |= {module} & sources.keys()
    return graph


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=dotted)
def test_module_of_the_package(path: Path) -> None:
    source = path.read_text()
    assert violations(dotted(path), source) == []
    assert len(source.splitlines()) <= MAX_LINES
    assert path.stem not in ("utils", "common", "helpers", "misc")


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph({dotted(path): path.read_text() for path in modules(PACKAGE)})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", modules("examples") + modules("benchmarks"), ids=dotted)
def test_examples_and_benchmarks_use_public_names_only(path: Path) -> None:
    import kan_mamba_layers

    tree = ast.parse(path.read_text())
    public = set(kan_mamba_layers.__all__)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"bare assert in line {node.lineno}"
        if isinstance(node, ast.Import):
            deep = [a.name for a in node.names if a.name.startswith(f"{PACKAGE}.")]
            assert not deep, f"line {node.lineno} imports {deep}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            if path in INNER_DOORS and f"{node.module}.".startswith(f"{INNER_DOORS[path]}."):
                continue
            assert node.module == PACKAGE, f"line {node.lineno} imports from {node.module}"
            assert {a.name for a in node.names} <= public
    assert len(path.read_text().splitlines()) <= MAX_LINES


def example_name(path: Path) -> str:
    """The dotted name by which examples import each other."""
    return dotted(path).removeprefix("examples.")


def may_import(name: str, target: str) -> bool:
    """Whether the module `name` of the examples may import their module `target`."""
    if "." not in target and target != "segmentation":
        return False  # a script
    rule = next((rule for rule in INNER if f"{name}.".startswith(rule)), None)
    return rule is None or any(f"{target}.".startswith(allowed) for allowed in INNER[rule])


def test_examples_import_downwards() -> None:
    graph = import_graph({example_name(path): path.read_text() for path in modules("examples")})
    assert [(name, target) for name, found in graph.items() for target in found if not may_import(name, target)] == []
    floors: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floors[name] = 1 + max((floors[target] for target in graph.get(name, ())), default=0)
    assert max(floors.values()) <= EXAMPLE_FLOORS


def test_no_two_examples_share_a_name() -> None:
    names = Counter(path.stem for path in modules("examples"))
    assert {name for name, count in names.items() if count > 1} == {"__init__"}


def test_no_two_test_files_share_a_name() -> None:
    """Outside of packages pytest imports them by their names alone."""
    names = Counter(
        path.name for path in (ROOT / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()
    )
    assert not [name for name, count in names.items() if count > 1]


def bare_imports(source: str, names: Collection[str]) -> list[str]:
    """Imports of a script of `benchmarks` without its package: they would find, or be taken for, another's module."""
    tops = ((target.split(".")[0], line) for target, line in imports(ast.parse(source)))
    return [f"line {line} imports {top}" for top, line in tops if top in names or not top]


@pytest.mark.parametrize("path", modules("benchmarks") + modules("tests/benchmarks"), ids=dotted)
def test_benchmarks_import_each_other_by_their_package(path: Path) -> None:
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("*.py")} | {"gpu"}
    assert "run" in scripts
    assert bare_imports(path.read_text(), scripts - sys.stdlib_module_names) == []


def test_there_is_something_to_check() -> None:
    assert len(modules(PACKAGE)) > 15 and len(modules("examples")) > 0


class TestTheCheckItself:
    @pytest.mark.parametrize(
        ("name", "source", "complaint"),
        [
            ("kan_mamba_layers.ops.x", "from kan_mamba_layers.layers import EMA", "storey above"),
            ("kan_mamba_layers.layers.x", "import kan_mamba_layers.models.km_unet", "storey above"),
            ("kan_mamba_layers.layers.x", "from kan_mamba_layers import SS2D", "storey above"),
            ("kan_mamba_layers._check", "def f():\n    from kan_mamba_layers.ops import resolve", "storey above"),
            ("kan_mamba_layers.layers.x", "from kan_mamba_layers.ops.kan_linear import reference", "backend"),
            ("kan_mamba_layers.ops.a.cpu", "from kan_mamba_layers.ops.a.reference import scan", "backend"),
            ("kan_mamba_layers.ops.a.cpu", "from kan_mamba_layers.ops.a import triton", "backend"),
            ("kan_mamba_layers.ops.b.x", "from kan_mamba_layers.ops.a import chunked", "backend"),
            ("kan_mamba_layers.ops.a.cpu.kernel", "from kan_mamba_layers.ops.a.triton import kernel", "backend"),
            ("kan_mamba_layers.ops.a", "from kan_mamba_layers.ops.a import cpu", "compiled backend"),
            ("kan_mamba_layers.ops.a", "from kan_mamba_layers.ops.simd.vector import load", "compiled backend"),
            ("kan_mamba_layers.ops.a.cpu", "import triton", "triton at its top"),
            ("kan_mamba_layers.ops.x", "from . import y", "relative"),
            ("kan_mamba_layers.ops.x", "import triton", "triton at its top"),
            ("kan_mamba_layers.ops.x", "from numba import njit", "numba at its top"),
            ("kan_mamba_layers.layers.x", "assert 1", "assert"),
            ("kan_mamba_layers.layers.x", "print(1)", "print"),
            ("kan_mamba_layers.ops.x", "import os\nos.environ['A']", "environment"),
        ],
    )
    def test_planted_violation_is_found(self, name: str, source: str, complaint: str) -> None:
        assert any(complaint in line for line in violations(name, source))

    @pytest.mark.parametrize("back", ["import p.a", "from p.a import f", "def f():\n    from p import a"])
    def test_planted_circle_is_found(self, back: str) -> None:
        sources = {"p.a": "from p.b import g", "p.b": "from p.c import h", "p.c": back}
        with pytest.raises(CycleError):
            TopologicalSorter(import_graph(sources)).prepare()
        TopologicalSorter(import_graph({**sources, "p.c": "from p import d"})).prepare()

    @pytest.mark.parametrize(
        ("name", "target", "allowed"),
        [
            (f"{FORMATS}hc18", f"{FORMATS}files", True),
            (f"{FORMATS}hc18", f"{FORMATS}busi", False),
            (f"{FORMATS}hc18", "segmentation.data.split", False),
            ("segmentation.data.datamodule", f"{FORMATS}busi", True),
            ("segmentation.data.datamodule", "segmentation.networks", False),
            ("segmentation.module", "segmentation.networks", True),
            ("segmentation.tasks", "segmentation.data.item", False),
            ("segmentation.module", "quickstart", False),
        ],
    )
    def test_what_examples_may_import(self, name: str, target: str, allowed: bool) -> None:
        assert may_import(name, target) == allowed

    @pytest.mark.parametrize("source", ["import run", "def f():\n    from gpu.x import y", "from . import run"])
    def test_planted_bare_import_is_found(self, source: str) -> None:
        assert bare_imports(source, {"run", "gpu"})
        assert not bare_imports("from benchmarks import run\nfrom benchmarks.gpu.x import y", {"run", "gpu"})

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("kan_mamba_layers.ops.a", "from kan_mamba_layers.ops.a import chunked, reference"),
            ("kan_mamba_layers.ops.a.library", "def f():\n    from kan_mamba_layers.ops.a import cpu"),
            ("kan_mamba_layers.ops.a.cpu", "import numba\nfrom kan_mamba_layers.ops.a.cpu import kernel"),
            ("kan_mamba_layers.ops.a.triton", "import triton.language as tl"),
            ("kan_mamba_layers.models.x", "from kan_mamba_layers.layers import EMA"),
            ("kan_mamba_layers.models.x", "def f():\n    import safetensors"),
            ("kan_mamba_layers.ops.x", "import math\nimport torch.nn.functional as F\nimport numpy"),
            ("kan_mamba_layers", "from kan_mamba_layers.models import KMUNet"),
        ],
    )
    def test_good_import_passes(self, name: str, source: str) -> None:
        assert violations(name, source) == []
