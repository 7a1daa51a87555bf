"""One network on one task: its training, its validation, and how it is scored on and applied to images of any size."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from numpy.typing import NDArray
from torch import Tensor, nn

from kan_mamba_layers import SS2D, KANLinear, Segmenter, param_groups
from segmentation.callbacks import AveragedWeights
from segmentation.data.item import Item
from segmentation.data.pixels import Pixels
from segmentation.figures import Case
from segmentation.networks import build_network
from segmentation.prediction import Prediction, predict_case
from segmentation.scores import ValidationScores, predicted_classes, score_image
from segmentation.tasks import get_task

Batch = dict[str, Tensor]

# Weights of the Dice loss and of the cross-entropy.
LOSSES = {"dice_ce": (1.0, 1.0), "dice": (1.0, 0.0), "ce": (0.0, 1.0)}
# The layers whose parameters may have a learning rate of their own.
GROUPS = {"spline_lr": KANLinear, "scan_lr": SS2D}


class Segmentation(lightning.LightningModule):
    """AdamW, linear warm-up over the first part of the steps, then a cosine down to zero.

    Args:
        task: name of the task.
        network: a model of kan_mamba_layers, or unet, unet_pp (MONAI).
        model_args: arguments of the model, e.g. {"use_kan": false} for an ablation.
        pretrained: weights to begin with, one of kan_mamba_layers.list_pretrained(); null for fresh ones.
        image_size: side of the squares that images are squashed to.
        lr: peak learning rate; 4e-3 was measured with the tiny models.
        spline_lr: multiplies the learning rate of all parameters in KANLinear.
        scan_lr: multiplies the learning rate of all parameters in SS2D.
        weight_decay: of matrices and kernels.
        warmup: part of the steps in which the learning rate rises.
        loss: Dice loss plus cross-entropy, or one of them.
        ema_decay: of the averaged weights; null for none.
        flips: in test and predict, average over the flips of the task's augmentation.
        window: in test and predict, windows of the image at its own resolution, not the squashed image.
    """

    def __init__(
        self,
        task: str,
        network: str = "km_unet_pp_tiny",
        model_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        *,
        image_size: int = 128,
        lr: float = 4e-3,
        spline_lr: float = 1.0,
        scan_lr: float = 1.0,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
        loss: Literal["dice_ce", "dice", "ce"] = "dice_ce",
        ema_decay: float | None = 0.99,
        flips: bool = False,
        window: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup {warmup} is a part of all steps: give a number from 0 to 1, e.g. 0.05")
        if min(spline_lr, scan_lr) < 0:
            raise ValueError(f"spline_lr {spline_lr} and scan_lr {scan_lr} must not be negative: 1 changes nothing")
        self.task, self.image_size = get_task(task), image_size
        options = dict(model_args or {}) | ({} if pretrained is None else {"pretrained": pretrained})
        try:
            self.network = build_network(network, self.task.in_channels, self.task.num_classes, **options)
        except TypeError as error:
            raise ValueError(f"model.model_args {model_args} do not fit {network!r}: {error}") from error
        self.lr, self.weight_decay, self.warmup, self.ema_decay = lr, weight_decay, warmup, ema_decay
        self.factors = {"spline_lr": spline_lr, "scan_lr": scan_lr}
        self.how = {"flips": flips, "windows": window}
        if flips and not self.task.flip_axes:
            raise ValueError(
                f"flips cannot be averaged for {task}: its images are never flipped in training, because front and "
                "back, head and foot are fixed; leave flips out"
            )
        binary = self.task.num_classes == 1
        of_dice, of_ce = LOSSES[loss]
        self.loss = DeepSupervisionLoss(
            DiceCELoss(sigmoid=binary, softmax=not binary, to_onehot_y=not binary, lambda_dice=of_dice, lambda_ce=of_ce)
        )
        self.metrics = ValidationScores(self.task.class_names)
        self.scores: dict[str, Any] = {}  # of the latest whole validation set

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        return self.network(image)

    def training_step(self, batch: Batch) -> Tensor:
        outputs = self(batch["image"])
        loss = self.loss(outputs, batch["mask"])
        logits = outputs
        if isinstance(outputs, list):  # a mean over depths, comparable to val/loss
            loss, logits = loss / sum(self.loss.get_weights(len(outputs))), outputs[0]
        found, wanted = predicted_classes(logits.detach()) > 0, batch["mask"] > 0  # b 1 h w
        iou = (found & wanted).sum((1, 2, 3)) / (found | wanted).sum((1, 2, 3))  # b
        self._log("train/iou", iou.nan_to_num(nan=1.0).mean(), batch)
        self._log("train/loss", loss, batch)
        schedule: Any = self.lr_schedulers()
        self.log("lr", self.lr * schedule.lr_lambdas[0](schedule.last_epoch))
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop before the checkpoints of an epoch whose loss is NaN or infinite."""
        for name, value in self.trainer.callback_metrics.items():
            if name.endswith("/loss") and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} in epoch {self.current_epoch + 1}, so this training has diverged: start again "
                    f"with a model.lr below {self.lr:g}; checkpoints of the epochs before are kept"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scores"] = self.scores  # of the very weights in it

    def validation_step(self, batch: Batch) -> None:
        logits = self(batch["image"])
        self._log("val/loss", self.loss(logits, batch["mask"]), batch)
        self.metrics.update(predicted_classes(logits), batch["mask"], batch["index"])

    def on_validation_epoch_end(self) -> None:
        self.scores = self.metrics.compute()
        self.metrics.reset()
        means = {f"val/{name}": self.scores["per_image"][name]["mean"] for name in ("iou", "dice")}
        self.log_dict(means, prog_bar=True, sync_dist=True)  # already of all processes; their mean changes nothing

    def test_step(self, item: Item) -> dict[str, Any]:
        """The scores of one image at its own size and its predicted classes (h w), or why it cannot be read."""
        try:
            image, truth = item.read()
        except (OSError, RuntimeError, ValueError) as error:
            return {"reason": str(error)}
        classes = self.classes_of(image)
        return {"row": score_image(self.task, item, classes, truth), "classes": classes}

    def predict_step(self, files: Sequence[Path]) -> Prediction:
        data = self.trainer.datamodule
        return predict_case(files, self.task, self.classes_of, data.cuts, data.channel_files)

    def classes_of(self, image: Pixels) -> NDArray[np.uint8]:
        """Class numbers (h w) of an image (h w c) of any size."""
        return self.segmenter()(image, **self.how)

    def segmenter(self) -> Segmenter:
        """The network with what belongs to its use; it is put in evaluation mode."""
        task = self.task
        facts = {"size": self.image_size, "in_channels": task.in_channels, "flip_axes": task.flip_axes}
        return Segmenter(self.network, task.class_names, **facts)

    def case_of(self, label: str, item: Item) -> Case:
        """An item with its truth and its prediction, to be drawn."""
        image, truth = item.read()
        return Case(label, image, truth, self.classes_of(image), self.task.class_names)

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [] if self.ema_decay is None else [AveragedWeights(self.ema_decay)]

    def configure_optimizers(self) -> dict[str, Any]:
        """Weight decay for matrices and kernels only, not for biases, norms and the scan's A, D and delta bias."""
        layers = [(name, layer) for name, kind in GROUPS.items() for layer in self.modules() if isinstance(layer, kind)]
        factors = {p: self.factors[name] for name, layer in layers for p in layer.parameters()}
        decays = {p: group["weight_decay"] for group in param_groups(self, self.weight_decay) for p in group["params"]}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in self.parameters():
            if p.requires_grad:
                groups.setdefault((decays[p], self.lr * factors.get(p, 1.0)), []).append(p)
        options = [{"params": ps, "weight_decay": decay, "lr": lr} for (decay, lr), ps in groups.items()]
        optimizer = torch.optim.AdamW(options, lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, int(steps * self.warmup))

        def schedule(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log(self, name: str, value: Any, batch: Batch) -> None:
        shown, images = name.endswith("loss"), len(batch["image"])
        self.log(name, value, on_step=False, on_epoch=True, prog_bar=shown, sync_dist=True, batch_size=images)
