"""Training of one network on one task: loss, optimiser, schedule and what is logged."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn

from segmentation.metrics import SegmentationMetrics, confusion_counts, image_scores, predicted_classes
from segmentation.tasks import Task

Batch = dict[str, Tensor]


class Segmentation(lightning.LightningModule):
    """Dice + cross-entropy, AdamW, linear warm-up over the first twentieth of the steps, then a cosine down to zero."""

    def __init__(self, task: Task, network: nn.Module, *, lr: float = 4e-3, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.task, self.network, self.lr, self.weight_decay = task, network, lr, weight_decay
        binary = task.num_classes == 1
        self.loss = DeepSupervisionLoss(DiceCELoss(sigmoid=binary, softmax=not binary, to_onehot_y=not binary))
        self.metrics = SegmentationMetrics(task.class_names)
        self.scores: dict[str, Any] = {}  # of the latest whole validation set

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        return self.network(image)

    def training_step(self, batch: Batch) -> Tensor:
        outputs = self(batch["image"])
        loss = self.loss(outputs, batch["mask"])
        logits = outputs
        if isinstance(outputs, list):  # a mean over depths, comparable to val/loss
            loss, logits = loss / sum(self.loss.get_weights(len(outputs))), outputs[0]
        with torch.no_grad():
            counts = confusion_counts(predicted_classes(logits), batch["mask"], len(self.task.labels))
            self._log("train/iou", image_scores(counts, "iou").mean(), batch)
        self._log("train/loss", loss, batch)
        return loss

    def validation_step(self, batch: Batch) -> None:
        logits = self(batch["image"])
        self._log("val/loss", self.loss(logits, batch["mask"]), batch)
        self.metrics.update(predicted_classes(logits), batch["mask"], batch["index"])

    def on_validation_epoch_end(self) -> None:
        self.scores = self.metrics.compute()
        self.metrics.reset()
        means = {f"val/{name}": self.scores["per_image"][name] for name in ("iou", "dice")}
        self.log_dict(means, prog_bar=True, sync_dist=True)  # already of all processes; their mean changes nothing

    def _log(self, name: str, value: Tensor, batch: Batch) -> None:
        self.log(
            name,
            value,
            on_step=False,
            on_epoch=True,
            prog_bar=name.endswith("loss"),
            sync_dist=True,
            batch_size=len(batch["image"]),
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """Weight decay for matrices and kernels only, not for biases, norms and the scan's A, D and delta bias."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        plain = [p for p in parameters if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)]
        kept = {id(p) for p in plain}
        groups = [
            {"params": [p for p in parameters if id(p) not in kept], "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, steps // 20)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
