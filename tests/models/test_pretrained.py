"""The weights that the library brings: they load offline, fit their names, and label images of any kind."""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kan_mamba_layers
from kan_mamba_layers import KMUNetPP, Segmenter, create_model, list_pretrained
from kan_mamba_layers.models import pretrained as module

WEIGHTS = Path(kan_mamba_layers.__file__).parent / "weights"
CLASSES = {
    "breast_lesion": ("lesion",),
    "fetal_head": ("head",),
    "lumbar_spine": ("L1", "L2", "L3", "L4", "L5"),
    "skin_lesion": ("lesion",),
}
IMAGES: dict[str, tuple[tuple[int, ...], type]] = {
    "grey": ((216, 320), np.uint8),
    "colour": ((150, 201, 3), np.uint8),
    "deep": ((91, 64), np.uint16),
    "portrait with alpha": ((403, 97, 4), np.uint8),
    "one pixel": ((1, 1), np.float32),
}


def picture(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    values = np.random.default_rng(0).random(shape)
    return (values * (1 if dtype == np.float32 else np.iinfo(dtype).max)).astype(dtype)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a network fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_list() -> None:
    assert list_pretrained() == sorted(CLASSES)
    assert list_pretrained("*lesion") == ["breast_lesion", "skin_lesion"]
    assert list_pretrained("resnet") == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", CLASSES)
class TestEach:
    def test_the_segmenter_and_the_model_have_the_same_weights(self, name: str) -> None:
        segmenter, model = Segmenter.from_pretrained(name), create_model("km_unet_pp_tiny", pretrained=name)
        assert segmenter.classes == CLASSES[name]
        assert model.training and not segmenter.model.training
        state = segmenter.model.state_dict()
        assert all(torch.equal(state[key], x) for key, x in model.state_dict().items())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        classes = len(CLASSES[name])
        assert model.config["num_classes"] == (1 if classes == 1 else 1 + classes)
        assert model.config["in_channels"] == segmenter.in_channels == (3 if name == "skin_lesion" else 1)

    @pytest.mark.parametrize("kind", IMAGES)
    def test_images_of_every_kind(self, name: str, kind: str) -> None:
        image, segmenter = picture(*IMAGES[kind]), Segmenter.from_pretrained(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            labels = segmenter(image)
            p = segmenter.probabilities(image, flips=bool(segmenter.flip_axes), windows=True)
        assert labels.shape == p.shape[1:] == image.shape[:2] and labels.dtype == np.uint8
        assert labels.max() <= len(CLASSES[name]) and np.isfinite(p).all() and 0 <= p.min() <= p.max() <= 1

    def test_the_card_says_what_they_are(self, name: str) -> None:
        card = " ".join((WEIGHTS / name / "README.md").read_text(encoding="utf-8").split())
        for part in ("no basis for a diagnosis", "Licence of the data", "sha256 of the split", "Limits", "| Dice"):
            assert part in card
        split = json.loads((WEIGHTS / name / "split.json").read_text())
        assert split["sha256"][:16] in card
        sides = Counter(row["split"] for row in split["items"].values())
        assert set(sides) == {"train", "val", "test"}
        assert all(f"{count} images of" in card for count in sides.values())
        groups = {side: {row["group"] for row in split["items"].values() if row["split"] == side} for side in sides}
        assert not groups["test"] & (groups["train"] | groups["val"])

    def test_a_flipped_bit_is_refused(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(WEIGHTS / name, tmp_path / name)
        monkeypatch.setattr(module, "_WEIGHTS", tmp_path)
        file = tmp_path / name / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        for load in (Segmenter.from_pretrained, lambda name: create_model("km_unet_pp_tiny", pretrained=name)):
            with pytest.raises(ValueError, match=f"{name}.* is damaged"):
                load(name)


def test_a_folder_of_the_same_name_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("skin_lesion").mkdir()  # of images, say
    assert Segmenter.from_pretrained("skin_lesion").classes == ("lesion",)
    own = Segmenter(create_model("km_unet_pp_tiny", in_channels=1), ["own"], size=64, in_channels=1)
    own.save_pretrained("skin_lesion")
    with pytest.raises(ValueError, match=r"'skin_lesion' is one of .* and also a folder .* write './skin_lesion'"):
        Segmenter.from_pretrained("skin_lesion")
    for folder in ("./skin_lesion", Path("skin_lesion")):
        assert Segmenter.from_pretrained(folder).classes == ("own",)
    assert create_model("km_unet_pp_tiny", pretrained="skin_lesion").config["in_channels"] == 3


def test_the_wheel_stays_small() -> None:
    """Weights and cards of the wheel, which may have 8 MB."""
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 7.5e6


class TestStartingFromThem:
    def test_other_channels_and_classes_keep_all_but_the_ends(self) -> None:
        model = create_model("km_unet_pp_tiny", pretrained="fetal_head", in_channels=3, num_classes=4)
        assert isinstance(model, KMUNetPP)
        state = create_model("km_unet_pp_tiny", pretrained="fetal_head").state_dict()
        drawn = {key for key, x in model.state_dict().items() if not torch.equal(x, state[key])}
        assert drawn == {"encoder.0.conv.0.0.weight", *(key for key in state if ".logits." in key)}
        assert model(torch.randn(2, 3, 40, 56))[0].shape == (2, 4, 40, 56)

    def test_the_encoder_alone(self) -> None:
        whole = create_model("km_unet_pp_tiny", pretrained="fetal_head")
        encoder = create_model("km_unet_pp_tiny", pretrained="fetal_head", features_only=True)
        state = whole.state_dict()
        assert all(torch.equal(x, state[key]) for key, x in encoder.state_dict().items())
        assert len(encoder.eval()(torch.randn(1, 1, 64, 64))) == 5

    def test_without_deep_supervision(self) -> None:
        model = create_model("km_unet_pp_tiny", pretrained="fetal_head", deep_supervision=False)
        assert model(torch.randn(2, 1, 40, 56)).shape == (2, 1, 40, 56)

    def test_the_default_device(self) -> None:
        with torch.device("meta"):
            model = create_model("km_unet_pp_tiny", pretrained="fetal_head")
        assert {x.device.type for x in model.state_dict().values()} == {"meta"}

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("km_unet_pp_tiny", {"pretrained": "head"}, r"pretrained='head' is not one of list_pretrained\(\): breast"),
            (
                "km_unet_pp_tiny",
                {"pretrained": "fetal_head", "d_state": 2},
                "d_state is 2, but pretrained='fet",
            ),
            ("km_unet_pp_small", {"pretrained": "fetal_head"}, "widths is .* but pretrained='fetal_head' are weights"),
            ("km_unet_tiny", {"pretrained": "fetal_head"}, "are weights of a KMUNetPP, not of 'km_unet_tiny'"),
        ],
    )
    def test_other_models_are_refused(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            create_model(name, **options)
