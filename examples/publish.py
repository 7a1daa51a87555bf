"""Make weights that the library brings of a run: in half precision, with its split, its scores and a model card.

    python examples/publish.py runs/heads fetal_head

The scores are those of the stored weights on the test side of the run's split.
"""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from kan_mamba_layers import Segmenter
from segmentation import runs
from segmentation.networks import weights_folder
from segmentation.scores import plus_minus, titles

# Source, licence and attribution of what the weights were trained on, and what they do not know.
DATA = {
    "skin_lesion": (
        "dermatoscopic images of the training set of the ISIC 2017 challenge (Codella et al., ISBI 2018, "
        "arXiv 1710.05006), squashed to 256x256",
        "usually stated as CC0, by some mirrors as CC BY-NC; not verified",
        "One lesion in the middle of the image, mostly on light skin. The split is one of the training set, which is "
        "easier than the official test set.",
    ),
    "fetal_head": (
        "HC18, two-dimensional ultrasound of the standard plane (van den Heuvel et al., PLOS ONE 13(8), 2018; Zenodo "
        "1327317)",
        "CC BY 4.0",
        "One head per image, in the standard plane, from two devices of one hospital.",
    ),
    "lumbar_spine": (
        "MyoSegmenTUM spine, sagittal T2-weighted MRI of healthy subjects (Burian et al., BMC Musculoskeletal "
        "Disorders 20, 2019)",
        "article CC BY 4.0; the data's own licence is not verified",
        "Sagittal slices of 1 mm and 224x224 pixels with the five lumbar vertebrae of healthy adults. The numbering "
        "survives moving the image by a tenth of its height. In one of 34 subjects, whose last vertebra is "
        "wedge-shaped, every vertebra gets its neighbour's number. "
        "Images of another kind need weights of their own: on three volumes of another source, twice as tall as wide "
        "and with seven vertebrae, Dice of vertebra against rest was 0.01 to 0.14. The scores below are of one fold of "
        "five, chosen on its validation subjects; over all 34 subjects the five have 0.917, and a mean of the classes "
        "of 0.876.",
    ),
    "breast_lesion": (
        "breast ultrasound images BUSI with a lesion (Al-Dhabyani et al., Data in Brief 28, 2020)",
        "CC0 according to a mirror; not verified",
        "Every image of the training had a lesion, so one is found in healthy tissue too.",
    ),
}


def publish(run: Path, name: str) -> Path:
    """Write config.json, model.safetensors, split.json and README.md, and return their folder."""
    if name not in DATA:
        raise ValueError(f"name {name!r} has no data: choose {', '.join(DATA)}")
    facts, folder = runs.read_json(run / "metrics.json"), weights_folder(name)
    Segmenter.from_pretrained(run / "model").save_pretrained(folder, dtype=torch.float16)
    shutil.copyfile(run / "split.json", folder / "split.json")
    where = runs.read_config(run)["data"]["folder"]
    options = ["--pretrained", name, f"--data.folder={where}", f"--data.split={folder / 'split.json'}"]
    options += ["--data.side=test", "--trainer.accelerator=cpu", f"--out={run / 'published'}"]
    subprocess.run([sys.executable, str(Path(__file__).with_name("lab.py")), "test", *options], check=True)
    scores = runs.read_json(run / "published" / "scores.json")
    (folder / "README.md").write_text(card(name, facts, scores), encoding="utf-8")
    return folder


def card(name: str, facts: dict[str, Any], scores: dict[str, Any]) -> str:
    """The model card, from what the training and the test left behind."""
    source, licence, limits = DATA[name]
    images, subjects = facts["images"], facts["subjects"]
    sides = ", ".join(f"{images[side]} images of {subjects[side]} subjects ({side})" for side in images)
    rows = [(titles(scores["unit"])[score], value) for score, value in scores["per_image"].items() if score != "f1"]
    lines = [f"| {title}, mean per image ± sd | {plus_minus(value['mean'], value['sd'])} |" for title, value in rows]
    for label, part in scores.get("classes", {}).items():
        lines.append(f"| Dice of {label}, mean per image | {plus_minus(part['per_image']['dice'])} |")
    if "mean_of_classes" in scores:
        lines.append(f"| mean Dice of the classes | {plus_minus(scores['mean_of_classes']['dice'])} |")
    if "circumference" in scores:
        error = scores["circumference"]
        lines += [
            f"| head circumference, mean absolute error | {plus_minus(error['mean_absolute_error_mm'], digits=2)} mm |",
            f"| head circumference, mean error | {error['mean_error_mm']:+.2f} mm |",
        ]
    table = "\n".join(lines)
    notes = "\n".join(
        textwrap.fill(note, 100, initial_indent="* ", subsequent_indent="  ", break_on_hyphens=False)
        for note in (
            f"Data: {source}.",
            f"Licence of the data: {licence}.",
            f"Split by subject: {sides}; sha256 of the split {facts['split_sha256'][:16]}.",
            f"Training: {facts['steps']} steps of `examples/lab.py fit` at {facts['image_size']}x{facts['image_size']} "
            f"pixels, seed {facts['seed']}; epoch {facts['best_epoch']} of {facts['epochs']}, the best by Dice on the "
            "validation subjects.",
            f"Limits: {limits}",
        )
    )
    return f"""# {name}: {facts["network"]}

**For research. This is not a medical device, and no basis for a diagnosis.**

```python
from kan_mamba_layers import Segmenter

mask = Segmenter.from_pretrained("{name}")(image)  # h w, from a NumPy image h w, h w 3 or h w 4
```

{notes}

Scores of these weights, in half precision, on the {scores["images"]} test images, whose subjects took part in nothing
before, at the images' own size:

| | |
|---|---:|
{table}

Again with the same data in DIR:

```bash
python examples/lab.py test --pretrained {name} --data.folder DIR \\
  --data.split kan_mamba_layers/weights/{name}/split.json --data.side test
```
"""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(publish(Path(sys.argv[1]), sys.argv[2]))
