"""The benchmarks of KANLinear: equal functions, a product that is one, bytes that are counted, wrong layers refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import candidates, cases, kan_layers, limit, measure, peers, record, report, run, tables
from helpers import relative_l2
from kan_mamba_layers import KANLinear

ROOT = Path(__file__).resolve().parents[2]
UNIFORM, ADAPTIVE, FINE = cases.kan(50, 6, 5), cases.kan(50, 6, 5, adaptive=True), cases.kan(50, 6, 5, g=32)
SMALL = [UNIFORM, ADAPTIVE, FINE]
LEAVES = ("x", "base_weight", "spline_weight", "spline_scaler")
KAN = [case for case in cases.CASES if case.suite == "kan"]

# What stand-ins for the peers' checkouts are made of: same names, same shapes, this package's function.
EFFICIENT = """
from kan_mamba_layers import KANLinear
"""
FAST = """
from torch import nn
class FastKANLayer(nn.Linear):
    def __init__(self, i, o, num_grids):
        super().__init__(i, o)
        self.frozen = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
"""
PYKAN_HELPER = """
def transposed(layer, x):
    import torch
    from kan_mamba_layers import kan_linear
    coef, base, scale = layer.coef.transpose(0, 1), layer.scale_base.T, layer.scale_sp.T
    return kan_linear(x, base, coef, scale, layer.grid, backend="reference")
"""
PYKAN = """
import sklearn.linear_model
import torch
from torch import nn
from .helper import transposed
class KANLayer(nn.Module):
    def __init__(self, i, o, num, k):
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(i, num + 2 * k + 1), requires_grad=False)
        self.coef = nn.Parameter(torch.zeros(i, o, num + k))
        self.scale_base, self.scale_sp = (nn.Parameter(torch.zeros(i, o)) for _ in range(2))
    def forward(self, x):
        return transposed(self, x), x, x, x
"""


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkouts(tmp_path):
    """Paths of folders that look like the peers' checkouts."""
    texts = {"efficient_kan": EFFICIENT, "fast_kan": FAST, "pykan": PYKAN}
    for name, text in texts.items():
        file = tmp_path / name / peers.FILES[name]
        file.parent.mkdir(parents=True)
        file.write_text(text)
    (tmp_path / "pykan" / "kan" / "helper.py").write_text(PYKAN_HELPER)
    yield {name: str(tmp_path / name) for name in texts}
    for name in [name for name in sys.modules if name.startswith("_peer_")]:
        del sys.modules[name]


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile without a compiler: what is measured is traced, and run as it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def layers(case: cases.Case, paths: dict[str, str] | None = None) -> dict[str, candidates.Candidate]:
    return {c.name: c for c in kan_layers.layers(case, "cpu", torch.float32, paths or {})}


def planted(change: Callable[[KANLinear, Tensor], Tensor]) -> candidates.Candidate:
    """A candidate whose layer computes something else."""

    class Changed(nn.Module):
        def __init__(self, layer: KANLinear) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return change(self.inner, x)

    renamed = {f"inner.{name}": name for name in LEAVES[1:]}
    return kan_layers.layer("planted", lambda ours, x: (Changed(ours), x), renamed=renamed)


class TestCases:
    def test_names_say_what_is_measured(self):
        assert {"kan-1024x160-160-g5", "kan-16384x128-128-g32", "kan-16384x128-128-g5-adaptive"} <= {
            c.name for c in KAN
        }
        widths = {(case.length, case.sizes["in"], case.sizes["out"]) for case in run.select(["kan"])}
        assert widths == {(rows, i, i) for rows, i in cases.KAN_SHAPES}

    def test_some_cases_are_for_a_gpu_alone(self):
        on_cpu, on_gpu = (run.select(["kan"], device=device) for device in ("cpu", "cuda"))
        assert on_gpu == KAN and on_cpu == [case for case in KAN if not case.device]
        assert {case.dtype for case in on_gpu if case not in on_cpu} == {"", "bfloat16"}
        assert max(case.length for case in on_gpu) == 1048576

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    def test_layers_are_fresh_and_the_same_each_time(self, case):
        (first, x), (second, again) = cases.make_module(case), cases.make_module(case)
        assert torch.equal(x, again) and x.shape == (50, 6)
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name])
        assert first.spline_weight.shape == (5, 6, case.sizes["g"] + 3)
        assert first.has_uniform_grid == (case is not ADAPTIVE)

    def test_input_is_standard_normal(self):
        _, x = cases.make_module(cases.kan(4096, 8, 2))
        assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03  # five standard errors and more


class TestCandidates:
    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    def test_textbook_is_the_function_of_our_layer(self, case):
        expected, actual = (
            measure._results(c.bind(case, "cpu", exact=True), "training")
            for c in (layers(case)["reference"], kan_layers.TEXTBOOK)
        )
        assert set(expected) == {"output", *(f"grad {name}" for name in LEAVES)}
        rounding = 1e-12 if case is ADAPTIVE else 1e-6  # the closed form spaces the knots anew, which float32 rounded
        for key in expected:
            assert relative_l2(actual[key], expected[key]) < rounding, key

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    def test_gemm_is_the_product_that_the_layer_comes_down_to(self, case):
        product = layers(case)[kan_layers.GEMM].bind(case, "cpu")
        layer, x = cases.make_module(case)
        assert product.leaves["x"].shape == (50, 6 * (case.sizes["g"] + 4))
        assert relative_l2(product.run(), layer(x)) < 1e-5

    def test_linear_has_the_same_features(self):
        bound = layers(UNIFORM)["nn.Linear"].bind(UNIFORM, "cpu")
        layer, x = cases.make_module(UNIFORM)
        assert torch.equal(bound.run(), F.linear(x, layer.base_weight))

    def test_every_backend_of_ours_is_measured_and_auto_first(self):
        found = list(layers(UNIFORM))
        supported = candidates.supported_backends("kan_linear", "cpu", torch.float32)
        assert found[: len(supported)] == supported and "reference" in supported
        assert {"compiled auto", "compiled reference", kan_layers.GEMM, "nn.Linear", "textbook"} <= set(found)

    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    def test_all_are_right(self, case, checkouts, traced_only):
        checker = measure.Checker(case, "cpu", torch.float32, kan_layers.TEXTBOOK)
        found = layers(case, checkouts)
        assert (kan_layers.FAST in found) == (case is not ADAPTIVE)
        for name, candidate in found.items():
            assert not candidate.skip_reason(case, "training"), name
            worst, _ = checker.errors(candidate, "training")
            assert max(worst.values()) < 1e-5, (name, worst)
            if candidate.same:
                assert set(worst) == {"output", *(f"grad {name}" for name in LEAVES)}

    def test_bfloat16_keeps_parameters_and_the_function(self, checkouts):
        checker = measure.Checker(UNIFORM, "cpu", torch.bfloat16, kan_layers.TEXTBOOK)
        for candidate in (c for c in layers(UNIFORM, checkouts).values() if not c.compiled):
            bound = candidate.bind(UNIFORM, "cpu", torch.bfloat16)
            assert bound.leaves["x"].dtype == bound.run().dtype == torch.bfloat16
            assert {leaf.dtype for name, leaf in bound.leaves.items() if name != "x"} == {torch.float32}
            worst, _ = checker.errors(candidate, "training")
            assert max(worst.values()) < measure.LIMITS[torch.bfloat16], candidate.name

    def test_absent_peers_say_so_without_a_path(self, tmp_path):
        found = kan_layers.peers(UNIFORM, dict.fromkeys(("efficient_kan", "fast_kan", "pykan"), str(tmp_path)))
        assert [c.name for c in found] == [kan_layers.EFFICIENT, kan_layers.PYKAN, kan_layers.FAST]
        for candidate in found:
            assert candidate.skip_reason(UNIFORM, "forward").startswith("not measured")
            assert str(tmp_path) not in candidate.absent

    def test_an_installed_package_kan_is_measured_and_a_broken_one_told(self, tmp_path):
        package, out = tmp_path / "site" / "kan", tmp_path / "kan.json"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "KANLayer.py").write_text(PYKAN.replace("import sklearn.linear_model\n", ""))
        (package / "helper.py").write_text(PYKAN_HELPER.replace("reference", "auto"))  # the faster one
        command = [sys.executable, "-m", "benchmarks", "run", "kan", "--quick", "--cases", "kan-1024x64-64-g5"]
        command += ["--candidates", "pykan", "--budget", "0", "--out", str(out)]
        paths = [str(tmp_path / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]

        def measured() -> set[tuple[str, str]]:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
            return {(row["status"], row["reason"]) for row in record.rows_of(record.load(out)["cases"])}

        assert measured() == {("ok", "")}
        (package / "KANLayer.py").write_text("import not_there")
        assert measured() == {("not measured", "not measured (installed, but cannot be imported: not_there)")}

    def test_the_layer_of_single_edges_is_not_run_where_they_are_many(self, checkouts):
        pykan = layers(UNIFORM, checkouts)[kan_layers.PYKAN]
        assert pykan.skip_reason(cases.kan(1024, 160, 160), "training") == ""
        assert "each edge" in pykan.skip_reason(cases.kan(1025, 160, 160), "training")

    def test_a_peer_leaves_no_stand_ins_and_a_broken_one_no_module(self, checkouts):
        layers(UNIFORM, checkouts)
        assert "sklearn" not in sys.modules or hasattr(sys.modules["sklearn"], "__version__")
        Path(checkouts["fast_kan"], peers.FILES["fast_kan"]).write_text("raise OSError('at /some/path')")
        del sys.modules["_peer_fast_kan"]
        assert layers(UNIFORM, checkouts)[kan_layers.FAST].absent == "its file cannot be loaded: OSError"
        assert "_peer_fast_kan" not in sys.modules


def options(**changes: object) -> run.Options:
    return run.Options(**{"rounds": 2, "budget": 0.05, "memory": False, **changes})


class TestMeasuring:
    def test_saved_bytes_count_each_storage_once_and_no_inputs(self):
        def saves(layer: KANLinear, x: Tensor) -> Tensor:
            there = torch.exp(x)  # saved by exp, by both factors, and through a view
            return layer(x * 0 + 1) * 0 + (there * there * there.view(-1, 6)).sum()

        bound = planted(lambda layer, x: x @ layer.base_weight.T).bind(UNIFORM, "cpu")
        assert measure.saved_bytes(bound) == 0
        plain = planted(lambda layer, x: layer(x * 0 + 1) * 0).bind(UNIFORM, "cpu")
        more = planted(saves).bind(UNIFORM, "cpu")
        # exp's result, and the product of two, which is multiplied by a third
        assert measure.saved_bytes(more) - measure.saved_bytes(plain) == 2 * 50 * 6 * 4

    def test_the_textbook_saves_many_times_its_bases(self):
        bases = 50 * 6 * 8 * 4
        assert measure.saved_bytes(kan_layers.TEXTBOOK.bind(UNIFORM, "cpu")) > 3 * bases

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
    def test_compiled_layers_are_warm_before_their_memory_is_measured(self, traced_only, monkeypatch):
        sizes = []
        once = measure._once
        monkeypatch.setattr(measure, "_once", lambda bound, mode: (sizes.append(counter()), once(bound, mode)))

        def counter() -> int:
            return torch._dynamo.utils.counters["stats"]["unique_graphs"]

        case = cases.kan(100, 6, 5)
        peak = measure.peak_bytes(layers(case)["compiled reference"], case, "training", torch.float32)
        assert peak < 64 << 20 and sizes[0] == counter() > 0


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small cases without the compiled candidates, written to a file."""
    out = tmp_path_factory.mktemp("results") / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limit, "measure", lambda device: {"elements_per_second": 1e9, "copy_bytes_per_second": 1e10})
        run.measure([UNIFORM, ADAPTIVE], [1], options(candidates="[!c]*"), out)
    return out


class TestReport:
    def test_every_candidate_has_times_and_saved_bytes(self, result):
        rows = record.rows_of(record.load(result)["cases"])
        for row in rows:
            assert row["status"] in ("ok", "not measured"), row["reason"]
            if row["status"] == "ok":
                assert row["median_s"] > 0 and "limit_s" not in row
                assert ("saved_bytes" in row) == (row["mode"] == "training")
        saved = {r["candidate"]: r["saved_bytes"] for r in rows if r["case"] == UNIFORM.name and "saved_bytes" in r}
        assert saved[kan_layers.GEMM] == 0 < saved["textbook"]

    def test_ratios_and_what_is_missing_are_rendered(self, result, tmp_path):
        report.main([str(result), "--out", str(tmp_path)])
        text = (tmp_path / "tiny.md").read_text(encoding="utf-8")
        assert "elements of a scan" not in text
        rows = record.rows_of(record.load(result)["cases"])
        for case in (UNIFORM, ADAPTIVE):
            of_case = {(r["candidate"], r["mode"]): r for r in rows if r["case"] == case.name}
            table = text.split(f"### `{case.name}`")[1].split("###")[0]
            line = next(line for line in table.splitlines() if line.startswith("| textbook |"))
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            forward, gemm = (of_case[name, "forward"]["median_s"] for name in ("textbook", kan_layers.GEMM))
            assert cells[1:4] == [tables.three_digits(1e3 * forward), f"{tables.three_digits(forward / gemm)}x", ""]
            assert "Not measured (not installed, and no path given): efficient-kan, pykan" in table


class TestCommandLine:
    def test_list(self, capsys):
        run.main(["kan", "--list"])
        assert capsys.readouterr().out.split() == [case.name for case in KAN if not case.device]

    def test_memory_of_a_layer_in_a_fresh_process(self):
        peak = run._peak_elsewhere(cases.QUICK[-3], "reference", "training", options())
        assert peak is not None and peak >= 1024 * 64 * 8 * 4  # its bases

    def test_a_process_that_fails_has_no_memory(self, capsys):
        assert run._peak_elsewhere(UNIFORM, "nobody", "training", options()) is None
        assert "nobody on kan-50x6-5-g5" in capsys.readouterr().err
