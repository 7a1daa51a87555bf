"""Options, seeds and fixtures of the whole test suite."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from helpers import Golden, nan_filled_empty

ROOT = Path(__file__).resolve().parents[1]

# Derandomised: the same examples on every machine, so a red test is red for everybody.
settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=50_000, deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        type=Path,
        default=ROOT.parent / "shared",
        metavar="PATH",
        help="folder with golden/ and data/ (default: ../shared beside the repository)",
    )
    parser.addoption("--nightly", action="store_true", help="run the tests that take minutes too")


def pytest_configure(config: pytest.Config) -> None:
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # so that the processes do not fight for the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {} if torch.cuda.is_available() else {"gpu": "no CUDA or ROCm device"}
    if not config.getoption("--nightly"):
        skipped["nightly"] = "takes minutes; run with --nightly"
    for item in items:
        for marker, reason in skipped.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Skip a test that asks by name for what needs an optional package, where that is missing."""
    try:
        return (yield)
    except Exception as error:  # of any kind: compilers and processes of their own wrap what was raised
        found = re.search(r"needs (\w+), which is not installed", str(error))
        if found and importlib.util.find_spec(found[1].lower()) is None:
            pytest.skip(f"needs {found[1]}")
        raise


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder of shared material; tests that need it skip where it is absent."""
    folder: Path = request.config.getoption("--shared")
    if not folder.is_dir():
        pytest.skip(f"shared material not found at {folder}; give its folder with --shared PATH")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], Golden]:
    """Load the values of a whole model by the stem of their file: `golden("km_unet_0")`."""

    def load(name: str) -> Golden:
        path = shared / "golden" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"golden file {path.name} is not in {path.parent}")
        return Golden.load(path)

    return load


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def poisoned_empty() -> Iterator[None]:
    """Uninitialised memory reads as NaN, so a value that was never written shows up in the results."""
    with nan_filled_empty():
        yield


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
