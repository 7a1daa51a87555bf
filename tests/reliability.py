"""Write docs/reliability.md: each bar, and how many tests hold it up today.

    python -m pytest --junitxml report.xml
    python -m pytest --hypothesis-profile=thorough --junitxml thorough.xml tests/ops tests/test_walk_orders.py
    python -m pytest --cov kan_mamba_layers --cov-report json:coverage.json     # with pytest-cov
    python tests/mutate.py --sample 200 --out mutants.json
    python tests/reliability.py report.xml --thorough thorough.xml --coverage coverage.json --mutants mutants.json

Several reports are read as one: those of the nightly tests, of a GPU, or of other versions may follow the first. To
`mutants.json` may be added by hand why a survivor was left ("reasons", a text for each), which survivors change no
result ("equal", a list), and how many mutants were noticed before tests were added ("first").
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


# Modules whose lines run in Numba's or Triton's machine code.
KERNELS = ("*/simd/*", "*_kernel.py", "*/cpu/block.py", "*/triton/*")


class Bar(NamedTuple):
    """What has to hold, and the patterns of the tests that check it."""

    text: str
    tests: tuple[str, ...]


BARS = {
    "Right numbers": (
        Bar(
            "Every op, backend and dtype against an independent float64 oracle: outputs and every gradient err at most "
            "twice as much as PyTorch's own formula at that dtype, plus one rounding",
            (
                "*output*and_every_gradient*",
                "*outputs_last_state_and_every_gradient*",
                "*test_numbers*",
                "*equals_the_oracle*",
            ),
        ),
        Bar("First and second derivatives against finite differences in float64", ("*gradcheck*", "*gradgradcheck*")),
        Bar("Splines and their derivatives against SciPy, at knots too", ("*test_bspline*", "*scipy*")),
        Bar(
            "Random shapes, dtypes, strides and flags, 50 examples each by default, 2,000 with "
            "`--hypothesis-profile=thorough`",
            ("*test_output_and_every_gradient*", "*TestProperties*", "*test_vector*", "*test_wide*"),
        ),
        Bar(
            "Identities: linearity, skips, split sequences, flips and transposes, sums of bases",
            ("*TestIdentities*", "*TestSymmetries*", "*TestProperties*", "*is_the_sum_of_its_taps*"),
        ),
        Bar("Values of the original implementations", ("*golden*", "*layer_of_the_original*")),
        Bar(
            "Extreme values: huge, tiny, denormal, constant, not finite",
            ("*Stress*", "*stress*", "*SpecialValues*", "*extreme*"),
        ),
    ),
    "Kernels": (
        Bar("PyTorch's own check of operators", ("*opcheck*",)),
        Bar("Triton kernels in the interpreter, more than 40 cases a test", ("*test_kernels_in_the_interpreter*",)),
        Bar(
            "Triton kernels compiled ahead of time, their registers and spills as in a table", ("*test_ahead_of_time*",)
        ),
        Bar(
            "Nothing beyond the ends is read or written, nothing unwritten is read",
            ("*unwritten*", "*beyond_the_ends*", "*test_memory*"),
        ),
        Bar(
            "The same bits again for the same number of threads, the same up to rounding for any other",
            ("*same_bits*", "*any_number*", "*several_threads*", "*TestThreads*"),
        ),
        Bar("Vector instructions of each processor", ("*test_targets*", "*ops.simd*")),
    ),
    "Contracts": (
        Bar(
            "Bad input is refused with the argument, the value and the fix",
            ("*test_bad_input*", "*refused*", "*TestArguments*"),
        ),
        Bar("Sizes of zero", ("*empty*", "*no_batch*", "*no_rows*", "*zero_size*", "*no_features*")),
        Bar("`torch.compile`, `torch.export`, ONNX", ("*test_compile*", "*Compile*", "*Export*", "*onnx*", "*export*")),
        Bar(
            "Subclasses of tensors, copies, files, the meta device",
            ("*MetaTensor*", "*metatensor*", "*subclass*", "*copies*", "*meta_device*"),
        ),
        Bar(
            "Without Numba, without Triton",
            ("*WithoutNumba*", "*cannot_import*", "*without_triton*", "*without_numba*"),
        ),
        Bar(
            "Public names, layers of imports, docstring examples",
            ("*test_public_api*", "*test_layering*", "kan_mamba_layers.*"),
        ),
    ),
    "Models and experiments": (
        Bar("Every model: any size, gradients, files, parameter counts", ("tests.models.*",)),
        Bar("Stored weights: flipped bits, truncated files, malicious pickles", ("*test_storage*",)),
        Bar("Training killed and resumed, bit for bit", ("*test_resume*",)),
        Bar("Data: broken files, wrong sizes, other layouts", ("tests.examples.data.*",)),
        Bar("Scores against independent formulas", ("*test_scores*", "*test_compare*")),
    ),
}

# What the tests of other libraries do, as far as greps through their trees of late 2026 and a look at their tests of
# kernels showed.
PEERS = """## Beside other libraries

| | here | mamba | VMamba | fla | Liger-Kernel | attention-gym |
| --- | --- | --- | --- | --- | --- | --- |
| kernels tested without a GPU | interpreter, ahead of time | no | no | no | no | plain form |
| half precision tested | yes | commented out | not looked for | yes | yes, with reruns | yes |
| `gradcheck`, `gradgradcheck` | yes, yes | no, no | no, no | no, no | no, no | no, no |
| `opcheck` | every op | no | no | one file | no | yes |
| random properties (hypothesis) | yes | no | no | no | no | no |
| unwritten memory | poisoned, guarded | no | no | poisoned | no | not looked for |
""".splitlines()


def outcomes(reports: list[Path]) -> dict[str, str]:
    """What became of each test, by its dotted name; the last report counts."""
    found = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            ended = {child.tag for child in case} & {"failure", "error", "skipped"}
            found[f"{case.get('classname')}.{case.get('name')}"] = min(ended, default="passed")
    return found


def render(
    ended: dict[str, str],
    thorough: dict[str, str] | None = None,
    coverage: dict[str, Any] | None = None,
    mutants: dict[str, Any] | None = None,
) -> str:
    """The page."""
    total = Counter(ended.values())
    lines = [
        "# Reliability",
        "",
        "What has to hold, and how many tests hold it up. `tests/reliability.py` writes this page from the report of a",
        f"run of the tests: {_counts(total)} in all. A test may stand in more than one row.",
        "",
    ]
    for title, bars in BARS.items():
        lines += [f"## {title}", "", "| what has to hold | tests |", "| --- | --- |"]
        for bar in bars:
            names = [name for name in ended if any(fnmatch.fnmatchcase(name, pattern) for pattern in bar.tests)]
            if not names:
                raise SystemExit(f"no test matches {bar.tests}: {bar.text}")
            lines.append(f"| {bar.text} | {_counts(Counter(ended[name] for name in names))} |")
        lines.append("")
    if thorough:
        lines += _of_thorough(thorough)
    if coverage:
        lines += _of_coverage(coverage["files"])
    if mutants:
        lines += _of_mutants(mutants)
    lines += PEERS
    return "\n".join(lines).rstrip() + "\n"


def _counts(ends: Counter[str]) -> str:
    said = [f"{ends['passed']:,} passed", *(f"{n:,} {end}" for end, n in sorted(ends.items()) if end != "passed")]
    return ", ".join(said)


def _of_thorough(ended: dict[str, str]) -> list[str]:
    return [
        "## Random examples",
        "",
        "`python -m pytest --hypothesis-profile=thorough` draws 2,000 examples for each test that takes random shapes,",
        f"dtypes, strides and flags, instead of 50: {_counts(Counter(ended.values()))}.",
        "",
    ]


def _of_coverage(files: dict[str, Any]) -> list[str]:
    """Lines that the tests run, but for kernels, which Numba and Triton compile."""
    counts = {
        name: (file["summary"]["covered_lines"], file["summary"]["num_statements"])
        for name, file in files.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in KERNELS) and file["summary"]["num_statements"]
    }
    run, lines = (sum(count) for count in zip(*counts.values(), strict=True))
    least = sorted(counts, key=lambda name: counts[name][0] / counts[name][1])[:5]
    return [
        "## Lines",
        "",
        f"The tests run {run:,} of {lines:,} lines of the package, {run / lines:.1%}, kernels apart, which Numba and",
        "Triton compile. Least of all:",
        "",
        *(f"* `{name}`: {counts[name][0]} of {counts[name][1]}" for name in least),
        "",
    ]


def _of_mutants(mutants: dict[str, Any]) -> list[str]:
    survivors, run, reasons = mutants["survivors"], mutants["run"], mutants.get("reasons", {})
    equal = [line for line in survivors if line in mutants.get("equal", ())]
    left = [line for line in survivors if line not in equal]
    noticed = run - len(survivors)

    def listed(lines: list[str]) -> list[str]:
        return [f"* `{line}`: {reasons[line]}" if line in reasons else f"* `{line}`" for line in lines]

    return [
        "## Mutants",
        "",
        "`tests/mutate.py` changes one operator, number or statement of a layer, a reference formula or the split of a",
        f"data set at a time. Of {mutants['mutants']:,} such changes {run:,} drawn at random were tried. The tests",
        f"notice {noticed:,} of them, {noticed / run:.1%}; before tests were added for others,",
        f"{mutants.get('first', noticed):,}. Of the {len(survivors)} unnoticed ones {len(equal)} change no result;",
        f"of all others {noticed / (run - len(equal)):.1%} are noticed. Unnoticed, and results differ:",
        "",
        *listed(left),
        "",
        "Unnoticed, and results are the same:",
        "",
        *listed(equal),
        "",
    ]


def main() -> None:
    """Read the reports and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.xml")
    parser.add_argument("--thorough", type=Path, metavar="REPORT.xml")
    parser.add_argument("--coverage", type=Path, metavar="FILE.json")
    parser.add_argument("--mutants", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    thorough = outcomes([args.thorough]) if args.thorough else None
    coverage, mutants = (
        path and json.loads(path.read_text(encoding="utf-8")) for path in (args.coverage, args.mutants)
    )
    PAGE.write_text(render(outcomes(args.reports), thorough, coverage, mutants), encoding="utf-8")


if __name__ == "__main__":
    main()
