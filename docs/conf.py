"""Sphinx configuration. Build with: sphinx-build -W -b html docs docs/_build"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kan_mamba_layers import __version__

project = "kan_mamba_layers"
author = "The kan_mamba_layers authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_benchmarks/*", "results/*"]  # the tables are included by benchmarks.md

# The figures and the tables of benchmarks are made from the code and the records, and are not kept.
here = Path(__file__).resolve().parent
environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
subprocess.run([sys.executable, here / "figures", here / "_figures"], check=True, env=environment)
records = sorted((here.parent / "benchmarks" / "results").glob("*.json"))
report = ["-m", "benchmarks", "report", *records, "--out", here / "_benchmarks"]
subprocess.run([sys.executable, *report], check=True, env=environment)

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"kan_mamba_layers {version}"
