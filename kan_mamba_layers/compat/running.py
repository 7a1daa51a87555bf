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
    parser.add_argument("--keep", action="store_true", help="keep a mamba_ssm that there is, without its kernels")
    parser.add_argument("target", metavar="TARGET", help="the script to run")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="passed to the program")
    options = parser.parse_args(arguments)
    script = Path(options.target)
    if not (options.module or script.is_file()):
        parser.error(f"no such script: {options.target!r}; give the path of a Python file, or -m and a module")
    sys.argv = [options.target, *options.arguments]
    if options.module:
        install(force=options.force, keep=options.keep)
        run_module(options.target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(script.resolve().parent))
        install(force=options.force, keep=options.keep)
        run_path(str(script.absolute()), run_name="__main__")
