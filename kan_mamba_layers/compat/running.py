"""The command line: run a program with the stand-ins installed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from runpy import run_module, run_path

from kan_mamba_layers.compat.importing import install


def main(arguments: Sequence[str] | None = None) -> None:
    """Install the stand-ins and run a program as ``python SCRIPT`` or ``python -m MODULE`` would."""
    parser = argparse.ArgumentParser(
        prog="python -m kan_mamba_layers.compat",
        description="Run a program with stand-ins for mamba_ssm, causal_conv1d and VMamba's selective_scan.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="TARGET is a module, as in python -m")
    parser.add_argument("--force", action="store_true", help="shadow modules of these names that are installed")
    parser.add_argument("--keep", action="store_true", help="keep an existing mamba_ssm and replace only its kernels")
    # REMAINDER would drop a "--" that follows the target.
    parser.add_argument("program", metavar="TARGET", nargs=argparse.PARSER, help="the script to run, and its arguments")
    options = parser.parse_args(arguments)
    program = options.program
    if program[0] == "--":  # as in python -- SCRIPT; argparse may leave it
        program = program[1:]
    target = program[0]
    script = Path(target)
    if not (options.module or script.is_file()):
        parser.error(f"no such script: {target!r}; give the path of a Python file, or -m and a module")
    sys.argv = program
    if options.module:
        install(force=options.force, keep=options.keep)
        run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(script.resolve().parent))
        install(force=options.force, keep=options.keep)
        run_path(str(script.absolute()), run_name="__main__")
