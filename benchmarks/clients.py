"""Run published models on the stand-ins of `kan_mamba_layers.compat`, unmodified and on a CPU.

python -m benchmarks clients CHECKOUTS --out TABLE.md
python -m benchmarks clients VM-UNet VMamba mamba --stubs DIR

A checkout is a folder with the name of its repository; `checkouts.py` lists the models. Each one does a training step,
and the same model, with the same weights and random numbers, does it again with a plain recurrence for the scan, and
with the authors' class `Mamba` if their file `mamba_simple.py` lies in the checkout or in one of state-spaces/mamba
beside it. Every model has a process of its own. Errors are the largest difference over the largest value.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.baselines import recurrence
from benchmarks.checkouts import CLIENTS, NAMES, Client
from benchmarks.command import make_parser, search_path, start
from kan_mamba_layers import selective_scan
from kan_mamba_layers.compat import install

HEAD = ("repository and commit", "model", "output", "gradients", "step", "plain step")


def main(arguments: Sequence[str]) -> None:
    """Run the clients and write a table as it grows."""
    parser = make_parser("clients", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a checkout, or a folder of checkouts")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the names of repositories")
    parser.add_argument("--stubs", type=Path, metavar="DIR", help="substitutes for packages that are not installed")
    parser.add_argument("--out", type=Path, metavar="TABLE.md")
    parser.add_argument("--run", nargs=2, metavar=("NUMBER", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    stubs = args.stubs and args.stubs.resolve()
    if args.run:
        number, file = args.run
        Path(file).write_text(json.dumps(run(CLIENTS[int(number)], args.paths[0], stubs)), encoding="utf-8")
        return
    folders = [folder.resolve() for path in args.paths for folder in (path, *sorted(path.glob("*/")))]
    lines = [_line(*HEAD), _line("---", "---", *["---:"] * 4)]
    print("\n".join(lines))
    for number, client in enumerate(CLIENTS):
        if not fnmatch.fnmatch(client.repository, args.only):
            continue
        checkout = next((folder for folder in folders if folder.name == client.repository), None)
        lines.append(
            _row(number, checkout, stubs) if checkout else _line(client.repository, f"`{client.make}`", "absent")
        )
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(number: int, checkout: Path, stubs: Path | None) -> str:
    client, ask = CLIENTS[number], ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    repository, _, commit = checkout.name.partition("@")
    commit = commit or subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    name, model = f"{repository} `{commit}`" if commit else repository, f"`{client.make}`"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = start("clients", str(checkout), "--run", str(number), str(file))
        command += ["--stubs", str(stubs)] if stubs else []
        done = subprocess.run(command, env=os.environ | search_path(), capture_output=True, text=True)
        if not file.is_file():
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return _line(name, model, said[-1][:200].replace("|", "/"))
        result = json.loads(file.read_text(encoding="utf-8"))
    marks = [*(name for name in ("force", "keep") if getattr(client, name)), *result["stubs"]]
    model += f" ({', '.join(marks)})" if marks else ""
    errors = [f"{result[key]:.0e}" for key in ("outputs", "gradients")]
    return _line(name, model, *errors, *(f"{seconds:.1g} s" for seconds in result["seconds"]))


def run(client: Client, checkout: Path, stubs: Path | None) -> dict[str, Any]:
    """The errors and the times of a client."""
    torch.set_num_threads(1)
    sys.path[:0] = [str(checkout / folder) for folder in client.folders]
    sys.path += [str(stubs)] if stubs else []
    install(force=client.force, keep=client.keep)
    model = _build(client)
    with torch.no_grad():
        for weight in model.parameters():  # layers that begin at 0 would hide what lies before them
            if weight.is_floating_point():
                weight += 0.02 * torch.randn_like(weight)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _seed()
    inputs = [torch.randn(x) if isinstance(x, tuple) else x for x in client.inputs]
    outputs, gradients, _ = _step(model, inputs)  # compiles
    seconds = _step(model, inputs)[2]
    op = selective_scan
    for module in list(sys.modules.values()):  # wherever the package has it, for the stand-ins and for Mamba
        if getattr(module, "__dict__", {}).get("selective_scan") is op:
            module.selective_scan = recurrence
    used = _modules_below(stubs) if stubs else []
    for name in _modules_below(checkout):
        del sys.modules[name]
    if not client.keep:
        _take_the_authors_mamba(checkout)
    model = _build(client)
    model.load_state_dict(weights)
    true_outputs, true_gradients, plain_seconds = _step(model, inputs)
    return {
        "outputs": error(outputs, true_outputs),
        "gradients": error(gradients, true_gradients),
        "seconds": [seconds, plain_seconds],
        "stubs": sorted({name.partition(".")[0] for name in used}),
    }


def _modules_below(folder: Path) -> list[str]:
    """The names of those imported from files and folders in it."""
    found = []
    for name, module in sys.modules.items():
        known = getattr(module, "__dict__", {})  # other attributes may run code of the module's own
        if any(folder in Path(path).parents for path in (known.get("__file__"), *known.get("__path__", ())) if path):
            found.append(name)
    return found


def _build(client: Client) -> nn.Module:
    _seed()
    return eval(client.make, NAMES | vars(importlib.import_module(client.module))).train()


def _step(model: nn.Module, inputs: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Outputs, gradients and seconds of one training step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    _seed()
    began = time.perf_counter()
    found = [x.as_subclass(Tensor) for x in tree_leaves(model(*inputs)) if isinstance(x, Tensor)]
    outputs = {str(k): x for k, x in enumerate(found)}
    terms = [(x * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() + x.square().mean() for x in outputs.values()]
    sum(terms).backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return {name: x.detach() for name, x in outputs.items()}, gradients, time.perf_counter() - began


def _take_the_authors_mamba(checkout: Path) -> None:
    """Put their class in the place of ours, with their convolution in PyTorch where they have one.

    A file that cannot be imported, because of the names of its own package, is passed over.
    """
    below = "mamba_ssm/modules/mamba_simple.py"
    for path in [*sorted(checkout.rglob(below)), checkout.parent / "mamba" / below]:
        if path.is_file():
            spec = importlib.util.spec_from_file_location("mamba_ssm.modules.mamba_simple", path)
            theirs = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(theirs)
            except ImportError:
                continue
            theirs.causal_conv1d_fn = None
            sys.modules["mamba_ssm.modules.mamba_simple"] = theirs
            sys.modules["mamba_ssm"].Mamba = theirs.Mamba
            return


def _seed() -> None:
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(0)


def error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The largest difference over the largest value, of all tensors together; infinite where a value is not finite."""
    if found.keys() != true.keys():
        raise ValueError(f"only one of the two runs has {sorted(found.keys() ^ true.keys())}")
    if not all(torch.isfinite(value).all() for value in (*found.values(), *true.values())):
        return math.inf
    some = [name for name, value in true.items() if value.numel()]
    difference = max(float((found[name] - true[name]).abs().max()) for name in some)
    return difference / max(float(true[name].abs().max()) for name in some)


def _line(*cells: str) -> str:
    return "| " + " | ".join([*cells, *[""] * (len(HEAD) - len(cells))]) + " |"
