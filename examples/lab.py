"""Train, score and apply segmentation networks, and compare what was trained.

    python examples/lab.py fit --data.task fetal_head --data.folder DIR --run runs/heads
    python examples/lab.py fit --run runs/heads --resume
    python examples/lab.py test --run runs/heads
    python examples/lab.py predict --run runs/heads --out masks IMAGE_OR_FOLDER_OR_VOLUME ...
    python examples/lab.py predict --pretrained fetal_head --out masks IMAGE_OR_FOLDER_OR_VOLUME ...
    python examples/lab.py compare runs/isic2017 --out runs/isic2017

Every argument of the network, the data and Lightning's Trainer is a flag, or stands in a YAML file given by --config.
"""

import argparse
import datetime
import inspect
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import pandas as pd
import yaml
from jsonargparse.typing import PositiveFloat
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from segmentation import runs
from segmentation.callbacks import Checkpoints, EpochSeed, History, WholeEpochs, WholeFiles
from segmentation.compare import compare
from segmentation.console import console, mistakes_in_one_line, quieten, say, scores_table, told_of_interrupts
from segmentation.data import split as splits
from segmentation.data.datamodule import SegmentationData
from segmentation.figures import draw_cases, draw_curves
from segmentation.module import Segmentation
from segmentation.networks import count_parameters, multiply_adds, pretrained_settings, weights_folder
from segmentation.prediction import read_pixel_sizes
from segmentation.report import write_report
from segmentation.writers import MaskWriter, ScoreWriter, check_outputs

TRAINER_DEFAULTS = {
    "max_epochs": 40,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# Left as Lightning has them, so that every run has a validation after each epoch, with checkpoints.
FIXED = ("fast_dev_run", "barebones", "enable_checkpointing", "check_val_every_n_epoch", "val_check_interval")
FIXED += ("limit_val_batches", "overfit_batches")
# With weights of these types neither the average nor the scores are what they should be.
PRECISIONS = {"16-true", "bf16-true", "64-true", "64"}
# What a resumed run may change: how long and where it trains, and where the images lie, which its split knows by their
# hashes; not what is trained.
FREE_ON_RESUME = {"data.folder", "data.num_workers", "data.split", "data.side", "model.flips", "model.window"}
# Scores and masks are made by one process.
SINGLE = {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
STRICT = {"exit_on_error": False}  # of parsers: raise what is wrong, without the usage


class Lab(LightningCLI):
    """LightningCLI whose state is a run folder."""

    # The command line.

    def init_parser(self, verb: str = "", **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        add = parser.add_argument
        if verb == "fit":
            add("--run", type=Path | None, help="run folder (default: runs/TASK-NETWORK)")
            add("--resume", action="store_true", help="go on from the last checkpoint of the run, if there is one")
        elif verb:
            add("--run", type=Path | None, help="run folder of fit, or one of its .ckpt files")
            add("--pretrained", type=str | None, help="instead of a run, weights of kan_mamba_layers.list_pretrained()")
        if verb == "test":
            add(
                "--out", type=Path | None, help="folder for the scores and masks (default: RUN/SIDE, or runs/NAME/SIDE)"
            )
        if verb == "predict":
            add("inputs", nargs="+", type=Path, help="images, volumes (.mha, .nii, .nii.gz), or folders of them")
            add("--out", type=Path, default=Path("predictions"), help="folder for masks, overlays and predictions.csv")
            add("--overwrite", action="store_true", help="write into --out although it holds files")
            add("--pixel_size", type=PositiveFloat | None, help="millimetres per pixel, to measure heads")
            add("--pixel_size_csv", type=Path | None, help="columns filename, pixel size(mm), as in HC18")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.task", "model.task")
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("seed_everything", "data.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"ckpt_path", "weights_only", "verbose", "return_predictions"}
        return {verb: hidden | own for verb, own in LightningCLI.subcommands().items() if verb != "validate"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        self.config = parser.parse_args(with_config_of_run(sys.argv[1:] if args is None else list(args)))
        self.settings = self.config[self.config.subcommand]  # what was asked for, defaults included

    # What is checked before anything is made.

    def before_instantiate_classes(self) -> None:
        data, trainer = self.settings.data, self.settings.trainer
        for name in ("folder", "split"):  # so that the run may be used from wherever
            data[name] = data[name] and data[name].absolute()
        if str(trainer.precision) in PRECISIONS:
            raise ValueError(f"trainer.precision {trainer.precision} is not supported: use 32-true or bf16-mixed")
        if self.subcommand == "fit":
            self.run_folder = self.settings.run or Path("runs", f"{data.task}-{self.settings.model.network}")
            self.check_fit()
            return
        if self.settings.pretrained:
            self.run_folder, self.checkpoint = weights_folder(self.settings.pretrained), None
        else:
            self.run_folder, self.checkpoint = runs.find_run(self.settings.run)
        for name, value in SINGLE.items():
            trainer[name] = value
        if self.subcommand == "test":
            self.check_test()
        elif (self.settings.pixel_size_csv or self.settings.pixel_size) and data.task != "fetal_head":
            raise ValueError(f"pixel sizes measure heads, but {str(self.run_folder)!r} is of {data.task}")

    def check_fit(self) -> None:
        run, trainer = self.run_folder, self.settings.trainer
        usual = inspect.signature(lightning.Trainer).parameters
        for name in FIXED:
            if trainer[name] != usual[name].default:
                raise ValueError(f"trainer.{name} {trainer[name]} would skip validations: leave it out")
        if trainer.max_steps == -1 and trainer.max_epochs is not None and trainer.max_epochs < 1:
            raise ValueError(f"trainer.max_epochs {trainer.max_epochs} must be at least 1")
        if rank_zero_only.rank == 0 and runs.holds_files("run", run):  # other processes start when the folder is there
            if not self.settings.resume:
                raise FileExistsError(
                    f"run {str(run)!r} is not empty: add --resume to continue that run, or give another --run"
                )
            runs.check_resumed(run, self.dumped(), FREE_ON_RESUME)

    def check_test(self) -> None:
        """On the data of its run, a test follows the run's split; on other data all images are scored."""
        run, data, out = self.run_folder, self.settings.data, self.settings.out
        own_split, name = run / "split.json", run.resolve().name
        own = runs.read_config(run)["data"] if self.checkpoint else {}
        folders = [path and Path(path).resolve() for path in (data.folder, own.get("folder"))]
        if self.checkpoint and folders[0] == folders[1] and str(data.split) in ("None", str(own.get("split"))):
            data.split = own_split  # a copy of the one that the run followed
        data.limit = None
        data.side = data.side or ("all" if data.split is None else "test")
        words = [folders[0].name] if folders[0] and data.split != own_split else []
        chosen = [self.checkpoint.stem] if self.checkpoint and self.checkpoint.stem != "best" else []
        words += [data.side, *chosen, *self.options()]
        self.out = out or (run if self.checkpoint else Path("runs", name)) / "-".join(words)
        if runs.holds_files("out", self.out) and out and runs.read_json(out / "scores.json").get("run") != name:
            raise FileExistsError(f"out {str(out)!r} holds files that are no scores of {name!r}: give another")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        settings, run = self.settings, self.run_folder
        trainer = self.config_init[self.subcommand].trainer
        callbacks = list(trainer.callbacks or [])
        if trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        kwargs |= {"callbacks": callbacks, "default_root_dir": run}
        if self.subcommand == "fit":
            keep = {"enable_version_counter": False, "auto_insert_metric_name": False, "dirpath": run / "checkpoints"}
            callbacks += [
                EpochSeed(settings.seed_everything),
                History(run / "history.csv"),
                Checkpoints(filename="best", monitor="val/dice", mode="max", **keep),
                Checkpoints(filename="last", **keep),  # after the best one, so that it knows of it
            ]
            if trainer.max_steps != -1:
                callbacks.append(WholeEpochs(trainer.max_steps))
                kwargs["max_steps"] = -1
            kwargs["plugins"] = [WholeFiles(), *(trainer.plugins or ())]
            if trainer.logger in (None, True):
                kwargs["logger"] = TensorBoardLogger(run, name="tensorboard", version="")
        elif self.subcommand == "test":
            split = settings.data.split
            facts = {"run": run.resolve().name, "side": settings.data.side, "options": self.options()}
            facts |= {"checkpoint": self.checkpoint and self.checkpoint.name}
            facts |= {"split_sha256": split and splits.split_hash(splits.read_split(split))}
            self.writer = ScoreWriter(self.out, self.facts() | facts)
            callbacks.append(self.writer)
        else:
            table = settings.pixel_size_csv
            self.writer = MaskWriter(settings.out, read_pixel_sizes(table) if table else {}, settings.pixel_size)
            callbacks.append(self.writer)
        return super().instantiate_trainer(**kwargs)

    # The commands.

    def fit(self, model: Segmentation, datamodule: SegmentationData) -> None:
        """Train, score the best epoch on the validation subjects, and leave the run folder behind."""
        run, trainer, resume = self.run_folder, self.trainer, self.settings.resume
        own_split = run / "split.json"
        if resume and own_split.exists():
            splits.refuse_other_split(datamodule.split, own_split)
            datamodule.split = own_split  # so that no subject moves to another side
        datamodule.setup("fit")
        if weights := self.settings.model.pretrained:
            splits.warn_of_weights(datamodule.test_items, weights_folder(weights) / "split.json")
        continued, refused = runs.latest_checkpoint(run / "checkpoints") if resume else (None, [])
        for sentence in refused:
            say(sentence, "yellow")
        if continued is not None:
            datamodule.first_epoch = runs.read_checkpoint(continued)["epoch"] + 1
        undone = runs.taken_back if trainer.is_global_zero and not resume else nullcontext
        if trainer.is_global_zero:
            run.mkdir(parents=True, exist_ok=True)
            with runs.whole_file(run / "config.yaml") as draft:
                draft.write_text(yaml.safe_dump(self.dumped(), sort_keys=False), encoding="utf-8")
            splits.write_split(own_split, datamodule.table)
        say(
            f"{model.task.title}: {self.settings.model.network}, {count_parameters(model) / 1e6:.2f} M parameters, "
            f"{len(datamodule.train_set)} training, {len(datamodule.val_set)} validation and "
            f"{len(datamodule.test_items)} test images, "
            + (f"resuming from {continued}" if continued else f"run folder {run}")
        )
        command = shlex.join(["python", "examples/lab.py", "fit", "--run", str(run), "--resume"])
        with told_of_interrupts(trainer, f"Go on with:\n    {command}"), undone(run):
            trainer.fit(model, datamodule=datamodule, ckpt_path=continued, weights_only=True)
        if trainer.is_global_zero:
            console.print(scores_table(f"{run}, validation", self.finish(model, datamodule)))
            say(f"scores, curves and pictures are in {run}")

    def finish(self, model: Segmentation, data: SegmentationData) -> dict[str, Any]:
        """Write metrics.json, curves.png, cases.png, and the network itself in `model/` if it is one of ours.

        All is read from the files of the run, which the processes of a training leave behind.
        """
        run, settings, rows = self.run_folder, self.settings, pd.read_csv(self.run_folder / "history.csv")
        best, last = (runs.read_checkpoint(run / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
        model.load_state_dict(best["state_dict"])
        sides = {side: [item for item in data.items if item.split == side] for side in splits.SIDES}
        facts = {
            **{"model_args": settings.model.model_args or {}, "seed": settings.seed_everything},
            "parameters": count_parameters(model.network),
            "multiply_adds": multiply_adds(model.network, model.task.in_channels, settings.data.image_size),
            "images": {side: len(items) for side, items in sides.items()},
            "subjects": {side: len({item.group for item in items}) for side, items in sides.items()},
            "split_sha256": splits.split_hash(data.table),
            **{"epochs": len(rows), "steps": last["global_step"], "best_epoch": best["epoch"] + 1},
            "seconds": round(rows["seconds"].sum(), 1),
            "metrics": best["scores"],
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        runs.write_json(run / "metrics.json", self.facts() | facts | runs.provenance(self.trainer.strategy.root_device))
        draw_curves(run / "curves.png", {settings.model.network: [rows]}, settings.model.loss)
        items = data.val_set.items[:: max(1, len(data.val_set) // 3)][:3]
        draw_cases(run / "cases.png", [model.case_of(item.id, item) for item in items])
        if hasattr(model.network, "save_pretrained"):
            model.segmenter().save_pretrained(run / "model")
        return best["scores"]

    def test(self, model: Segmentation, datamodule: SegmentationData) -> None:
        """Score the best epoch, or the checkpoint that was named, on images that its training never touched."""
        self.writer.facts["epoch"] = self.load(model)
        datamodule.setup("test")
        own_split = self.run_folder / "split.json"
        if remark := splits.refuse_seen(datamodule.test_items, own_split, self.settings.data.split):
            say(remark, "yellow")
        with told_of_interrupts(self.trainer, f"Nothing was scored: remove {self.out} before it is --out again"):
            self.trainer.test(model, datamodule=datamodule, verbose=False)
        scores = self.writer.scores
        title = f"{scores['network']}, {scores['images']} images of {scores['data']}, {scores['side']}"
        console.print(scores_table(title, scores))
        for image in scores["unreadable_images"]:
            say(f"left out: {image['id']}: {image['reason']}", "yellow")
        say(f"scores, masks and cases are in {self.out}")

    def predict(self, model: Segmentation, datamodule: SegmentationData) -> None:
        """Write the masks of all inputs; what cannot be read is named and counted."""
        out = self.settings.out
        self.load(model)
        datamodule.inputs = self.settings.inputs
        datamodule.setup("predict")
        check_outputs(datamodule.predict_dataloader().dataset, self.settings.pixel_size_csv, out)
        if runs.holds_files("out", out) and not self.settings.overwrite:
            raise FileExistsError(f"out {str(out)!r} is not empty: add --overwrite, or give another folder")
        out.mkdir(parents=True, exist_ok=True)
        with told_of_interrupts(self.trainer, f"What was predicted is in {out}"):
            self.trainer.predict(model, datamodule=datamodule, return_predictions=False)
        rows, unreadable = self.writer.rows, self.writer.unreadable
        say(f"{len(rows)} of {len(rows) + len(unreadable)} files predicted, in {out}")
        for entry in unreadable:
            say(f"skipped: {entry['reason']}", "yellow")
        if self.writer.silent and (self.checkpoint is None or not datamodule.cuts):
            say(f"taken as stored, for no header says how they lie: {', '.join(self.writer.silent)}", "yellow")
        if not rows:
            raise SystemExit(1)

    def load(self, model: Segmentation) -> int | None:
        """Give the network the weights of the run, and return their epoch; pretrained ones are there already."""
        if self.checkpoint is None:
            return None
        content = runs.read_checkpoint(self.checkpoint)
        self.datamodule.load_state_dict(content.get(type(self.datamodule).__qualname__, {}))
        try:
            model.load_state_dict(content["state_dict"])
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint {str(self.checkpoint)!r} does not fit the network of {self.run_folder / 'config.yaml'} "
                f"({self.settings.model.network}, {self.settings.model.model_args}): keep both from one run"
            ) from error
        return int(content["epoch"]) + 1

    def facts(self) -> dict[str, Any]:
        """What metrics.json and scores.json tell of the task and the data."""
        data, network = self.settings.data, self.settings.model.network
        name = data.folder.resolve().name if data.folder else "demo"
        return {"task": data.task, "network": network, "image_size": data.image_size, "data": name}

    def options(self) -> list[str]:
        """The options of the prediction that are switched on."""
        return [name for name in ("window", "flips") if self.settings.model[name]]

    def dumped(self) -> dict[str, Any]:
        """The settings as config.yaml holds them."""
        content = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["fit"]
        return {name: content[name] for name in ("seed_everything", "trainer", "model", "data")}


def with_config_of_run(args: list[str]) -> list[str]:
    """The arguments with the settings of the run in front, where one is tested, applied or resumed."""
    verb, *rest = args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, **STRICT)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--pretrained")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    known, _ = parser.parse_known_args(rest)
    if verb in ("test", "predict") and not known.help:
        if (known.run is None) == (known.pretrained is None):
            raise ValueError("give either the folder of a run with --run, or the name of weights with --pretrained")
        if known.pretrained is not None:
            return [verb, *pretrained_settings(known.pretrained), *rest]
    if known.run is None or known.help or verb not in Lab.subcommands():
        return args
    folder, _ = runs.find_run(known.run)
    if verb == "fit" and not (known.resume and (folder / "config.yaml").is_file()):
        return args
    runs.read_config(folder)  # names what is wrong with it
    return [verb, f"--config={folder / 'config.yaml'}", *rest]


def compare_runs(args: Sequence[str]) -> dict[str, Any]:
    """The command `compare`."""
    parser = jsonargparse.ArgumentParser(prog="lab.py compare", description="Compare the scores of runs.", **STRICT)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--on", default="test", help="the folder inside each run that its scores are in")
    parser.add_argument("--baseline", type=str | None, help="what the others are set against (default: unet)")
    settings = parser.parse_args(args)
    if runs.holds_files("out", settings.out) and (settings.out / "config.yaml").is_file():
        raise FileExistsError(f"out {str(settings.out)!r} is a run, whose curves.png must stay: give another folder")
    results, groups = compare(settings.runs, settings.on, settings.baseline)
    write_report(settings.out, results, groups)
    say(f"report in {settings.out / 'report.html'}")
    return results


def main(args: Sequence[str] | None = None) -> Lab | dict[str, Any]:
    """Run one command."""
    args = sys.argv[1:] if args is None else list(args)
    quieten()
    if args in ([], ["-h"], ["--help"]):
        say(str(__doc__).strip())
        return {}
    if args[0] == "compare":
        return compare_runs(args[1:])
    if args[0][0] != "-" and args[0] not in Lab.subcommands():
        raise ValueError(f"command {args[0]!r} is unknown: use {', '.join([*Lab.subcommands(), 'compare'])}")
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
    with mistakes_in_one_line():
        main()
