"""The recipe of a training: its loss, and which parameters learn how."""

from __future__ import annotations

import pickle

import pytest
import torch

from kan_mamba_layers import Segmenter
from segmentation.callbacks import AveragedWeights, WholeEpochs
from segmentation.data.datamodule import ImageSet
from segmentation.data.demo import demo_items
from segmentation.data.pixels import to_target
from segmentation.module import LOSSES, Segmentation
from segmentation.tasks import TASKS, get_task


def optimiser(module: Segmentation) -> dict:
    module._trainer = type("Trainer", (), {"estimated_stepping_batches": 40})()
    return module.configure_optimizers()


def test_no_weight_decay_for_vectors_and_marked_parameters():
    module = Segmentation("isic2017", "km_unet_tiny")
    groups = optimiser(module)["optimizer"].param_groups
    decayed, plain = ({id(p) for p in group["params"]} for group in groups)
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith(("A_logs", "Ds", "dt_projs_bias"))
        assert (id(parameter) in plain) == exempt
        assert (id(parameter) in decayed) != exempt
    assert [group["weight_decay"] > 0 for group in groups] == [True, False]


def test_splines_and_scans_may_learn_at_a_pace_of_their_own():
    module = Segmentation("isic2017", "km_unet_tiny", lr=0.01, spline_lr=0.5, scan_lr=0.1)
    groups = optimiser(module)["optimizer"].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    expected = {"spline_weight": 0.005, "base_weight": 0.005, "A_logs": 0.001, "in_proj.weight": 0.001}
    for ending, rate in {**expected, "dwconv.weight": 0.01}.items():
        found = {rates[id(p)] for name, p in module.network.named_parameters() if name.endswith(ending)}
        assert sorted(found) == pytest.approx([rate]), ending
    assert len(rates) == len(list(module.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_sums_they_are_called(loss):
    module = Segmentation("isic2017", "unet", loss=loss)
    logits, mask = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 1, 8, 8)).float()
    p = logits.sigmoid()
    dice = (1 - 2 * (p * mask).sum((2, 3)) / (p + mask).sum((2, 3))).mean()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask)
    expected = {"dice": dice, "ce": entropy, "dice_ce": dice + entropy}[loss]
    assert module.loss(logits, mask).item() == pytest.approx(expected.item(), abs=1e-5)


def test_averages_can_be_sent_to_other_processes():
    again = pickle.loads(pickle.dumps(AveragedWeights(0.9)))._kwargs["multi_avg_fn"]
    for number, expected in ((0, 1.9), (10**6, 1.1)):
        means = [torch.tensor([1.0]), torch.tensor([[1.0, 1.0]])]
        again(means, [2 * mean for mean in means], torch.tensor(number))
        assert [value for mean in means for value in mean.flatten().tolist()] == pytest.approx([expected] * 3)
    counters = [torch.tensor(1)]
    again(counters, [torch.tensor(5)], torch.tensor(3))
    assert counters == [5]


def test_warm_up_may_be_left_out():
    schedule = optimiser(Segmentation("isic2017", "unet", warmup=0))["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert schedule(0) == schedule(1) == 1
    assert schedule(40) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segmentation("isic2017", "unet", warmup=5), "warmup 5 is a part of all steps"),
        (lambda: Segmentation("isic2017", "unet", scan_lr=-1), "must not be negative"),
        (lambda: Segmentation("lumbar_spine", "unet", flips=True), "flips cannot be averaged for lumbar_spine"),
        (lambda: AveragedWeights(1.0), "ema_decay 1.0 must lie between 0 and 1"),
        (lambda: WholeEpochs(0), "trainer.max_steps 0 must be at least 1"),
    ],
)
def test_misuse_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_network_sees_what_it_saw_in_training():
    item = demo_items(get_task("isic2017"), 48)[0]
    image, mask = item.read()
    module, seen = Segmentation("isic2017", "unet", image_size=32), []
    module.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    module.classes_of(image)
    images, masks = Segmenter.to_square(image, 32).half()[None], to_target(mask, 32)[None]
    trained_on = ImageSet(module.task, [item], images, masks, training=False)
    torch.testing.assert_close(seen[0][0], trained_on[0]["image"], rtol=0, atol=0.01)  # half precision


def test_flips_of_the_tasks():
    axes = {name: task.flip_axes for name, task in TASKS.items()}
    assert axes["isic2017"] == (-2, -1)
    assert axes["fetal_head"] == axes["breast_lesion"] == (-1,)
    assert {name for name in TASKS if not axes[name]} == {"lumbar_spine", "spine_vertebrae", "spine_structures"}
