"""What the base class of the KAN layers is for: finding them in a model."""

from __future__ import annotations

import torch
from torch import nn

from kan_mamba_layers import KANConv2d, KANLinear
from kan_mamba_layers.layers.kan import SplineLayer
from kan_mamba_layers.layers.module import Layer


def test_finds_the_kan_layers_of_a_model() -> None:
    model = nn.Sequential(KANConv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Sequential(KANLinear(12, 4), nn.Linear(4, 2)))
    found = [m for m in model.modules() if isinstance(m, SplineLayer)]
    assert found == [model[0], model[3][0]]
    penalty = sum(m.regularization_loss() for m in found)
    assert torch.equal(penalty, model[0].regularization_loss() + model[3][0].regularization_loss())


def test_is_the_only_base_class() -> None:
    for layer in (KANConv2d, KANLinear):
        assert layer.__bases__ == (SplineLayer,)
    assert SplineLayer.__bases__ == (Layer,)
