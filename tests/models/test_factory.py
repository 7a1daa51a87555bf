"""Models by name, and the numbers of their parameters."""

from __future__ import annotations

import pytest
import torch

import kan_mamba_layers
from kan_mamba_layers import KMUNet, KMUNetPP, VMamba, VMambaUNet, create_model, list_models

# A change of these numbers changes every published checkpoint: edit them by hand, knowingly.
PARAMETERS = {
    "km_unet": 7008753,
    "km_unet_base": 7008753,
    "km_unet_small": 2003025,
    "km_unet_tiny": 520161,
    "km_unet_pp": 9282129,
    "km_unet_pp_base": 9282129,
    "km_unet_pp_small": 2725521,
    "km_unet_pp_tiny": 721281,
    "u_kan": 6355393,
    "u_kan_base": 6355393,
    "u_kan_small": 1892737,
    "u_kan_tiny": 485489,
    "vmamba_base": 88557800,
    "vmamba_small": 50147752,
    "vmamba_tiny": 30249064,
    "vmamba_unet_base": 106415041,
    "vmamba_unet_small": 60001489,
    "vmamba_unet_tiny": 40102801,
}


class TestNames:
    def test_list(self) -> None:
        assert list_models() == sorted(PARAMETERS)
        assert list_models("km_unet_pp*") == [
            "km_unet_pp",
            "km_unet_pp_base",
            "km_unet_pp_small",
            "km_unet_pp_tiny",
        ]
        tiny = ["km_unet_pp_tiny", "km_unet_tiny", "u_kan_tiny", "vmamba_tiny", "vmamba_unet_tiny"]
        assert list_models("*_tiny") == tiny
        assert list_models("resnet*") == []

    @pytest.mark.parametrize("name", sorted(PARAMETERS))
    def test_parameters(self, name: str) -> None:
        with torch.device("meta"):
            model = create_model(name)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
        families = {"km_unet_pp": KMUNetPP, "vmamba_unet": VMambaUNet, "vmamba": VMamba, "": KMUNet}
        assert type(model) is next(cls for family, cls in families.items() if name.startswith(family))
        assert model.training

    @pytest.mark.parametrize("name", ["km_unet", "km_unet_pp", "u_kan"])
    def test_the_family_alone_is_base(self, name: str) -> None:
        with torch.device("meta"):
            assert create_model(name).config == create_model(f"{name}_base").config

    def test_base_is_the_constructors_default(self) -> None:
        with torch.device("meta"):
            assert create_model("km_unet").config == KMUNet().config
            improved = KMUNetPP(context_from=1)  # the class itself has SS2D and EMA at level 0 too
            assert create_model("km_unet_pp").config == improved.config

    @pytest.mark.parametrize("name", ["km_unet_small", "km_unet_pp_small", "u_kan_small", "km_unet", "u_kan"])
    def test_larger_models_run(self, name: str) -> None:
        with torch.no_grad():
            assert create_model(name).eval()(torch.randn(1, 3, 40, 56)).shape == (1, 1, 40, 56)

    def test_the_tiny_models_have_a_residual_connection_around_their_context(self) -> None:
        """The class KMUNet has none by default, as published."""
        names = [name for name in PARAMETERS if not name.startswith("vmamba")]
        residual = {name for name in names if create_model(name).config["context_residual"]}
        assert residual == {"km_unet_tiny", *(name for name in PARAMETERS if name.startswith("km_unet_pp"))}
        published = create_model("km_unet_tiny", context_residual=False)
        assert not published.config["context_residual"]
        assert sum(p.numel() for p in published.parameters()) == 519809

    def test_u_kan_has_no_context(self) -> None:
        config = create_model("u_kan_tiny").config
        assert not config["use_ss2d"] and not config["use_ema"]


class TestOverrides:
    def test_reach_a_vmamba(self) -> None:
        encoder = create_model("vmamba_tiny", in_channels=1, features_only=True, out_indices=(0, 1), drop_path=0.0)
        assert encoder.feature_info.channels() == [96, 192] and encoder.config["depths"] == (2, 2, 8, 2)
        assert encoder.config["in_channels"] == 1 and encoder.config["drop_path"] == 0.0

    def test_replace_named_options(self) -> None:
        model = create_model("km_unet_pp_tiny", in_channels=1, num_classes=4, use_kan=False, deep_supervision=True)
        for key, value in {"in_channels": 1, "num_classes": 4, "use_kan": False, "deep_supervision": True}.items():
            assert model.config[key] == value
        assert create_model("u_kan_tiny", use_ema=True).config["use_ema"]

    def test_do_not_leak_into_the_next_model(self) -> None:
        before = create_model("km_unet_tiny").config
        create_model("km_unet_tiny", d_state=2, widths=(8, 8, 8, 8, 8))
        assert create_model("km_unet_tiny").config == before

    @pytest.mark.parametrize(
        ("name", "suggestion"),
        [("kmunet", "km_unet"), ("km_unet_pp_tinny", "km_unet_pp_tiny"), ("KM_UNET", "km_unet"), ("ukan", "u_kan")],
    )
    def test_unknown_name_suggests_the_nearest(self, name: str, suggestion: str) -> None:
        with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*{suggestion})"):
            create_model(name)

    def test_names_are_not_attributes_of_the_package(self) -> None:
        """A function `km_unet` beside the module `km_unet` would hide it."""
        import kan_mamba_layers.models.km_unet as module

        assert module.KMUNet is kan_mamba_layers.KMUNet
