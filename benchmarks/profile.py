"""How fast a layer or a model is on this machine, with which backend, and with how much memory.

python -m benchmarks profile ss2d --dim 96 --size 512 512 --training
python -m benchmarks profile kan_linear --in-features 256 --out-features 256 --rows 4096 --grid-size 5
python -m benchmarks profile ema --dim 64 --size 128 128 --dtype bfloat16 --device cuda
python -m benchmarks profile km_unet_tiny --size 256 256 --dry-run    # runs nothing: which backends can run it
python -m benchmarks profile models --size 256 256                    # parameters and FLOPs of every named model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, run, tables
from benchmarks.candidates import BACKENDS, MODES, Candidate
from benchmarks.command import make_parser
from benchmarks.measure import Checker
from kan_mamba_layers import SS2D, KANLinear, list_models, resolve

CHECKED = 16 * 16  # pixels or rows: `reference` takes one step of a scan at a time
CHECKED_OF_MODELS = {"b": 2, "h": 32, "w": 32}  # the least of which BatchNorm can have a mean at every level
Call = tuple[str, Tensor, dict[str, Tensor]]  # of an op: its name, its first argument, and others by name


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each mode and backend."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    options = run.Options(args.device, args.dtype, rounds=args.rounds, budget=args.longest, longest=args.longest)
    options = replace(options, modes=MODES if args.training else MODES[:1], whole=True)
    try:
        for line in _models(args, options) if args.what == "models" else profile(_case(args), options, args.dry_run):
            print(line, flush=True)
    except ValueError as error:  # in the words of the layer or model
        parser.error(str(error))


def profile(case: cases.Case, options: run.Options, dry: bool = False) -> Iterator[str]:
    """The backend that is taken, the size of the call, and what every backend makes of it."""
    calls = list(_calls(case, options))
    refused = {b: next(filter(None, (reason(b, call) for call in calls)), "") for b in BACKENDS if calls}
    taken = dict.fromkeys(resolve(op, "auto", x, **given) for op, x, given in calls)
    yield f"{case.name}, {options.dtype}, {options.device}, {torch.get_num_threads()} threads"
    yield f"backend='auto' takes {', '.join(taken)}" if calls else "PyTorch's own operators: there are no backends"
    if dry:
        yield from (f"{backend:10} {why or 'can run it'}" for backend, why in refused.items())
        return
    wanted = [backend for backend, why in refused.items() if not why] or ["pytorch"]
    able = [c for c in run.candidates_of(case, options) if c.name in wanted]
    truth = next((c for c in able if c.name == "reference"), able[0])
    parameters, flops = count(case, able[0], options)
    yield f"{parameters:,} parameters; {', '.join(f'{n / 1e9:.3g} GFLOP {mode}' for mode, n in flops.items())}"
    corner = replace(case, sizes=CHECKED_OF_MODELS) if case.suite == "models" else case.limited(1, CHECKED)
    where = "{rows} rows" if "rows" in case.sizes else "{b} images of {h}x{w} pixels"
    part = "" if corner == case else f" on {where.format(**corner.sizes)} alone"
    yield f"Checked against {truth.name} in float64{part}. Medians with quartiles, and peaks above the inputs:"
    checker = Checker(corner, options.device, run.DTYPES[options.dtype], truth)
    yield from map(run.line, run.measure_case(case, able, options, checker))
    yield from (f"* {why}" for why in refused.values() if why)


def reason(backend: str, call: Call) -> str:
    """Why a backend cannot run a call, in the words of the op; nothing if it can."""
    try:
        resolve(call[0], backend, call[1], **call[2])  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return ""


def _calls(case: cases.Case, options: run.Options) -> Iterator[Call]:
    """The calls of ops in a layer, without memory for their input; of a model one for each op, of unknown size."""
    sizes, value = case.sizes, torch.empty((), device=options.device, dtype=run.DTYPES[options.dtype])
    module = cases.make_module(case.limited(1, 1))[0]
    if isinstance(module, KANLinear):
        x = value.expand(sizes["rows"], sizes["in"])
        yield "kan_linear", x, {"spline_weight": module.spline_weight, "grid": module.grid}
        return
    if isinstance(module, SS2D):
        weight = module.dt_projs_weight
        x = value.expand(sizes["b"], sizes["h"], sizes["w"], weight.shape[1])
        yield "cross_selective_scan", x, {"dt_proj_weight": weight, "A_log": module.A_logs}
        return
    for kind, op in ((SS2D, "cross_selective_scan"), (KANLinear, "kan_linear")):
        if any(isinstance(layer, kind) for layer in module.modules()):
            yield op, value.expand(1), {}


def count(case: cases.Case, candidate: Candidate, options: run.Options) -> tuple[int, dict[str, int]]:
    """Parameters, and floating-point operations in each mode, by PyTorch's counter and the library's formulas."""
    bound, flops = candidate.bind(case, options.device, run.DTYPES[options.dtype]), {}
    for mode in options.modes:
        bound.train(mode == "training")
        for leaf in bound.leaves.values():  # without gradients the counter fails at a view of one that needs them
            leaf.requires_grad_(mode == "training")
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode == "training"):
            out = bound.run()
            if mode == "training":  # torch.autograd.grad would break the counter's hooks at a leaf
                out.backward(torch.ones_like(out))
        flops[mode] = counter.get_total_flops()
    return sum(leaf.numel() for name, leaf in bound.leaves.items() if name != "x"), flops


def _models(args: argparse.Namespace, options: run.Options) -> Iterator[str]:
    rows = []
    for name in (n for n in list_models() if n.endswith(("_tiny", "_small", "_base"))):
        case = _case(argparse.Namespace(**{**vars(args), "what": name}))
        parameters, flops = count(case, Candidate("auto", module=cases.make_module), replace(options, modes=MODES[:1]))
        rows.append([f"`{name}`", f"{parameters:,}", f"{flops['forward'] / 1e9:.2f}"])
    yield tables.table(["model", "parameters", f"GFLOP at {'x'.join(map(str, args.size))}"], rows, 2)


def _case(args: argparse.Namespace) -> cases.Case:
    if args.what == "kan_linear":
        return cases.kan(args.rows, args.in_features, args.out_features, args.grid_size)
    (height, width), batch = args.size, args.batch
    if args.what == "ss2d":
        return cases.block(batch, height, width, args.dim, 16)
    suite, channels = ("blocks", {"c": args.dim}) if args.what == "ema" else ("models", {})
    parts = [args.what, f"b{batch}", *(f"c{c}" for c in channels.values()), f"{height}x{width}"]
    return cases.Case("-".join(parts), suite, args.what, {"b": batch, "h": height, "w": width, **channels})


def _parser() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
        return int(text)

    every, image, wide, splines = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    every.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    every.add_argument("--dtype", default="float32", choices=tuple(run.DTYPES), help="half: under autocast")
    every.add_argument("--training", action="store_true", help="also time forward and backward")
    every.add_argument("--dry-run", action="store_true", help="run nothing, and say which backends can run it")
    every.add_argument("--rounds", type=positive, default=7, metavar="N", help="in which the backends take turns")
    every.add_argument("--longest", type=float, default=10.0, metavar="S", help="seconds that a call may take")
    image.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), required=True)
    image.add_argument("--batch", type=positive, default=1, metavar="N", help="images")
    wide.add_argument("--dim", type=positive, metavar="N", required=True, help="channels")
    for name in ("--in-features", "--out-features", "--rows"):
        splines.add_argument(name, type=positive, metavar="N", required=True)
    splines.add_argument("--grid-size", type=positive, default=5, metavar="N", help="intervals")
    parser = make_parser("profile", __doc__)
    flags = {"ss2d": [wide, image], "ema": [wide, image], "kan_linear": [splines]}
    told = f"{', '.join(flags)}, models, or one of {', '.join(list_models())}; WHAT --help tells its flags"
    names = parser.add_subparsers(dest="what", metavar="WHAT", required=True, help=told)
    for name in [*flags, "models", *list_models()]:
        names.add_parser(name, parents=[*flags.get(name, [image]), every])
    return parser
