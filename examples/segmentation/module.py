"""Training of one network on one task: loss, optimiser, schedule and what is logged."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn

from kan_mamba_layers import SS2D, KANLinear
from segmentation.metrics import SegmentationMetrics, confusion_counts, image_scores, predicted_classes
from segmentation.tasks import Task

Batch = dict[str, Tensor]

# Weights of the Dice loss and of the cross-entropy.
LOSSES = {"dice_ce": (1.0, 1.0), "dice": (1.0, 0.0), "ce": (0.0, 1.0)}
# The layers whose parameters may have a learning rate of their own.
GROUPS = {"spline_lr": KANLinear, "scan_lr": SS2D}


class Segmentation(lightning.LightningModule):
    """AdamW, linear warm-up over the first part of the steps, then a cosine down to zero.

    `spline_lr` and `scan_lr` multiply the learning rate of all parameters in KANLinear and in SS2D.
    """

    def __init__(
        self,
        task: Task,
        network: nn.Module,
        *,
        lr: float = 4e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
        loss: str = "dice_ce",
        spline_lr: float = 1.0,
        scan_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.task, self.network, self.lr, self.weight_decay, self.warmup = task, network, lr, weight_decay, warmup
        self.factors = {"spline_lr": spline_lr, "scan_lr": scan_lr}
        binary = task.num_classes == 1
        of_dice, of_ce = LOSSES[loss]
        self.loss = DeepSupervisionLoss(
            DiceCELoss(sigmoid=binary, softmax=not binary, to_onehot_y=not binary, lambda_dice=of_dice, lambda_ce=of_ce)
        )
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
        factors = {
            id(p): self.factors[name]
            for name, kind in GROUPS.items()
            for layer in self.modules()
            if isinstance(layer, kind)
            for p in layer.parameters()
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in self.parameters():
            if p.requires_grad:
                decayed = p.ndim > 1 and not getattr(p, "_no_weight_decay", False)
                groups.setdefault((self.weight_decay * decayed, factors.get(id(p), 1.0)), []).append(p)
        optimizer = torch.optim.AdamW(
            [{"params": ps, "weight_decay": decay, "lr": self.lr * factor} for (decay, factor), ps in groups.items()],
            lr=self.lr,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, int(steps * self.warmup))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
