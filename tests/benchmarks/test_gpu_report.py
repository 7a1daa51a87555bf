"""The journals of sessions on a GPU become a record, a page, a plot and a list of failures by kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, report
from benchmarks.gpu import chart, page
from benchmarks.gpu.failures import kernels_of
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.summary import pick_counters, summarise
from benchmarks.gpu.tasks import Setting

GPU = {"name": "NVIDIA H100 80GB HBM3", "multiprocessors": 132, "memory_bytes": 80 << 30}
CROSS, KAN = "cross-b8-d32-128x128-n16-r1", "kan-65536x64-64-g5-bfloat16"
SIZES = {
    CROSS: {"b": 8, "h": 128, "w": 128, "d": 32, "n": 16, "r": 1},
    KAN: {"rows": 65536, "in": 64, "out": 64, "g": 5, "s": 3, "adaptive": 0},
}
# 4 * 8 * 128^2 * 32 * 16 exponentials at 1e12 a second, which is more than the 3.4e7 bytes take.
RATES = {"elements_per_second": 1e12, "copy_bytes_per_second": 1e12, "product_flops_per_second": {"bf16": 6e14}}
LIMIT = 268435456 / 1e12
PLANNED = {"check": ("scan2d/row/bf16", "tf32"), "train": ("fetal_head/unet_pp/2000",)}
TUNED = "b8 128x128 d32 n16 r1"
SECRET = "/home/alice/checkout/kernels.py"


class Day:
    """Journals as `gpu_day` writes them, with a clock of their own."""

    def __init__(self, folder: Path, device: str = "cuda") -> None:
        self.folder, self.device, self.now = folder, device, 100.0

    def session(self, part: str, minute: int, commit: str = "abc123", gpu: dict | None = GPU) -> None:
        machine = {"cpu": "A processor", "cores": 16, "gpu": gpu if self.device == "cuda" else None}
        versions = {"python": "3.11.7", "torch": "2.13.0", "cuda": "12.8", "triton": None, "commit": commit}
        date = f"2026-12-01T10:{minute:02}:00+00:00"
        found = {"device": self.device, "seconds": 60.0, "machine": machine, "versions": versions}
        tasks = [[name, 60.0, False] for name in PLANNED.get(part, ())]
        self.journal(part).append(event="session", run=date, part=part, date=date, tasks=tasks, **found)

    def task(self, part: str, name: str, seconds: float = 2.0, **end: object) -> None:
        self.journal(part).append(event="begin", task=name, pid=1, time=self.now)
        self.now += seconds
        self.journal(part).append(event="end", task=name, seconds=seconds, **{"status": "ok", **end})

    def journal(self, part: str) -> Journal:
        return Journal(self.folder / f"{part}.jsonl")


def row(case: str, candidate: str, mode: str, seconds: float | None, **more: object) -> dict:
    found = {
        **{"case": case, "suite": "kan" if case == KAN else "ops-b8", "device": "cuda", "dtype": "bfloat16"},
        **{"op": "kan_linear" if case == KAN else "cross_selective_scan", "sizes": SIZES[case], "axis": ""},
        **{"threads": 1, "candidate": candidate, "mode": mode, "error_limit": 0.02},
    }
    if seconds is None:
        return {**found, "status": "not measured", "reason": "not measured (not installed)", **more}
    timed = {"median_s": seconds, "quartiles_s": [seconds] * 3, "peak_bytes": 3 << 20}
    errors = {"output": 1e-3, "grad x": 2e-3, "grad D": 3e-3} if mode == "training" else {"output": 1e-3}
    return {**found, "status": "ok", "reason": "", "errors": errors, **timed, **more}


def check(day: Day) -> None:
    day.session("check", 0)
    good = {"errors": {"output": 1e-3, "grad x": 1e-3}, "allowed": {"output": 2e-3, "grad x": 4e-3}}
    day.task("check", "scan2d/row/bf16", **good)
    wrong = {"errors": {"output": 1e-3, "grad x": "inf"}, "allowed": {"output": 2e-3, "grad x": 4e-3}}
    day.task("check", "scan2d/pixel/fp32", status="failed", reason="it was run once more")
    day.task("check", "racecheck/scan", status="skipped", reason="compute-sanitizer is not installed here")
    day.journal("check").append(event="begin", task="offsets/batch", pid=1, time=day.now)
    day.session("check", 5)
    day.task("check", "scan2d/pixel/fp32", **good)
    saved = Setting(day.folder).save("scan1d/37/bf16", {"u": torch.zeros(2)})
    reason = "grad x: relative error inf, allowed 4.00e-03; wrong: grad x"
    day.task("check", "scan1d/37/bf16", status="wrong", reason=reason, inputs_saved=saved, **wrong)
    day.task("check", "kan/one/fp32", status="crashed", reason="its process ended with -11")
    day.task("check", "module/SS2D/fp16", status="failed", reason=f"OSError: no {SECRET}\n| told twice")
    fault = f"3 faults: Invalid __global__ read of size 4 bytes; at carry+0x1230 in {SECRET}:201"
    day.task("check", "memcheck/scan-chunks", status="wrong", reason=fault, output=SECRET)
    day.task("check", "offsets/batch", status="timeout", reason="not done after 180 s")
    for task, writes in (("memcheck/scan", 0), ("racecheck/merge", 2)):
        day.task("check", task, faults=0, shared_writes=writes)
    kernel = {"kernel": "scan", "warps": 1, "registers": 90, "spills": 0, "shared": 512, "instructions": {}}
    day.task("check", "resources", kernels=[kernel, {**kernel, "registers": 255, "spills": 24}], spilling=["scan"])
    with day.journal("check").path.open("ab") as file:
        file.write(b'{"event": "end", "task": "tf32", "stat')


def speed(day: Day) -> None:
    day.session("speed", 10)
    day.task("speed", "limits", rates=RATES)
    rows = []
    for mode, factor in (("forward", 1), ("training", 3)):
        rows += [
            row(CROSS, "triton", mode, 1e-3 * factor),
            row(CROSS, "chunked", mode, 4e-3 * factor),
            row(CROSS, "VMamba CUDA", mode, 2e-3 * factor),
            row(CROSS, "mamba_ssm CUDA", mode, None),
        ]
    day.task("speed", f"time/{CROSS}/bfloat16", rows=rows)
    wrong = {"status": "wrong", "reason": "not timed: relative error 5.0e-01 of grad x", "errors": {"output": 0.001}}
    rows = [
        row(KAN, "triton", "forward", 1e-3),
        row(KAN, "gemm", "forward", 5e-4),
        row(KAN, "triton", "training", 1e-3, **{**wrong, "errors": {"output": 1e-3, "grad x": float("inf")}}),
        row(KAN, "gemm", "training", 2e-3, saved_bytes=7),
        row(KAN, "efficient-kan", "training", 8e-3),
    ]
    day.task("speed", f"time/{KAN}/bfloat16", rows=rows)


def tune(day: Day) -> None:
    day.session("tune", 20)
    choice = {
        "fields": ["block", "chunk", "pair", "warps", "stages"],
        "times": [[[32, 256, True, None, None], 3e-4], [[32, 512, False, 2, None], 2e-4]],
        **{"today": [32, 256, True, None, None], "best": [32, 512, False, 2, None], "today_over_best": 1.5},
        "multiprocessors": 132,
    }
    wrong = [[32, 64, True, 4, None]]
    day.task("tune", f"warm/scan forward/{TUNED}", refused=[[128, 64, True, None, None]])
    reason = f"wrong results under {wrong}"
    day.task("tune", f"time/scan forward/{TUNED}", status="wrong", reason=reason, wrong=wrong, **choice)
    counters = {
        "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed [%]": "40.0",
        "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active [%]": "48.7",
        "gpu__time_duration.sum [us]": "812.3",
        "other": "1",
    }
    day.task("tune", "counters/scan", counters=counters)


def train(day: Day) -> None:
    day.session("train", 30)
    test = {"images": 88, "per_image": {"dice": {"mean": 0.9512}, "iou": {"mean": 0.91}}}
    test["circumference"] = {"mean_absolute_error_mm": 2.714, "no_ellipse": 1}
    cost = {"steps": 2000, "train_seconds": 93.2, "seconds_per_step": 0.0466, "curves": {"epoch": [1, 2]}}
    day.task("train", "fetal_head/unet/2000", test=test, **cost)
    day.task("train", "isic2017/unet/2000", **cost)
    day.task("train", "lumbar_spine/unet/2000", status="failed", reason="RuntimeError: the training ended with 1")
    day.journal("train").append(event="progress", task="isic2017/unet_pp/2000", curves={"epoch": [1, 9]})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a day of four parts."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("day")
    day = Day(folder / "came back")
    for part in (check, speed, tune, train):
        part(day)
    gpu_report.main([str(day.folder), "--name", "h100", "--results", str(folder)])
    report.main([str(folder / "gpu-h100.json"), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def content(written: Path) -> dict:
    return json.loads((written / "gpu-h100.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return (written / "gpu-h100.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands under a title, up to the next one."""
    return re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


class TestFile:
    def test_with_what_and_when(self, content):
        assert (content["schema"], content["kind"], content["name"]) == (2, "gpu sessions", "h100")
        assert content["date"] == "2026-12-01T10:00:00+00:00" and content["device"] == "cuda"
        assert content["machine"]["gpu"] == GPU and content["versions"]["commit"] == "abc123"
        assert list(content["parts"]) == ["check", "speed", "tune", "train"]

    def test_sessions_of_a_part_are_merged(self, content):
        part = content["parts"]["check"]
        assert part["counts"] == {"ok": 5, "skipped": 1, "wrong": 2, "failed": 1, "crashed": 1, "timeout": 1}
        assert [session["allowed_s"] for session in part["sessions"]] == [60.0, 60.0]
        assert [session["used_s"] for session in part["sessions"]] == [6.0, 18.0]
        assert "scan2d/pixel/fp32" not in {failure["task"] for failure in content["failures"]}
        assert "tf32" in part["left"] and "scan2d/row/bf16" not in part["left"]
        assert "fetal_head/unet_pp/2000" in content["parts"]["train"]["left"]

    def test_rows_keep_what_is_shown(self, content):
        scan, kan = (case["rows"] for case in content["parts"]["speed"]["cases"])
        timed = {"median_s": 0.001, "quartiles_s": [0.001] * 3, "peak_bytes": 3 << 20, "errors": {"output": 1e-3}}
        assert scan[0] == {"candidate": "triton", "mode": "forward", **timed}
        assert scan[4]["errors"] == {"output": 1e-3, "gradients": 3e-3} and kan[2]["errors"]["gradients"] == "inf"
        assert scan[3]["status"] == "not measured" and kan[3]["saved_bytes"] == 7
        assert "curves" not in content["parts"]["train"]["runs"][0]

    def test_a_scan_has_a_limit(self, content):
        scan, kan = content["parts"]["speed"]["cases"]
        assert scan["limit_s"] == pytest.approx(LIMIT, rel=1e-3) and "limit_s" not in kan

    def test_names_no_user_host_or_path(self, written):
        for name in ("gpu-h100.json", "gpu-h100.md", "gpu-h100-speed.svg"):
            found = (written / name).read_text(encoding="utf-8")
            assert not any(word in found for word in ("alice", "/home", "host.example", str(written)))
        assert '"/' not in (written / "gpu-h100.json").read_text(encoding="utf-8")


class TestFailures:
    @pytest.mark.parametrize(
        ("kernel", "told"),
        [
            ("scan_backward", "`scan1d/37/bf16` | wrong | grad x: relative error inf"),
            ("scan", "`offsets/batch` | timeout | not done after 180 s"),
            ("scan", f"`time/scan forward/{TUNED}` | wrong"),
            ("carry", "`memcheck/scan-chunks` | wrong | 3 faults"),
            (
                "kan_forward",
                "`kan/one/fp32` | crashed | its process ended with -11 | `grad_input`, `grad_weights` | no",
            ),
            ("grad_input", f"`time/{KAN}/bfloat16` | wrong | training: not timed: relative error 5.0e-01 of grad x"),
            ("module SS2D", "`module/SS2D/fp16` | failed | OSError: no kernels.py &#124; told twice"),
            ("training", "`lumbar_spine/unet/2000` | failed"),
        ],
    )
    def test_are_told_under_their_kernel(self, text, kernel, told):
        assert told in section(text, kernel)

    def test_saved_inputs_are_told(self, text, content):
        assert [f["task"] for f in content["failures"] if f["inputs_saved"]] == ["scan1d/37/bf16"]
        assert re.search(r"`scan1d/37/bf16` .* \| yes \|", text)

    @pytest.mark.parametrize(
        ("part", "task", "reason", "kernels"),
        [
            ("check", "scan2d/row/bf16", "output: relative error 1, allowed 0; wrong: output, grad x", "scan"),
            ("check", "plans/b1", "the same call again under Plan(block=32, chunk=16): last differs by 1e-3", "scan"),
            ("check", "again/scan1d/1500", "repetition 3: grad u differs by 1e-3", "scan_backward"),
            ("check", "kan/one/fp32", "grad bias: x; wrong: grad bias, grad x", "grad_input grad_weights"),
            ("check", "compiled/kan/knots linear", "under torch.compile: output differs by 1", "kan_forward"),
            ("check", "offsets/batch back", "not done", "scan_backward"),
            ("check", "memcheck/grad_input-knots", "2 faults", "grad_input"),
            ("check", "racecheck/scan-chunks", "2 faults", "scan chunk_ends carry merge"),
            ("check", "racecheck/scan", "1 faults: Race at 0x12 in file.py:30:merge", "merge"),
            ("check", "module/KANLinear adaptive/fp32", "", "module KANLinear adaptive"),
            ("check", "tests", "3 of 9 tests fail", "tests of the project"),
            ("speed", "warm/model-km_unet_base-b1-256x256/float32", "", "module km_unet_base"),
            ("speed", "limits", "", "limits"),
            ("tune", "time/scan backward/b8", "", "scan_backward"),
            ("tune", "warm/kan grad_weights/9x4 float32", "", "grad_weights"),
            ("tune", "counters/kan_forward", "", "kan_forward"),
        ],
    )
    def test_kernels_of(self, part, task, reason, kernels):
        found = kernels_of(part, task, reason)
        steps = ("step_sizes", "step_gradients") if kernels == "scan_backward" else ()
        assert " ".join(found) == kernels or found == (kernels, *steps, "chunk_ends", "carry", "merge")


class TestPage:
    def test_environment(self, text):
        assert text.startswith("# Measured on NVIDIA H100 80GB HBM3\n")
        assert "80 GiB, 132 multiprocessors; python 3.11.7, torch 2.13.0, cuda 12.8; commit abc123." in text
        assert "1000 G exponentials per second. TFLOP/s of a large product: bf16 600." in text

    def test_check(self, text):
        found = section(text, "Check")
        assert "| `scan2d` | 0.5, output of `pixel` | 0.5, output of `row` |  |" in found
        assert "| `scan1d` |  | inf, grad x of `37` |  |" in found
        assert "| `racecheck/scan` | compute-sanitizer is not installed here |" in found
        assert "| `scan` | 2 | 1 | 255 | 24 | 512 |" in found
        assert "memory checkers found no fault in `memcheck/scan`, `racecheck/merge`." in found
        assert "In `racecheck/merge` lanes write to one address" in found

    def test_times_limits_and_memory(self, text):
        forward = section(text, "Scans, batch 8, bfloat16, forward")
        assert f"| `{CROSS}` | 1 (1x) | 4 (4x) | 2 (2x) |" in forward
        assert f"| `{CROSS}` | 0.268 | 26.8 % | 6.7 % | 13.4 % |" in forward
        assert f"| `{CROSS}` | 3.0 | 3.0 | 3.0 |" in forward
        assert "* Not measured (not installed): mamba_ssm CUDA." in forward
        kan = section(text, f"`{KAN}`")
        assert "| triton | 1 | 2x |  | wrong |  |  | 3.0 | 3.0 |  | 1.0e-03 | inf |" in kan
        assert re.search(r"\| efficient-kan \| . \|  \|  \| 8 \| 4x \| 1x \|", kan)

    def test_choices(self, text):
        told = "block 32, chunk 256, pair | chunk 512, no pair, warps 2 | 2 | 0.3 | 0.2 | 1.5x"
        assert f"| `{TUNED}` | {told} |" in section(text, "scan forward")
        assert "block 32, chunk 64, pair, warps 4, default stages" in text
        assert f"| `scan forward/{TUNED}` | 1 |" in text
        assert "| `scan` | 812.3 us | 48.7 |" in text
        assert "values 1024, enough 4, wanted 8, pair_steps 64 | 1.5 | 1.5 |" in text  # though `rule` was not reached

    def test_trainings(self, text):
        found = section(text, "Trainings")
        assert "| fetal_head | `unet` | 2000 | 93 | 46.6 | 0.951 | 0.910 | 2.71 | 1 |" in found
        assert "| isic2017 | `unet` | 2000 | 93 | 46.6 |  |  |  |  |" in found
        assert "| `isic2017/unet_pp/2000` | 9 |" in found

    def test_several_machines_and_commits_are_told(self, tmp_path):
        day = Day(tmp_path)
        day.session("check", 0)
        day.session("check", 9, commit="def456", gpu={**GPU, "name": "NVIDIA H200"})
        found = page.environment(summarise(tmp_path, "x"))
        assert "commit abc123, def456." in found
        assert "several GPUs, NVIDIA H100 80GB HBM3, NVIDIA H200: times of different sessions do not compare" in found

    def test_counters_that_are_not_there_are_left_out(self):
        assert pick_counters({}) == {}
        assert pick_counters({"x__warps_active.avg.pct [%]": "37.9"}) == {"occupancy, %": "37.9"}


class TestPlotAndTerminal:
    def test_the_plot_is_written_and_shown(self, written, text):
        assert "](gpu-h100-speed.svg)" in text
        assert "128x128, 32 channels, 16 states" in (written / "gpu-h100-speed.svg").read_text(encoding="utf-8")

    def test_the_plot_has_multiples_of_our_time_whatever_came_first(self, content, tmp_path):
        speed = content["parts"]["speed"]
        cases = [{**case, "rows": case["rows"][::-1]} for case in speed["cases"]]
        assert chart.plot({"parts": {"speed": {**speed, "cases": cases}}}, tmp_path / "speed.svg")
        found = re.findall(r"<!-- ([\d.]+(?:x| ms)) -->", (tmp_path / "speed.svg").read_text(encoding="utf-8"))
        assert sorted(found) == ["2x", "3 ms", "4x"]

    def test_no_plot_without_times(self, tmp_path):
        day = Day(tmp_path / "day")
        check(day)
        gpu_report.main([str(day.folder), "--name", "x", "--results", str(tmp_path)])
        report.main([str(tmp_path / "gpu-x.json"), "--out", str(tmp_path)])
        assert {path.name for path in tmp_path.glob("gpu-x*")} == {"gpu-x.json", "gpu-x.md"}

    def test_the_terminal_tells_failures_and_headlines(self, content):
        told = page.terminal(content).splitlines()
        assert told[0].startswith("check: 5 ok, 1 skipped, 2 wrong")
        assert told[told.index("carry: 1 failures") + 1].split()[:3] == ["wrong", "check", "memcheck/scan-chunks:"]
        assert "the fastest alternative takes 2 times our time" in told[-2]
        assert told[-1].startswith("The chosen plans and tiles take 1.5 times")


class TestCommandLine:
    @pytest.fixture
    def rehearsal(self, tmp_path: Path) -> Path:
        day = Day(tmp_path / "day", device="cpu")
        tune(day)
        return day.folder

    def test_a_rehearsal_goes_nowhere_by_itself(self, rehearsal, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match=r"rehearsal on a CPU .*: give --results DIR"):
            gpu_report.main([str(rehearsal), "--name", "x"])
        assert {path.name for path in tmp_path.iterdir()} == {"day"}

    def test_a_rehearsal_says_so(self, rehearsal, tmp_path):
        gpu_report.main([str(rehearsal), "--name", "x", "--results", str(tmp_path)])
        report.main([str(tmp_path / "gpu-x.json"), "--out", str(tmp_path)])
        title, first, *_ = (tmp_path / "gpu-x.md").read_text(encoding="utf-8").split("\n\n")
        assert title == "# A rehearsal on a CPU, no measurements: x"
        assert first.startswith("These are no measurements")

    def test_what_cannot_be_reported(self, tmp_path):
        with pytest.raises(SystemExit):
            gpu_report.main([str(tmp_path), "--name", "a/b"])
        with pytest.raises(ValueError, match="holds no session of check"):
            gpu_report.main([str(tmp_path), "--name", "x"])
        Day(tmp_path).session("check", 0)
        Day(tmp_path, device="cpu").session("tune", 1)
        with pytest.raises(ValueError, match="mixes the devices cpu, cuda"):
            gpu_report.main([str(tmp_path), "--name", "x"])
