"""Models on disk: what comes back is the same to the bit, and damage is refused by the name of the file."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINY, image
from torch.nn.utils import prune

from helpers import says
from kan_mamba_layers import KANLinear, KMUNet, KMUNetPP, VMamba, create_model, from_pretrained
from kan_mamba_layers.models.model import Model

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model, which the tests copy and damage."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    KMUNetPP(1, 2, widths=(8, 16)).save_pretrained(folder)
    return folder


def classified(classes: int) -> Model:
    model = VMamba(num_classes=3, depths=(1, 1, 1, 1), dims=8)
    model.reset_classifier(classes)
    return model


def meaning(data: bytes) -> object:
    """What a JSON file says; None if it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return None


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

    @pytest.mark.parametrize(
        "made",
        [
            lambda: KMUNet(num_classes=np.int64(3), widths=(8,) * 5, d_state=np.int32(1), use_kan=np.True_),
            lambda: KMUNet(features_only=True, out_indices=range(3), widths=[8] * 5, d_state=1),
            lambda: classified(np.int64(5)),
        ],
        ids=["numbers", "range", "reset"],
    )
    def test_arguments_from_numpy(self, made: Callable[[], Model], tmp_path: Path) -> None:
        model = made().eval()
        model.save_pretrained(tmp_path / "model")
        again = from_pretrained(tmp_path / "model")
        assert again.config == model.config and type(next(iter(again.config.values()))) is int

    def test_pretrained_with_arguments_from_numpy(self) -> None:
        options = {"features_only": True, "out_indices": range(2), "in_channels": np.int64(1)}
        assert len(create_model("km_unet_pp_tiny", pretrained="fetal_head", **options)(image(1, 32, 32)[:, :1])) == 2

    def test_shared_weights_are_stored_for_each(self, tmp_path: Path) -> None:
        model = KMUNet(widths=(8,) * 5, d_state=1).eval()
        model.decoder_context[0] = model.encoder_context[0]
        model.save_pretrained(tmp_path / "model")
        again = from_pretrained(tmp_path / "model")
        assert torch.equal(again(image(1, 32, 32)), model(image(1, 32, 32)))
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
        state = from_pretrained(tmp_path / "half").state_dict()
        pairs = [(name, name.replace("decoder", "encoder")) for name in state if name.startswith("decoder_context.0.")]
        assert pairs and all(torch.equal(state[a], state[b]) for a, b in pairs)

    def test_a_model_that_could_not_be_loaded_is_refused(self, tmp_path: Path) -> None:
        model = KMUNet(widths=(8,) * 5, d_state=1)
        prune.random_unstructured(model.encoder[0].conv[0][0], "weight", 0.5)
        with pytest.raises(ValueError, match=says("weight", "KMUNet", "prune", "torch.save")):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
        other = KMUNet(widths=(8,) * 5, d_state=1)
        other.encoder[0].conv[0][0] = torch.nn.Conv2d(3, 8, 1, bias=False)
        with pytest.raises(ValueError, match=says("encoder.0.conv.0.0.weight", "a new head", "torch.save")):
            other.save_pretrained(tmp_path / "model")
        prune.remove(model.encoder[0].conv[0][0], "weight")
        model.save_pretrained(tmp_path / "model")

    def test_a_subclass_with_arguments_of_its_own_is_stored(self, tmp_path: Path) -> None:
        class Small(KMUNet):
            def __init__(self, width: int) -> None:
                super().__init__(widths=(width,) * 5, d_state=1)

        Small(8).save_pretrained(tmp_path / "model")
        state = safetensors.load_file(tmp_path / "model" / "model.safetensors")
        assert state.keys() == Small(8).state_dict().keys()

    def test_learned_knots_keep_their_dtype(self, tmp_path: Path) -> None:
        model = KMUNet(1, 2, widths=(4, 4, 4, 4, 4), d_state=1, expand=1, ema_factor=2)
        for layer in model.modules():
            if isinstance(layer, KANLinear):
                layer.grid = torch.nn.Parameter(layer._buffers.pop("grid"))
        model.save_pretrained(tmp_path, dtype=torch.float16)
        stored, state = safetensors.load_file(tmp_path / "model.safetensors"), model.state_dict()
        grids = [name for name in state if name.endswith(".grid")]
        assert grids and all(torch.equal(stored[name], state[name]) for name in grids)
        assert {x.dtype for name, x in stored.items() if name.endswith("spline_weight")} == {torch.float16}

    @pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 1e5), (torch.float8_e4m3fn, 500.0)])
    def test_a_dtype_holds_what_is_finite(self, dtype: torch.dtype, large: float, tmp_path: Path) -> None:
        model = KMUNetPP(1, 2, widths=(8, 16))
        with torch.no_grad():
            next(model.parameters()).view(-1)[1] = -large
        with pytest.raises(ValueError, match=says(f"dtype={dtype} cannot hold encoder", f"up to {large:g};")):
            model.save_pretrained(tmp_path, dtype=dtype)

    def test_a_nan_is_stored(self, tmp_path: Path) -> None:
        model = KMUNetPP(1, 2, widths=(8, 16))
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = float("nan")
        model.save_pretrained(tmp_path, dtype=torch.float16)
        assert next(from_pretrained(tmp_path).parameters()).isnan().sum() == 1

    def test_another_backend(self, tmp_path: Path) -> None:
        KMUNet(widths=(8,) * 5, d_state=1, backend="triton").save_pretrained(tmp_path / "model")
        again = from_pretrained(tmp_path / "model", backend="chunked")
        assert again.config["backend"] == "chunked" and again(image(1, 32, 32)).isfinite().all()

    def test_who_may_read_other_new_files_may_read_these(self, stored: Path, tmp_path: Path) -> None:
        plain = tmp_path / "plain"
        plain.write_bytes(b"")
        assert {path.stat().st_mode for path in stored.iterdir()} == {plain.stat().st_mode}

    def test_loads_on_the_cpu_whatever_the_default_device(self, stored: Path) -> None:
        with torch.device("meta"):
            again = from_pretrained(stored).state_dict()
        assert all(torch.equal(again[key], x) for key, x in from_pretrained(stored).state_dict().items())

    @pytest.mark.parametrize("changes", [{"num_classes": 3}, {"in_channels": 4}, {"num_classes": 2}], ids=str)
    def test_other_classes_and_channels(self, changes: dict[str, int], tmp_path: Path) -> None:
        """Only the layers at both ends change, and only where their size does."""
        model = KMUNetPP(1, 2, widths=(8, 16), deep_supervision=True)
        model.save_pretrained(tmp_path)
        state = model.state_dict()
        for other in (from_pretrained(tmp_path, **changes), KMUNetPP.from_pretrained(tmp_path, **changes)):
            assert other.config == {**model.config, **changes}
            drawn = {key for key, x in other.state_dict().items() if not torch.equal(x, state[key])}
            logits = {key for key in state if ".logits." in key}
            ends = {"num_classes": logits, "in_channels": {"encoder.0.conv.0.0.weight"}}
            ((name, value),) = changes.items()
            assert drawn == (ends[name] if value != model.config[name] else set())
            assert other(image(1, 32, 32)[:, :1].expand(-1, other.config["in_channels"], -1, -1)).isfinite().all()

    def test_other_classes_keep_splines_that_were_extended(self, tmp_path: Path) -> None:
        model = KMUNet(1, 2, widths=(4, 4, 4, 4, 4), d_state=1, expand=1, ema_factor=2)
        for layer in model.modules():
            if isinstance(layer, KANLinear):
                layer.extend_grid(7)
        model.save_pretrained(tmp_path)
        state = model.state_dict()
        other = from_pretrained(tmp_path, num_classes=3).state_dict()
        assert {key for key, x in other.items() if not torch.equal(x, state[key])} == {
            "head.logits.weight",
            "head.logits.bias",
        }

    def damaged(self, folder: Path, tmp_path: Path, name: str, change: Callable[[bytearray], bytes]) -> Path:
        copy_of = tmp_path / "damaged"
        copy_of.mkdir()
        for file in folder.iterdir():
            data = file.read_bytes()
            (copy_of / file.name).write_bytes(change(bytearray(data)) if file.name == name else data)
        return copy_of

    @pytest.mark.parametrize(("name", "flips"), [("model.safetensors", 300), ("config.json", 100)])
    def test_a_flipped_bit_is_refused(self, stored: Path, tmp_path: Path, name: str, flips: int) -> None:
        folder = self.damaged(stored, tmp_path, name, bytes)
        whole, draw = (folder / name).read_bytes(), random.Random(0)
        for _ in range(flips):
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(data)
            if name == "config.json" and meaning(bytes(data)) == meaning(whole):
                continue  # a space became a tab
            with pytest.raises((ValueError, TypeError), match=r"config\.json|model\.safetensors|is damaged|holds a"):
                KMUNetPP.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_truncated_file_is_refused_by_name(self, stored: Path, tmp_path: Path, name: str) -> None:
        folder = self.damaged(stored, tmp_path, name, bytes)
        whole = (folder / name).read_bytes()
        for n in range(20):
            (folder / name).write_bytes(whole[: n * (len(whole) - 2) // 19])  # without the last line break it is whole
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                KMUNetPP.from_pretrained(folder)

    def test_a_pickle_in_place_of_the_weights_runs_nothing(self, stored: Path, tmp_path: Path) -> None:
        class Malicious:
            def __reduce__(self) -> tuple:
                return (Path.touch, (tmp_path / "it ran",))

        folder = self.damaged(stored, tmp_path, "model.safetensors", lambda data: pickle.dumps(Malicious()))
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            KMUNetPP.from_pretrained(folder)
        assert not (tmp_path / "it ran").exists()

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_full_disk_leaves_the_stored_model(
        self, stored: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        folder = self.damaged(stored, tmp_path, name, bytes)
        writer = (Path, "write_text" if name == "config.json" else "write_bytes")
        monkeypatch.setattr(*writer, no_space)
        with pytest.raises(OSError, match="No space left"):
            KMUNetPP(1, 3, widths=(8, 16)).save_pretrained(folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
            file.name: file.read_bytes() for file in stored.iterdir()
        }

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
