"""All three tasks on the built-in demo: trains a few small networks for a few epochs each and prints one table.

    python examples/quickstart.py

Every network leaves its scores and masks of the test subjects in runs/quickstart/TASK-NETWORK;
runs/quickstart/overview.png shows one image of each task. `lab.py` does the same for images of your own.
"""

from pathlib import Path
from typing import Any

import lightning
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Table

from segmentation.console import console, mistakes_in_one_line, quieten, say
from segmentation.data.datamodule import SegmentationData
from segmentation.figures import draw_cases
from segmentation.module import Segmentation
from segmentation.writers import ScoreWriter

# For a hundred steps; found by trying 2e-3 to 8e-3 with km_unet_pp_tiny on this very demo, so the table shows that
# things work, not which network is better.
LEARNING_RATES = {"isic2017": 8e-3, "fetal_head": 8e-3, "lumbar_spine": 4e-3}


def quickstart(
    out: Path = Path("runs", "quickstart"),
    networks: tuple[str, ...] = ("km_unet_pp_tiny", "km_unet_tiny", "unet"),
    epochs: int = 12,
    size: int = 64,
    images: int = 60,
) -> list[dict[str, Any]]:
    """Train every network on every task's demo and score it on the subjects kept for the test.

    Args:
        out: folder for scores, masks and overview.png.
        networks: names to compare; the first draws the overview.
        epochs: epochs of each training.
        size: side of the square images.
        images: demo images of each task, a fifth of the subjects kept for the test.
    """
    quieten()
    found, cases = [], []
    table = Table("task", "network", "IoU", "Dice", "F1", title="test subjects, mean per image")
    for task, lr in LEARNING_RATES.items():
        data = SegmentationData(task, image_size=size, limit=images, batch_size=4)
        for network in networks:
            lightning.seed_everything(0, verbose=False)
            module = Segmentation(task, network, image_size=size, lr=lr)
            writer = ScoreWriter(out / f"{task}-{network}", {"task": task, "network": network})
            options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
            trainer = lightning.Trainer(
                max_epochs=epochs, gradient_clip_val=1.0, callbacks=[writer, RichProgressBar()], **options
            )
            trainer.fit(module, datamodule=data)
            trainer.test(module, datamodule=data, verbose=False)
            found.append(writer.scores)
            means = {name: score["mean"] for name, score in writer.scores["per_image"].items()}
            table.add_row(task, network, *(f"{means[score]:.3f}" for score in ("iou", "dice", "f1")))
            if network == networks[0]:
                cases.append(module.case_of(module.task.title, data.test_items[0]))
    draw_cases(out / "overview.png", cases)
    console.print(table)
    say(f"scores, masks and overview.png are in {out}")
    return found


if __name__ == "__main__":
    with mistakes_in_one_line():
        auto_cli(quickstart, as_positional=False)
