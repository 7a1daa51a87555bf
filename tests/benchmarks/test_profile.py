"""What a user asks of a layer on this machine: who can serve it, how fast, with how much memory; all in a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import cases, profile, run
from kan_mamba_layers import create_model

ROOT = Path(__file__).resolve().parents[2]
SS2D = ["ss2d", "--dim", "16", "--size", "4", "4"]
KAN = ["kan_linear", "--in-features", "6", "--out-features", "5", "--rows", "20"]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def options(**changes: object) -> run.Options:
    return run.Options(**{"rounds": 2, "memory": False, "whole": True, **changes})


class TestCommand:
    def test_it_lists_its_commands_and_knows_no_others(self):
        usage = start("--help")
        assert usage.returncode == 0
        for command in ("clients", "run", "report", "gpu_day", "gpu_report", "profile"):
            assert f"\n  {command} " in usage.stdout
        assert start().returncode == 1
        unknown = start("limit")
        assert unknown.returncode == 1 and "no command 'limit'" in unknown.stderr and not unknown.stdout

    def test_a_command_says_how_it_is_called(self):
        assert "usage: python -m benchmarks run " in start("run", "--help").stdout

    def test_a_dry_run_names_every_backend_and_why_it_cannot_run(self):
        large = start("profile", "ss2d", "--dim", "96", "--size", "512", "512", "--dry-run")
        assert large.returncode == 0, large.stderr
        name, taken, *lines = large.stdout.splitlines()
        assert name.startswith("ss2d-b1-c96-512x512-n16, float32, cpu")
        found = dict(line.split(maxsplit=1) for line in lines)
        assert found.keys() == {"cpu", "triton", "chunked", "reference"}
        assert found["chunked"] == found["reference"] == "can run it"
        assert "cannot run this call of cross_selective_scan" in found["triton"]
        best = "cpu" if find_spec("numba") else "chunked"
        assert taken == f"backend='auto' takes {best}" and found[best] == "can run it"

    def test_a_run_shows_times_memory_and_errors(self):
        done = start("profile", *SS2D, "--rounds", "2")
        assert done.returncode == 0, done.stderr
        text = done.stdout
        assert f"{sum(p.numel() for p in cases.make_module(cases.block(1, 4, 4, 16, 16))[0].parameters()):,}" in text
        assert "GFLOP forward" in text and "training" not in text
        for backend in ("chunked", "reference"):
            times = r"[\d.]+ ms \([\d.]+ to [\d.]+\)  error \de-\d\d"
            found = re.search(rf"^forward +{backend} +{times}  peak (\d+\.\d) MiB$", text, re.MULTILINE)
            assert found and 0 <= float(found[1]) < 1000
        assert "cannot run this call" in text

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["ss2d", "--size", "4", "4"], "the following arguments are required: --dim"),
            (["ss2d", "--dim", "16"], "the following arguments are required: --size"),
            ([*SS2D, "--rows", "5"], "unrecognized arguments: --rows 5"),
            (["km_unet_tiny", "--size", "32", "32", "--dim", "16"], "unrecognized arguments: --dim 16"),
            (
                ["kan_linear", "--in-features", "6", "--rows", "5"],
                "the following arguments are required: --out-features",
            ),
            (["ema", "--dim", "12", "--size", "4", "4"], "channels"),
            (["ss2d", "--dim", "0", "--size", "4", "4"], "'0' is not a positive integer"),
            (["ss2d", "--dim", "16", "--size", "4"], "--size"),
            (["ss3d"], "invalid choice"),
            ([*SS2D, "--dtype", "float64"], "invalid choice"),
        ],
    )
    def test_bad_arguments_are_told(self, arguments, complaint, capsys):
        with pytest.raises(SystemExit) as raised:
            profile.main([*arguments, "--dry-run"])
        said = capsys.readouterr()
        assert raised.value.code == 2 and complaint in said.err and not said.out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there_is_told(self, capsys):
        with pytest.raises(SystemExit):
            profile.main([*SS2D, "--device", "cuda"])
        assert "PyTorch finds no GPU" in capsys.readouterr().err


class TestProfile:
    @pytest.mark.parametrize(
        ("case", "rows"),
        [
            (cases.block(1, 2, 3, 4, 16), {"chunked", "reference"}),
            (cases.kan(7, 3, 2), {"chunked", "reference"}),
            (cases.Case("ema", "blocks", "ema", {"b": 1, "h": 3, "w": 2, "c": 8}), {"pytorch"}),
        ],
        ids=lambda value: getattr(value, "op", ""),
    )
    def test_every_backend_is_timed_with_its_gradients(self, case, rows):
        text = "\n".join(profile.profile(case, options(modes=("forward", "training"))))
        found = re.findall(r"^(\w+) +(\w+) +[\d.]+ ms .* error (\S+)", text, re.MULTILINE)
        assert "GFLOP training" in text and all(float(error) < 1e-5 for *_, error in found)
        for mode in ("forward", "training"):
            assert rows <= {backend for of_mode, backend, _ in found if of_mode == mode}

    def test_a_model_runs_on_one_backend_throughout(self):
        case = cases.Case("model", "models", "km_unet_tiny", {"b": 1, "h": 32, "w": 32})
        found = run.whole(case)
        module, _ = found[2].module(case, "cpu")
        assert {layer.backend for layer in module.modules() if hasattr(layer, "backend")} == {"chunked"}

    def test_a_wrong_backend_is_not_timed(self, monkeypatch):
        make = cases.make_module

        def spoiled(*args, **arguments):
            module, x = make(*args, **arguments)
            if arguments["backend"] == "chunked":
                module.register_forward_hook(lambda module, args, y: 1.01 * y)
            return module, x

        monkeypatch.setattr("benchmarks.candidates.make_module", spoiled)
        text = "\n".join(profile.profile(cases.block(1, 2, 3, 4, 16), options(modes=("forward",))))
        assert re.search(r"^forward +chunked +not timed: relative error 1", text, re.MULTILINE)

    def test_what_is_too_large_to_check_is_checked_in_part_and_said(self):
        text = "\n".join(profile.profile(cases.kan(300, 3, 2), options(modes=("forward",))))
        assert "in float64 on 256 rows alone." in text
        text = "\n".join(profile.profile(cases.kan(256, 3, 2), options(modes=("forward",))))
        assert "in float64. Medians" in text

    def test_operations_are_those_of_the_formulas(self):
        case, candidate = cases.kan(7, 3, 2), run.candidates_of(cases.kan(7, 3, 2), options(candidates="chunked"))[0]
        parameters, flops = profile.count(case, candidate, options(modes=("forward",)))
        assert parameters == 3 * 2 * (1 + 8 + 1) and flops == {"forward": 2 * 7 * 3 * 2 * 9}

    def test_operations_of_training_include_the_gradient_of_the_input(self):
        """A convolution of 1 and one of 3x3, for each of 8 groups: backward has as many again, for each factor."""
        case = cases.Case("ema", "blocks", "ema", {"b": 2, "h": 3, "w": 5, "c": 16})
        _, flops = profile.count(case, run.candidates_of(case, options())[0], options())
        forward = 2 * 8 * 2 * (2 * 2 * (3 + 5) + 9 * 2 * 2 * 3 * 5)
        assert flops == {"forward": forward, "training": 3 * forward}

    def test_the_table_of_the_readme(self, monkeypatch, capsys):
        monkeypatch.setattr(profile, "list_models", lambda: ["u_kan_tiny", "u_kan"])
        arguments = profile._parser().parse_args(["models", "--size", "32", "32"])
        _, _, row = next(profile._models(arguments, options())).splitlines()
        parameters = sum(p.numel() for p in create_model("u_kan_tiny").parameters())
        assert row.startswith(f"| `u_kan_tiny` | {parameters:,} | 0.0")
