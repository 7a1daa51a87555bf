"""Feature maps: every model returns what its `feature_info` says, in the shapes that users of timm expect."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tiny_models import assert_gradients, image, total
from torch import Tensor, nn

from helpers import says
from kan_mamba_layers import KMUNet, KMUNetPP, VMamba

TINY = {"d_state": 1, "expand": 1, "ema_factor": 2}
# How a model is made, the channels of its maps and by how much they are smaller than the image.
MODELS: dict[str, tuple[Callable[..., nn.Module], list[int], list[int]]] = {
    "KMUNet": (lambda **o: KMUNet(widths=(4, 8, 8, 6, 4), **TINY, **o), [4, 8, 8, 6, 4], [2, 4, 8, 16, 32]),
    "KMUNet of the paper's code": (
        lambda **o: KMUNet(widths=(4, 8, 8, 6, 4), trunk_context=False, **TINY, **o),
        [4, 8, 8, 6, 4],
        [2, 4, 8, 16, 32],
    ),
    "KMUNetPP": (lambda **o: KMUNetPP(widths=(4, 8, 8, 6), **TINY, **o), [4, 8, 8, 6], [2, 4, 8, 16]),
    "VMamba": (lambda **o: VMamba(depths=(1, 2, 1, 1), dims=4, **o), [4, 8, 16, 32], [4, 8, 16, 32]),
}


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0](**options)


@pytest.mark.parametrize("name", MODELS)
class TestFeatures:
    def test_maps_are_those_of_the_whole_model(self, name: str) -> None:
        whole, features = build(name).eval(), build(name, features_only=True).eval()
        state = whole.state_dict()
        assert features.state_dict().keys() < state.keys()
        features.load_state_dict({key: state[key] for key in features.state_dict()})
        seen: dict[str, Tensor] = {}
        for module in features.feature_info.module_name():
            whole.get_submodule(module).register_forward_hook(
                lambda _, inputs, out, module=module: seen.update({module: out})
            )
        with torch.no_grad():
            whole(image(2, 64, 96))
            maps = features(image(2, 64, 96))
        info = features.feature_info
        assert (info.channels(), info.reduction()) == MODELS[name][1:]
        assert len(maps) == len(info)
        for i, (x, module) in enumerate(zip(maps, info.module_name(), strict=True)):
            assert x.shape == (2, info[i]["num_chs"], 64 // info[i]["reduction"], 96 // info[i]["reduction"])
            out = seen[module]
            assert torch.equal(x, out.movedim(-1, 1) if name == "VMamba" else out)

    def test_chosen_maps_alone_are_computed(self, name: str) -> None:
        every, some = build(name, features_only=True).eval(), build(name, features_only=True, out_indices=[2, -4])
        count = len(every.feature_info)
        assert some.feature_info.out_indices == (2, count - 4) and some.config["out_indices"] == (2, -4)
        assert some.feature_info.channels() == [MODELS[name][1][i] for i in (2, count - 4)]
        state = every.state_dict()
        some.load_state_dict({key: state[key] for key in some.state_dict()})
        with torch.no_grad():
            expected = every(image(2, 64, 64))
            for x, i in zip(some.eval()(image(2, 64, 64)), (2, count - 4), strict=True):
                assert torch.equal(x, expected[i])
        total(some.train()(image(2, 64, 64))).backward()
        assert_gradients(some)

    def test_the_rest_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=says("forward_features", "features_only=True")):
            build(name, features_only=True).forward_features(image(1, 64, 64))
        with pytest.raises(ValueError, match=says(r"out_indices=\(0,\)", "features_only=True")):
            build(name, out_indices=(0,))


@pytest.mark.parametrize(
    ("bad", "error"),
    [((9,), ValueError), ((0, -9), ValueError), *((bad, TypeError) for bad in (1, "01", (), (0.5,), (True,)))],
)
def test_indices_of_no_map_are_refused(bad: object, error: type[Exception]) -> None:
    got = bad[-1] if isinstance(bad, tuple) and bad else bad
    with pytest.raises(error, match=says(r"out_indices(\[\d\])? must", re.escape(f"got {got!r}"))):
        build("KMUNetPP", features_only=True, out_indices=bad)


def test_models_describe_their_maps_without_features_only() -> None:
    assert build("KMUNet").feature_info.reduction() == [2, 4, 8, 16, 32]
    assert VMamba(depths=(1, 1, 1, 1), dims=4).feature_info[1] == {
        "num_chs": 8,
        "reduction": 8,
        "module": "layers.1.blocks.0",
    }
