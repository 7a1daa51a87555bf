"""VMamba: its stages by hand, the published sizes and checkpoints, and the U-Net on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_convert import stacked
from tiny_models import assert_gradients, image, total
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers import assert_close, says
from kan_mamba_layers import VMamba, VMambaUNet, create_model, from_pretrained, param_groups

SMALL = {"depths": (1, 2, 1, 1), "dims": 8}


def small(*sizes: int, **options) -> VMamba:
    torch.manual_seed(0)
    return VMamba(*sizes, **{**SMALL, **options}).eval()


def unet(**options) -> VMambaUNet:
    torch.manual_seed(0)
    return VMambaUNet(SMALL, **options)


def stages_by_hand(model: VMamba, x: Tensor) -> list[Tensor]:  # b c h w
    """The map of every stage from the weights outside of the blocks, in plain PyTorch, and the blocks themselves."""
    state = model.state_dict()

    def halved(x: Tensor, conv: str, norm: str) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], stride=2, padding=1).movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = F.gelu(halved(x, "patch_embed.0", "patch_embed.2")).movedim(-1, 1)
    x, maps = halved(x, "patch_embed.5", "patch_embed.7"), []
    for i, depth in enumerate(model.config["depths"]):
        for j in range(depth):
            x = model.get_submodule(f"layers.{i}.blocks.{j}")(x)
        maps.append(x.movedim(-1, 1))
        if i < 3:
            x = halved(maps[-1], f"layers.{i}.downsample.1", f"layers.{i}.downsample.3")
    return maps


class TestVMamba:
    def test_equals_its_parts_at_an_odd_size(self) -> None:
        model, x = small(3, 5), image(2, 67, 50)
        with torch.no_grad():
            maps = stages_by_hand(model, x)
            assert [tuple(m.shape[1:]) for m in maps] == [(8, 17, 13), (16, 9, 7), (32, 5, 4), (64, 3, 2)]
            norm, head = model.classifier.norm, model.classifier.head
            last = F.layer_norm(maps[-1].movedim(1, -1), (64,), norm.weight, norm.bias).movedim(-1, 1)
            assert_close("features", model.forward_features(x), last, 1e-6)
            logits = last.mean((2, 3)) @ head.weight.mT + head.bias
            assert_close("logits", model(x), logits, 1e-5)
            encoder = small(features_only=True)
            encoder.load_published(model.state_dict())
            for got, expected in zip(encoder(x), maps, strict=True):
                assert_close("map", got, expected, 1e-6)
            model.reset_classifier(0)
            assert_close("pooled", model(x), last.mean((2, 3)), 1e-5)
            assert model.config["num_classes"] == 0

    @pytest.mark.parametrize("classes", [0, 2])
    @pytest.mark.parametrize("training", [False, True])
    def test_a_new_classifier_is_in_the_mode_of_the_model(self, training: bool, classes: int) -> None:
        model = small(3, 5).train(training)
        model.reset_classifier(classes)
        assert {module.training for module in model.modules()} == {training}

    @pytest.mark.parametrize("size", [(1, 1), (4, 4), (33, 1)])
    def test_tiny_images(self, size: tuple[int, int]) -> None:
        assert small(3, 5)(image(2, *size)).isfinite().all()

    def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(self) -> None:
        results = []
        for enable in (False, True):
            model = small(3, 5, drop_path=0.2).train()
            model.set_grad_checkpointing(enable)
            torch.manual_seed(1)
            total(model(image(8, 40, 32))).backward()
            assert_gradients(model)
            results.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_drop_path_grows_linearly(self) -> None:
        model = small(depths=(1, 2, 2, 1), drop_path=0.5)
        rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])

    def test_dynamics_and_norms_do_not_decay(self) -> None:
        model = small(3, 5)
        _, rest = param_groups(model, 0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        dynamics = ("A_logs", "Ds", "dt_projs_bias")
        expected = {name for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(dynamics)}
        assert {names[id(p)] for p in rest["params"]} == expected

    @pytest.mark.parametrize(
        ("name", "options", "millions"),
        [
            ("vmamba_tiny", {}, 30),
            ("vmamba_small", {}, 50),
            ("vmamba_base", {}, 89),
            ("vmamba_tiny", {"depths": (2, 2, 5, 2), "expand": 2.0}, 31),
            ("vmamba_small", {"depths": (2, 2, 20, 2), "expand": 1.0}, 49),
            ("vmamba_base", {"depths": (2, 2, 20, 2), "expand": 1.0}, 87),
        ],
    )
    def test_parameters_as_published(self, name: str, options: dict, millions: int) -> None:
        """The numbers of VMamba's table: s1l8, s2l15, s2l15, s2l5, s1l20 and s1l20."""
        with torch.device("meta"):
            model = create_model(name, **options)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


class TestPublished:
    model = small(3, 5)
    state = model.state_dict()

    @pytest.mark.parametrize("form", [lambda state: state, stacked], ids=["apart", "stacked"])
    def test_both_forms_of_the_keys_from_a_file(self, form, tmp_path: Path) -> None:
        published = form(self.state)
        torch.save({"model": published, "epoch": 3}, tmp_path / "published.pth")
        twin = small(3, 5).apply(lambda m: m.weight.data.add_(1) if isinstance(m, nn.LayerNorm) else None)
        twin.load_published(tmp_path / "published.pth")
        assert all(torch.equal(x, self.state[name]) for name, x in twin.state_dict().items())
        assert twin.state_dict().keys() == self.state.keys()

    @pytest.mark.parametrize("options", [{"features_only": True}, {"features_only": True, "out_indices": (1,)}])
    def test_an_encoder_leaves_out_what_it_has_not(self, options: dict) -> None:
        encoder = small(**options)
        encoder.load_published(stacked(self.state))
        assert all(torch.equal(x, self.state[name]) for name, x in encoder.state_dict().items())
        with pytest.raises(RuntimeError, match=r"op\.conv2d\.bias"):
            encoder.load_published({**self.state, "layers.0.blocks.0.op.conv2d.bias": torch.zeros(8)})

    def test_a_grey_image_is_seen_as_the_same_in_all_channels(self) -> None:
        grey, x = small(1, 5), image(1, 40, 36, channels=1)
        grey.load_published(self.state)
        with torch.no_grad():
            assert_close("logits", grey(x), self.model(x.expand(-1, 3, -1, -1)), 1e-5)

    def test_sizes_that_a_factor_rounds(self) -> None:
        """The factor that the error names makes the model of the checkpoint, although 15 / 11 * 11 is less than 15."""
        options = {"depths": (1, 1, 1, 1), "dims": (11, 22, 44, 88), "num_classes": 2}
        published = VMamba(expand=15 / 11, **options)
        with pytest.raises(ValueError, match=says("expand is 1.3636", "model 1.0")):
            VMamba(expand=1.0, **options).load_published(published.state_dict())
        twin = VMamba(expand=15 / 11, **options)
        twin.load_published(published.state_dict())
        assert torch.equal(twin.classifier.head.weight, published.classifier.head.weight)

    def test_a_model_that_was_changed_is_named(self) -> None:
        pruned = small(3, 5)
        prune.l1_unstructured(pruned.layers[0].blocks[0].op, "A_logs", 0.1)
        with pytest.raises(ValueError, match=says("the model has no 'layers.0.blocks.0.op.A_logs'", "prune")):
            pruned.load_published(self.state)

    @pytest.mark.parametrize(
        ("sizes", "options", "parts"),
        [
            ((3, 5), {"depths": (1, 2, 2, 1)}, ("depths is", r"\(1, 2, 1, 1\)", r"\(1, 2, 2, 1\)", "build the model")),
            ((3, 5), {"dims": 16}, ("dims is", r"dims=\(8, 16, 32, 64\)")),
            ((3, 5), {"expand": 2.0}, ("expand is 1.0", "model 2.0")),
            ((3, 5), {"d_state": 2}, ("d_state is 1", "model 2")),
            ((3, 5), {"mlp_ratio": 0.0}, ("mlp_ratio is 4.0", "model 0.0")),
            ((3, 7), {}, ("classifier.head.weight", r"\(5, 64\)", "num_classes=5, then reset_classifier")),
            ((2, 5), {}, ("patch_embed.0.weight", r"\(4, 3, 3, 3\)", "in_channels=3, or 1")),
        ],
    )
    def test_other_sizes_are_refused_with_the_fix(self, sizes: tuple, options: dict, parts: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=says(*parts)):
            small(*sizes, **options).load_published(self.state)

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"outnorm0.weight": torch.zeros(8)}, ("'outnorm0.weight'", "does not belong")),
            ({"layers.0.blocks.0.ln_1.weight": torch.zeros(8)}, ("ln_1.weight'", "does not belong")),
        ],
    )
    def test_foreign_keys_are_refused_by_name(self, change: dict, parts: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=says(*parts)):
            small(3, 5).load_published({**self.state, **change})

    def test_what_is_no_vmamba_is_refused(self) -> None:
        with pytest.raises(ValueError, match=says("layers.0.blocks.0.norm.weight", "whole checkpoint")):
            small(3, 5).load_published({"classifier.head.weight": torch.zeros(5, 64)})

    @pytest.mark.parametrize("changes", [{"num_classes": 3}, {"num_classes": 0}, {"in_channels": 1}], ids=str)
    def test_stored_models_change_at_both_ends(self, changes: dict, tmp_path: Path) -> None:
        self.model.save_pretrained(tmp_path)
        other = from_pretrained(tmp_path, **changes)
        assert other.config == {**self.model.config, **changes}
        ends = {
            "num_classes": {"classifier.head.weight", "classifier.head.bias"},
            "in_channels": {"patch_embed.0.weight"},
        }
        (change,) = changes
        drawn = {name for name, x in other.state_dict().items() if not torch.equal(x, self.state[name])}
        assert drawn == ends[change] & other.state_dict().keys()


class TestUNet:
    def test_equals_its_parts_at_an_odd_size(self) -> None:
        model, x = unet(num_classes=2).eval(), image(2, 67, 50)
        with torch.no_grad():
            maps = [
                norm(m.movedim(1, -1)).movedim(-1, 1) for norm, m in zip(model.norms, model.encoder(x), strict=True)
            ]
            y = maps[3]
            for i in (2, 1, 0):
                y = F.interpolate(model.decoder[i].conv(y), maps[i].shape[2:], mode="bilinear") + maps[i]
            y = F.interpolate(model.up.conv(y), (34, 25), mode="bilinear")
            assert_close("features", model.forward_features(x), y, 1e-6)
            y = F.interpolate(model.head.decode.conv(y), (67, 50), mode="bilinear")
            assert_close("logits", model(x), model.head.logits(y), 1e-6)

    def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(self) -> None:
        results = []
        for enable in (False, True):
            model = unet(in_channels=1)
            model.set_grad_checkpointing(enable)
            total(model(image(2, 32, 33, channels=1))).backward()
            assert_gradients(model)
            results.append([p.grad for p in model.parameters()] + list(model.buffers()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_one_value_per_channel_cannot_train(self) -> None:
        with pytest.raises(ValueError, match=says("batch of 1", "BatchNorm", "64x64")):
            unet()(image(1, 32, 32))
        assert unet().eval()(image(1, 32, 32)).shape == unet()(image(1, 33, 32))[..., :32, :].shape

    def test_a_checkpoint_for_the_encoder(self, tmp_path: Path) -> None:
        published = small(3, 5)
        torch.save({"model": stacked(published.state_dict())}, tmp_path / "published.pth")
        model = unet(num_classes=2, encoder_weights=str(tmp_path / "published.pth"), drop_path=0.3)
        state = published.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in model.encoder.state_dict().items())
        assert model.encoder.config["drop_path"] == 0.3
        model.eval().save_pretrained(tmp_path / "model")
        again, x = from_pretrained(tmp_path / "model"), image(1, 40, 36)
        assert again.config == model.config and "encoder_weights" not in model.config
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        more = from_pretrained(tmp_path / "model", num_classes=4)
        drawn = {name for name, x in more.state_dict().items() if not torch.equal(x, model.state_dict()[name])}
        assert drawn == {"head.logits.weight", "head.logits.bias"}

    def test_its_encoder_is_the_named_model(self) -> None:
        with torch.device("meta"):
            model, encoder = create_model("vmamba_unet_tiny"), create_model("vmamba_tiny", features_only=True)
        shapes = {name: x.shape for name, x in encoder.state_dict().items()}
        assert {name: x.shape for name, x in model.encoder.state_dict().items()} == shapes
        assert model.encoder.config["drop_path"] == encoder.config["drop_path"] == 0.2
