"""The tests of the package, without examples and docs, on other versions and without its optional dependencies.

    nox -s tests-3.12          newest versions of everything, on Python 3.10 to 3.13
    nox -s oldest              the lowest versions that pyproject.toml admits
    nox -s without             Python 3.11 without Numba, without Triton, without any optional dependency

On Linux these install PyTorch's CUDA builds, gigabytes each; `-- -c constraints.txt` chooses other versions.
"""

import nox

PACKAGE = ("tests/ops", "tests/layers", "tests/models", "tests/compat")
PACKAGE += (
    "tests/test_bad_input.py",
    "tests/test_golden.py",
    "tests/test_import.py",
    "tests/test_public_api.py",
    "kan_mamba_layers",
)
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "scipy>=1.11", "scikit-image")
OPTIONAL = ("numba", "triton", "matplotlib")
OLDEST = {
    "torch": "2.4.0",
    "triton": "3.0.0",
    "numpy": "1.24.4",
    "numba": "0.60.0",
    "einops": "0.7.0",
    "safetensors": "0.4.0",
    "matplotlib": "3.8.0",
    "scipy": "1.11.4",
}


def _test(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", "-q", *PACKAGE)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """With the newest versions, or those of a constraints file."""
    session.install(".", *OPTIONAL, *TOOLS, *session.posargs)
    _test(session)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """With the lowest versions."""
    session.install(".", *(f"{name}=={version}" for name, version in OLDEST.items()), *TOOLS, *session.posargs)
    _test(session)


@nox.session(python="3.11")
@nox.parametrize("missing", [("numba",), ("triton",), OPTIONAL], ids=["numba", "triton", "optional"])
def without(session: nox.Session, missing: tuple[str, ...]) -> None:
    """Without some of the optional dependencies."""
    session.install(".", *OPTIONAL, *TOOLS, *session.posargs)
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", *missing)
    _test(session)
