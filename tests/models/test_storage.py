"""Models on disk: what comes back is the same to the bit, and damage is refused by the name of the file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, image

from kan_mamba_layers import KMUNetPP, create_model, from_pretrained


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model, which the tests copy and damage."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    KMUNetPP(1, 2, widths=(8, 16)).save_pretrained(folder)
    return folder


class TestStorage:
    @pytest.mark.parametrize("name", TINY)
    def test_round_trip_is_bit_equal(self, name: str, tmp_path: Path) -> None:
        model = create_model(name, num_classes=2)
        model(image(2, 48, 48))
        model.eval().save_pretrained(tmp_path / "model")
        for again in (from_pretrained(tmp_path / "model"), type(model).from_pretrained(str(tmp_path / "model"))):
            assert type(again) is type(model) and again.config == model.config
            state = again.state_dict()
            assert list(state) == list(model.state_dict())
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
            assert torch.equal(again.eval()(image(1, 48, 40)), model(image(1, 48, 40)))

    def damaged(self, folder: Path, tmp_path: Path, name: str, change: Callable[[bytearray], bytes]) -> Path:
        copy_of = tmp_path / "damaged"
        copy_of.mkdir()
        for file in folder.iterdir():
            data = file.read_bytes()
            (copy_of / file.name).write_bytes(change(bytearray(data)) if file.name == name else data)
        return copy_of

    @pytest.mark.parametrize("trial", range(12))
    def test_a_flipped_bit_in_the_weights_is_refused(self, stored: Path, tmp_path: Path, trial: int) -> None:
        def flip(data: bytearray) -> bytes:
            draw = random.Random(trial)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(data)

        folder = self.damaged(stored, tmp_path, "model.safetensors", flip)
        with pytest.raises(ValueError, match=r"(?s)(?=.*model\.safetensors)(?=.*(damaged|sha256))"):
            KMUNetPP.from_pretrained(folder)

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_truncated_file_is_refused_by_name(self, stored: Path, tmp_path: Path, name: str, share: float) -> None:
        folder = self.damaged(stored, tmp_path, name, lambda data: bytes(data[: int(share * len(data))]))
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            KMUNetPP.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"num_classes": 2', b'"num_classes": 3'),
            (b'"widths"', b'"wicths"'),
            (b'"in_channels": 1', b'"in_channels": 0'),
        ],
    )
    def test_a_config_that_does_not_fit_is_refused_by_name(
        self, stored: Path, tmp_path: Path, old: bytes, new: bytes
    ) -> None:
        folder = self.damaged(stored, tmp_path, "config.json", lambda data: bytes(data).replace(old, new))
        assert (folder / "config.json").read_bytes() != (stored / "config.json").read_bytes()
        with pytest.raises((ValueError, TypeError), match=r"config\.json"):
            KMUNetPP.from_pretrained(folder)

    def test_a_file_that_was_not_written_by_us_is_refused(self, stored: Path, tmp_path: Path) -> None:
        folder = self.damaged(stored, tmp_path, "config.json", lambda data: b"[]")
        with pytest.raises(ValueError, match=r"config\.json"):
            KMUNetPP.from_pretrained(folder)
