"""The same numbers on a GPU as on the CPU: the scans by Triton, and outputs and gradients of layers and models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from helpers import assert_close, gradients, relative_l2
from kan_mamba_layers import (
    EMA,
    SS2D,
    SS3D,
    KANBlock,
    KANConv2d,
    KANLinear,
    Mamba,
    VSSBlock,
    create_model,
    cross_selective_scan,
    resolve,
    selective_scan,
    walks,
)
from kan_mamba_layers.compat import mamba2
from ops.selective_scan.calls import Call, Inputs, full_line_inputs, image_inputs, on_images, on_lines_with_state

pytestmark = pytest.mark.gpu
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def a_mask(*shape: int) -> torch.Tensor:
    """Some of the places, never none of an image."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    return mask.index_fill(-1, torch.tensor([0]), True)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[object, ...]]] = {
    "KANLinear": (lambda: KANLinear(12, 7), (5, 9, 12), ()),
    "KANLinear of degree 1": (lambda: KANLinear(12, 7, spline_order=1, grid_size=9), (5, 9, 12), ()),
    "KANLinear outside its grid": (
        lambda: KANLinear(12, 7, extrapolation="linear", grid_range=(-0.3, 0.3)),
        (5, 9, 12),
        (),
    ),
    "KANConv2d": (lambda: KANConv2d(6, 8, 3, padding=1), (2, 6, 9, 7), ()),
    "KANBlock": (lambda: KANBlock(16), (2, 6 * 5, 16), (6, 5)),
    "SS2D": (lambda: SS2D(12), (2, 9, 7, 12), ()),
    "SS2D of a mask": (lambda: SS2D(12), (2, 9, 7, 12), (a_mask(2, 9, 7),)),
    "SS2D along Hilbert's curve": (lambda: SS2D(12, walks=walks.hilbert), (2, 9, 7, 12), ()),
    "SS3D": (lambda: SS3D(12), (2, 3, 5, 4, 12), ()),
    "SS3D of a mask": (lambda: SS3D(12), (2, 3, 5, 4, 12), (a_mask(2, 3, 5, 4),)),
    "VSSBlock": (lambda: VSSBlock(16), (2, 9, 7, 16), ()),
    "Mamba": (lambda: Mamba(16), (2, 37, 16), ()),
    "Mamba of a mask": (lambda: Mamba(16, bidirectional=True), (2, 37, 16), (a_mask(2, 37),)),
    "Mamba2": (lambda: mamba2.Mamba2(32, d_state=16, headdim=16), (2, 150, 32), ()),
    "EMA": (lambda: EMA(16), (2, 16, 9, 7), ()),
    "km_unet_tiny": (lambda: create_model("km_unet_tiny"), (2, 3, 67, 50), ()),
    "km_unet_pp_tiny": (lambda: create_model("km_unet_pp_tiny"), (2, 3, 67, 50), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_on_the_cpu(name: str) -> None:
    build, shape, others = CASES[name]
    on_cpu: nn.Module = build().eval()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(shape)
    outputs = []
    for module, image in ((on_cpu, x.clone()), (on_gpu, x.cuda())):
        image.requires_grad_()
        with torch.backends.cudnn.flags(allow_tf32=False):  # which rounds the inputs of convolutions to 10 bits
            y = module(image, *(o.to(image.device) if isinstance(o, torch.Tensor) else o for o in others))
            y.square().sum().backward()
        outputs.append({"output": y, "input": image.grad, **{k: p.grad for k, p in module.named_parameters()}})
    for part, expected in outputs[0].items():
        assert_close(part, outputs[1][part].cpu(), expected, 1e-4)


@pytest.mark.parametrize("name", ["KANLinear", "KANLinear of degree 1", "SS2D", "SS2D of a mask"])
def test_gradients_of_single_samples_as_on_the_cpu(name: str) -> None:
    build, shape, others = CASES[name]
    on_cpu = build().eval()
    x = torch.randn(shape)

    def sample_gradients(module: nn.Module) -> dict[str, torch.Tensor]:
        device = next(module.parameters()).device

        def loss(parameters: dict[str, torch.Tensor], *sample: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(module, parameters, tuple(s[None] for s in sample)).square().sum()

        given = dict(module.named_parameters()), *(t.to(device) for t in (x, *others))
        found = torch.func.vmap(torch.func.grad(loss), (None, *[0] * (len(given) - 1)))(*given)
        return {key: value.cpu() for key, value in found.items()}

    expected = sample_gradients(on_cpu)
    for key, found in sample_gradients(copy.deepcopy(on_cpu).cuda()).items():
        assert_close(key, found, expected[key], 1e-4)


# The scans. Shapes: below a chunk, ragged, one wide, one long enough to be cut into chunks.


SCANS: dict[str, tuple[Callable[[str], Call], Callable[[], Inputs]]] = {
    "pixel": (on_images, lambda: image_inputs(1, 1, 1, 3, 1, 1)),
    "image": (on_images, lambda: image_inputs(2, 9, 7, 12, 2, 16)),
    "row": (on_images, lambda: image_inputs(2, 1, 45, 33, 3, 5)),
    "column": (on_images, lambda: image_inputs(2, 45, 1, 33, 10, 17)),
    "map": (on_images, lambda: image_inputs(1, 40, 36, 96, 3, 16)),
    "line": (on_lines_with_state, lambda: full_line_inputs(2, 12, 37, 16)),
    "groups": (on_lines_with_state, lambda: full_line_inputs(3, 40, 70, 4, groups=2)),
    "long line": (on_lines_with_state, lambda: full_line_inputs(1, 8, 1500, 5)),
}
HALF = ("x", "u", "delta", "B", "C", "z")  # what a model under half precision hands over; parameters stay float32


@needs_triton
class TestTriton:
    @pytest.fixture(autouse=True)
    def whole_products(self) -> Iterator[None]:
        """No TF32 in the projections around the kernels."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", SCANS)
    def test_equals_the_recurrence(self, name: str, dtype: torch.dtype) -> None:
        """In float64 on the CPU, with the inputs already rounded; half precision rounds the outputs once more."""
        function, make = SCANS[name]
        inputs = {k: v.to(dtype) if k in HALF else v for k, v in make().items()}
        out, grads = gradients(function("triton"), {k: v.cuda() for k, v in inputs.items()})
        expected, expected_grads = gradients(function("reference"), {k: v.double() for k, v in inputs.items()})
        assert out.dtype == dtype
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        assert relative_l2(out, expected) <= 1e-5 + rounding
        for key, grad in grads.items():
            assert grad.dtype == inputs[key].dtype
            assert relative_l2(grad, expected_grads[key]) <= 5e-5 + 2 * rounding, key

    @pytest.mark.parametrize("name", ["image", "map", "groups", "long line"])
    def test_same_bits_again(self, name: str) -> None:
        function, make = SCANS[name]
        inputs = {k: v.cuda() for k, v in make().items()}
        first = function("triton")(**inputs)
        for _ in range(1000):
            assert torch.equal(function("triton")(**inputs), first)

    @pytest.mark.parametrize("name", ["image", "map", "groups", "long line"])
    def test_same_gradients_again(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under PyTorch's deterministic algorithms, which ask for a fixed workspace of the matrix library."""
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        function, make = SCANS[name]
        inputs = {k: v.cuda() for k, v in make().items()}
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            _, first = gradients(function("triton"), inputs)
            for _ in range(50):
                _, grads = gradients(function("triton"), inputs)
                assert all(torch.equal(grads[k], first[k]) for k in first)
        finally:
            torch.use_deterministic_algorithms(before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_auto_is_triton(self, dtype: torch.dtype) -> None:
        x = torch.randn(2, 9, 7, 12, device="cuda", dtype=dtype)
        for op in ("selective_scan", "cross_selective_scan"):
            assert resolve(op, "auto", x) == "triton"
        layer = SS2D(12).cuda().to(dtype)
        auto = layer(x)
        layer.backend = "triton"
        assert torch.equal(auto, layer(x))

    def test_auto_is_chunked_in_double_precision(self) -> None:
        x = torch.randn(1, 5, 4, 6, device="cuda", dtype=torch.float64)
        assert resolve("cross_selective_scan", "auto", x) == "chunked"
        with pytest.raises(ValueError, match="float64"):
            resolve("cross_selective_scan", "triton", x)
        with pytest.raises(ValueError, match="'cuda'"):
            resolve("cross_selective_scan", "cpu", x)

    def test_auto_is_chunked_beyond_the_limits(self) -> None:
        inputs = {k: v.cuda() for k, v in full_line_inputs(1, 2, 3, 1025).items()}
        assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="chunked"))
        with pytest.raises(ValueError, match="A has 1025 states"):
            selective_scan(**inputs, backend="triton")
        layer = KANLinear(3, 2, spline_order=6).cuda()
        x = torch.randn(4, 3, device="cuda")
        auto = layer(x)
        layer.backend = "chunked"
        assert torch.equal(auto, layer(x))

    def test_compiled(self) -> None:
        layer = SS2D(12).cuda()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for h, w in [(9, 7), (5, 20)]:
            x = torch.randn(2, h, w, 12, device="cuda", requires_grad=True)
            (grad,), (expected,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, layer))
            assert_close("dx", grad, expected, 1e-4)

    def test_autocast(self) -> None:
        layer = SS2D(12).cuda()
        x = torch.randn(2, 9, 7, 12, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
            out.float().square().sum().backward()
        assert_close("out", out.float(), layer(x), 0.03)
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_second_derivatives(self) -> None:
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            inputs = {k: v.to("cuda", dtype).requires_grad_() for k, v in SCANS["image"][1]().items()}
            out = cross_selective_scan(**inputs, backend=backend)
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["x"], create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), list(inputs.values())))
        for name, found, expected in zip(inputs, *results, strict=True):
            assert_close(name, found, expected, 1e-4)
