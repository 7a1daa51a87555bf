"""All three tasks on the built-in demo: trains a few small networks for a few epochs each and prints one table.

    python examples/quickstart.py

Every run leaves its report in runs/quickstart/TASK-MODEL, and runs/quickstart/overview.png shows one image of each
task. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

import train
from kan_mamba_layers import from_pretrained
from segmentation import report
from segmentation.data.demo import DEMOS
from segmentation.data.module import SegmentationData
from segmentation.tasks import get_task

MODELS = ["km_unet_pp_tiny", "km_unet_tiny", "unet"]
# For a hundred steps; found by trying 2e-3 to 8e-3 with km_unet_pp_tiny on this very demo, so the table shows that
# things work, not which network is better.
LEARNING_RATES = {"isic2017": 8e-3, "fetal_head": 8e-3, "lumbar_spine": 2e-3}


def quickstart(
    out: Path = Path("runs", "quickstart"),
    models: list[str] = MODELS,
    epochs: int = 8,
    size: int = 64,
    images: int = 60,
) -> list[dict[str, Any]]:
    """Train every model on every task's demo and compare them.

    Args:
        out: folder of all runs and of overview.png.
        models: networks to compare; the first must be one of kan_mamba_layers, it draws the overview.
        epochs: epochs of each run.
        size: side of the square images.
        images: demo images of each task, a seventh of the subjects for validation, a fifth kept for testing.
    """
    runs, shown = [], []
    common = [f"--epochs={epochs}", f"--image-size={size}", f"--limit={images}", "--batch-size=4"]
    for name in DEMOS:
        task = get_task(name)
        for model in models:
            flags = [f"--task={name}", f"--model={model}", f"--out={out / f'{name}-{model}'}", "--resume"]
            runs.append(train.main([*flags, *common, f"--lr={LEARNING_RATES[name]}"]))
        network = from_pretrained(out / f"{name}-{models[0]}" / "model")
        data = SegmentationData(task, image_size=size, limit=images)
        shown.append((task.title, report.predict(network, data.val_set, number=1)[0]))
    report.draw_overview(out / "overview.png", shown)
    train.console.print(report.results_table(runs))
    train.console.print(f"reports and overview.png in {out}", soft_wrap=True)
    return runs


if __name__ == "__main__":
    auto_cli(quickstart, as_positional=False)
