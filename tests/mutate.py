"""The mutation check: change one operator, number or statement of a module at a time, and see whether its tests fail.

    python tests/mutate.py --sample 200 --seed 0 --out mutants.json

Each mutant runs in a copy of the tree, in a process forked from one that has already imported PyTorch. It counts as
killed if a test of its module fails or takes too long. Survivors are printed as `file:line: before -> after`; some are
equivalent to the original, which a person has to judge. Needs os.fork.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("kan_mamba_layers", "tests", "examples", "pyproject.toml")
BAD_INPUT = "tests/test_bad_input.py"
KAN, SCAN = "kan_mamba_layers/layers/kan", "kan_mamba_layers/ops/selective_scan"
TARGETS = {
    "kan_mamba_layers/ops/bspline.py": [BAD_INPUT, "tests/ops/test_bspline.py"],
    "kan_mamba_layers/ops/kan_linear/reference.py": [BAD_INPUT, "tests/ops/kan_linear/test_kan_linear.py"],
    "kan_mamba_layers/ops/kan_linear/chunked.py": [BAD_INPUT, "tests/ops/kan_linear/test_kan_linear.py"],
    f"{SCAN}/reference.py": ["tests/ops/selective_scan/test_selective_scan.py"],
    f"{SCAN}/chunked.py": [
        "tests/ops/selective_scan/test_selective_scan.py",
        "tests/ops/selective_scan/test_cross_selective_scan.py",
        "tests/ops/selective_scan/test_fused.py",
    ],
    f"{SCAN}/directions.py": [
        "tests/ops/selective_scan/test_cross_selective_scan.py",
        "tests/ops/selective_scan/test_walks.py",
    ],
    **{
        f"{KAN}/{name}.py": [BAD_INPUT, "tests/layers/kan"]
        for name in ("base", "grid", "refit", "state", "activation", "edges", "linear", "conv", "block")
    },
    **{
        f"kan_mamba_layers/walks/{name}.py": [
            BAD_INPUT,
            "tests/test_walk_orders.py",
            "tests/ops/selective_scan/test_walks.py",
        ]
        for name in ("walk", "keys", "hilbert")
    },
    "kan_mamba_layers/layers/vss.py": [BAD_INPUT, "tests/layers/test_vss.py"],
    "kan_mamba_layers/layers/grid_scan.py": [
        BAD_INPUT,
        "tests/layers/test_ss2d.py",
        "tests/layers/test_grid_scan.py",
    ],
    "kan_mamba_layers/layers/mamba.py": [BAD_INPUT, "tests/layers/test_mamba.py"],
    "kan_mamba_layers/layers/module.py": [BAD_INPUT, "tests/layers/test_layer.py"],
    "kan_mamba_layers/layers/ema.py": [BAD_INPUT, "tests/layers/test_ema.py"],
    "kan_mamba_layers/layers/drop_path.py": ["tests/layers/test_drop_path.py"],
    "kan_mamba_layers/explain.py": [BAD_INPUT, "tests/test_explain.py"],
    "examples/segmentation/data/split.py": ["tests/examples/data"],
}
SWAPS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}
PRELOADED = ("hypothesis", "numba", "scipy.stats", "torch")  # once, for all forks
LONGEST = 600.0  # seconds of a mutant's tests


class Mutant(NamedTuple):
    """A changed module: what changed, and its whole new source."""

    file: str
    line: int
    change: str
    source: str


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    skipped = {id(child) for node in ast.walk(tree) for part in _unmutated(node) for child in ast.walk(part)}
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in skipped or not (change := _changed(node)):
            continue
        mutated = copy.deepcopy(tree)
        target = next(n for i, n in enumerate(ast.walk(mutated)) if i == index)
        vars(target).update(vars(change))
        target.__class__ = change.__class__
        text = f"{ast.unparse(node)} -> {ast.unparse(change)}"
        yield Mutant(file, getattr(node, "lineno", 0), text, ast.unparse(ast.fix_missing_locations(mutated)))


def _unmutated(node: ast.AST) -> list[ast.AST]:
    """The parts that no test should pin: annotations, messages, imports, and what only a type checker runs."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)):
        return [node]
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return [node]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation] if node.value else [node]
    annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [part for part in annotations if part is not None]


def _changed(node: ast.AST) -> ast.AST | None:
    """The node's mutant, or None if it has none."""
    new = copy.deepcopy(node)
    if isinstance(new, (ast.BinOp, ast.BoolOp)) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()
    elif isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.USub, ast.Not)):
        return new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        new.value = not new.value
    elif isinstance(new, ast.Constant) and isinstance(new.value, (int, float)):
        new.value = new.value + 1
    elif isinstance(new, (ast.If, ast.IfExp)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
    elif isinstance(new, ast.Expr) and isinstance(new.value, ast.Call):
        return ast.Pass()
    else:
        return None
    return new


def run_tests(tree: Path, tests: list[str]) -> bool:
    """Whether the tests pass in a tree, in a forked process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.chdir(tree)
        sys.path[:0] = [str(tree), str(tree / "examples"), str(tree / "tests")]
        import pytest

        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--shared", str(ROOT.parent / "shared")]
        os._exit(pytest.main([*options, *tests]))
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    """Draw mutants, run their tests, and report the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of TARGETS; all by default")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the result goes")
    args = parser.parse_args()
    everything = [mutant for file in args.files or TARGETS for mutant in mutants(file)]
    chosen = random.Random(args.seed).sample(everything, min(args.sample or len(everything), len(everything)))

    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(n) for n in range(args.workers)]
        for tree in trees:
            for name in COPIED:
                source = ROOT / name
                shutil.copytree(source, tree / name) if source.is_dir() else shutil.copy(source, tree / name)
        for tests in {tuple(TARGETS[mutant.file]) for mutant in chosen}:
            if not run_tests(trees[0], list(tests)):
                raise SystemExit(f"{' '.join(tests)} fail without any mutant: mend them first")
        free = list(trees)

        def survives(mutant: Mutant) -> bool:
            tree = free.pop()
            path = tree / mutant.file
            original = path.read_text(encoding="utf-8")
            path.write_text(mutant.source, encoding="utf-8")
            passed = run_tests(tree, TARGETS[mutant.file])
            path.write_text(original, encoding="utf-8")
            free.append(tree)
            print(
                "survived" if passed else "killed  ", f"{mutant.file}:{mutant.line}: {mutant.change[:120]}", flush=True
            )
            return passed

        with ThreadPool(args.workers) as pool:
            survivors = [m for m, lives in zip(chosen, pool.map(survives, chosen, chunksize=1), strict=True) if lives]
    killed = len(chosen) - len(survivors)
    print(f"{killed} of {len(chosen)} mutants killed, of {len(everything)} in all")
    if args.out:
        lines = [f"{m.file}:{m.line}: {m.change}" for m in survivors]
        args.out.write_text(json.dumps({"mutants": len(everything), "run": len(chosen), "survivors": lines}, indent=1))


if __name__ == "__main__":
    main()
