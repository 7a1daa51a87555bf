"""Both models in all their named forms: one set of tests for every name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, TINY, assert_gradients, build, image, total
from torch import Tensor, nn

from helpers import assert_close, dice, ellipses
from kan_mamba_layers import EMA, SS2D, KMUNet, VMamba, VSSBlock, create_model

ABLATIONS = (
    {"use_kan": False},
    {"use_ss2d": False},
    {"use_ema": False},
    {"trunk_context": False},
    {"decoder_kan": False},
    {"context_residual": True},
    {"context_residual": False},
    {"use_ss2d": False, "use_ema": False},
    {"grid_size": 8, "spline_order": 2},
    {"d_state": 1, "expand": 2},
    {"ema_factor": 2},
    {"drop_path": 0.3},
)


@pytest.mark.parametrize("name", TINY)
class TestEveryModel:
    def test_every_parameter_gets_a_gradient(self, name: str) -> None:
        model = build(name)
        total(model(image(2, 64, 64))).backward()
        assert_gradients(model)

    @pytest.mark.parametrize("size", [(32, 32), (67, 50), (224, 224), (540, 800)])
    def test_any_size(self, name: str, size: tuple[int, int]) -> None:
        with torch.no_grad():
            out = build(name).eval()(image(1, *size))
        assert out.shape == (1, 1, *size) and out.isfinite().all()

    @pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("classes", [1, 2, 6])
    def test_any_channels_and_classes(self, name: str, channels: int, classes: int) -> None:
        model = build(name, in_channels=channels, num_classes=classes).eval()
        with torch.no_grad():
            assert model(image(1, 32, 40, channels=channels)).shape == (1, classes, 32, 40)

    @pytest.mark.parametrize("classes", [3, 4, 5])
    def test_more_classes(self, name: str, classes: int) -> None:
        with torch.no_grad():
            assert build(name, num_classes=classes).eval()(image(1, 32, 32)).shape == (1, classes, 32, 32)

    @pytest.mark.parametrize("size", [(64, 64), (32, 64), (65, 77)])
    def test_a_batch_of_one_trains(self, name: str, size: tuple[int, int]) -> None:
        model = build(name)
        total(model(image(1, *size))).backward()
        assert_gradients(model)

    @pytest.mark.parametrize("size", [(32, 32), (33, 34)])
    def test_one_value_per_channel_cannot_train(self, name: str, size: tuple[int, int]) -> None:
        model = build(name)
        with pytest.raises(ValueError, match=r"(?s)(?=.*BatchNorm)(?=.*batch of 1)(?=.*64x64)"):
            model(image(1, *size))
        assert model(image(2, *size)).isfinite().all()
        assert model.eval()(image(1, *size)).isfinite().all()

    def test_features_are_what_the_head_reads(self, name: str) -> None:
        model = build(name).eval()
        x = image(2, 66, 50)
        with torch.no_grad():
            features = model.forward_features(x)
            assert features.shape == (2, 16, 33, 25)
            if isinstance(model, KMUNet):
                logits = model.head(features, x.shape[2:])
            else:  # and the first level before its pooling
                logits = model.heads["4"](features, x.shape[2:], model.encoder[0].conv(x))
            assert torch.equal(logits, model(x))

    def test_an_image_does_not_see_the_others(self, name: str) -> None:
        model, x = build(name).eval(), image(3, 40, 48)
        with torch.no_grad():
            assert_close("out", model(x[1:2]), model(x)[1:2], 1e-5)

    def test_same_bits_again(self, name: str) -> None:
        results = []
        for _ in range(2):
            model = build(name)
            out = model(image(2, 48, 40))
            total(out).backward()
            results.append([out.detach(), *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_gradient_checkpointing_gives_equal_gradients(self, name: str) -> None:
        results = []
        for enable in (False, True):
            model = build(name)
            model.set_grad_checkpointing(enable)
            total(model(image(2, 64, 48))).backward()
            results.append([p.grad for p in model.parameters()] + list(model.buffers()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_backends_agree(self, name: str) -> None:
        x = image(1, 48, 40)
        model = build(name).eval()
        reference = build(name, backend="reference").eval()
        reference.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert_close("out", model(x), reference(x), 1e-4)

    def test_autocast(self, name: str) -> None:
        model, x = build(name), image(2, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        total(out.float()).backward()
        assert out.isfinite().all()
        for parameter, p in model.named_parameters():
            assert p.grad.isfinite().all(), parameter
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = model.eval()(x)
        with torch.no_grad():
            assert_close("out", out, model(x), 0.1)

    def test_half_precision_weights(self, name: str) -> None:
        model, x = build(name).eval(), image(1, 48, 40)
        with torch.no_grad():
            expected = model(x)
            out = model.bfloat16()(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert_close("out", out, expected, 0.1)

    def test_round_trips(self, name: str) -> None:
        model = build(name, num_classes=2)
        model(image(2, 48, 48))  # moves the running statistics
        other = create_model(name, num_classes=2)
        other.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            expected = model.eval()(image(1, 48, 48))
            for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin.eval()(image(1, 48, 48)), expected)

    def test_config_rebuilds_the_model(self, name: str) -> None:
        model = build(name, in_channels=2, num_classes=3)
        twin = type(model)(**model.config)
        assert twin.config == model.config
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        assert {k: v.shape for k, v in twin.state_dict().items()} == shapes

    def test_meta_device(self, name: str) -> None:
        with torch.device("meta"):
            model = create_model(name)
        assert all(v.is_meta for v in model.state_dict().values())
        assert model.eval()(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1, 64, 64)
        trained = build(name).eval()
        model.load_state_dict(trained.state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(model(image(1, 40, 40)), trained(image(1, 40, 40)))

    def test_dynamics_are_marked_for_optimizers(self, name: str) -> None:
        for parameter, p in build(name).named_parameters():
            dynamic = parameter.endswith(("A_logs", "Ds", "dt_projs_bias"))
            assert getattr(p, "_no_weight_decay", False) == dynamic, parameter

    def test_nothing_is_printed(self, name: str, capfd: pytest.CaptureFixture[str]) -> None:
        build(name)(image(2, 64, 64))
        assert capfd.readouterr() == ("", "")

    def test_overfits_four_images(self, name: str) -> None:
        x, mask = ellipses()
        model = build(name)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(1, 151):
            logits = model.train()(x)
            probability = logits.sigmoid()
            overlap = 2 * (probability * mask).sum() / (probability.sum() + mask.sum())
            loss = F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                with torch.no_grad():
                    reached = dice(model.eval()(x), mask)
                if reached >= 0.98:
                    return
        pytest.fail(f"Dice {reached:.3f} after {step} steps")


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_larger_models_use_every_parameter_too(family: str, size: str) -> None:
    model = build(f"{family}_{size}")
    total(model(image(2, 64, 64))).backward()
    assert_gradients(model)


@pytest.mark.parametrize("name", ["km_unet_tiny", "km_unet_pp_tiny"])
class TestAblations:
    @pytest.mark.parametrize("options", ABLATIONS, ids=str)
    def test_every_parameter_is_used(self, name: str, options: dict) -> None:
        model = build(name, **options)
        out = model(image(4, 64, 64))
        total(out).backward()
        assert_gradients(model)

    def test_switches_leave_out_what_they_name(self, name: str) -> None:
        def parts(**options) -> set[str]:
            return {key.rpartition(".")[2] for key in build(name, **options).state_dict()} | {
                part for key in build(name, **options).state_dict() for part in key.split(".")
            }

        everything = parts()
        assert {"spline_weight", "A_logs", "conv1x1"} <= everything
        assert not {"spline_weight", "grid"} & parts(use_kan=False)
        assert "A_logs" not in parts(use_ss2d=False) and "conv1x1" in parts(use_ss2d=False)
        assert "conv1x1" not in parts(use_ema=False) and "A_logs" in parts(use_ema=False)
        kan_blocks = [
            sum(key.endswith("fc1.grid") for key in build(name, decoder_kan=on).state_dict()) for on in (True, False)
        ]
        assert kan_blocks == [{"km_unet_tiny": 4, "km_unet_pp_tiny": 5}[name], 2]

    def test_sizes_reach_the_layers(self, name: str) -> None:
        model = build(name, grid_size=7, spline_order=2, d_state=5, expand=3, ema_factor=2)
        state = model.state_dict()
        assert all(v.shape[1] == 7 + 2 * 2 + 1 for k, v in state.items() if k.endswith(".grid"))
        assert all(v.shape[1] == 5 for k, v in state.items() if k.endswith(".A_logs"))
        for key, value in state.items():
            if key.endswith("in_proj.weight"):
                assert value.shape[0] == 2 * 3 * value.shape[1]
        assert {v.shape[0] for k, v in state.items() if k.endswith("gn.weight")} == {16 // 2, 32 // 2, 48 // 2}

    def test_trunk_context_decides_what_the_encoder_goes_on_from(self, name: str) -> None:
        trunk, skip = build(name), build(name, trunk_context=False)
        skip.load_state_dict(trunk.state_dict())
        assert not torch.allclose(trunk(image(2, 64, 64)), skip(image(2, 64, 64)), atol=1e-3)

    def test_gradient_checkpointing_stores_less(self, name: str) -> None:
        """The grid has nothing to recompute at its largest level if its context begins at the second one."""
        plain = {"context_from": 0} if name.startswith("km_unet_pp") else {}
        sizes = []
        for enable in (False, True):
            model, kept = build(name, **plain), []
            model.set_grad_checkpointing(enable)

            def keep(x: Tensor, kept: list[int] = kept) -> Tensor:
                kept.append(x.numel())
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                model(image(2, 64, 64))
            sizes.append(sum(kept))
        assert sizes[1] < 0.8 * sizes[0]

    def test_drop_path_acts_in_training_only(self, name: str) -> None:
        model, x = build(name, drop_path=0.5), image(4, 64, 64)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_one_image_trains_where_the_statistics_are_frozen() -> None:
    model = build("km_unet_tiny")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(image(1, 32, 32)).sum().backward()
    assert_gradients(model)


class Patches(nn.Conv2d):
    """With the channels last, and without a part `0`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(1, -1)


@pytest.mark.parametrize(
    ("model", "part", "replacement", "shape"),
    [
        (lambda: VSSBlock(8), "norm", nn.Identity(), (1, 5, 6, 8)),
        (lambda: SS2D(8, expand=1), "conv2d", nn.Identity(), (1, 5, 6, 8)),
        (lambda: EMA(8, 4), "conv3x3", nn.Identity(), (1, 8, 5, 6)),
        (lambda: VMamba(1, 3, depths=(1, 1, 1, 1), dims=8), "patch_embed", Patches(1, 8, 4, 4), (1, 1, 40, 40)),
    ],
)
def test_parts_without_a_weight_may_take_the_place_of_others(model, part, replacement, shape) -> None:
    model, x = model(), torch.randn(shape)
    setattr(model, part, replacement)
    assert model(x).isfinite().all()
