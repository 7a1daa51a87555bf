"""What the commands share: how they are started, here and in a process of their own, and how peers are named."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("mamba_ssm", "vmamba", "mambapy", "efficient_kan", "fast_kan", "pykan")


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks COMMAND`, described by the docstring of its module."""
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=description, formatter_class=style
    )


def start(*arguments: str) -> list[str]:
    """The same command line again, for a process with `search_path()`."""
    return [sys.executable, "-m", __package__, *arguments]


def search_path() -> dict[str, str]:
    """Where such a process finds this package, and the library if it is not installed: behind what is given."""
    return {"PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])}


def peer_path(text: str) -> tuple[str, str]:
    """The name and the path of a checkout."""
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PATH with {', '.join(PEERS[:-1])} or {PEERS[-1]} as NAME"
        )
    return name, path
