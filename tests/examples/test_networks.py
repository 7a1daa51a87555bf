"""Baselines and our models behind one function."""

from __future__ import annotations

import pytest
import torch

from segmentation.networks import BASELINES, build_network, count_parameters, list_networks


@pytest.mark.parametrize("name", [*BASELINES, "km_unet_pp_tiny", "km_unet_tiny", "u_kan_tiny"])
def test_logits_and_gradients(name):
    """Lightning's `ddp` looks for no unused parameters: it fails if one gets no gradient."""
    network = build_network(name, 3, 6)
    image = torch.randn(2, 3, 50, 67)
    outputs = network(image)
    if "_pp" in name:
        assert isinstance(outputs, list)
        assert len(outputs) == 4
    else:
        outputs = [outputs]
    assert all(output.shape == (2, 6, 50, 67) for output in outputs)
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.eval()(image).shape == (2, 6, 50, 67)
    if name in BASELINES:
        assert 4e5 < count_parameters(network) < 7e5


@pytest.mark.parametrize("name", ["unet_pp", "km_unet_pp_tiny"])
def test_deep_supervision_can_be_switched_off_and_puts_the_deepest_first(name):
    image = torch.randn(2, 1, 64, 64)
    assert isinstance(build_network(name, 1, 1, deep_supervision=False)(image), torch.Tensor)
    network = build_network(name, 1, 1).eval()
    with torch.no_grad():
        deepest = network(image)
        network.training = True  # only the output format, the norms stay
        assert torch.equal(network(image)[0], deepest)


@pytest.mark.parametrize(("name", "nearest"), [("km_unet_tny", "km_unet_tiny"), ("uunet", "unet")])
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"model '{name}' is unknown: did you mean {nearest}"):
        build_network(name, 3, 1)


def test_baselines_have_no_pretrained_weights():
    with pytest.raises(ValueError, match="pretrained='fetal_head' are weights of one of our networks, not of 'unet'"):
        build_network("unet", 1, 1, pretrained="fetal_head")


def test_every_segmentation_model_of_the_package_is_listed():
    names = set(list_networks())
    assert {"unet", "unet_pp", "km_unet", "km_unet_pp_small", "u_kan", "vmamba_unet_tiny"} <= names
    assert "vmamba_tiny" not in names, "it classifies"
