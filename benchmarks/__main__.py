"""`python -m benchmarks COMMAND ...`; `COMMAND --help` tells more."""

import importlib
import sys

COMMANDS = {
    "profile": "time, memory and FLOPs of one layer or model on this machine, with every backend",
    "clients": "published models on the stand-ins of kan_mamba_layers.compat, beside a plain recurrence",
    "run": "error, time and memory of ops, layers and models, beside textbook forms and peers, as JSON",
    "report": "such records as pages of tables",
    "gpu_day": "check, time, tune and train on a GPU that is available for minutes",
    "gpu_report": "its results as a record, and its failures by kernel",
}


def main() -> None:
    """Hand the rest of the command line to a command."""
    name, *arguments = sys.argv[1:] or [""]
    if name in COMMANDS:
        raise SystemExit(importlib.import_module(f"benchmarks.{name}").main(arguments))
    usage = "\n".join([str(__doc__), *(f"  {command:16} {what}" for command, what in COMMANDS.items())])
    if name not in ("-h", "--help"):
        raise SystemExit(usage if not name else f"no command {name!r}\n\n{usage}")
    print(usage)


if __name__ == "__main__":
    main()
