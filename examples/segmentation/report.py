"""What a comparison writes: results.json, report.html, curves.png and cost.png. The page holds its pictures."""

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from segmentation.figures import draw_cost, draw_curves
from segmentation.runs import Run, whole_file, write_json
from segmentation.scores import DIGITS, plus_minus, titles

Numbers = dict[str, Any]

VERDICTS = {"none": "no difference seen", "too few subjects": "too few subjects to say"}


def write_report(out: Path, results: Numbers, groups: Mapping[str, Sequence[Run]]) -> None:
    """Everything about these numbers, and the cases of the first seed of each variant."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    pictures = {"curves": out / "curves.png", "cost": out / "cost.png"}
    histories = {name: [run.history for run in group] for name, group in groups.items()}
    draw_curves(pictures["curves"], histories, results["recipe"].get("model.loss", "of each variant"))
    costs = {name: {**v["cost"], **v["per_image"]["dice"]} for name, v in results["variants"].items()}
    frame = pd.DataFrame.from_dict(costs, orient="index", dtype=float).rename(columns={"mean": "dice"})
    draw_cost(pictures["cost"], frame)
    cases = {name: group[0].folder / results["on"] / "cases.png" for name, group in groups.items()}
    cases = {name: path for name, path in cases.items() if path.is_file()}

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    templates.filters["embedded"] = lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    page = templates.get_template("report.html.jinja")
    with whole_file(out / "report.html") as draft:
        text = page.render(**results, tables=make_tables(results), pictures=pictures, cases=cases)
        draft.write_text(text, encoding="utf-8")


def make_tables(results: Numbers) -> dict[str, str]:
    """The tables of the report as HTML, a row per variant; those with nothing to tell are left out."""
    names = titles(results["unit"].replace("mixed", "mm or px"))
    tables: dict[str, dict[str, Numbers]] = defaultdict(dict)
    for variant, v in results["variants"].items():
        digits, cost = {score: DIGITS.get(score, 3) for score in names}, v["cost"]
        tables["scores"][variant] = {
            "seeds": len(v["seeds"]),
            **{title: _over_seeds(v["per_image"][score], digits[score]) for score, title in names.items()},
            **{f"pooled {names[score]}": _over_seeds(v["pooled"][score]) for score in ("iou", "dice")},
            "Dice per subject": _over_seeds(v["per_subject"]["dice"]),
            "nothing found": f"{v['empty_predictions']:.1f}",
        }
        tables["spread"][variant] = {
            title: plus_minus(v["per_image"][score]["sd_images"], digits=digits[score])
            for score, title in names.items()
        }
        if "classes" in v:
            tables["classes"][variant] = {name: _over_seeds(dice) for name, dice in v["classes"].items()}
            tables["classes"][variant]["mean"] = _over_seeds(v["mean_of_classes"])
        if errors := v.get("circumference"):
            signed = errors["error_mm"]
            tables["circumference"][variant] = {
                "images": errors["images"],
                "mean absolute error (mm)": _over_seeds(errors["absolute_error_mm"], 2),
                "median (mm)": _over_seeds(errors["median_absolute_error_mm"], 2),
                "mean error ± sd over images (mm)": plus_minus(signed["mean"], signed["sd_images"], 2),
                "without an ellipse": f"{errors['no_ellipse']:.1f}",
            }
        if d := results["differences"].get(variant):
            tables["differences"][variant] = {
                "difference of Dice": f"{d['mean']:+.3f}",
                "95 % interval": "n/a" if d["low"] is None else f"{d['low']:+.3f} to {d['high']:+.3f}",
                "verdict": VERDICTS.get(d["verdict"], d["verdict"]),
                **{"images": d["images"], "subjects": d["subjects"], "seeds": len(d["seeds"])},
            }
        tables["cost"][variant] = {
            "parameters": f"{cost['parameters']:,}",
            "multiply-adds": f"{cost['multiply_adds'] / 1e9:.3f} G",
            "seconds per epoch": f"{cost['seconds_per_epoch']:.1f}",
            "minutes in all": f"{cost['minutes']:.1f}",
        }
        if results["settings"][variant]:
            tables["settings"][variant] = results["settings"][variant]
    tables["recipe"] = {name: {"value": value} for name, value in results["recipe"].items()}
    frames = {name: pd.DataFrame.from_dict(rows, orient="index", dtype=object) for name, rows in tables.items()}
    return {name: frame.map(str).to_html(border=0) for name, frame in frames.items()}


def _over_seeds(values: Numbers, digits: int = 3) -> str:
    return plus_minus(values["mean"], values["sd_seeds"], digits)
