"""Exports to ONNX, to AOTInductor and of plain scans: one graph, right at every size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close
from kan_mamba_layers import (
    EMA,
    SS2D,
    KANConv2d,
    KANLinear,
    Mamba,
    VSSBlock,
    create_model,
    export_onnx,
    selective_scan,
)

DYNAMIC = torch.export.Dim.DYNAMIC


# Nodes of the ONNX graph with PyTorch 2.13.
WHOLE = {"u_kan_tiny": 762, "km_unet_tiny": 1791, "km_unet_pp_tiny": 2152}


class Line(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend: Any = backend

    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor) -> Any:
        options: Any = {"return_last_state": True, "initial_state": start, "backend": self.backend}
        return selective_scan(u, delta, A, B, C, **options)


def line(batch: int, length: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(length)
    u, delta, B, C = (torch.randn(batch, n, length, generator=draw) for n in (6, 6, 3, 3))
    A, start = torch.randn(6, 3, generator=draw), torch.randn(batch, 6, 3, generator=draw)
    return u, delta.exp(), -A.exp(), B, C, start


def test_chunked_exports_with_any_length() -> None:
    along: Any = {0: DYNAMIC, 2: DYNAMIC}
    shapes = (along, along, None, along, along, {0: DYNAMIC})
    module = torch.export.export(Line("chunked"), line(2, 20), dynamic_shapes=shapes).module()
    for batch, length in [(3, 2), (2, 63), (4, 64), (2, 65), (2, 130)]:
        inputs = line(batch, length)
        for name, got, want in zip(("y", "state"), module(*inputs), Line("reference")(*inputs), strict=True):
            assert_close(f"{name} of {batch}, {length}", got, want, 1e-5)


class Frozen(nn.Module):
    """A module whose code turns the number of pixels into a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x / len(range(x.shape[2] * x.shape[3]))


class TestOnnx:
    @pytest.fixture(autouse=True)
    def packages(self) -> None:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)

    def test_one_file_serves_every_size(self, tmp_path: Path) -> None:
        import onnx
        import onnxruntime

        layer, path = SS2D(4, d_state=2, backend="cpu").eval(), tmp_path / "layer.onnx"
        report = export_onnx(layer, path, opset=19)
        model = onnx.load(path)
        assert report.opset == model.opset_import[0].version == 19
        assert report.nodes == len(model.graph.node) < 200
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}, "operators that every runtime has"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for shape in [(2, 10, 12, 4), (1, 1, 1, 4), (1, 9, 7, 4), (3, 17, 9, 4), (1, 8, 8, 4), (1, 1, 65, 4)]:
            x = torch.randn(shape)
            (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert_close(f"out at {shape}", torch.from_numpy(out), layer(x), 1e-5)

    @pytest.mark.nightly
    @pytest.mark.parametrize(("name", "nodes"), WHOLE.items())
    def test_a_whole_model(self, name: str, nodes: int, tmp_path: Path) -> None:
        report = export_onnx(create_model(name).eval(), tmp_path / "model.onnx")
        assert report.error <= 1e-5 and report.nodes <= 1.02 * nodes
        assert {shape[2:] for shape in report.shapes} == {(64, 96), (97, 145), (47, 71)}
        assert {shape[0] for shape in report.shapes} >= {1, 2, 4}

    def test_a_graph_of_one_size_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="differs from PyTorch"):
            export_onnx(Frozen().eval(), tmp_path / "m.onnx", torch.randn(2, 3, 4, 5))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("other", [float("nan"), float("inf"), 2.0])
    def test_a_graph_of_other_values_is_refused(self, other: float, tmp_path: Path) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * (other if torch.compiler.is_exporting() else 1.0)

        with pytest.raises(ValueError, match="differs from PyTorch"):
            export_onnx(Two().eval(), tmp_path / "m.onnx", torch.randn(2, 3), sizes={0: "batch"})
        assert not list(tmp_path.iterdir())

    def test_results_that_are_not_finite_or_whole_numbers(self, tmp_path: Path) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return x.sqrt(), 1 / x.relu(), x.argmax(1)

        report = export_onnx(Odd().eval(), tmp_path / "m.onnx", torch.randn(2, 3), sizes={0: "batch"})
        assert report.error <= 1e-6

    def test_sizes_that_the_model_fixes_are_named(self, tmp_path: Path) -> None:
        class Fixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if x.shape[2] % 32:
                    raise RuntimeError("height must be a multiple of 32")
                return 2 * x

        path, x = tmp_path / "m.onnx", torch.randn(2, 1, 32, 8)
        with pytest.raises(ValueError, match=r"model refuses an input of .*multiple of 32.*leave .* out of sizes"):
            export_onnx(Fixed().eval(), path, x, sizes={0: "batch", 2: "height"})
        assert {shape[2] for shape in export_onnx(Fixed().eval(), path, x, sizes={0: "batch", 3: "w"}).shapes} == {32}

    def test_masks_and_whole_numbers(self, tmp_path: Path) -> None:
        path, sizes = tmp_path / "m.onnx", {0: "batch", 1: "length"}
        inputs = (torch.randn(2, 12, 8), torch.rand(2, 12) > 0.3)
        report = export_onnx(Mamba(8, 4).eval(), path, inputs, sizes=(sizes, sizes))
        assert report.error < 1e-5 and len(set(report.shapes)) > 2
        words = nn.Sequential(nn.Embedding(9, 8), Mamba(8, 4)).eval()
        assert export_onnx(words, path, torch.randint(9, (2, 12)), sizes=sizes).error < 1e-5
        with pytest.raises(TypeError, match=r"example\[0\] must be a dense tensor of real numbers, got"):
            export_onnx(words, path, torch.zeros(2, 3, dtype=torch.complex64))

    def test_a_model_that_writes_into_its_input(self, tmp_path: Path) -> None:
        model, x = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(3, 3, 3)).eval(), torch.randn(2, 3, 8, 9)
        before = x.clone()
        assert export_onnx(model, tmp_path / "m.onnx", x).error < 1e-5
        assert torch.equal(x, before)

    def test_a_transformer_with_splines(self, tmp_path: Path) -> None:
        """It reads the dtype of its linear layers' weights."""
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model.linear1, model.linear2 = KANLinear(8, 16), KANLinear(16, 8)
        sizes = {0: "batch", 1: "length"}
        assert export_onnx(model.eval(), tmp_path / "m.onnx", torch.randn(2, 5, 8), sizes=sizes).error < 1e-5

    @pytest.mark.parametrize(
        ("layer", "inputs", "larger"),
        [
            (VSSBlock(8, channels_first=True), (torch.randn(2, 8, 6, 4), torch.ones(2, 6, 4).bool()), (4, 8, 10, 7)),
            (KANConv2d(4, 3, 3), torch.randn(4, 6, 5), (4, 10, 8)),
        ],
        ids=["mask", "image without batch"],
    )
    def test_sizes_that_vary_by_default(self, layer: nn.Module, inputs: Any, larger: tuple, tmp_path: Path) -> None:
        report = export_onnx(layer.eval(), tmp_path / "m.onnx", inputs)
        assert report.error < 1e-5 and larger in report.shapes

    def test_an_opset_that_is_not_written_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"torch\.onnx cannot write model with opset=99 and took (\d+); .*=\1$"):
            export_onnx(KANLinear(3, 2).eval(), tmp_path / "m.onnx", opset=99)
        assert not list(tmp_path.iterdir())

    def test_a_missing_folder_is_named_first(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere.* is in a folder that does not exist"):
            export_onnx(KANLinear(3, 2).eval(), tmp_path / "nowhere" / "m.onnx")
        with pytest.raises(ValueError, match="is a folder; name a file in it"):
            export_onnx(KANLinear(3, 2).eval(), tmp_path)

    def test_an_operator_that_onnxruntime_lacks_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"float64.*model\.float\(\)"):
            export_onnx(SS2D(4, d_state=2).double().eval(), tmp_path / "m.onnx")

    def test_a_trace_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="export_onnx"):
            torch.onnx.export(SS2D(4, d_state=2).eval(), (torch.randn(1, 3, 4, 4),), tmp_path / "m.onnx", dynamo=False)

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (KANLinear(3, 2), {}, r"model\.eval"),
            (nn.Sequential(nn.BatchNorm1d(3).train()).eval().append(nn.BatchNorm1d(3)), {}, "or a part of it"),
            (KANLinear(3, 2).eval().half(), {}, "float16"),
            (nn.Sequential(KANLinear(3, 2)).eval(), {}, "example is None"),
            (KANLinear(3, 2).eval(), {"example": []}, r"example must have at least one tensor, got \[\]"),
            (KANLinear(3, 2).eval(), {"opset": 9}, "opset must be at least 18"),
            (KANLinear(3, 2).eval(), {"example": torch.randn(4, 5)}, "3 features"),
            (KANLinear(3, 2).eval(), {"example": torch.randn(1, 3)}, r"example\[0\] has size 1 in dimension 0"),
            (KANLinear(3, 2).eval(), {"sizes": {2: "rows"}}, "dimension 2"),
            (KANLinear(3, 2).eval(), {"sizes": [{0: "a"}, {0: "a"}]}, "2 entries for 1 inputs"),
            (EMA(8).eval(), {"sizes": {2: "side", 3: "side"}}, "'side'"),
        ],
    )
    def test_bad_arguments(self, model: nn.Module, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            export_onnx(model, tmp_path / "m.onnx", **options)


# A module, the dimensions whose size may vary, an example, and an input of another size.
PACKAGED = {
    "KANLinear": (lambda: KANLinear(8, 6), (0, 1), (2, 9, 8), (3, 17, 8)),
    "SS2D": (lambda: SS2D(8, d_state=4), (0, 1, 2), (2, 9, 11, 8), (3, 17, 5, 8)),
    "EMA": (lambda: EMA(16, factor=4), (0, 2, 3), (2, 16, 9, 11), (3, 16, 17, 5)),
    "km_unet_tiny": (lambda: create_model("km_unet_tiny"), (0, 2, 3), (2, 3, 64, 96), (3, 3, 96, 64)),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", PACKAGED)
def test_a_package_of_aot_inductor(name: str, tmp_path: Path) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    if shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    make, free, *sizes = PACKAGED[name]
    model, (x, other) = make().eval(), (torch.randn(size) for size in sizes)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(dict.fromkeys(free, DYNAMIC),))
        package = aoti_load_package(aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2")))
        for image in (x, other):
            assert_close(f"out at {tuple(image.shape)}", package(image), model(image), 1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["km_unet_tiny", "km_unet_pp_tiny"])
def test_a_program_is_right_at_every_size(name: str, strict: bool) -> None:
    model = create_model(name).eval()
    shapes = (dict.fromkeys((0, 2, 3), DYNAMIC),)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes, strict=strict)
    for size in [(3, 3, 97, 45), (2, 3, 41, 64)]:
        x = torch.randn(size)
        with torch.no_grad():
            assert_close(f"out at {size}", program.module()(x), model(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WHOLE)
def test_a_model_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """As `model.half()` on the CPU."""
    torch.manual_seed(0)
    model, x = create_model(name).eval(), torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        expected = model(x)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert_close("logits", found.float(), expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_autocast_trains_without_nan(scale: float, dtype: torch.dtype) -> None:
    """One image to a model, on a scale that its BatchNorm must take out, with the scaled loss of mixed precision."""
    torch.manual_seed(0)
    model = create_model("km_unet_tiny")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", dtype):
        loss = model(scale * torch.randn(2, 3, 32, 32)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
