"""The tables of an experiment's report, made from its numbers (see `comparison.compare`) and nothing else."""

from __future__ import annotations

from segmentation.page import table
from segmentation.wording import (
    SIDES,
    Numbers,
    Results,
    code,
    device,
    interval,
    number,
    over_seeds,
    plus_minus,
    signed,
)

NAMES = {"iou": "IoU", "dice": "Dice", "f1": "F1"}


def scores_table(results: Results) -> str:
    """IoU, Dice and F1 per image, pooled, and as printed in the repeated report."""
    has_printed = any(variant["printed"] for variant in results["variants"].values())
    header = ["network", "seeds", *NAMES.values(), *(f"pooled {name}" for name in NAMES.values())]
    header += [f"printed {name}" for name in NAMES.values()] if has_printed else []
    rows = []
    for name, variant in results["variants"].items():
        row = [code(name), str(len(variant["seeds"]))]
        row += [plus_minus(variant["per_image"][score]) for score in NAMES]
        row += [plus_minus(variant["pooled"][score]) for score in NAMES]
        if has_printed:
            row += [number((variant["printed"] or {}).get(score), 2) for score in NAMES]
        rows.append(row)
    caption = (
        f"{SIDES[results['side']].capitalize()} images. IoU, Dice and F1: mean over the images of each image's score; "
        f"pooled: one score of the pixels of all images together; {over_seeds(results)}. Foreground is any label "
        "against the rest; Dice and F1 of a mask are the same number, both are given because tables use both."
    )
    return table(header, rows, caption + (" Printed: by the report that is repeated here." if has_printed else ""))


def details_table(results: Results) -> str:
    """Every score per image with its spread over seeds and over images."""
    unit, tolerance = results["unit"].replace("mixed", "mm or px"), f"{results['tolerance']:g}"
    names = {**NAMES, "hd95": f"HD95 ({unit})", "surface_dice": f"surface Dice ({tolerance} {unit})"}
    header = ["network", *(cell for name in names.values() for cell in (name, "over images"))]
    rows = []
    for name, variant in results["variants"].items():
        row = [code(name)]
        for score in names:
            digits, values = 1 if score == "hd95" else 3, variant["per_image"][score]
            row += [plus_minus(values, digits), number(values["sd_images"], digits)]
        rows.append(row)
    caption = (
        f"Per image, on the {SIDES[results['side']]} images: mean over the images, {over_seeds(results)}; "
        "“over images”: the standard deviation over the images, averaged over the seeds. HD95: 95th percentile of the "
        "distances between the two outlines, less is better; an image in which nothing was found counts with its "
        f"diagonal. Surface Dice: the part of both outlines that lies within {tolerance} {unit} of the other."
    )
    if results["unit"] == "mixed":
        caption += " These two are left out: the pixel size is known for some of the images only."
    return table(header, rows, caption)


def classes_table(results: Results) -> str:
    """Dice of every class; empty for a task of one class."""
    names = results["classes"]
    if len(names) == 1:
        return ""
    rows = [
        [code(name), *(plus_minus(variant["classes"][cls]) for cls in names), plus_minus(variant["mean_of_classes"])]
        for name, variant in results["variants"].items()
    ]
    caption = (
        f"Dice of every class by itself: mean over the {SIDES[results['side']]} images that hold the class, in truth "
        f"or prediction, {over_seeds(results)}; mean: of the classes."
    )
    return table(["network", *names, "mean"], rows, caption)


def circumference_table(results: Results) -> str:
    """Errors of the head circumference; empty where none is known."""
    known = {name: v["circumference"] for name, v in results["variants"].items() if "circumference" in v}
    if not known:
        return ""
    rows = []
    for name, errors in known.items():
        error = errors["error_mm"]
        bias = f"{number(error['mean'], 2)} ± {number(error['sd_images'], 2)}"
        rows.append(
            [
                code(name),
                str(errors["images"]),
                plus_minus(errors["absolute_error_mm"], 2),
                bias,
                number(errors["no_ellipse"], 1),
            ]
        )
    header = ["network", "images", "mean absolute error (mm)", "mean error ± sd over images (mm)", "without an ellipse"]
    caption = (
        "Head circumference, from an ellipse fitted to the outline of the prediction, against the circumference that "
        f"the data set gives; absolute error: mean over the images, {over_seeds(results)}. Images without an ellipse "
        "are in no error; their number is a mean over the seeds."
    )
    return table(header, rows, caption)


def differences_table(results: Results) -> str:
    """Paired differences of Dice; empty where there is nothing to set against."""
    found = {name: d for name, d in results["differences"].items() if d}
    if not found:
        return ""
    rows = [
        [code(name), signed(d["mean"]), interval(d), str(d["images"]), str(d["subjects"]), str(len(d["seeds"]))]
        for name, d in found.items()
    ]
    header = ["network", "difference of Dice", "95 % interval", "images", "subjects", "seeds"]
    return table(header, rows, f"{differences_caption(results)}.")


def differences_caption(results: Results) -> str:
    """How a paired difference was made."""
    return (
        f"Dice minus Dice of {code(results['baseline'])} on the same image, averaged over the seeds that both have, "
        "then over the images; interval: bootstrap over subjects"
    )


def cost_table(results: Results) -> str:
    """Size and time of every variant."""
    header = ["network", "parameters", "multiply-adds", "seconds per epoch", "minutes in all"]
    rows = [
        [code(name), *cost_cells(variant["cost"]), number(variant["cost"]["minutes"], 1)]
        for name, variant in results["variants"].items()
    ]
    return table(header, rows, f"{cost_caption(results)} Minutes: training of all seeds.")


def cost_cells(cost: Numbers) -> list[str]:
    """Parameters, multiply-adds and seconds per epoch."""
    return [f"{cost['parameters']:,}", f"{cost['multiply_adds'] / 1e9:.3f} G", number(cost["seconds_per_epoch"], 1)]


def cost_caption(results: Results) -> str:
    """What was counted, and where the clock ran."""
    size = results["image_size"]
    return (
        f"Multiply-adds: for one image of {size}x{size}, half the operations of convolutions, matrix products, KAN "
        f"layers and scans. Seconds: mean over epochs and seeds on {device(results)}, with the validation after each "
        "epoch; other machines, and other work on the same machine, give other times."
    )


def ablation_table(results: Results) -> str:
    """Dice, difference from the full network, and cost of every variant."""
    header = ["variant", "arguments", "seeds", "Dice", "difference", "95 % interval"]
    header += ["parameters", "multiply-adds", "seconds per epoch"]
    rows = []
    for name, variant in results["variants"].items():
        d = results["differences"].get(name)
        arguments = ", ".join(f"{key}={value}" for key, value in (variant["model_args"] | variant["train"]).items())
        rows.append(
            [
                code(name),
                code(arguments) if arguments else "",
                str(len(variant["seeds"])),
                plus_minus(variant["per_image"]["dice"]),
                *((signed(d["mean"]), interval(d)) if d else ("", "")),
                *cost_cells(variant["cost"]),
            ]
        )
    caption = f"Dice: mean per image on the {SIDES[results['side']]} images, {over_seeds(results)}."
    caption += f" Difference: {differences_caption(results)}." if results["differences"] else ""
    return table(header, rows, f"{caption} {cost_caption(results)}", words=2)
