"""Train, score and apply segmentation networks, and compare what was trained.

    python examples/lab.py fit --data.task fetal_head --data.folder DIR --run runs/heads
    python examples/lab.py fit --run runs/heads --resume
    python examples/lab.py test --run runs/heads
    python examples/lab.py predict --run runs/heads --out masks IMAGE_OR_FOLDER_OR_VOLUME ...
    python examples/lab.py compare runs/isic2017 --out runs/isic2017

Every argument of the network, the data and Lightning's Trainer is a flag, or stands in a YAML file given by --config.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import pandas as pd
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from segmentation.callbacks import Checkpoints, EpochSeed, History, WholeEpochs, WholeFiles
from segmentation.compare import compare
from segmentation.console import console, quieten, say, scores_table
from segmentation.data.datamodule import SegmentationData
from segmentation.data.split import SIDES, read_split, refuse_seen, split_hash, write_split
from segmentation.figures import Case, draw_cases, draw_history
from segmentation.module import Segmentation
from segmentation.networks import count_parameters, multiply_adds
from segmentation.prediction import check_outputs, read_pixel_sizes
from segmentation.runs import (
    check_folder,
    device_name,
    find_run,
    holds_files,
    latest_checkpoint,
    provenance,
    read_checkpoint,
    read_config,
    read_json,
    whole_file,
    write_json,
)
from segmentation.writers import MaskWriter, ScoreWriter

TRAINER_DEFAULTS = {
    "max_epochs": 40,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# What every run has: validation after each epoch, with checkpoints.
FIXED = {
    "fast_dev_run": False,
    "barebones": False,
    "enable_checkpointing": None,
    "check_val_every_n_epoch": 1,
    "val_check_interval": None,
    "limit_val_batches": None,
    "overfit_batches": 0.0,
}
# With weights of these types neither the average nor the scores are what they should be.
PRECISIONS = {"16-true", "bf16-true", "64-true", "64"}
# What a resumed run may change: how long and where it trains, and where the images lie, which its split knows by their
# hashes; not what is trained.
FREE_ON_RESUME = {"data.folder", "data.num_workers", "data.split", "data.side", "model.flips", "model.window"}
STRICT = {"exit_on_error": False}  # of parsers: raise what is wrong, without the usage
# What the user can mend.
MISTAKES = (jsonargparse.ArgumentError, ImportError, MisconfigurationException, OSError, ValueError)
SINGLE = {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}


class Lab(LightningCLI):
    """LightningCLI whose state is a run folder."""

    def init_parser(self, verb: str = "", **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        add = parser.add_argument
        if verb == "fit":
            add("--run", type=Path | None, help="run folder (default: runs/TASK-NETWORK)")
            add("--resume", action="store_true", help="go on from the last checkpoint of the run, if there is one")
        elif verb:
            add("--run", type=Path, required=True, help="run folder of fit, or one of its .ckpt files")
        if verb == "test":
            add("--out", type=Path | None, help="folder for the scores and masks (default: RUN/SIDE)")
        if verb == "predict":
            add("inputs", nargs="+", type=Path, help="images, volumes (.mha, .nii, .nii.gz), or folders of them")
            add("--out", type=Path, required=True, help="folder for masks, overlays and predictions.csv")
            add("--overwrite", action="store_true", help="write into --out although it holds files")
            add("--pixel_size_csv", type=Path | None, help="columns filename, pixel size(mm), as in HC18")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.task", "model.task")
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("seed_everything", "data.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        own = {"model", "datamodule", "ckpt_path", "weights_only", "verbose", "return_predictions"}
        own |= {"train_dataloaders", "val_dataloaders", "dataloaders"}
        return dict.fromkeys(("fit", "test", "predict"), own)

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        self.config = parser.parse_args(with_config_of_run(sys.argv[1:] if args is None else list(args)))

    @property
    def settings(self) -> jsonargparse.Namespace:
        """What was asked for, defaults included."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        settings, trainer = self.settings, self.settings.trainer
        for name in ("folder", "split"):  # so that the run may be used from wherever
            settings.data[name] = settings.data[name] and settings.data[name].absolute()
        if str(trainer.precision) in PRECISIONS:
            raise ValueError(f"trainer.precision {trainer.precision} is not supported: use 32-true or bf16-mixed")
        if self.subcommand == "fit":
            self.run_folder = settings.run or Path("runs", f"{settings.data.task}-{settings.model.network}")
            for name, value in FIXED.items():
                if trainer[name] != value:
                    raise ValueError(f"trainer.{name} {trainer[name]} would skip validations: leave it out")
            if trainer.max_steps == -1 and trainer.max_epochs is not None and trainer.max_epochs < 1:
                raise ValueError(f"trainer.max_epochs {trainer.max_epochs} must be at least 1")
            if rank_zero_only.rank == 0:  # the other processes start when the folder is there
                check_folder(self.run_folder, self.dumped() if settings.resume else None, FREE_ON_RESUME)
            return
        self.run_folder, self.checkpoint = find_run(settings.run)
        for name, value in SINGLE.items():
            trainer[name] = value
        if self.subcommand == "predict" and settings.pixel_size_csv and settings.data.task != "fetal_head":
            raise ValueError(f"pixel_size_csv measures heads, but {str(self.run_folder)!r} is of {settings.data.task}")
        if self.subcommand == "test":
            follow_run(settings.data, self.run_folder)
            self.out = settings.out or self.run_folder / test_folder(settings, self.run_folder, self.checkpoint)
            name = self.run_folder.resolve().name
            if holds_files("out", self.out) and settings.out and read_json(self.out / "scores.json").get("run") != name:
                raise FileExistsError(f"out {str(self.out)!r} holds files that are no scores of {name!r}: give another")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        trainer = self.config_init[self.subcommand].trainer
        callbacks = list(trainer.callbacks or [])
        if trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        kwargs |= {"callbacks": callbacks, "default_root_dir": self.run_folder}
        if self.subcommand == "fit":
            self.history = History(self.run_folder / "history.csv")
            callbacks += [EpochSeed(self.settings.seed_everything), self.history]
            keep = {"enable_version_counter": False, "auto_insert_metric_name": False}
            keep["dirpath"] = self.run_folder / "checkpoints"
            callbacks.append(Checkpoints(filename="best", monitor="val/dice", mode="max", **keep))
            callbacks.append(Checkpoints(filename="last", **keep))  # after the best one, so that it knows of it
            if trainer.max_steps != -1:
                callbacks.append(WholeEpochs(trainer.max_steps))
                kwargs["max_steps"] = -1
            kwargs["plugins"] = [WholeFiles(), *(trainer.plugins or ())]
            if trainer.logger in (None, True):
                kwargs["logger"] = TensorBoardLogger(self.run_folder, name="tensorboard", version="")
        elif self.subcommand == "test":
            self.writer = ScoreWriter(self.out, self.facts_of_test())
            callbacks.append(self.writer)
        else:
            table = self.settings.pixel_size_csv
            self.writer = MaskWriter(self.settings.out, read_pixel_sizes(table) if table else {})
            callbacks.append(self.writer)
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: Segmentation, datamodule: SegmentationData) -> None:
        """Train, score the best epoch on the validation subjects, and leave the run folder behind."""
        run, trainer, resume = self.run_folder, self.trainer, self.settings.resume
        own_split = run / "split.json"
        if resume and datamodule.split is None and own_split.exists():
            datamodule.split = own_split  # so that files added since cannot move a subject to another side
        datamodule.setup("fit")
        continued, refused = latest_checkpoint(run / "checkpoints") if resume else (None, [])
        for sentence in refused:
            say(sentence, "yellow")
        if continued is not None:
            datamodule.first_epoch = read_checkpoint(continued)["epoch"] + 1
        if trainer.is_global_zero:
            run.mkdir(parents=True, exist_ok=True)
            with whole_file(run / "config.yaml") as draft:
                draft.write_text(yaml.safe_dump(self.dumped(), sort_keys=False), encoding="utf-8")
            write_split(own_split, datamodule.table)
        say(
            f"{model.task.title}: {self.settings.model.network}, {count_parameters(model) / 1e6:.2f} M parameters, "
            f"{len(datamodule.train_set)} training, {len(datamodule.val_set)} validation and "
            f"{len(datamodule.test_items)} test images, "
            + (f"resuming from {continued}" if continued else f"run folder {run}")
        )
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=continued, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            if trainer.interrupted:
                command = shlex.join(["python", "examples/lab.py", "fit", "--run", str(run), "--resume"])
                say(f"\nInterrupted. Go on with:\n    {command}")
                raise SystemExit(130) from None
            raise
        if trainer.is_global_zero:
            scores = self.finish(model, datamodule)
            console.print(scores_table(f"{run}, validation", scores))
            say(f"scores, curves and pictures are in {run}")

    def test(self, model: Segmentation, datamodule: SegmentationData) -> None:
        """Score the best epoch, or the checkpoint that was named, on images that its training never touched."""
        self.writer.facts["epoch"] = self.load(model)
        datamodule.setup("test")
        own_split = self.run_folder / "split.json"
        if self.settings.data.split is None and (remark := refuse_seen(datamodule.test_items, own_split)):
            say(remark, "yellow")
        self.out.mkdir(parents=True, exist_ok=True)
        self.trainer.test(model, datamodule=datamodule, verbose=False)
        scores = self.writer.scores
        title = f"{scores['network']}, {scores['images']} images of {scores['data']}, {scores['side']}"
        console.print(scores_table(title, scores))
        for image in scores["unreadable_images"]:
            say(f"left out: {image['id']}: {image['reason']}", "yellow")
        say(f"scores, masks and cases are in {self.out}")

    def predict(self, model: Segmentation, datamodule: SegmentationData) -> None:
        """Write the masks of all inputs; what cannot be read is named and counted."""
        out, table = self.settings.out, self.settings.pixel_size_csv
        self.load(model)
        datamodule.inputs = self.settings.inputs
        datamodule.setup("predict")
        check_outputs(datamodule.predict_dataloader().dataset, table, out)
        if holds_files("out", out) and not self.settings.overwrite:
            raise FileExistsError(f"out {str(out)!r} is not empty: add --overwrite, or give another folder")
        out.mkdir(parents=True, exist_ok=True)
        self.trainer.predict(model, datamodule=datamodule, return_predictions=False)
        rows, unreadable = self.writer.rows, self.writer.unreadable
        say(f"{len(rows)} of {len(rows) + len(unreadable)} files predicted, in {out}")
        for entry in unreadable:
            say(f"skipped: {entry['reason']}", "yellow")
        if not rows:
            raise SystemExit(1)

    def load(self, model: Segmentation) -> int:
        """Give the network the weights of the run, and return their epoch."""
        content = read_checkpoint(self.checkpoint)
        self.datamodule.load_state_dict(content.get(type(self.datamodule).__qualname__, {}))
        try:
            model.load_state_dict(content["state_dict"])
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint {str(self.checkpoint)!r} does not fit the network of {self.run_folder / 'config.yaml'} "
                f"({self.settings.model.network}, {self.settings.model.model_args}): keep both from one run"
            ) from error
        return int(content["epoch"]) + 1

    def facts_of_test(self) -> dict[str, Any]:
        """What scores.json tells of where its numbers come from."""
        data, model = self.settings.data, self.settings.model
        return {
            **{"task": data.task, "network": model.network, "image_size": data.image_size},
            **{"run": self.run_folder.resolve().name, "checkpoint": self.checkpoint.name},
            "data": "demo" if data.folder is None else data.folder.resolve().name,
            "side": data.side,
            "options": [name for name in ("window", "flips") if model[name]],
            "split_sha256": None if data.split is None else split_hash(read_split(data.split)),
        }

    def dumped(self) -> dict[str, Any]:
        """The settings as config.yaml holds them."""
        content = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"]
        return {name: content[name] for name in ("seed_everything", "trainer", "model", "data")}

    def finish(self, model: Segmentation, data: SegmentationData) -> dict[str, Any]:
        """Write metrics.json, curves.png, cases.png, and the network itself in `model/` if it is one of ours.

        All is read from the files of the run, which the processes of a training leave behind.
        """
        run, settings, rows = self.run_folder, self.settings, pd.read_csv(self.run_folder / "history.csv")
        best, last = (read_checkpoint(run / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
        model.load_state_dict(best["state_dict"])
        sides = {side: [item for item in data.items if item.split == side] for side in SIDES}
        write_json(
            run / "metrics.json",
            {
                **{"task": settings.data.task, "network": settings.model.network},
                **{"model_args": settings.model.model_args or {}, "image_size": settings.data.image_size},
                "seed": settings.seed_everything,
                "parameters": count_parameters(model.network),
                "multiply_adds": multiply_adds(model.network, model.task.in_channels, settings.data.image_size),
                "data": "demo" if settings.data.folder is None else settings.data.folder.resolve().name,
                "images": {side: len(items) for side, items in sides.items()},
                "subjects": {side: len({item.group for item in items}) for side, items in sides.items()},
                "split_sha256": split_hash(data.table),
                "epochs": len(rows),
                "steps": last["global_step"],
                "best_epoch": best["epoch"] + 1,
                "seconds": round(rows["seconds"].sum(), 1),
                "metrics": best["scores"],
                "command": shlex.join(["python", *sys.argv]),
                "device": device_name(self.trainer.strategy.root_device),
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                **provenance(),
            },
        )
        draw_history(run / "curves.png", rows, settings.model.loss)
        cases = []
        for item in data.val_set.items[:: max(1, len(data.val_set) // 3)][:3]:
            image, truth = item.read()
            cases.append(Case(item.id, image, truth, model.eval().classes_of(image), model.task.class_names))
        draw_cases(run / "cases.png", cases)
        if hasattr(model.network, "save_pretrained"):
            model.network.save_pretrained(run / "model")
        return best["scores"]


def with_config_of_run(args: list[str]) -> list[str]:
    """The arguments with the settings of the run in front, where one is tested, applied or resumed."""
    verb, rest = args[:1], args[1:]
    names = [value for flag, value in pairwise(rest) if flag == "--run"]
    names += [arg.removeprefix("--run=") for arg in rest if arg.startswith("--run=")]
    if {"-h", "--help"} & set(rest):
        return args
    if not names and verb in (["test"], ["predict"]):
        raise ValueError("run is missing: give the folder of a run with --run")
    if not names:
        return args
    folder, _ = find_run(Path(names[-1]))
    if verb == ["fit"] and not ("--resume" in rest and (folder / "config.yaml").is_file()):
        return args
    read_config(folder)  # names what is wrong with it
    return [*verb, f"--config={folder / 'config.yaml'}", *rest]


def follow_run(data: jsonargparse.Namespace, run: Path) -> None:
    """On the data of its run, a test follows the run's split; on other data all images are scored."""
    trained_on = read_config(run)["data"].get("folder")
    places = [None if folder is None else Path(folder).resolve() for folder in (data.folder, trained_on)]
    if data.split is None and places[0] == places[1]:
        data.split = run / "split.json"
    data.limit = None
    data.side = data.side or ("all" if data.split is None else "test")


def test_folder(settings: jsonargparse.Namespace, run: Path, checkpoint: Path) -> str:
    """The name of the folder for the scores: the side, and what is not as usual."""
    own = settings.data.split == run / "split.json"
    words = [] if own or settings.data.folder is None else [settings.data.folder.resolve().name]
    words += [settings.data.side, *([checkpoint.stem] if checkpoint.stem != "best" else [])]
    words += [name for name in ("window", "flips") if settings.model[name]]
    return "-".join(words)


def main(args: Sequence[str] | None = None) -> Lab | dict[str, Any]:
    """Run one command."""
    args = sys.argv[1:] if args is None else list(args)
    quieten()
    if args in ([], ["-h"], ["--help"]):
        say(str(__doc__).strip())
        return {}
    if args[:1] == ["compare"]:
        parser = jsonargparse.ArgumentParser(prog="lab.py compare", description="Compare the scores of runs.", **STRICT)
        parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of run folders")
        parser.add_argument("--out", type=Path, required=True, help="folder of the report")
        parser.add_argument("--on", default="test", help="the folder inside each run that its scores are in")
        parser.add_argument("--baseline", type=str | None, help="what the others are set against (default: unet)")
        settings = parser.parse_args(args[1:])
        results = compare(**settings.as_dict())
        say(f"report in {settings.out / 'report.html'}")
        return results
    return Lab(
        Segmentation,
        SegmentationData,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_kwargs={"description": __doc__, **STRICT}
        | {verb: {"verb": verb, **STRICT} for verb in Lab.subcommands()},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
    )


if __name__ == "__main__":
    try:
        main()
    except MISTAKES as error:
        is_long = isinstance(error, jsonargparse.ArgumentError)
        sys.stderr.write(f"error: {' '.join(str(error).split()) if is_long else error}\n")
        raise SystemExit(2) from None
