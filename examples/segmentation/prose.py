"""The words of an experiment's report, made from its numbers (see `comparison.compare`) and nothing else."""

from __future__ import annotations

from segmentation import tables
from segmentation.page import table
from segmentation.wording import (
    SIDES,
    Numbers,
    Results,
    code,
    count,
    device,
    epochs,
    interval,
    join,
    listed,
    on_cpu,
    overrides,
    seeds,
    signed,
)

FEW_SUBJECTS = 10
FULL_BUDGET = {"epochs": 50, "image_size": 256, "parameters": 5e6, "seeds": 3}


def experiment_text(results: Results) -> str:
    """The report of networks that were trained alike."""
    parts = [
        f"# {results['title'].capitalize()}: {len(results['variants'])} networks, trained alike",
        introduction(results),
        budget(results),
        "## Scores",
        tables.scores_table(results),
        printed_note(results),
        tables.details_table(results),
        tables.classes_table(results),
        tables.circumference_table(results),
        f"## Compared with {code(results['baseline'])}" if results["differences"] else "",
        tables.differences_table(results),
        differences_sentences(results),
        "## Cost",
        tables.cost_table(results),
        "![Dice of every variant against its parameters and its time per epoch](cost.png)",
        *curves_and_cases(results),
        how(results),
    ]
    return join(parts)


def ablation_text(results: Results) -> str:
    """The report of variants of one network."""
    model = next(iter(results["variants"].values()))["model"]
    parts = [
        f"# {results['title'].capitalize()}: what each part of {model} contributes",
        introduction(results),
        budget(results),
        "## Scores and cost",
        tables.ablation_table(results),
        "![Dice of every variant against its parameters and its time per epoch](cost.png)",
        f"## Compared with {code(results['baseline'])}" if results["differences"] else "",
        differences_sentences(results),
        "## Scores in detail",
        tables.details_table(results),
        tables.classes_table(results),
        tables.circumference_table(results),
        *curves_and_cases(results),
        how(results),
    ]
    return join(parts)


def introduction(results: Results) -> str:
    """One sentence of what was done, and how much of it is missing."""
    images, subjects = results["data"]["images"], results["data"]["subjects"]
    source = (
        "drawn images of the built-in demo"
        if results["data"]["demo"]
        else f"the data in {code(results['data']['name'])}"
    )
    side, size = SIDES[results["side"]], results["image_size"]
    text = (
        f"{listed([code(name) for name in results['variants']])} learned to segment: {results['title']} "
        f"({code(results['task'])}), on {source}, squashed to {size}x{size} pixels, "
        f"for {epochs(results)} with {seeds(results['seeds'])}, on {device(results)}. "
        f"{images['train']} images of {subjects['train']} subjects were trained on; "
        f"{images['val']} of {subjects['val']} chose the best epoch by its Dice; "
        f"{images['test']} of {subjects['test']} were kept for the test. "
        "All had the same split, recipe and budget"
        + (", but for what stands under “How”" if overrides(results) else "")
        + f". The scores below are those of the best epoch on the {side} images, at the images' own size"
        + (", with probabilities averaged over flips of the image." if results["flips"] else ".")
    )
    if results["side"] == "val":
        text += " The best epoch was chosen on these very images, so the scores flatter every variant alike."
    if results["missing"]:
        done = results["runs"] - len(results["missing"])
        text += (
            f"\n\n**{done} of {results['runs']} runs are in this report.** Missing: {'; '.join(results['missing'])}."
        )
    if results["unreadable"]:
        lost = ", ".join(code(entry["id"]) for entry in results["unreadable"])
        text += f"\n\n{len(results['unreadable'])} {side} images could not be read and are left out: {lost}."
    return text


def budget(results: Results) -> str:
    """What the training had too little of for its scores to be what the networks can reach; empty for a full budget."""
    variants = results["variants"].values()
    largest = max(variant["cost"]["parameters"] for variant in variants)
    longest = max(max(variant["epochs"]) for variant in variants)
    size, many = results["image_size"], len(results["seeds"])
    lacks = [
        (f"{count(longest, 'epoch')}", longest < FULL_BUDGET["epochs"]),
        (f"images of {size}x{size} pixels", size < FULL_BUDGET["image_size"]),
        (f"networks of at most {largest / 1e6:.1f} million parameters", largest < FULL_BUDGET["parameters"]),
        (f"{count(many, 'seed')}", many < FULL_BUDGET["seeds"]),
    ]
    small = [name for name, lacking in lacks if lacking]
    if not small:
        return ""
    place = "on a CPU " if on_cpu(results) else ""
    return (
        f"Trained {place}at {size}x{size} for {epochs(results)}: a small budget ({', '.join(small)}). "
        "The scores tell how the networks compare at this budget, not what any of them can reach."
    )


def printed_note(results: Results) -> str:
    """Why the printed figures cannot be reached one by one."""
    printed = {name: v["printed"] for name, v in results["variants"].items() if v["printed"]}
    if not printed:
        return ""
    worst = max(printed.values(), key=lambda scores: abs(scores["dice"] - scores["f1"]))
    note = "How the printed figures were aggregated over pixels, images and classes is unknown"
    if worst["dice"] != worst["f1"]:
        note += (
            ", and they cannot all be the same pixel-wise metric: Dice and F1 of one mask are the same number, "
            f"{worst['dice']:.2f} and {worst['f1']:.2f} are not"
        )
    return f"{note}. Data, split and training differ too, so only the order of the networks can be compared."


def differences_sentences(results: Results) -> str:
    """A sentence per variant, and what the intervals do not cover."""
    found = {name: d for name, d in results["differences"].items() if d}
    if not found:
        return ""
    sentences = [f"* {difference_sentence(results, name, d)}" for name, d in found.items()]
    fewest = min(d["subjects"] for d in found.values())
    note = (
        "The intervals say how far the differences depend on which subjects were scored. How far they depend on the "
        "seeds is told by the ± of the scores alone. Of many such intervals one in twenty leaves out zero by chance."
    )
    if fewest < FEW_SUBJECTS:
        note += f" With {count(fewest, 'subject')} they are rough."
    return "\n".join(sentences) + f"\n\n{note}"


def difference_sentence(results: Results, name: str, d: Numbers) -> str:
    """Above, below, or no difference seen, by the interval."""
    base = results["baseline"]
    where = f"on {count(d['images'], 'image')} of {count(d['subjects'], 'subject')}, {count(len(d['seeds']), 'seed')}"
    if d["low"] is None:
        return f"{code(name)}: {signed(d['mean'])} Dice against {code(base)}; one subject gives no interval ({where})."
    span = f"{signed(d['mean'])} Dice, {interval(d)} ({where})"
    if d["verdict"] == "none":
        return f"No difference seen between {code(name)} and {code(base)}: {span}."
    sentence = f"{code(name)} is {d['verdict']} {code(base)}: {span}."
    deviations = [results["variants"][v]["per_image"]["dice"]["sd_seeds"] for v in (name, base)]
    largest = max((sd for sd in deviations if sd is not None), default=0.0)
    if abs(d["mean"]) < largest:
        sentence += f" That is less than the deviation over seeds ({largest:.3f})."
    return sentence


def curves_and_cases(results: Results) -> list[str]:
    """The pictures with their captions."""
    parts = [
        "## Curves",
        "*Loss and IoU of every epoch, mean over the seeds in a band from the least to the greatest; where seeds "
        "stopped at different epochs, up to the first stop. Training values: means over the epoch's augmented images.*",
        "![Loss and IoU per epoch](curves.png)",
        "## Cases",
        f"*The {SIDES[results['side']]} images with the best, the median and the worst Dice of each first seed.*",
    ]
    return parts + [f"### {code(name)}\n\n![Cases of {name}](cases-{name}.png)" for name in results["variants"]]


def how(results: Results) -> str:
    """Everything that is needed to do it again."""
    rows = [(code(name), code(str(value))) for name, value in results["recipe"].items()]
    rows += [(f"{code(key)} for {code(name)}", code(str(value))) for name, key, value in overrides(results)]
    facts = [
        ("seeds", ", ".join(str(seed) for seed in results["seeds"])),
        ("device", "; ".join(results["device"])),
        ("date", ", ".join(results["date"])),
        ("commit", ", ".join(code(commit or "unknown") for commit in results["commit"])),
        ("versions", "; ".join(", ".join(f"{k} {v}" for k, v in versions.items()) for versions in results["versions"])),
        ("SHA-256 of the split", code(results["data"]["split_sha256"])),
    ]
    return join(
        [
            f"## How\n\n```\n{results['command']}\n```",
            table(["", ""], facts, "Every run keeps its own in `runs/*/metrics.json`.", words=2),
            table(["setting", "value"], rows, "The recipe, as resolved.", words=2),
        ]
    )
