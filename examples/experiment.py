"""Train several networks alike, with several seeds on one split, score them on subjects kept apart, and write a report.

    python examples/experiment.py --config examples/configs/isic2017.yaml --data-dir DIR --out runs/isic2017

Without --data-dir the built-in demo of the task is used. Started again, it goes on where it was stopped: what is
trained is not trained again, and what is scored is not scored again. Several of it may work in one --out at once, each
with its own --seeds, once the first has written split.json; `--report-only` then makes one report of all.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track
from rich.table import Table

import train
from segmentation.checkpoints import load_run
from segmentation.comparison import compare
from segmentation.data.module import SegmentationData
from segmentation.data.split import write_split
from segmentation.experiment import (
    Finished,
    Plan,
    Run,
    Variant,
    evaluate_run,
    held_out_items,
    read_finished,
    write_json,
)
from segmentation.figures import draw_cases, draw_cost, draw_curves
from segmentation.inference import flip_axes
from segmentation.networks import build_network
from segmentation.page import write_page
from segmentation.prose import experiment_text
from segmentation.tasks import TASKS, get_task
from segmentation.wording import plus_minus

console = Console()

MODELS = ["unet", "unet_pp", "km_unet_tiny", "km_unet_pp_tiny"]
# Settings of train.py that the experiment itself gives to every run. One process and device a run: several would each
# run this script, and a batch of another size would be another recipe.
OWNED = {"config", "task", "model", "model_args", "data_dir", "out", "resume", "split", "seed"}
OWNED |= {"trainer.devices", "trainer.num_nodes", "trainer.strategy"}
SPLITTING = {"limit", "val_fraction", "test_fraction", "split_seed"}  # go into split.json, which the runs follow
COMMON = SPLITTING | {"image_size"}  # the same for every variant
MAY_DIFFER = {"config", "out", "resume", "data_dir", "split", "num_workers", "trainer"}  # when a run is continued
TRAINER_IN_RECIPE = ("precision", "gradient_clip_val", "accumulate_grad_batches")


def add_settings(parser: ArgumentParser) -> None:
    """The flags that all experiments have; any of them can also stand in a YAML file given by `--config`."""
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    add("--task", choices=list(TASKS), required=True)
    add("--seeds", type=list[int], default=[0, 1, 2], help="one run each: initial weights, order, augmentation")
    add("--data-dir", type=Path | None, help="folder of images and masks (default: the demo of the task)")
    add("--out", type=Path, required=True, help="folder of the runs and the report")
    add("--train", type=dict[str, Any], default={}, help="settings of train.py, e.g. --train.epochs=40")
    add("--flips", type=bool, default=False, help="average over flips of the image when scoring")
    add("--report-only", action="store_true", help="train and score nothing, report what is finished")


def build_parser() -> ArgumentParser:
    """All flags of this script."""
    parser = ArgumentParser(prog="experiment.py", description="Train several networks alike and compare them.")
    add_settings(parser)
    parser.add_argument("--models", type=list[str], default=MODELS, help="names that train.py takes as --model")
    parser.add_argument(
        "--per-model",
        type=dict[str, dict[str, Any]],
        default={},
        help="""settings of train.py, and model_args, of one model, e.g. '{"unet": {"lr": 0.002}}'""",
    )
    return parser


def choose_variants(settings: Namespace) -> list[Variant]:
    """One variant a model, with what is set for it alone."""
    if unknown := sorted(settings.per_model.keys() - set(settings.models)):
        raise ValueError(f"per-model names {unknown[0]!r}, which is not one of the models {settings.models}")
    variants = []
    for model in settings.models:
        own = flatten(settings.per_model.get(model, {}))
        variants.append(Variant(model, model, own.pop("model_args", {}), own))
    return variants


def make_plan(settings: Namespace, variants: Sequence[Variant], **more: Any) -> Plan:
    """The plan of these settings, with every name and value checked before anything is trained."""
    task = get_task(settings.task)
    common = flatten(settings.train)
    check_names(common, "train")
    for variant in variants:
        check_names(variant.train, f"per-model {variant.name}", COMMON)
        build_network(variant.model, task.in_channels, task.num_classes, **variant.model_args)
    for name, values in (("seeds", settings.seeds), ("variants", [variant.name for variant in variants])):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} {values} must be one or more, each of them once")
    size = common.get("image_size", train.build_parser().get_defaults().image_size)
    if settings.flips:
        flip_axes(task, size)
    shared = {"data_dir": settings.data_dir, "out": settings.out, "flips": settings.flips, **more}
    plan = Plan(task, tuple(variants), tuple(settings.seeds), image_size=size, train=common, **shared)
    for run in plan.runs:
        check_continued(run, parse_training(training_flags(plan, run)))
    return plan


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of train.py by their long names: those under `trainer` as trainer.NAME, dashes as underscores."""
    flat = {name.replace("-", "_"): value for name, value in settings.items() if name != "trainer"}
    return flat | {f"trainer.{name}": value for name, value in settings.get("trainer", {}).items()}


def check_names(settings: dict[str, Any], where: str, refused: set[str] = frozenset()) -> None:
    """Refuse what train.py does not know, and what is not for the runs to choose."""
    known = set(train.build_parser().get_defaults().keys()) - OWNED - refused
    for name in settings:
        if name in OWNED | refused:
            raise ValueError(f"{where} sets {name!r}, which is the same for all runs: leave it out there")
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "see train.py --help"
            raise ValueError(f"{where} sets {name!r}, which train.py does not know: did you mean {near}?")


def training_flags(plan: Plan, run: Run) -> list[str]:
    """The arguments of train.py for one run."""
    variant = run.variant
    settings = {
        "task": plan.task.name,
        "model": variant.model,
        "model_args": variant.model_args,
        **({} if plan.data_dir is None else {"data_dir": str(plan.data_dir)}),
        "out": str(run.folder),
        "split": str(plan.split),
        "seed": run.seed,
        "trainer.devices": 1,
        **{name: value for name, value in plan.train.items() if name not in SPLITTING},
        **variant.train,
    }
    return [*(as_flag(name, value) for name, value in settings.items()), "--resume"]


def as_flag(name: str, value: Any) -> str:
    """`--name=value`, with lists and dicts as JSON."""
    flag = name if "." in name else name.replace("_", "-")
    return f"--{flag}={value if isinstance(value, str) else json.dumps(value)}"


def parse_training(flags: Sequence[str]) -> Namespace:
    """What train.py makes of its flags."""
    parser = train.build_parser()
    parser.exit_on_error = False
    try:
        return parser.parse_args(list(flags))
    except ArgumentError as error:
        raise ValueError(f"train.py refuses its settings: {error}") from error


def check_continued(run: Run, settings: Namespace) -> None:
    """Refuse to go on in, or to report, a run that was started with other settings."""
    if not (run.folder / "config.yaml").is_file():
        return
    before = train.build_parser().parse_path(run.folder / "config.yaml")
    for name in sorted(vars(settings).keys() - MAY_DIFFER):
        if before[name] != settings[name]:
            raise ValueError(
                f"{name} is {settings[name]!r}, but the run in {str(run.folder)!r} was trained with {before[name]!r}: "
                "use the same settings, remove that run, or give another --out"
            )


def prepare(plan: Plan, parser: ArgumentParser, settings: Namespace) -> None:
    """Create the folder with the resolved settings and the split that all runs follow."""
    plan.out.mkdir(parents=True, exist_ok=True)
    splitting = {name: value for name, value in plan.train.items() if name in SPLITTING}
    config = plan.out / "config.yaml"
    if plan.split.is_file() and config.is_file():
        before = {name: value for name, value in flatten(parser.parse_path(config).train).items() if name in SPLITTING}
        if before != splitting:
            raise ValueError(f"{plan.split} was made with {before}, not with {splitting}: give another --out")
    elif not plan.split.is_file():
        data = SegmentationData(plan.task, plan.data_dir, image_size=plan.image_size, **splitting)
        write_split(plan.split, data.split)
    parser.save(settings, config, overwrite=True, skip_unset=False)  # null is a setting too


def carry_out(plan: Plan, command: str) -> None:
    """Train and score every run that is not finished."""
    items = held_out_items(plan)
    bar = partial(track, description="scoring", console=console, transient=True, disable=not console.is_terminal)
    for number, run in enumerate(plan.runs, start=1):
        where = f"run {number} of {len(plan.runs)}: {run}"
        console.print(f"{where}{', trained before' if run.trained else ''}", soft_wrap=True, style="bold")
        try:
            if not run.trained:
                train.main(training_flags(plan, run))
            evaluate_run(plan, run, items, progress=bar)
        except (KeyboardInterrupt, SystemExit):
            console.print(f"\nStopped in {where}. The same command goes on:\n    {command}", soft_wrap=True)
            raise


def write_report(plan: Plan, finished: dict[str, list[Finished]], results: dict[str, Any], text: str) -> None:
    """results.json, the pictures, report.md and report.html."""
    items = {item.id: item for item in held_out_items(plan)}
    write_json(plan.out / "results.json", results)
    draw_curves(plan.out / "curves.png", finished)
    draw_cost(plan.out / "cost.png", results["variants"])
    for name, group in finished.items():
        found = results["variants"][name]["cases"]
        cases = [(f"{case}: Dice {row['dice']:.3f}\n{row['id']}", items[row["id"]]) for case, row in found.items()]
        draw_cases(plan.out / f"cases-{name}.png", load_run(group[0].run.folder), cases, flips=plan.flips)
    write_page(plan.out, text)


def recipe(plan: Plan) -> dict[str, Any]:
    """The settings of train.py that all runs share, defaults included."""
    settings = parse_training([as_flag("task", plan.task.name), *(as_flag(*item) for item in plan.train.items())])
    chosen = {name: value for name, value in settings.as_dict().items() if name not in {*OWNED, "trainer"}}
    given = [name.removeprefix("trainer.") for name in plan.train if name.startswith("trainer.")]
    return chosen | {f"trainer.{name}": settings.trainer[name] for name in dict.fromkeys([*TRAINER_IN_RECIPE, *given])}


def conduct(
    plan: Plan, parser: ArgumentParser, settings: Namespace, command: str, baseline: str, text: Callable[[dict], str]
) -> dict[str, Any]:
    """Do what is left of the plan, unless only a report is wanted, and report what is finished."""
    if not settings.report_only:
        prepare(plan, parser, settings)
        carry_out(plan, command)
    finished = read_finished(plan)
    results = {**compare(plan, finished, baseline), "recipe": recipe(plan), "command": command}
    write_report(plan, finished, results, text(results))
    console.print(summary(results))
    console.print(f"report in {plan.out / 'report.html'}", soft_wrap=True)
    return results


def summary(results: dict[str, Any]) -> Table:
    """The scores per image for the console."""
    table = Table("", title=f"{results['title']}, {results['side']} images, mean per image ± deviation over seeds")
    for name in ("IoU", "Dice", f"HD95 ({results['unit']})"):
        table.add_column(name, justify="right")
    for name, variant in results["variants"].items():
        scores = variant["per_image"]
        table.add_row(name, *(plus_minus(scores[score]) for score in ("iou", "dice")), plus_minus(scores["hd95"], 1))
    return table


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command that makes the experiment, for the report."""
    return shlex.join(["python", os.path.relpath(script), *(word for word in argv if word != "--report-only")])


def read_plan(argv: Sequence[str]) -> tuple[Plan, Namespace]:
    """The plan that the flags ask for, and the flags as parsed."""
    settings = build_parser().parse_args(argv)
    return make_plan(settings, choose_variants(settings)), settings


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, score and report; returns the content of results.json."""
    argv = sys.argv[1:] if argv is None else list(argv)
    plan, settings = read_plan(argv)
    baseline = "unet" if "unet" in settings.models else settings.models[0]
    return conduct(plan, build_parser(), settings, command_line(__file__, argv), baseline, experiment_text)


if __name__ == "__main__":
    main()
