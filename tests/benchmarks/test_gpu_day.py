"""The kit for a GPU day, rehearsed on a CPU: killed parts go on, wrong kernels are caught, a hang costs one task."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers import release

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if release("triton") < (3, 7) and release("numpy") >= (2, 4):
    pytest.skip("needs numpy below 2.4 for the interpreter of Triton before 3.7", allow_module_level=True)

from benchmarks import gpu_day, gpu_report, report
from benchmarks.gpu import check, sanitizer, speed, tune
from benchmarks.gpu.archive import pack, unpack
from benchmarks.gpu.compare import judge, same_bits
from benchmarks.gpu.guards import between_nan, guarded
from benchmarks.gpu.journal import CRASHED, FAILED, OK, SKIPPED, TIMEOUT, WRONG, Journal
from benchmarks.gpu.rules import RULES, best_rules
from benchmarks.gpu.tasks import Setting, Skip, Task, Wrong, find_program
from benchmarks.gpu.workers import perform, start_worker, supervise, work
from benchmarks.measure import relative_l2

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("check", "speed", "tune", "train")


def start(*arguments: str, path: Path = ROOT) -> subprocess.Popen[bytes]:
    """`gpu_day` in a process group of its own, with the package at `path`."""
    paths = [str(path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "gpu_day", *arguments, "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, env=environment, cwd=path, start_new_session=True)


def wait_until(condition, seconds: float = 120.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def ends(folder: Path, part: str) -> list[dict]:
    return [record for record in Journal(folder / f"{part}.jsonl").records() if record["event"] == "end"]


class TestRehearsal:
    def test_every_part_starts_is_killed_goes_on_and_is_reported(self, tmp_path: Path) -> None:
        out, runs = tmp_path / "out", tmp_path / "runs"

        def kill_and_go_on(part: str) -> tuple[list[str], int, str]:
            """What had ended when the part was killed, and how its second run ended."""
            flags = (part, "--out", str(out), "--runs", str(runs), "--workers", "1")
            process = start(*flags)
            sign = "begin" if part == "train" else "end"  # there is one training only
            wait_until(lambda: any(r["event"] == sign for r in Journal(out / f"{part}.jsonl").records()))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            before = [end["task"] for end in ends(out, part)]
            process = start(*flags)
            printed = process.communicate(timeout=300)[0].decode()
            return before, process.returncode, printed

        with ThreadPoolExecutor() as pool:
            outcomes = dict(zip(PARTS, pool.map(kill_and_go_on, PARTS), strict=True))
        for part, (before, code, printed) in outcomes.items():
            assert code == 0, printed + (out / "log.txt").read_text()[-3000:]
            expected = {task.name for task in gpu_day.select(part, Setting(out=out, device="cpu", runs=runs))}
            done = [end["task"] for end in ends(out, part)]
            assert sorted(done) == sorted(expected), part  # each task has ended once
            assert set(before) <= set(done) and len(Journal(out / f"{part}.jsonl").records()) > len(done)
            assert {end["status"] for end in ends(out, part)} <= {OK, SKIPPED}
            assert sum(end["status"] == OK for end in ends(out, part)) >= 1
            assert sum(r["event"] == "session" for r in Journal(out / f"{part}.jsonl").records()) == 2
        sizes = {file.name: file.stat().st_size for file in out.rglob("*") if file.is_file()}
        assert len(sizes) <= 8 and max(sizes.values()) < 16 << 20, sizes

        gpu_report.main([str(out), "--name=rehearsal", f"--results={tmp_path}"])
        report.main([str(tmp_path / "gpu-rehearsal.json"), f"--out={tmp_path}"])
        result = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
        assert result["kind"] == "gpu sessions" and set(result["parts"]) == set(PARTS)
        assert "no measurements" in (tmp_path / "gpu-rehearsal.md").read_text()

    def test_a_wrong_kernel_is_caught_and_its_inputs_are_saved(self, tmp_path: Path) -> None:
        package = tmp_path / "kan_mamba_layers"
        shutil.copytree(ROOT / "kan_mamba_layers", package, ignore=shutil.ignore_patterns("__pycache__"))
        kernel = package / "ops" / "selective_scan" / "triton" / "forward_kernel.py"
        right, wrong = "* h + (dt * xt.to(tl.float32))", "* h - (dt * xt.to(tl.float32))"
        assert kernel.read_text().count(right) == 1
        kernel.write_text(kernel.read_text().replace(right, wrong))
        out = tmp_path / "out"
        process = start("check", "--out", str(out), "--tasks", "scan?d/*/fp32", path=tmp_path)
        printed = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 1 and "2 wrong" in printed
        found = {end["task"]: end for end in ends(out, "check")}
        assert {end["status"] for end in found.values()} == {WRONG} and len(found) == 2
        assert "output" in found["scan2d/pixel/fp32"]["reason"]
        saved = Journal(out / "failures.jsonl").records()
        inputs = unpack(next(record["tensors"] for record in saved if record["task"] == "scan2d/pixel/fp32"))
        expected = check.sweep.OPS["scan2d/pixel"].make()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)

    def test_tasks_have_names_of_their_own_and_most_telling_first(self) -> None:
        setting = Setting(out=Path("nowhere"))
        for part in PARTS:
            names = [task.name for task in gpu_day.select(part, setting)]
            assert len(set(names)) == len(names) > 10, part
        assert next(iter(check.tasks(setting))).name == "tests"
        kinds = {name.split("/")[0] for name in (task.name for task in check.tasks(setting))}
        suspects = {"offsets", "plans", "rounding", "again", "graph", "compiled", "refused", "resources", "tf32"}
        assert kinds >= suspects | {"scan2d", "scan1d", "kan", "basis", "module", "memcheck", "racecheck"}
        assert len({task.name for task in tune.tasks(setting) if task.name.startswith("time/scan forward")}) == 12
        cases = {case.suite for case, _ in speed.cases(setting)}
        assert cases == {"ops", "ops-b8", "blocks", "models", "kan"}


class TestJournal:
    def test_a_torn_line_is_left_out_and_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j.jsonl")
        journal.append(event="end", task="a", status=OK)
        with journal.path.open("a") as file:
            file.write('{"event": "end", "task": "b", "sta')
        journal.append(event="end", task="c", status=OK)
        assert list(journal.ends()) == ["a", "c"]

    def test_a_task_is_claimed_once_in_a_session_and_again_in_the_next_unless_it_ended(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j.jsonl")
        journal.append(event="session", run="1")
        assert journal.claim("a") and not journal.claim("a")
        assert journal.open_task(os.getpid())["task"] == "a"
        journal.append(event="session", run="2")
        assert journal.claim("a")
        journal.append(event="end", task="a", status=OK)
        assert journal.open_task(os.getpid()) is None
        journal.append(event="session", run="3")
        assert not journal.claim("a")

    def test_the_first_worker_of_a_run_starts_its_session(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j.jsonl")
        for run, number in (("a", 1), ("a", 2), ("b", 3)):
            journal.open_session(run, lambda number=number: {"tasks": [], "number": number})
        assert journal.session("a")["number"] == 1 and journal.session("b")["number"] == 3
        assert journal.session("c") is None

    def test_tensors_survive_as_text(self) -> None:
        tensors = {"x": torch.randn(3, 4).bfloat16(), "n": torch.tensor([float("nan"), 1.0])}
        back = unpack(pack(tensors))
        assert torch.equal(back["x"], tensors["x"]) and back["n"].isnan().tolist() == [True, False]

    def test_large_inputs_are_not_saved(self, tmp_path: Path) -> None:
        setting = Setting(out=tmp_path)
        assert setting.save("small", {"x": torch.randn(10)})
        assert not setting.save("large", {"x": torch.randn(1 << 20)})
        assert [record["task"] for record in Journal(tmp_path / "failures.jsonl").records()] == ["small"]


# What the workers of the next test run: a module of tasks that end in every way there is.
TASKS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.tasks import Setting, Skip, Task, Wrong
from benchmarks.gpu.workers import work

def skip(setting): raise Skip("not here")
def wrong(setting): raise Wrong("off by one", {{}}, by=1)
def broken(setting): raise ValueError("no such thing")
def lost(setting): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def crash(setting): os._exit(9)
def hang(setting): time.sleep(600)

TASKS = [
    Task("good", lambda setting: {{"pid": os.getpid()}}), Task("skip", skip), Task("wrong", wrong),
    Task("broken", broken), Task("lost", lost), Task("after", lambda setting: {{"pid": os.getpid()}}),
    Task("crash", crash), Task("hang", hang, limit=1.0), Task("last", lambda setting: None),
    Task("alone", lambda setting: None, alone=True),
]
if __name__ == "__main__":
    out = Path(sys.argv[1])
    alone = sys.argv[2] == "alone"
    plan = [[t.name, t.limit, t.alone] for t in TASKS]
    Journal(out / "j.jsonl").open_session("run", lambda: {{"tasks": plan}})
    sys.exit(work([t for t in TASKS if t.alone == alone], Journal(out / "j.jsonl"), Setting(out=out)))
"""


class TestWorkers:
    def test_a_crash_a_hang_and_a_lost_gpu_cost_one_task_each(self, tmp_path: Path) -> None:
        script = tmp_path / "some_tasks.py"
        script.write_text(TASKS.format(root=str(ROOT)))
        journal = Journal(tmp_path / "j.jsonl")

        def start(alone: bool) -> subprocess.Popen[bytes]:
            crew = "alone" if alone else "together"
            return start_worker([sys.executable, str(script), str(tmp_path), crew], tmp_path / "log.txt", {})

        assert supervise(journal, "run", start, workers=1, end=time.time() + 120)
        found = journal.ends()
        assert {name: end["status"] for name, end in found.items()} == {
            **{"good": OK, "skip": SKIPPED, "wrong": WRONG, "broken": FAILED, "lost": FAILED, "after": OK},
            **{"crash": CRASHED, "hang": TIMEOUT, "last": OK, "alone": OK},
        }
        assert found["good"]["pid"] != found["after"]["pid"]  # a lost context is left behind
        assert found["wrong"]["by"] == 1 and found["broken"]["reason"] == "ValueError: no such thing"

    def test_time_that_is_up_leaves_tasks_for_the_next_session(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j.jsonl")
        journal.open_session("run", lambda: {"tasks": [["a", 60.0, False]]})
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        began = time.time()
        start = partial(start_worker, sleep, tmp_path / "log.txt", {})
        assert not supervise(journal, "run", lambda alone: start(), 2, began + 1)
        assert time.time() - began < 30 and not journal.ends()

    def test_workers_that_never_begin_are_told(self, tmp_path: Path) -> None:
        start = partial(start_worker, [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "log.txt", {})
        with pytest.raises(RuntimeError, match=r"log\.txt"):
            supervise(Journal(tmp_path / "j.jsonl"), "run", lambda alone: start(), 1, time.time() + 60)

    def test_results_cannot_hide_the_task_that_they_belong_to(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j.jsonl")
        work([Task("a", lambda setting: {"task": "b", "event": "c"})], journal, Setting(out=tmp_path))
        assert list(journal.ends()) == ["a"]

    def test_wrong_inputs_are_saved(self, tmp_path: Path) -> None:
        def run(setting: Setting) -> None:
            raise Wrong("differs", {"x": torch.ones(2), "none": None})

        result = perform(Task("a", run), Setting(out=tmp_path))
        assert result == {"status": WRONG, "reason": "differs", "inputs_saved": True}


class TestJudgements:
    def test_the_budget_is_twice_the_plain_error_and_a_band(self) -> None:
        exact = {"output": torch.ones(100, dtype=torch.float64)}
        plain = {"output": torch.full((100,), 1 + 1e-5)}
        judge({"output": torch.full((100,), 1 + 2e-5)}, exact, plain)
        with pytest.raises(Wrong, match="output"):
            judge({"output": torch.full((100,), 1 + 3e-5)}, exact, plain)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_wrong(self, value: float) -> None:
        bad = torch.ones(4)
        bad[2] = value
        assert relative_l2(bad, torch.ones(4)) == float("inf")
        with pytest.raises(Wrong):
            judge({"output": bad}, {"output": torch.ones(4).double()}, {"output": torch.ones(4)})
        with pytest.raises(Wrong):
            same_bits({"output": bad}, {"output": torch.ones(4)}, "again", {})

    def test_writes_beside_a_buffer_are_found(self) -> None:
        class Launcher:
            @staticmethod
            def _empty(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype)

        with guarded(Launcher):
            assert Launcher._empty(torch.ones(1), 3).isnan().all()

        def write_beside() -> None:
            with guarded(Launcher) as buffers:
                Launcher._empty(torch.ones(1), 3)
                buffers[0][-1] = 0.0

        with pytest.raises(Wrong, match="outside buffer 0 of 3 values"):
            write_beside()
        assert not Launcher._empty(torch.ones(1), 3).requires_grad  # the launcher has its own again
        assert torch.equal(between_nan(torch.arange(3.0)), torch.arange(3.0))


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at scan_backward+0x1230
=========     by thread (3,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at scan+0x90 and Read access at scan+0xa0 [8 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
SHARED_WRITES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at scan_backward+0x2f20 in backward.py:116
=========     and Write access at scan_backward+0x2f20 in backward.py:116 [1480 hazards]
=========
========= Error: Race reported between Write access at scan_backward+0x32a0 in backward.py:118
=========     and Write access at scan_backward+0x32a0 in backward.py:118 [708 hazards]
=========
========= Error: Race reported between Write access at scan_backward+0x32a0 in backward.py:118
=========     and Read access at scan_backward+0x32b0 in backward.py:118 [4 hazards]
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
NCU = """==PROF== Connected to process 12
"ID","Kernel Name","sm__throughput.avg.pct","dram__bytes.sum"
"","","%","Gbyte"
"0","scan","71.5","1.25"
"""


class TestTools:
    def test_faults_of_the_memory_checkers_are_counted_and_told(self) -> None:
        assert sanitizer.count_faults(MEMCHECK) == 2 and "at scan_backward" in sanitizer.first_fault(MEMCHECK)
        assert sanitizer.count_faults(RACECHECK) == 1 and "Race" in sanitizer.first_fault(RACECHECK)
        assert sanitizer.count_shared_writes(RACECHECK) == sanitizer.count_shared_writes(MEMCHECK) == 0
        assert sanitizer.count_faults(SHARED_WRITES) == 3 and sanitizer.count_shared_writes(SHARED_WRITES) == 2
        assert sanitizer.count_faults("========= ERROR SUMMARY: 0 errors\n") == 0
        assert sanitizer.count_faults("Segmentation fault") is None

    def test_a_memory_checker_that_finds_something_is_a_wrong_result(self, tmp_path: Path, monkeypatch) -> None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{MEMCHECK}END\nexit {sanitizer.FOUND}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        with pytest.raises(Wrong, match="2 faults"):
            sanitizer.checked("memcheck", "scan", Setting(out=tmp_path, device="cpu"))
        race = SHARED_WRITES[SHARED_WRITES.rindex("========= Error") :]  # the one that is none of these
        only_shared = SHARED_WRITES.replace(
            race, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
        )
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{only_shared}END\nexit {sanitizer.FOUND}\n")
        found = sanitizer.checked("racecheck", "scan", Setting(out=tmp_path, device="cpu"))
        assert found == {"faults": 0, "shared_writes": 2}
        program.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n")
        assert sanitizer.checked("memcheck", "scan", Setting(out=tmp_path, device="cpu"))["faults"] == 0
        program.write_text("#!/bin/sh\necho broken\nexit 1\n")
        with pytest.raises(RuntimeError, match="did not finish"):
            sanitizer.checked("memcheck", "scan", Setting(out=tmp_path, device="cpu"))

    def test_counters_are_read(self) -> None:
        found = tune.read_counters(NCU)
        assert found["sm__throughput.avg.pct [%]"] == "71.5" and found["dram__bytes.sum [Gbyte]"] == "1.25"
        assert tune.read_counters("==ERROR== no permission") == {}

    def test_failed_tests_are_named(self, tmp_path: Path) -> None:
        file = tmp_path / "tests.xml"
        file.write_text(
            '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="1 != 2"/></testcase>'
            '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
        )
        assert sanitizer.read_tests(file) == ({"tests": 3, "skipped": 1}, {"b": "1 != 2"})


class TestRules:
    def test_the_best_rule_is_that_of_the_least_mean_time(self) -> None:
        """Timed so that plans of one block alone are fast: rules that choose it must win."""
        ends = {}
        for shape in tune.SHAPES:
            plans = tune.plans(shape, False, 132)
            times = [[list(plan), 1.0 if plan.block == 128 else 2.0] for plan in plans]
            name = "time/scan forward/b{} {}x{} d{} n{} r{}".format(*shape)
            ends[name] = {"times": times, "multiprocessors": 132}
        found = best_rules(ends)["forward"]
        assert (
            found["shapes"] == 12
            and found["best"][0] == 2048
            and found["best_over_fastest"] < found["today_over_fastest"]
        )
        assert found["today"] == list(tune.launchers.scan.FORWARD) and "backward" not in best_rules(ends)

    def test_every_rule_has_its_plans_timed(self) -> None:
        for back in (False, True):
            plans = {tuple(plan) for plan in tune.plans(tune.SHAPES[2], back, 132)}
            scan = tune.launchers.scan
            sizes = scan.Sizes(*tune.sizes(tune.SHAPES[2]))
            chosen = {tuple(scan.choose_plan(sizes, 132, back=back, rule=scan.Rule(*rule))) for rule in RULES}
            assert chosen <= plans and tuple(scan.choose_plan(sizes, 132, back=back)) in plans

    def test_tiles_keep_what_products_need(self) -> None:
        kan = tune.launchers.kan
        job = kan.Job(65536, 64, 64, 8, 3, True, True, False)
        for kernel in ("forward", "grad_input", "grad_weights"):
            found = tune.tiles(kernel, job, kan.Gpu(90, 132, 227 * 1024))
            assert len(set(found)) == len(found) > 8
            assert all(min(t.rows, t.ins, t.outs) >= 16 and t.stages >= 1 for t in found)

    def test_a_variant_with_wrong_results_is_not_timed(self, tmp_path: Path) -> None:
        class Variant(NamedTuple):
            number: int

        x = torch.randn(50)
        calls = {Variant(0): lambda: x, Variant(1): lambda: x + 1, Variant(2): lambda: x.clone()}
        found = tune.timed(lambda setting: calls, Setting(out=tmp_path, device="cpu"))
        assert found["status"] == WRONG and found["wrong"] == [[1]] and [row[0] for row in found["times"]] == [[0], [2]]


def test_variants_take_turns_in_another_order_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(Setting, "rehearsal", False)
    called: list[int] = []
    times = tune.medians({k: partial(called.append, k) for k in range(4)}, Setting(out=tmp_path, device="cpu"))
    rounds = [tuple(called[i : i + 4]) for i in range(8, len(called), 4)]
    assert list(times) == [0, 1, 2, 3] and len(rounds) == 7 and len(set(rounds)) > 4
    assert len({before for order in rounds for before, k in pairwise(order) if k == 2}) == 3


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="name a part"):
        gpu_day.main(["--out", str(tmp_path)])
    with pytest.raises(Skip, match="not installed"):
        find_program("no-such-program")
