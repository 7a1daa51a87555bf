"""The trainings of a GPU day: what is trained in which order, with which flags, and what is kept of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from benchmarks.gpu import train  # noqa: E402
from benchmarks.gpu.tasks import Setting, Skip  # noqa: E402
from kan_mamba_layers import from_pretrained  # noqa: E402
from segmentation.networks import build_network  # noqa: E402
from segmentation.tasks import get_task  # noqa: E402


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path / "out", data=tmp_path / "data", runs=tmp_path / "runs", steps=20)


class TestCases:
    def test_every_network_on_every_task_before_anything_longer(self, setting):
        cases = train.cases(setting)
        assert [case.steps for case in cases] == [20] * 18 + [100] * 6
        assert [(case.task, case.model) for case in cases[:4]] == [
            *((task, "km_unet_pp_tiny") for task in ("isic2017", "fetal_head", "lumbar_spine")),
            ("isic2017", "unet"),
        ]
        assert {(case.task, case.model) for case in cases} == {
            (task, m) for task in train.FOLDERS for m in train.MODELS
        }

    def test_names_are_unique_and_limits_leave_a_second_a_step(self, setting):
        tasks = list(train.tasks(setting))
        assert len({task.name for task in tasks}) == len(tasks) == 24
        assert all(task.limit > int(task.name.split("/")[-1]) and not task.alone for task in tasks)

    def test_a_rehearsal_is_short(self, setting):
        assert len(list(train.tasks(replace(setting, device="cpu")))) == 1

    def test_without_data_nothing_is_trained(self, setting):
        with pytest.raises(Skip, match="data is not given: add --data DIR, a folder that holds isic2017, hc18, lumbar"):
            train.train_and_score(train.cases(setting)[0], replace(setting, data=None))


class TestFlags:
    def flags(self, case: train.Case, setting: Setting) -> dict[str, str]:
        verb, *flags = train.training_flags(case, setting, setting.runs / "x", 3)
        assert verb == "fit"
        return dict(flag.removeprefix("--").split("=") if "=" in flag else (flag, "") for flag in flags)

    def test_every_case_says_what_it_is(self, setting):
        for case in train.cases(setting):
            flags = self.flags(case, setting)
            expected = {
                "data.task": case.task,
                "data.folder": str(setting.data / train.FOLDERS[case.task]),
                "data.image_size": "256",
                "data.num_workers": "3",
                "model.network": case.model,
                "trainer.accelerator": "gpu",
                "trainer.max_steps": str(case.steps),
                "run": str(setting.runs / "x"),
            }
            assert expected.items() <= flags.items()
            assert "--resume" in flags
            assert json.loads(flags.get("model.model_args", "{}")) == case.model_args

    def test_the_recipe_is_that_of_the_experiments(self, setting):
        for case in train.cases(setting):
            flags = self.flags(case, setting)
            experiment = yaml.safe_load((ROOT / "examples" / "configs" / f"{case.task}.yaml").read_text())
            for name, value in experiment["data"].items():
                assert flags[f"data.{name}"] == str(value)
            assert "model" not in experiment
            assert experiment["trainer"].keys() == {"max_epochs"}

    def test_a_rehearsal_needs_neither_data_nor_a_gpu(self, setting):
        rehearsal = replace(setting, device="cpu", data=None)
        flags = self.flags(train.cases(rehearsal)[0], rehearsal)
        assert (flags["trainer.accelerator"], flags["trainer.max_steps"]) == ("cpu", "2")
        assert "data.folder" not in flags
        assert train.data_workers(rehearsal) == 0
        assert train.environment(rehearsal)["CUDA_VISIBLE_DEVICES"] == ""

    def test_little_shared_memory_leaves_the_augmentation_to_the_training(self, setting, monkeypatch):
        usage = train.shutil.disk_usage("/")
        monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage._replace(free=1 << 26))
        assert train.data_workers(setting) == 0


class TestProcess:
    def execute(self, tmp_path: Path, code: str, arguments: list[str], meanwhile=lambda: None) -> None:
        (tmp_path / "lab.py").write_text(code)
        variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
        train.execute([arguments], tmp_path / "logs" / "run.log", variables, meanwhile)

    def test_a_failure_comes_with_the_last_lines(self, tmp_path):
        code = "def main(args):\n    print('x' * 5000)\n    raise ValueError(f'no such {args[0]}')"
        with pytest.raises(RuntimeError, match="ended with 1, its output with\n") as error:
            self.execute(tmp_path, code, ["thing"])
        assert str(error.value).rstrip().endswith("ValueError: no such thing")
        assert len(str(error.value)) < 2000

    def test_progress_is_noted_meanwhile(self, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "PROGRESS", 0.05)
        looks: list[int] = []
        self.execute(tmp_path, "import time\ndef main(args): time.sleep(0.5)", [], lambda: looks.append(1))
        assert len(looks) > 1

    def test_an_interrupt_ends_the_training(self, tmp_path, monkeypatch):
        started: list[subprocess.Popen] = []
        popen = subprocess.Popen

        def start(*args, **kwargs):
            started.append(popen(*args, **kwargs))
            return started[-1]

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(train.subprocess, "Popen", start)
        monkeypatch.setattr(train, "PROGRESS", 0.05)
        with pytest.raises(KeyboardInterrupt):
            self.execute(tmp_path, "import time\ndef main(args): time.sleep(60)", [], interrupt)
        assert started[0].poll() == -9


class TestRecord:
    def write_run(self, run: Path, epochs: int) -> None:
        (run / "test").mkdir(parents=True)
        facts = dict.fromkeys(
            ("task", "network", "model_args", "image_size", "seed", "parameters", "data", "images"), 0
        )
        facts |= dict.fromkeys(("subjects", "split_sha256", "epochs", "best_epoch", "device", "versions"), 0)
        facts |= {"steps": 20, "seconds": 5.0, "metrics": {"per_image": {"dice": 0.5}}, "command": "", "date": ""}
        (run / "metrics.json").write_text(json.dumps(facts))
        scores = {"run": "x", "images": 3, "per_image": {"dice": {"mean": 0.4}}, "circumference": {"images": 3}}
        (run / "test" / "scores.json").write_text(json.dumps(scores))
        rows = [f"{k},0.123456,{1 / k},{k / 100},1.5,9" for k in range(1, epochs + 1)]
        (run / "history.csv").write_text("\n".join(["epoch,train/loss,val/loss,val/dice,seconds,val/iou", *rows]))

    def test_scores_speed_and_curves(self, tmp_path):
        self.write_run(tmp_path, 100)
        record = train.read_record(tmp_path)
        assert record["seconds_per_step"] == 0.25
        assert record["validation"] == {"per_image": {"dice": 0.5}}
        assert record["test"] == {"images": 3, "per_image": {"dice": {"mean": 0.4}}, "circumference": {"images": 3}}
        assert "command" not in record
        assert record["curves"]["epoch"] == [*range(1, 101, 3)]
        assert record["curves"]["val/dice"][-1] == 1.0
        assert record["curves"]["train/loss"][0] == 0.1235
        assert len(json.dumps(record)) < 5000

    @pytest.mark.parametrize("epochs", [1, 39, 40, 41, 1000])
    def test_curves_are_short_and_reach_the_last_epoch(self, tmp_path, epochs):
        self.write_run(tmp_path, epochs)
        curve = train.read_curves(tmp_path)["epoch"]
        assert min(epochs, 20) <= len(curve) <= train.CURVE_ROWS
        assert curve[-1] == epochs

    def test_no_curve_before_the_first_epoch(self, tmp_path):
        assert train.read_curves(tmp_path) == {}


class TestWeights:
    def folder(self, path: Path, size: int) -> Path:
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(size))
        (path / "config.json").write_text("{}")
        return path

    def names(self, archive: Path) -> list[str]:
        with tarfile.open(archive) as tar:
            return sorted({name.rpartition("/")[0] for name in tar.getnames()})

    def test_networks_are_added_and_longer_trainings_take_the_place_of_shorter(self, tmp_path):
        archive, folder = tmp_path / "out" / "weights.tar", self.folder(tmp_path / "model", 5000)
        for name, version in (("a", "20"), ("b", "20"), ("a", "100"), ("a", "100")):
            assert train.keep(folder, name, version, archive)
        assert self.names(archive) == ["a/100", "b/20"]
        assert [path.name for path in archive.parent.iterdir()] == ["weights.tar"]

    def test_what_does_not_fit_stays_out(self, tmp_path):
        archive = tmp_path / "weights.tar"
        assert train.keep(self.folder(tmp_path / "small", 30_000), "a", "1", archive, most=80_000)
        before = archive.read_bytes()
        assert not train.keep(self.folder(tmp_path / "large", 60_000), "b", "1", archive, most=80_000)
        assert archive.read_bytes() == before
        assert train.keep(tmp_path / "small", "c", "1", archive, most=80_000)
        assert self.names(archive) == ["a/1", "c/1"]

    def test_an_interrupt_leaves_the_archive_whole(self, tmp_path, monkeypatch):
        archive, folder = tmp_path / "weights.tar", self.folder(tmp_path / "model", 5000)
        assert train.keep(folder, "a", "1", archive)
        before = archive.read_bytes()

        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            broken.setattr(train.os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                train.keep(folder, "b", "1", archive)
        assert archive.read_bytes() == before
        assert train.keep(folder, "b", "1", archive)  # and what the interrupt left behind is in nobody's way
        assert self.names(archive) == ["a/1", "b/1"]
        assert not list(tmp_path.glob("*.part"))

    def test_processes_take_turns(self, tmp_path):
        archive, folder = tmp_path / "weights.tar", self.folder(tmp_path / "model", 5000)
        context = multiprocessing.get_context("fork")
        crew = [context.Process(target=train.keep, args=(folder, f"{k}", "1", archive)) for k in range(8)]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        assert self.names(archive) == [f"{k}/1" for k in range(8)]

    def test_the_tiny_networks_of_all_tasks_fit(self, tmp_path):
        for case in train.cases(Setting(tmp_path)):
            if "tiny" in case.model and case.steps == Setting.steps:
                task, folder = get_task(case.task), tmp_path / case.name.replace("/", "-")
                build_network(case.model, task.in_channels, task.num_classes, **case.model_args).save_pretrained(folder)
                assert train.keep(folder, case.name.replace("/", "-"), "1", tmp_path / "weights.tar")


def test_a_rehearsal_trains_scores_and_keeps_a_network(tmp_path):
    setting = Setting(tmp_path / "out", device="cpu", runs=tmp_path / "runs")
    (task,) = train.tasks(setting)
    record = task.run(setting)
    assert json.loads(json.dumps(record)) == record
    assert (record["steps"], record["weights_kept"]) == (2, True)
    assert set(record["test"]["per_image"]) >= {"iou", "dice", "f1"}
    assert set(record["test"]["classes"]) == set(record["validation"]["classes"]) == {"L1", "L2", "L3", "L4", "L5"}
    with tarfile.open(setting.out / "weights.tar") as tar:
        tar.extractall(tmp_path / "kept", filter="data")
    from_pretrained(tmp_path / "kept" / "lumbar_spine-km_unet_pp_tiny" / "2")
