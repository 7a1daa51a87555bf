"""The benchmarks measure what they say: same inputs each time, right baselines, wrong results refused."""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, candidates, cases, limit, measure, peers, record, report, run, tables
from helpers import relative_l2
from kan_mamba_layers import cross_selective_scan, selective_scan

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CROSS = cases.cross(2, 3, 5, 4, 3, 2)
SCAN = cases.scan(2, 4, 13, 3)
TINY = cases.cross(1, 4, 4, 16, 2, 1)
LAYERS = [cases.block(1, 4, 3, 4, 2), cases.Case("ema", "blocks", "ema", {"b": 1, "h": 4, "w": 3, "c": 8})]
SECRET = "/home/alice/checkout/kernels.py"
ODD_LENGTHS = [1, 2, 3, 4, 7, 16, 33]
EVERY = [*cases.CASES, *cases.QUICK]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options(**changes: object) -> run.Options:
    return run.Options(**{"rounds": 2, "budget": 0.05, "memory": False, **changes})


class TestCases:
    @pytest.mark.parametrize("part", [cases.CASES, cases.QUICK])
    def test_names_are_unique_and_suites_known(self, part):
        assert len({case.name for case in part}) == len(part) > 0
        assert {case.suite for case in part} <= set(cases.SUITES)

    def test_one_name_is_one_case(self):
        assert len({(case.name, str(case.sizes)) for case in EVERY}) == len({case.name for case in EVERY})

    @pytest.mark.parametrize("case", [CROSS, SCAN], ids=lambda case: case.op)
    def test_inputs_are_the_same_each_time_and_fit_the_op(self, case):
        first, second = cases.make_inputs(case), cases.make_inputs(case)
        assert all(torch.equal(first[name], second[name]) for name in first)
        y = cross_selective_scan(**first) if case is CROSS else selective_scan(**first, delta_softplus=True)
        assert torch.isfinite(y).all()

    def test_initial_steps_and_rates_are_those_of_a_fresh_layer(self):
        inputs = cases.make_inputs(cases.cross(1, 2, 2, 500, 3, 2))
        steps = torch.nn.functional.softplus(inputs["dt_proj_bias"])
        assert steps.min() >= 1e-3 - 1e-6 and steps.max() <= 1e-1 + 1e-6
        assert torch.allclose(inputs["A_log"].exp()[7], torch.tensor([1.0, 2.0, 3.0]))

    @pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
    def test_limited_cases_are_not_longer(self, case):
        small = case.limited(2, 100)
        assert small.length <= 100 and small.sizes.get("b", 1) <= 2 and small.elements <= case.elements
        assert case.limited(case.sizes.get("b", 1), case.length) == case

    def test_modules_are_the_same_each_time(self):
        first, second = (cases.make_module(cases.QUICK[-1])[0].state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestBaselines:
    @pytest.mark.parametrize("case", [CROSS, SCAN, cases.scan(1, 2, 1, 1)], ids=lambda case: case.name)
    @pytest.mark.parametrize("name", ["textbook steps", "parallel scan", "chunked"])
    def test_equal_reference_with_gradients(self, case, name):
        found = [*candidates.backends(case, "cpu"), *candidates.baselines(case)]
        reference, other = (next(c for c in found if c.name == n) for n in ("reference", name))
        expected, actual = (measure._results(c.bind(case, "cpu", exact=True), "training") for c in (reference, other))
        assert expected.keys() == actual.keys() and len(actual) > 5
        for key in expected:
            assert relative_l2(actual[key], expected[key]) < 1e-11, key

    @pytest.mark.parametrize("length", ODD_LENGTHS)
    def test_parallel_scan_at_every_length(self, length):
        draw = torch.Generator().manual_seed(length)
        a, x = (torch.rand(2, length, 3, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(2))
        states, state = [], torch.zeros(2, 3, dtype=torch.float64)
        for t in range(length):
            state = a[:, t] * state + x[:, t]
            states.append(state)
        expected = torch.stack(states, 1)
        actual = baselines.ParallelScan.apply(a, x)
        assert torch.allclose(actual, expected, rtol=1e-12)
        weights = torch.rand(expected.shape, dtype=torch.float64, generator=draw)
        for got, wanted in zip(
            torch.autograd.grad(actual, [a, x], weights), torch.autograd.grad(expected, [a, x], weights), strict=True
        ):
            assert torch.allclose(got, wanted, rtol=1e-12)

    def test_layouts_round_trip(self):
        bound = candidates.baselines(CROSS)[0].bind(CROSS, "cpu")
        assert bound.leaves["x"].shape == (2, 4, 3, 5) and bound.leaves["x"].is_contiguous()
        restored = measure._restored("x", bound.leaves["x"], bound)
        assert torch.equal(restored, cases.make_inputs(CROSS)["x"])


class TestPeers:
    def test_absent_peers_say_so_without_a_path(self, tmp_path):
        paths = dict.fromkeys(("mamba_ssm", "vmamba", "mambapy"), str(tmp_path))
        found = peers.peers(CROSS, "cpu", paths)
        assert len(found) == 3
        for candidate in found:
            assert candidate.skip_reason(CROSS, "forward").startswith("not measured")
            assert str(tmp_path) not in candidate.absent

    def test_a_checkout_is_measured_and_leaves_no_stand_ins(self, tmp_path):
        file = tmp_path / peers.FILES["mamba_ssm"]
        file.parent.mkdir(parents=True)
        file.write_text(
            "from mamba_ssm.utils.torch import custom_fwd\n"
            "from kan_mamba_layers import selective_scan\n"
            "@custom_fwd\ndef selective_scan_ref(*args, **kwargs):\n    return selective_scan(*args, **kwargs)\n"
        )
        sys.modules.pop("_peer_mamba_ssm", None)
        try:
            found = {c.name: c for c in peers.peers(CROSS, "cpu", {"mamba_ssm": str(tmp_path)})}
        finally:
            sys.modules.pop("_peer_mamba_ssm", None)
        assert "mamba_ssm" not in sys.modules
        checker = measure.Checker(CROSS, "cpu", torch.float32, run.ground_truth(CROSS))
        worst, _ = checker.errors(found[peers.MAMBA_REF], "training")
        assert max(worst.values()) < 1e-5


def planted(factor: float) -> candidates.Candidate:
    """A candidate whose output is off by a factor."""

    def scaled(**inputs: Tensor) -> Tensor:
        return factor * cross_selective_scan(**inputs, backend="chunked")

    return candidates.Candidate("planted", scaled)


class TestMeasuring:
    def test_relative_l2(self):
        one = torch.ones(4)
        assert measure.relative_l2(one, one) == 0
        assert measure.relative_l2(1.5 * one, one) == pytest.approx(0.5)
        assert measure.relative_l2(torch.full((4,), float("nan")), one) == math.inf
        with pytest.raises(ValueError, match="shape"):
            measure.relative_l2(torch.ones(3), one)

    @pytest.mark.parametrize("factor", [1.001, float("nan")])
    def test_a_wrong_result_is_not_timed(self, factor):
        rows = run.measure_case(TINY, [planted(factor)], options())
        assert [row["status"] for row in rows] == ["wrong", "wrong"]
        assert all("median_s" not in row and row["reason"] for row in rows)

    def test_a_wrong_gradient_is_not_timed(self):
        def detached(x: Tensor, **inputs: Tensor) -> Tensor:
            return cross_selective_scan(x.detach() + 0 * x, **inputs, backend="chunked")

        rows = run.measure_case(TINY, [candidates.Candidate("planted", detached)], options())
        assert [row["status"] for row in rows] == ["ok", "wrong"]
        assert "grad x" in rows[1]["reason"]

    def test_a_failing_candidate_is_recorded(self):
        def fails(**inputs: Tensor) -> Tensor:
            raise RuntimeError("at /some/path")

        rows = run.measure_case(TINY, [candidates.Candidate("planted", fails)], options())
        assert {row["status"] for row in rows} == {"failed"} and "/some" not in json.dumps(rows)

    def test_slow_and_large_and_quadratic_are_skipped(self):
        large = cases.cross(1, 128, 128, 32, 16, 1)
        steps, parallel = candidates.baselines(large)
        assert steps.skip_reason(large, "forward") == ""
        assert "quadratic" in steps.skip_reason(large, "training")
        assert "GiB" in parallel.skip_reason(large, "forward", memory=1e6)
        rows = run.measure_case(TINY, [planted(1.0)], options(longest=0.0))
        assert {row["status"] for row in rows} == {"not run"}

    @pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.op)
    def test_a_layer_without_the_gradient_of_its_input_is_not_timed(self, case):
        class Detached(torch.nn.Module):
            def __init__(self, layer: torch.nn.Module) -> None:
                super().__init__()
                self.inner = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x.detach() + 0 * x)

        def module(case: cases.Case, device: str) -> tuple[torch.nn.Module, Tensor]:
            layer, x = cases.make_module(case, device)
            return Detached(layer), x

        names = {f"inner.{name}": name for name, _ in cases.make_module(case)[0].named_parameters()}
        rows = run.measure_case(case, [candidates.Candidate("planted", module=module, renamed=names)], options())
        assert [row["status"] for row in rows] == ["ok", "wrong"]

    @pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.op)
    def test_the_gradient_of_a_layers_input_is_its_slope(self, case):
        bound = run.candidates_of(case, options(whole=True))[0].bind(case, "cpu", exact=True)
        _, *grads = bound.step("training", torch.ones_like(bound.run()))
        x, step = bound.leaves["x"], 1e-5
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        grad = dict(zip(bound.leaves, grads, strict=True))["x"]
        with torch.no_grad():
            x += step * along
            above = bound.run().sum()
            x -= 2 * step * along
            below = bound.run().sum()
        assert float((grad * along).sum()) == pytest.approx(float(above - below) / (2 * step), rel=1e-6)

    def test_images_of_a_model_have_no_gradient(self):
        case = cases.model("km_unet_tiny", side=32)
        assert "x" not in candidates.whole(case)[2].bind(case, "cpu").leaves

    @pytest.mark.parametrize(
        ("estimate", "call", "status", "reason"),
        [
            (4.0, 99.0, "ok", ""),
            (40.0, 4.0, "ok", ""),
            (40.0, 7.0, "not run", "not timed (a call took 7 s)"),
            (60.0, 4.0, "not run", "not run (an estimated 60 s per call)"),
        ],
    )
    def test_an_estimate_near_the_limit_is_not_believed(self, estimate, call, status, reason, monkeypatch):
        whole, part = cases.cross(1, 4, 8, 16, 2, 1), TINY
        checker = measure.Checker(part, "cpu", torch.float32, run.ground_truth(part))
        monkeypatch.setattr(checker, "errors", lambda *_: ({"output": 0.0}, estimate / 2))
        monkeypatch.setattr(run, "seconds_of_one", lambda *_: call)
        rows = run.measure_case(whole, [planted(1.0)], options(longest=5.0), checker)
        assert {(row["status"], row["reason"]) for row in rows} == {(status, reason)}

    def test_a_case_that_was_checked_whole_is_not_estimated(self):
        rows = run.measure_case(TINY, [planted(1.0)], options(longest=1e-9))
        assert all(row["reason"].startswith("not timed (a call took ") for row in rows)

    def test_rounds_are_counted_and_bounded_by_the_budget(self):
        bounds = {"a": planted(1.0).bind(TINY, "cpu"), "b": planted(1.0).bind(TINY, "cpu")}
        calls = {name: measure.call_of(bound, "training") for name, bound in bounds.items()}
        samples = measure.time_in_rounds(calls, "cpu", rounds=3)
        assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in samples.values())
        samples = measure.time_in_rounds(calls, "cpu", rounds=5, budget=0.0)
        assert all(len(seconds) == 2 for seconds in samples.values())
        assert measure.time_in_rounds({}, "cpu", rounds=2, budget=1.0) == {}

    def test_no_candidate_always_follows_the_same_one(self):
        called: list[str] = []
        calls = {name: partial(called.append, name) for name in "abc"}
        measure.time_in_rounds(calls, "cpu", rounds=7, sample=0.0)
        rounds = ["".join(called[i : i + 3]) for i in range(6, len(called), 3)]  # a call and one timed come before
        assert len(rounds) == 7 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
        for name in "abc":
            assert len({order[order.index(name) - 1] for order in rounds if order[0] != name}) == 2

    @pytest.mark.parametrize(
        ("samples", "expected"),
        [([3.0], [3, 3, 3]), ([1.0, 3.0], [1.5, 2, 2.5]), ([5.0, 1.0, 2.0, 4.0, 3.0], [2, 3, 4])],
    )
    def test_quartiles(self, samples, expected):
        assert measure.quartiles(samples) == expected

    def test_a_slow_first_call_is_timed_again(self):
        def slow_once(**inputs: Tensor) -> Tensor:
            calls.append(inputs)
            time.sleep(0.3 * (len(calls) == 1))
            return cross_selective_scan(**inputs, backend="chunked")

        calls: list[dict[str, Tensor]] = []
        checker = measure.Checker(TINY, "cpu", torch.float32, run.ground_truth(TINY))
        assert checker.errors(candidates.Candidate("planted", slow_once), "training", longest=0.2)[1] < 0.3
        calls.clear()
        inputs = cases.make_inputs(TINY)
        assert measure.seconds_of_one(lambda: slow_once(**inputs), "cpu", longest=0.2) < 0.3 and len(calls) == 2
        assert measure.seconds_of_one(lambda: slow_once(**inputs), "cpu", longest=math.inf) and len(calls) == 3

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
    def test_peak_memory_sees_a_large_tensor(self):
        def hungry(x: Tensor, **inputs: Tensor) -> Tensor:
            held = torch.ones(32 << 20) if x.shape[1] > 2 else torch.ones(1)  # 128 MiB
            return x * held[-1]

        case = cases.cross(1, 16, 16, 16, 2, 1)
        peak = measure.peak_bytes(candidates.Candidate("hungry", hungry), case, "forward", torch.float32)
        assert (100 << 20) < peak < (1 << 30)

    @pytest.mark.parametrize("mode", candidates.MODES)
    def test_peak_memory_of_a_model(self, mode):
        """Which halves its image so often that the smallest cannot warm it up."""
        case = cases.model("km_unet_tiny", side=64)
        assert measure.peak_bytes(candidates.whole(case)[2], case, mode, torch.float32) >= 0


RATES: dict[str, float | None] = {"elements_per_second": 1e9, "copy_bytes_per_second": 1e10}


class TestLimit:
    def test_rate_is_positive_and_finite(self):
        pytest.importorskip("numba")
        rate = limit.cpu_elements_per_second(steps=10_000)
        assert rate is not None and 0 < rate < math.inf

    def test_body_computes_the_scan(self):
        numpy = pytest.importorskip("numpy")
        pytest.importorskip("numba")
        rates, entries = (-1.0, -2.0, -3.0, -4.0), (0.5, 0.25, -1.0, -2.0)
        outputs, step, y = (0.25, 0.5, 0.25, 0.5), numpy.float32(1e-3), 0.25
        states = [0.5] * 4
        for _ in range(50):
            step = numpy.float32(step + numpy.float32(1e-8))
            for i, (rate, entry, output) in enumerate(zip(rates, entries, outputs, strict=True)):
                states[i] = 2 ** (float(step) * rate) * states[i] + float(step) * entry
                y += output * states[i]
        assert limit._body(50, -1.0) == pytest.approx(y, rel=1e-5)

    def test_the_faster_measurement_counts(self):
        slow = {"elements_per_second": 5e8, "copy_bytes_per_second": 2e10}
        assert limit.faster(slow, RATES) == {"elements_per_second": 1e9, "copy_bytes_per_second": 2e10}
        unknown: limit.Rates = dict.fromkeys(RATES)
        assert limit.faster(unknown, unknown) == unknown and limit.faster(unknown, RATES) == RATES

    def test_seconds(self):
        assert limit.seconds(CROSS, RATES, "cpu", 2) == pytest.approx(4 * 2 * 15 * 4 * 3 / 2e9)
        assert limit.seconds(SCAN, RATES, "cpu", 1) == pytest.approx(2 * 13 * 4 * 3 / 1e9)
        assert limit.seconds(cases.QUICK[-1], RATES, "cpu", 1) is None
        assert limit.seconds(CROSS, {**RATES, "elements_per_second": None}, "cpu", 1) is None
        exponentials, copies = limit.seconds(CROSS, RATES, "cuda", 1), limit.seconds(TINY, RATES, "cuda", 1)
        assert exponentials is not None and copies is not None and exponentials > 0 < copies


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one small case of each kind, written to a file."""
    out = tmp_path_factory.mktemp("results") / "tiny.json"
    scaling = cases.cross(1, 4, 4, 16, 2, 1, "scaling", "n")
    chosen = [TINY, cases.scan(1, 16, 9, 2), cases.block(1, 4, 4, 4, 2), scaling]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limit, "measure", lambda device: RATES)
        run.measure(chosen, [1], options(), out)
    return out


class TestRecord:
    def test_every_case_has_a_time_for_our_backends(self, result):
        rows = record.rows_of(record.load(result)["cases"])
        for case in {row["case"] for row in rows}:
            timed = {(r["candidate"], r["mode"]) for r in rows if r["case"] == case and r["status"] == "ok"}
            assert {("chunked", "forward"), ("chunked", "training")} <= timed
        for row in rows:
            assert row["status"] in ("ok", "not measured"), row["reason"]
            if row["status"] == "ok":
                assert ("limit_s" in row) == (row["suite"] != "blocks")
                low, middle, high = row["quartiles_s"]
                assert 0 < low <= middle == row["median_s"] <= high
                assert max(row["errors"].values()) <= measure.LIMITS[torch.float32]

    def test_says_with_what_and_nothing_private(self, result):
        text = result.read_text(encoding="utf-8")
        content = json.loads(text)
        assert content["machine"]["cores"] >= 1 and content["versions"]["torch"] == torch.__version__
        assert str(Path.home()) not in text and str(BENCHMARKS.parent) not in text and '"/' not in text

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (f'File "{SECRET}", line 3', 'File "kernels.py", line 3'),
            ("cd /root && make", "cd PATH && make"),
            ("['/usr/bin/gcc', '-I/opt/conda/include', '~/.triton/x.so']", "['PATH', '-IPATH', 'x.so']"),
            ("git+https://user:word@host.example/x.git there", "URL there"),
            ("time/scan forward/b8, 3 GB/s and/or ../x [register/thread]",) * 2,
            ({"/tmp/a": [float("inf"), 0.123456, 3]}, {"PATH": ["inf", 0.1235, 3]}),
        ],
    )
    def test_clean(self, before, after):
        assert record.clean(before) == after

    def test_another_schema_is_refused(self, tmp_path):
        file = tmp_path / "old.json"
        file.write_text('{"schema": 0}')
        with pytest.raises(ValueError, match=r"old\.json has schema 0"):
            record.load(file)


class TestReport:
    def test_the_page_has_every_time(self, result, tmp_path):
        report.main([str(result), "--out", str(tmp_path)])
        text = (tmp_path / "tiny.md").read_text(encoding="utf-8")
        first: dict[tuple[str, str], float] = {}
        for row in record.rows_of(record.load(result)["cases"]):
            assert f"`{row['case']}`" in text
            if row["status"] == "ok":
                median = row["median_s"]
                ratio = median / first.setdefault((row["case"], row["mode"]), median)
                assert f"{tables.three_digits(1e3 * median)} ({tables.three_digits(ratio)}x)" in text

    @pytest.mark.parametrize("name", ["cpu", "cpu-1-thread", "cpu-b8", "cpu-models", "cpu-scaling"])
    def test_ratios_on_record_are_to_the_first_column(self, name):
        text = report.render(record.load(BENCHMARKS / "results" / f"{name}.json"))
        rows = [line.split("|")[2:-1] for line in text.splitlines() if "x) |" in line]
        assert rows
        for first, *others in ([cell.removesuffix("x) ").split(" (") for cell in row] for row in rows):
            assert first[1:] == ["1"]
            for seconds, ratio in (cell for cell in others if len(cell) == 2 and " to " not in "".join(cell + first)):
                assert float(ratio) == pytest.approx(float(seconds) / float(first[0]), rel=0.02)

    def test_a_ratio_needs_the_time_of_the_first_column(self):
        names, seconds = ("absent", "ours", "other"), {"a": (1.0, 3.0), "b": (None, 3.0)}
        rows = []
        for case, values in seconds.items():
            for name, value in zip(names, (None, *values), strict=True):
                status = {"status": "ok", "median_s": value} if value else {"status": "not run"}
                rows.append({"case": case, "candidate": name, **status})
        assert tables.times_table(rows).splitlines() == [
            "| case | ours | other |",
            "|---|---:|---:|",
            "| `a` | 1000 (1x) | 3000 (3x) |",
            "| `b` | – | 3000 |",  # noqa: RUF001
        ]

    def test_a_record_in_which_nothing_was_checked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limit, "measure", lambda device: RATES)
        out = tmp_path / "none.json"
        run.measure([cases.cross(1, 33, 32, 2, 1, 1)], [1], options(candidates="reference"), out)
        report.main([str(out), "--out", str(tmp_path)])
        text = (tmp_path / "none.md").read_text(encoding="utf-8")
        assert "Not run (one step at a time" in text and "errors\n" not in text

    def test_two_runs_are_a_range(self, result):
        first, *_ = record.load(result)["cases"]
        for row, again in zip(first["rows"][:2], (4e-3, 2e-3), strict=True):
            row |= {"median_s": 2e-3, "again_s": again, "mode": "forward", "status": "ok"}
        rows = record.rows_of([{**first, "rows": first["rows"][:2]}])
        assert "| 2 to 4 (1x) | 2 (0.5 to 1x) |" in "\n".join(tables.measurements(rows))

    def test_a_candidate_without_a_time_says_why(self):
        row = {"case": "a", "candidate": "x", "status": "not run", "reason": "not run (an estimated 9 s per call)"}
        other = {**row, "candidate": "y", "status": "ok", "reason": "", "median_s": 1.0}
        assert tables.pivot([row, other], lambda row: "1 | <2").splitlines()[::2] == [
            "| case | y |",
            "| `a` | 1 &#124; &lt;2 |",
        ]
        assert tables.notes([row, other]) == ["* Not run (an estimated 9 s per call): x."]


class TestCommandLine:
    def test_runs_a_chosen_case_and_measures_memory_in_a_fresh_process(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(limit, "measure", lambda device: RATES)
        out = tmp_path / "one.json"
        arguments = ["scaling", "--cases", "scaling-pixels-*-32x32-*", "--candidates", "chunked"]
        run.main([*arguments, "--rounds", "2", "--budget", "0.01", "--threads", "1", "--out", str(out)])
        rows = record.rows_of(record.load(out)["cases"])
        assert [row["mode"] for row in rows] == ["forward", "training"]
        assert all(row["peak_bytes"] is not None and row["peak_bytes"] >= 0 for row in rows)
        assert "chunked" in capsys.readouterr().out

    def test_a_case_without_a_chosen_candidate_is_passed_over(self, tmp_path, monkeypatch):
        monkeypatch.setattr(limit, "measure", lambda device: RATES)
        block, out = cases.block(1, 4, 4, 4, 2), tmp_path / "one.json"
        chosen = options(candidates="parallel scan")
        run.measure([block, TINY], [1], chosen, out)
        assert {row["case"] for row in record.rows_of(record.load(out)["cases"])} == {TINY.name}
        with pytest.raises(SystemExit, match=r"matches --candidates 'parallel scan'"):
            run.measure([block], [1], chosen)

    def test_list(self, capsys):
        run.main(["ops", "--list"])
        names = capsys.readouterr().out.split()
        assert names == [case.name for case in cases.CASES if case.suite == "ops"]

    @pytest.mark.parametrize(
        "arguments", [["--peers-path", "someone=here"], ["--peers-path", "vmamba"], ["everything"], ["--cases", "none"]]
    )
    def test_wrong_arguments_are_refused(self, arguments):
        with pytest.raises(SystemExit):
            run.main(arguments)
