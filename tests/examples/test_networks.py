"""Baselines and our models behind one function."""

from __future__ import annotations

import pytest
import torch

from segmentation.networks import BASELINES, build_network, list_networks


@pytest.mark.parametrize("name", [*BASELINES, "km_unet_pp_tiny", "km_unet_tiny", "u_kan_tiny"])
def test_logits_in_evaluation_and_training(name):
    network = build_network(name, 3, 6)
    image = torch.randn(2, 3, 50, 67)
    outputs = network(image)
    if "_pp" in name:
        assert isinstance(outputs, list)
        assert len(outputs) == 4
    else:
        outputs = [outputs]
    assert all(output.shape == (2, 6, 50, 67) for output in outputs)
    assert network.eval()(image).shape == (2, 6, 50, 67)


@pytest.mark.parametrize("name", ["unet_pp", "km_unet_pp_tiny"])
def test_deep_supervision_can_be_switched_off_and_puts_the_deepest_first(name):
    image = torch.randn(2, 1, 64, 64)
    assert isinstance(build_network(name, 1, 1, deep_supervision=False)(image), torch.Tensor)
    network = build_network(name, 1, 1).eval()
    with torch.no_grad():
        deepest = network(image)
        network.training = True  # only the output format, the norms stay
        assert torch.equal(network(image)[0], deepest)


def test_baselines_have_about_half_a_million_parameters():
    for name in BASELINES:
        assert 4e5 < sum(p.numel() for p in build_network(name, 3, 1).parameters()) < 7e5


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="model 'km_unet_tny' is unknown: did you mean km_unet_tiny"):
        build_network("km_unet_tny", 3, 1)
    with pytest.raises(ValueError, match="did you mean unet"):
        build_network("uunet", 3, 1)


def test_every_segmentation_model_of_the_package_is_listed():
    names = set(list_networks())
    assert {"unet", "unet_pp", "km_unet", "km_unet_pp_small", "u_kan", "vmamba_unet_tiny"} <= names
    assert "vmamba_tiny" not in names, "it classifies"
