"""Single edges of KANLinear and KANConv2d: their values, their sizes, and pruning them."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kan_layers import EXTRAPOLATIONS, HALF, grouped_convolution, on_nonuniform_knots, with_large_splines
from scipy.integrate import trapezoid
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers import assert_close, basis_oracle, largest, says, silu, to_array
from kan_mamba_layers import KANConv2d, KANLinear
from kan_mamba_layers.layers.kan.edges import input_feature

Layer = KANLinear | KANConv2d


def edge_oracle(layer: Layer, x: np.ndarray, edge: tuple[int, ...], feature: int) -> np.ndarray:
    """silu and SciPy's B-splines for one edge; inside the grid all extrapolations are the same."""
    weight = to_array(layer.spline_weight)[edge]
    weight = weight if layer.spline_scaler is None else weight * to_array(layer.spline_scaler)[edge]
    bases = basis_oracle(x[:, None], to_array(layer.grid)[feature : feature + 1], layer.spline_order)[:, 0]
    return to_array(layer.base_weight)[edge] * silu(x) + bases @ weight


class TestEdgeFunction:
    @pytest.mark.parametrize("options", [{}, {"enable_standalone_scale_spline": False}, {"spline_order": 2}], ids=str)
    def test_equals_the_formula(self, options: dict) -> None:
        layer = on_nonuniform_knots(features=(3, 2), **options)
        x = torch.linspace(-3, 3, 101, dtype=torch.float64)
        every = layer.edge_function(x)
        assert every.shape == (101, 2, 3) and every.dtype == torch.float64
        for edge in np.ndindex(2, 3):
            expected = edge_oracle(layer, to_array(x), edge, edge[1])
            assert_close(f"{edge}", layer.edge_function(x, edge), expected, 1e-7)
            assert_close(f"{edge} of all", every[(slice(None), *edge)], expected, 1e-7)

    def test_of_a_convolution_takes_the_channel_of_its_group(self) -> None:
        layer, x = grouped_convolution(), torch.linspace(-0.9, 0.9, 50, dtype=torch.float64)
        every = layer.edge_function(x)
        assert every.shape == (50, 6, 2, 3, 2)
        for edge, channel in [((0, 0, 0, 0), 0), ((2, 1, 2, 1), 1), ((3, 0, 1, 0), 2), ((5, 1, 0, 1), 3)]:
            expected = edge_oracle(layer, to_array(x), edge, channel)
            assert_close(f"{edge}", layer.edge_function(x, edge), expected, 1e-7)
            assert_close(f"{edge} of all", every[(slice(None), *edge)], expected, 1e-7)

    @pytest.mark.parametrize("extrapolation", EXTRAPOLATIONS)
    def test_all_edges_add_up_to_the_output(self, extrapolation: str) -> None:
        """Also beyond the grid."""
        layer = with_large_splines(extrapolation=extrapolation, bias=True).double()
        x = 2 * torch.randn(20, dtype=torch.float64)
        assert_close(
            "sum", layer.edge_function(x).sum(-1) + layer.bias, layer(x[:, None].expand(-1, 8)), 1e-6
        )  # knots: float32

    @pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
    def test_points_of_any_shape(self, shape: tuple[int, ...]) -> None:
        layer, x = with_large_splines(), torch.rand(shape)
        one, every = layer.edge_function(x, (5, 7)), layer.edge_function(x)
        assert one.shape == shape and every.shape == (*shape, 6, 8)
        assert_close("one of all", one, every[..., 5, 7], 1e-6)

    def test_can_be_differentiated(self) -> None:
        layer, x = with_large_splines(features=(3, 2)).double(), torch.rand(5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: layer.edge_function(x, (1, 2)), (x,))
        layer.edge_function(x).sum().backward()
        assert all(largest(p.grad) > 0 for p in layer.parameters())

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision_modules_are_evaluated_in_float32(self, dtype: torch.dtype) -> None:
        layer, x = with_large_splines().to(dtype), torch.linspace(-1, 1, 20)
        expected = copy.deepcopy(layer).double().edge_function(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            values = layer.edge_function(x)
        assert values.dtype == torch.float32
        assert_close("values", values, expected, 2 * torch.finfo(dtype).eps)


class TestEdgeSizes:
    @pytest.mark.parametrize("make", [with_large_splines, on_nonuniform_knots, grouped_convolution])
    def test_is_the_root_mean_square_over_the_grid(self, make) -> None:
        layer = make()
        sizes = layer.edge_sizes()
        assert sizes.shape == layer.base_weight.shape
        for edge in list(np.ndindex(*sizes.shape))[::7]:
            feature = input_feature(edge, layer.base_weight.shape, len(layer.grid))
            knots = to_array(layer.grid)[feature, 3:-3]
            x = np.concatenate([np.linspace(a, b, 2001) for a, b in pairwise(knots)])
            mean = trapezoid(edge_oracle(layer, x, edge, feature) ** 2, x) / (knots[-1] - knots[0])
            np.testing.assert_allclose(sizes[edge].item(), np.sqrt(mean), rtol=1e-4)

    def test_of_a_constant_and_of_a_line(self) -> None:
        """Coefficients that are equal give a constant; knot averages give x, whose mean square on [-1, 1] is 1/3."""
        layer = KANLinear(1, 2, enable_standalone_scale_spline=False)
        with torch.no_grad():
            layer.base_weight.zero_()
            layer.spline_weight[0] = -0.7
            layer.spline_weight[1] = layer.grid.unfold(1, 3, 1)[:, 1:-1].mean(-1)
        assert_close("sizes", layer.edge_sizes(), torch.tensor([[0.7], [3**-0.5]]), 1e-6)

    @pytest.mark.parametrize("make", [with_large_splines, grouped_convolution])
    def test_block_by_block(self, make, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = make()
        whole = layer.edge_sizes()
        monkeypatch.setattr("kan_mamba_layers.layers.kan.edges._BLOCK", 1)
        assert_close("sizes", layer.edge_sizes(), whole, 1e-6)

    def test_counts_the_base(self) -> None:
        layer = KANLinear(4, 3, scale_noise=0.0)
        x = np.linspace(-1, 1, 10001)
        size = np.sqrt(trapezoid(silu(x) ** 2, x) / 2)
        assert_close("sizes", layer.edge_sizes(), size * to_array(layer.base_weight.abs()), 1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        layer = with_large_splines(base_activation=nn.Tanh).to(dtype)
        sizes = layer.edge_sizes()
        assert sizes.dtype == torch.promote_types(dtype, torch.float32) and not sizes.requires_grad
        assert_close("sizes", sizes, copy.deepcopy(layer).float().edge_sizes(), 2e-2 if dtype.itemsize == 2 else 1e-5)


def masked(layer: Layer, kept: Tensor) -> Layer:
    prune.custom_from_mask(layer, "base_weight", kept)
    prune.custom_from_mask(layer, "spline_weight", kept[..., None].expand_as(layer.spline_weight))
    return layer


class TestPruneEdges:
    @pytest.mark.parametrize("make", [with_large_splines, grouped_convolution])
    def test_zeroes_small_edges_and_leaves_the_others(self, make) -> None:
        layer = make()
        before, sizes = copy.deepcopy(layer), layer.edge_sizes()
        threshold = sizes.median().item()
        kept = layer.prune_edges(threshold)
        assert kept.dtype == torch.bool and torch.equal(kept, sizes > threshold) and 0.3 < kept.float().mean() < 0.6
        points = torch.linspace(-4, 4, 50)
        values, expected = layer.edge_function(points), before.edge_function(points)
        assert (values[:, ~kept] == 0).all() and torch.equal(values[:, kept], expected[:, kept])
        assert torch.equal(layer.edge_sizes() > 0, kept)

    def test_a_threshold_of_zero_takes_only_what_is_zero(self) -> None:
        layer = with_large_splines()
        assert layer.prune_edges(0).all()
        with torch.no_grad():
            layer.base_weight[2, 3] = 0
            layer.spline_weight[2, 3] = 0
        assert (~layer.prune_edges(0)).nonzero().tolist() == [[2, 3]]

    def test_what_is_not_a_number_is_not_hidden(self) -> None:
        layer = with_large_splines()
        with torch.no_grad():
            layer.base_weight[0, 0] = float("nan")
        assert layer.prune_edges(0.1)[0, 0] and layer.base_weight[0, 0].isnan()

    def test_training_revives_edges_unless_they_are_masked(self) -> None:
        x, target = torch.rand(256, 8) * 2 - 1, torch.randn(256, 6)
        for mask in (False, True):
            layer = with_large_splines()
            kept = layer.prune_edges(layer.edge_sizes().median().item())
            layer = masked(layer, kept) if mask else layer
            optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                (F.mse_loss(layer(x), target) + 0.01 * layer.regularization_loss()).backward()
                optimizer.step()
            layer(x)  # the masks are applied where the layer runs
            sizes = layer.edge_sizes()
            assert (sizes[kept] > 0).all()
            assert (sizes[~kept] == 0).all() == mask

    @pytest.mark.parametrize("make", [with_large_splines, grouped_convolution])
    def test_masks_survive_a_state_dict_and_can_be_made_permanent(self, make) -> None:
        layer, other = make(), make()
        kept = layer.prune_edges(layer.edge_sizes().median().item())
        masked(layer, kept)
        masked(other, torch.ones_like(kept))
        x = torch.randn(5, 8) if isinstance(layer, KANLinear) else torch.randn(2, 4, 6, 5)
        expected = layer(x)
        other.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(other(x), expected)
        for name in ("base_weight", "spline_weight"):
            prune.remove(layer, name)
        assert set(layer.state_dict()) == set(make().state_dict())
        assert torch.equal(layer(x), expected) and torch.equal(layer.edge_sizes() > 0, kept)
        assert torch.equal(layer.prune_edges(0), kept), "and pruning may go on"

    @pytest.mark.parametrize(
        "call",
        [lambda f: f.prune_edges(0.1), lambda f: f.update_grid(torch.rand(9, 8)), lambda f: f.extend_grid(10)],
        ids=["prune_edges", "update_grid", "extend_grid"],
    )
    def test_while_masks_are_on_weights_cannot_be_written(self, call) -> None:
        """What is written to a masked weight would be lost in the next forward pass."""
        layer = with_large_splines()
        masked(layer, layer.prune_edges(0.1))
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=says("base_weight|spline_weight", "pruned", r"prune\.remove")):
            call(layer)
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
