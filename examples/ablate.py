"""What each part of one network contributes: variants of it, trained alike, with one part left out or of another size.

    python examples/ablate.py --task isic2017 --model km_unet_pp_tiny --data-dir DIR --out runs/ablation-isic

    --variants '[use_kan=false, use_ss2d=false]'           some of the variants of `default_variants`
    --variants '{"narrow": {"widths": [8, 8, 16, 16, 32]}}'  others, by a name and the arguments of the model
    --variants '{"low-lr": {"train": {"lr": 0.001}}}'        or, under `train`, settings of train.py

Everything else is as in experiment.py: seeds, the settings of train.py under `train`, going on, `--report-only`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from experiment import add_settings, command_line, conduct, flatten, make_plan
from kan_mamba_layers import create_model, list_models
from segmentation.experiment import Plan, Variant
from segmentation.prose import ablation_text

FULL = "full"
PARTS = ("use_kan", "use_ss2d", "use_ema", "trunk_context", "decoder_kan", "context_residual")
SIZES = {"grid_size": (3, 8), "spline_order": (1, 2), "d_state": (1, 16), "expand": (1, 2), "ema_factor": (2, 8)}
NEEDS = {"grid_size": "use_kan", "spline_order": "use_kan", "d_state": "use_ss2d", "expand": "use_ss2d"}
NEEDS |= {"ema_factor": "use_ema"}

Arguments = dict[str, Any]


def build_parser() -> ArgumentParser:
    """All flags; any of them can also stand in a YAML file given by `--config`."""
    parser = ArgumentParser(prog="ablate.py", description="Train variants of one network alike and compare them.")
    add_settings(parser)
    add = parser.add_argument
    add("--model", default="km_unet_pp_tiny", help="a model of kan_mamba_layers")
    add("--model-args", type=Arguments, default={}, help="arguments of the model that all variants start from")
    add("--variants", type=dict[str, Arguments] | list[str] | None, help="see above (default: all)")
    add("--side", choices=["test", "val"], default="test", help="the images that are scored")
    return parser


def default_variants(model: str, **shared: Any) -> dict[str, Arguments]:
    """The network in full; without each of its parts; and with the sizes of parts that differ from its own."""
    if model not in list_models():
        raise ValueError(f"model {model!r} has no parts to leave out: choose one of {', '.join(list_models())}")
    own = create_model(model, **shared).config
    changes = [(part, False) for part in PARTS if own[part]]
    changes += [
        (name, size) for name, sizes in SIZES.items() for size in sizes if own[NEEDS[name]] and size != own[name]
    ]
    return {FULL: {}} | {f"{name}={json.dumps(value)}": {name: value} for name, value in changes}


def choose_variants(model: str, asked: dict[str, Arguments] | list[str] | None, **shared: Any) -> dict[str, Arguments]:
    """All default variants, those asked for by name, or those given with arguments; always with the full network."""
    known = default_variants(model, **shared)
    if asked is None:
        return known
    if isinstance(asked, dict):
        if odd := next((name for name in asked if not re.fullmatch(r"[\w.=+-]+", name)), None):
            raise ValueError(f"variant {odd!r} cannot be the name of a folder: use letters, digits and . = + - _")
        return {FULL: {}} | asked
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"variant {unknown[0]!r} is unknown for {model}: choose from {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys([FULL, *asked])}


def read_plan(argv: Sequence[str]) -> tuple[Plan, Namespace]:
    """The plan that the flags ask for, and the flags as parsed."""
    settings = build_parser().parse_args(argv)
    variants = []
    for name, arguments in choose_variants(settings.model, settings.variants, **settings.model_args).items():
        own = settings.model_args | arguments
        variants.append(Variant(name, settings.model, train=flatten(own.pop("train", {})), model_args=own))
    return make_plan(settings, variants, side=settings.side), settings


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, score and report; returns the content of results.json."""
    argv = sys.argv[1:] if argv is None else list(argv)
    plan, settings = read_plan(argv)
    return conduct(plan, build_parser(), settings, command_line(__file__, argv), FULL, ablation_text)


if __name__ == "__main__":
    main()
