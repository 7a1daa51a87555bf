"""KMUNetPP: its grid by the definition, deep supervision, pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import assert_gradients, build, image, total
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from kan_mamba_layers import SS2D, KMUNetPP


def grid_by_hand(model: KMUNetPP, x: Tensor) -> dict[tuple[int, int], Tensor]:
    """X[i, j] from the submodules and the definition alone, each node asking for the nodes that it needs."""
    X: dict[tuple[int, int], Tensor] = {}
    trunk = x
    for i, encode in enumerate(model.encoder):
        trunk = max_pool2d(encode.conv(trunk), 2) if i < 3 else encode(trunk)
        X[i, 0] = model.context[f"{i}_0"](trunk) if i < 3 else trunk
        trunk = X[i, 0] if model.config["trunk_context"] else trunk

    def node(i: int, j: int) -> Tensor:
        if (i, j) not in X:
            below = model.up[f"{i}_{j}"](node(i + 1, j - 1), node(i, 0).shape[2:])
            for k in range(j):
                below = below + model.plus[f"{i}_{j}_{k}"](node(i, k))
            if model.config["decoder_kan"] and i in (2, 3):
                below = model.kan[f"{i}_{j}"](below)
            X[i, j] = model.context[f"{i}_{j}"](below)
        return X[i, j]

    for j in range(1, len(model.encoder)):
        node(0, j)
    return X


def logits_by_hand(model: KMUNetPP, x: Tensor, X: dict[tuple[int, int], Tensor], j: int) -> Tensor:
    """What the head of X[0, j] says of the image."""
    head = model.heads[str(j)]
    y = interpolate(head.decode.conv(X[0, j]), size=x.shape[2:], mode="bilinear")
    if model.config["full_resolution"]:
        y = head.fuse(y + model.encoder[0].conv(x))
    return head.logits(y)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"trunk_context": False},
    {"decoder_kan": False},
    {"full_resolution": True},
    {"context_from": 1},
    {"context_from": 3, "full_resolution": True},
]


class TestKMUNetPP:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("levels", [2, 3, 4, 5])
    def test_the_grid_is_the_one_of_the_definition(self, levels: int, options: dict) -> None:
        model = build("km_unet_pp_tiny", widths=(8, 16, 32, 48, 64)[:levels], **options).eval()
        x = image(2, 70, 45)
        with torch.no_grad():
            X = grid_by_hand(model, x)
            depth = levels - 1
            assert set(X) == {(i, j) for i in range(levels) for j in range(levels - i)}
            assert torch.equal(model.forward_features(x), X[0, depth])
            assert torch.allclose(model(x), logits_by_hand(model, x, X, depth), rtol=0, atol=3e-7)

    def test_every_edge_of_the_grid_matters(self) -> None:
        model, x = build("km_unet_pp_tiny"), image(2, 64, 64)
        with torch.no_grad():
            expected = model(x)
            for key in model.plus:
                changed = copy.deepcopy(model)
                changed.plus[key][0].weight.neg_()
                assert not torch.allclose(changed(x), expected, atol=1e-3), key

    @pytest.mark.parametrize("options", OPTIONS[-3:], ids=str)
    def test_deep_supervision_lists_the_final_map_first(self, options: dict) -> None:
        model, x = build("km_unet_pp_tiny", deep_supervision=True, **options), image(2, 70, 45)
        twin = copy.deepcopy(model)
        out = model(x)
        assert isinstance(out, list) and [tuple(y.shape) for y in out] == 4 * [(2, 1, 70, 45)]
        X = grid_by_hand(twin, x)
        for y, j in zip(out, (4, 3, 2, 1), strict=True):
            assert torch.allclose(y, logits_by_hand(twin, x, X, j), atol=1e-6), j
        total(out).backward()
        assert_gradients(model)

    def test_evaluation_returns_the_final_map_alone(self) -> None:
        model, x = build("km_unet_pp_tiny", deep_supervision=True).eval(), image(1, 48, 40)
        out = model(x)
        assert isinstance(out, Tensor)
        features, skip = model.forward_features(x), model.encoder[0].conv(x)
        assert torch.equal(out, model.heads["4"](features, x.shape[2:], skip))
        assert isinstance(build("km_unet_pp_tiny").train()(image(2, 48, 40)), Tensor)

    @pytest.mark.parametrize("full_resolution", [False, True])
    @pytest.mark.parametrize("depth", [1, 2, 3, 4])
    def test_pruned_model_computes_the_same_at_its_depth(self, depth: int, full_resolution: bool) -> None:
        options = {"deep_supervision": True, "full_resolution": full_resolution}
        model, x = build("km_unet_pp_tiny", **options), image(2, 70, 45)
        model(x)  # moves the running statistics
        model.eval()
        pruned = model.prune(depth)
        with torch.no_grad():
            X, full = grid_by_hand(model, x), model.encoder[0].conv(x)
            assert torch.equal(pruned.eval()(x), model.heads[str(depth)](X[0, depth], x.shape[2:], full))
        assert isinstance(pruned, KMUNetPP)
        kept = set(pruned.state_dict())
        assert kept < set(model.state_dict())
        nodes = {key.split(".")[1] for key in kept if key.startswith("up.")}
        assert nodes == {f"{i}_{j}" for j in range(1, depth + 1) for i in range(depth + 1 - j)}

    def test_pruning_does_not_change_the_whole_model(self) -> None:
        model, x = build("km_unet_pp_tiny", deep_supervision=True).eval(), image(1, 40, 40)
        expected = model(x)
        with torch.no_grad():
            for p in model.prune(2).parameters():
                p.zero_()
        assert torch.equal(model(x), expected)

    def test_a_pruned_model_keeps_the_dtype_of_each_part(self) -> None:
        model = build("km_unet_pp_tiny", deep_supervision=True)
        model.heads.double()
        before = {name: x.dtype for name, x in model.state_dict().items()}
        pruned = model.prune(2).state_dict()
        assert {x.dtype for x in pruned.values()} == {torch.float32, torch.float64, torch.int64}
        assert {name: x.dtype for name, x in pruned.items()} == {name: before[name] for name in pruned}

    def test_a_replaced_parameter_is_named(self) -> None:
        model = build("km_unet_pp_tiny", deep_supervision=True)
        torch.nn.utils.parametrizations.weight_norm(model.heads["2"].logits)
        with pytest.raises(ValueError, match=r"no heads\.2\.logits\.weight any more; undo what replaced it"):
            model.prune(2)
        model.prune(1)

    def test_a_pruned_model_trains_and_is_stored(self, tmp_path) -> None:
        pruned = build("km_unet_pp_tiny", deep_supervision=True).prune(2).train()
        total(pruned(image(2, 48, 48))).backward()
        assert_gradients(pruned)
        pruned.eval().save_pretrained(tmp_path / "model")
        again = KMUNetPP.from_pretrained(tmp_path / "model")
        assert torch.equal(again(image(1, 40, 40)), pruned(image(1, 40, 40)))

    def test_keys_show_the_grid(self) -> None:
        nodes = {key.split(".")[1] for key in build("km_unet_pp_tiny").state_dict() if key.startswith("up.")}
        assert nodes == {f"{i}_{j}" for j in range(1, 5) for i in range(5 - j)}

    def test_context_blocks_begin_at_their_first_level(self) -> None:
        for first in range(5):
            model = build("km_unet_pp_tiny", context_from=first)
            scanned = {name.split(".")[1] for name, layer in model.named_modules() if isinstance(layer, SS2D)}
            assert {int(name[0]) for name in scanned} == set(range(first, 4))
        widths = (3, 5, 32, 48, 64)  # not divisible by the groups of EMA where there is none
        assert KMUNetPP(widths=widths, context_from=2).eval()(image(1, 40, 40)).shape == (1, 1, 40, 40)

    def test_the_head_at_full_resolution_sees_single_pixels(self) -> None:
        """A pixel that moves the map of the first level, but not its maxima, reaches the logits."""
        for full_resolution in (False, True):
            model = build("km_unet_pp_tiny", full_resolution=full_resolution).eval()
            model.encoder[0].conv = nn.Conv2d(3, 16, 1, bias=False)
            nn.init.constant_(model.encoder[0].conv.weight, 1.0)
            x = torch.rand(1, 3, 32, 32)
            x[..., ::2, ::2] += 2  # the maximum of every 2x2 window
            changed = x.clone()
            changed[..., 17, 17] += 0.5
            assert torch.equal(model(x), model(changed)) != full_resolution

    @pytest.mark.parametrize("first", [-1, 1.5])
    def test_a_wrong_first_level_is_refused(self, first: float) -> None:
        with pytest.raises((TypeError, ValueError), match="context_from must be"):
            KMUNetPP(context_from=first)
