"""The models under the tools of PyTorch: processes, averages, functional calls, deterministic algorithms, threads."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import TINY, build, image, total
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from kan_mamba_layers import EMA, SS2D, KANLayer, KANLinear, Mamba, VMamba
from kan_mamba_layers.models.blocks import ContextBlock


class Block(nn.Module):
    """Every layer once."""

    def __init__(self) -> None:
        super().__init__()
        self.scan, self.attention = SS2D(8, d_state=4), EMA(8, factor=2)
        self.splines, self.head = KANLayer(8).eval(), KANLinear(8, 3)  # BatchNorm would mix the images of a batch

    def forward(self, x: Tensor) -> Tensor:  # b h w c -> b o
        _, h, w, _ = x.shape
        x = self.attention(self.scan(x).movedim(-1, 1)).movedim(1, -1)
        return self.head(self.splines(x.flatten(1, 2), h, w).mean(1))


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, 5, 8, generator=draw), torch.randn(4, 3, generator=draw)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


def whole(state: dict) -> dict[str, Tensor]:
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}


def train_a_share(rank: int, port: int, folder: str) -> None:
    """One of two processes: half of the batch, replicated and then sharded."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, y = (half[2 * rank : 2 * rank + 2] for half in batch())
    torch.manual_seed(0)
    replicated = trained(DistributedDataParallel(Block()), x, y).module.state_dict()
    torch.manual_seed(0)
    sharded = Block()
    for part in (sharded.scan, sharded.splines, sharded):
        fully_shard(part)
    states = {"ddp": replicated, "fsdp": whole(trained(sharded, x, y).state_dict())}
    torch.save(states, Path(folder) / f"{rank}.pt")
    destroy_process_group()


@pytest.mark.nightly
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train_a_share, (port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    expected = trained(Block(), *batch()).state_dict()
    for rank in range(2):
        for way, state in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert list(state) == list(expected), way
            for name, value in expected.items():
                error = (state[name] - value).float().norm() / value.float().norm().clamp_min(1e-3)
                assert error <= 1e-5, f"{way} {name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", TINY)
class TestOneProcess:
    def test_deterministic_algorithms(self, name: str) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            total(build(name)(image(1, 32, 32).expand(2, -1, -1, -1))).backward()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_functional_call_equals_the_model(self, name: str) -> None:
        model, other, x = build(name).eval(), build(name).eval(), image(1, 32, 40)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert torch.equal(torch.func.functional_call(other, state, (x,)), model(x))

    def test_averaged_weights(self, name: str) -> None:
        model, x = build(name), image(2, 32, 32)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        average.update_parameters(model)
        first = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        total(model(x)).backward()
        optimizer.step()
        average.update_parameters(model)
        for key, p in average.module.named_parameters():
            torch.testing.assert_close(p, (first[key] + model.state_dict()[key]) / 2)
        average.eval()
        assert average(x).isfinite().all()


SIZES = ((2, 64, 64), (1, 64, 64), (2, 80, 48), (3, 65, 97), (2, 96, 96))
# What is compiled, its input, whether it trains, and the graphs that PyTorch 2.13 makes of it.
COMPILED = {
    "EMA": (lambda: EMA(16), lambda b, h, w: (torch.randn(b, 16, h, w),), False, 4),
    "SS2D": (lambda: SS2D(16), lambda b, h, w: (torch.randn(b, h, w, 16),), True, 5),
    "KANLayer": (lambda: KANLayer(16), lambda b, h, w: (torch.randn(b, h * w, 16), h, w), False, 3),
    "Mamba": (lambda: Mamba(16), lambda b, h, w: (torch.randn(b, h, 16),), False, 3),
    "ContextBlock": (lambda: ContextBlock(16), lambda b, h, w: (torch.randn(b, 16, h, w),), True, 3),
    "km_unet_tiny": (lambda: build("km_unet_tiny"), lambda *size: (image(*size),), False, 3),
    "km_unet_pp_tiny": (lambda: build("km_unet_pp_tiny"), lambda *size: (image(*size),), True, 3),
    "VMamba": (lambda: VMamba(depths=(1, 1, 1, 1), dims=8), lambda *size: (image(*size),), False, 3),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMPILED)
def test_five_sizes_make_few_graphs(name: str) -> None:
    make, inputs, training, graphs = COMPILED[name]
    module, counter = make().train(training), CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in SIZES:
        x = inputs(*size)
        if training:
            total(compiled(*x)).backward()
            continue
        with torch.no_grad():
            expected = module(*x)
            assert (compiled(*x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert counter.frame_count <= graphs


@pytest.mark.nightly
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_twenty_trainings_give_the_same_bits(name: str, threads: int, set_threads) -> None:
    if threads > (os.cpu_count() or 1):
        pytest.skip("needs two cores")
    set_threads(threads)

    def train() -> list[Tensor]:
        model = build(name)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            total(model(image(2, 64, 48))).backward()
            optimizer.step()
        return list(model.state_dict().values())

    expected = train()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(train(), expected, strict=True))
