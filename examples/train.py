"""Train one network on one task, from a folder of images or from the built-in demo, and write a report.

    python examples/train.py --task isic2017 --model km_unet_pp_tiny --data-dir DIR --out runs/isic --epochs 40

Everything Lightning's Trainer can do is a flag too, for example `--trainer.precision bf16-mixed`; see `--help`.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from segmentation import report
from segmentation.callbacks import AveragedWeights, EpochSeed, History, Patience, Steps, WholeFiles
from segmentation.checkpoints import latest_checkpoint, read_checkpoint
from segmentation.data import split as splits
from segmentation.data.module import SegmentationData
from segmentation.module import LOSSES, Segmentation
from segmentation.networks import build_network
from segmentation.tasks import TASKS, get_task

console = Console(quiet=rank_zero_only.rank != 0)

# What a resumed run may change: how long and where it trains, not what is trained on which images.
FREE_ON_RESUME = {"config", "out", "resume", "epochs", "steps", "patience", "num_workers", "trainer", "split"}
# Trainer arguments that this script sets itself, and those that would skip the validation after every epoch.
OWNED = {"callbacks", "logger", "max_epochs", "default_root_dir", "enable_checkpointing", "fast_dev_run", "barebones"}
OWNED |= {"check_val_every_n_epoch", "val_check_interval", "limit_val_batches", "overfit_batches"}
TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# Warnings of Lightning that are answered here: images are in memory, and repeated images are counted once.
REMARKS = (
    "does not have many workers",
    "Checkpoint directory .* is not empty",
    "Using `DistributedSampler` with the dataloaders",
    "LeafSpec",
)


def build_parser() -> ArgumentParser:
    """All flags; any of them can also stand in a YAML file given by `--config`."""
    parser = ArgumentParser(prog="train.py", description="Train one network on one segmentation task.")
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    add("--task", choices=list(TASKS), required=True)
    add("--model", default="km_unet_pp_tiny", help="a model of kan_mamba_layers, or unet, unet_pp (MONAI)")
    add("--model-args", type=dict[str, Any], default={}, help="""ablations, e.g. '{"use_kan": false}'""")
    add("--data-dir", type=Path | None, help="folder of images and masks, see examples/README.md (default: the demo)")
    add("--out", type=Path | None, help="run folder (default: runs/TASK-MODEL)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the run folder, if there is one")
    add("--epochs", type=int, default=40)
    add("--steps", type=int | None, help="train for so many steps, in whole epochs, instead of --epochs")
    add("--patience", type=int | None, help="stop after so many epochs without a better validation Dice")
    add("--lr", type=float, default=4e-3, help="peak learning rate; 4e-3 was measured with the tiny models")
    add("--spline-lr", type=NonNegativeFloat, default=1.0, help="multiplies the learning rate in KANLinear")
    add("--scan-lr", type=NonNegativeFloat, default=1.0, help="multiplies the learning rate in SS2D")
    add("--warmup", type=ClosedUnitInterval, default=0.05, help="part of the steps in which the learning rate rises")
    add("--weight-decay", type=float, default=1e-2)
    add("--loss", choices=list(LOSSES), default="dice_ce", help="Dice loss plus cross-entropy, or one of them")
    add("--augment", type=bool, default=True, help="the augmentation of the task's modality")
    add("--ema-decay", type=float | None, default=0.99, help="of the averaged weights; null for none")
    add("--batch-size", type=int, default=8, help="per process")
    add("--image-size", type=int, default=128, help="images are squashed to a square of this side")
    add("--limit", type=int | None, help="use at most so many images (whole subjects)")
    add("--split", type=Path | None, help="split.json of another run, to train and validate on the same subjects")
    add("--val-fraction", type=float, default=0.15, help="part of the subjects that choose the best epoch")
    add("--test-fraction", type=float, default=0.2, help="part of the subjects that training never sees")
    add("--split-seed", type=int, default=0, help="which subjects those are")
    add("--seed", type=int, default=0, help="initial weights, order of the images, augmentation")
    add("--num-workers", type=int, default=0, help="data processes; images are in memory, so 0 is usually best")
    parser.add_class_arguments(lightning.Trainer, "trainer", skip=OWNED, instantiate=False)
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    return parser


@rank_zero_only
def prepare_folder(parser: ArgumentParser, settings: Namespace, out: Path) -> None:
    """Create the run folder, refuse to mix two runs in one, and write the resolved config."""
    config = out / "config.yaml"
    if out.exists() and any(out.iterdir()):
        if not settings.resume:
            raise FileExistsError(
                f"out {str(out)!r} is not empty: add --resume to continue that run, or give another --out"
            )
        if config.exists():
            before = parser.parse_path(config)
            for name in sorted(vars(settings).keys() - FREE_ON_RESUME):
                if before[name] != settings[name]:
                    raise ValueError(
                        f"{name} is {settings[name]!r}, but the run in {str(out)!r} was started with {before[name]!r}: "
                        "resume with the same settings, or give another --out"
                    )
    out.mkdir(parents=True, exist_ok=True)
    parser.save(settings, config, overwrite=True, skip_unset=False)  # null is a setting too


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named, and if no other is left the run cannot go on."""
    newest, refused = latest_checkpoint(folder)
    for sentence in refused:
        console.print(f"[yellow]{sentence}", soft_wrap=True)
    if refused and newest is None:
        raise ValueError(f"{refused[0]}: no whole checkpoint is left in {str(folder)!r}; train anew in another --out")
    return newest


def quieten() -> None:
    """Lightning's remarks on its set-up say nothing new here; warnings about the run itself stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in REMARKS:
        warnings.filterwarnings("ignore", f".*{remark}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate the best epoch, write the run folder and return the facts and scores of metrics.json."""
    argv = sys.argv[1:] if argv is None else list(argv)
    quieten()
    parser = build_parser()
    settings = parser.parse_args(argv)
    if settings.trainer.max_steps != -1:
        raise ValueError(
            f"trainer.max_steps {settings.trainer.max_steps} would end within an epoch, without its validation: "
            f"use --steps {settings.trainer.max_steps}"
        )
    out = settings.out or Path("runs", f"{settings.task}-{settings.model}")

    lightning.seed_everything(settings.seed, verbose=False)
    task = get_task(settings.task)
    split = settings.split
    if split is None and settings.resume and (out / "split.json").exists():
        split = out / "split.json"  # so that files added since cannot move a subject to another side
    network = build_network(settings.model, task.in_channels, task.num_classes, **settings.model_args)
    data = SegmentationData(
        task,
        settings.data_dir,
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        val_fraction=settings.val_fraction,
        test_fraction=settings.test_fraction,
        split=split,
        limit=settings.limit,
        split_seed=settings.split_seed,
        seed=settings.seed,
        augment=settings.augment,
        num_workers=settings.num_workers,
    )
    recipe = ("lr", "weight_decay", "warmup", "loss", "spline_lr", "scan_lr")
    module = Segmentation(task, network, **{name: settings[name] for name in recipe})
    prepare_folder(parser, settings, out)
    continued = find_checkpoint(out / "checkpoints") if settings.resume else None
    if continued is not None:
        data.first_epoch = read_checkpoint(continued)["epoch"] + 1
    if rank_zero_only.rank == 0:
        splits.write_split(out / "split.json", data.split)

    history = History(out / "history.csv")
    best, last = out / "checkpoints" / "best.ckpt", out / "checkpoints" / "last.ckpt"
    keep = {"dirpath": best.parent, "enable_version_counter": False, "auto_insert_metric_name": False}
    callbacks = [
        EpochSeed(settings.seed),
        history,
        ModelCheckpoint(filename=best.stem, monitor="val/dice", mode="max", **keep),
        ModelCheckpoint(filename=last.stem, **keep),  # after the best one, so that it knows of it
    ]
    if settings.ema_decay is not None:
        callbacks.insert(0, AveragedWeights(settings.ema_decay))
    if settings.steps is not None:
        callbacks.append(Steps(settings.steps))
    if settings.patience is not None:
        callbacks.append(Patience(settings.patience))
    options = parser.instantiate(settings).trainer.as_dict()
    if options["enable_progress_bar"] is not False:
        callbacks.append(RichProgressBar())
    logger = TensorBoardLogger(out, name="tensorboard", version="")
    options["plugins"] = [WholeFiles(), *(options["plugins"] or ())]
    trainer = lightning.Trainer(
        **options, max_epochs=settings.epochs, callbacks=callbacks, logger=logger, default_root_dir=out
    )
    console.print(
        f"{task.title}: {settings.model}, {report.count_parameters(network) / 1e6:.2f} M parameters, "
        f"{len(data.train_set)} training, {len(data.val_set)} validation and {len(data.test_items)} test images, "
        + (f"resuming from {continued}" if continued else f"run folder {out}"),
        soft_wrap=True,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=continued, weights_only=True)
        # Only the weights: `validate(ckpt_path=...)` would turn the callbacks, and so the curves, back to that epoch.
        module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
        trainer.validate(module, datamodule=data, verbose=False)
    except SystemExit:  # Lightning's answer to Ctrl-C
        if trainer.interrupted:
            command = ["python", os.path.relpath(__file__), *argv, *([] if settings.resume else ["--resume"])]
            console.print(f"\nInterrupted. Go on with:\n    {shlex.join(command)}", soft_wrap=True)
            raise SystemExit(130) from None
        raise

    command = shlex.join(["python", os.path.relpath(__file__), *argv])
    facts = report.collect_facts(settings.as_dict(), command, trainer.strategy.root_device, module, data, history.rows)
    if trainer.is_global_zero:
        report.write_run(out, task, network, data.val_set, history.rows, facts)
        console.print(f"report in {out}", soft_wrap=True)
    return facts


if __name__ == "__main__":
    console.print(report.results_table([main()]))
