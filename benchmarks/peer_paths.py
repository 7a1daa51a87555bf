"""Checkouts of other implementations, as the command line names them."""

import argparse

NAMES = ("mamba_ssm", "vmamba", "mambapy", "efficient_kan", "fast_kan", "pykan")


def peer_path(text: str) -> tuple[str, str]:
    """The name and the path of a checkout."""
    name, _, path = text.partition("=")
    if name not in NAMES or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PATH with {', '.join(NAMES[:-1])} or {NAMES[-1]} as NAME"
        )
    return name, path
