"""What neither the interpreter nor the compiler can show: races through memory, large offsets, streams, rounding.

Each check is an identity, so that no oracle has to be computed at the sizes where the faults would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import launchers
from benchmarks.gpu.calls import CALLS, kan_backward, kan_forward, kan_inputs, scan_backward, scan_forward, scan_inputs
from benchmarks.gpu.compare import Results, judge, moved, results, same_bits, same_numbers, tf32
from benchmarks.gpu.guards import between_nan, guarded
from benchmarks.gpu.kernels import compiled_kernels
from benchmarks.gpu.processes import only_one
from benchmarks.gpu.sweep import MODULES, OPS, Module, Op, as_op, image, line, splines
from benchmarks.gpu.tasks import Setting, Skip, Task, Wrong

REPEATS = 20
SIZES = (  # b h w d n r of the scans that are run under every plan
    (1, 9, 7, 33, 16, 2),
    (2, 5, 13, 65, 4, 1),
    (1, 37, 31, 129, 16, 10),
    (3, 1, 50, 31, 17, 3),
    (1, 8, 9, 1, 1, 1),
)
TF32_BANDS = 500.0  # 1e-3, of factors rounded to 10 bits, in bands of float32
CHOSEN_MODULES = ("SS2D wide", "KANBlock", "km_unet_tiny", "km_unet_pp_tiny")
CHOSEN = (
    "scan2d/9x7 d12 n16 r2",
    "scan2d/40x36 d96",
    "scan1d/groups",
    "scan1d/1500",
    "kan/33x17-35",
    "kan/knots linear",
)


def scan_results(x: dict[str, Tensor], grad_y: Tensor, height: int, width: int, plan: Any = None) -> Results:
    """Outputs and gradients of the scan's launcher, under one plan."""
    y, last, saved = scan_forward(x, height, width, plan)
    grads = scan_backward(x, grad_y, saved, height, width, plan and plan._replace(pair=False))
    return {"y": y, "last": last, **{f"grad {name}": grad for name, grad in grads.items()}}


def plans_agree(size: tuple[int, ...], setting: Setting) -> dict[str, Any]:
    """However the work is cut, by however many warps, the results are those of the chosen plan, which the sweep judges.

    More warps than one put the values that a program exchanges through memory into lanes of different warps.
    """
    _, height, width, _, n, _ = size
    x = {name: between_nan(value) for name, value in scan_inputs(*size, setting.device).items()}
    grad_y = torch.randn(x["u"].shape, generator=torch.Generator().manual_seed(1)).to(x["u"])
    expected, worst, tried = scan_results(x, grad_y, height, width), 0.0, 0
    tried_plans = product((32, 128), (16, 48, 1 << 20), (False, True), (1, 4))
    if setting.rehearsal:
        tried_plans = product((32,), (16,), (False, True), (1,))
    for block, chunk, pair, warps in tried_plans:
        if block * n > 2048:
            continue
        steps = min(chunk, -(-height * width // launchers.scan.TILE) * launchers.scan.TILE)
        plan = launchers.scan.Plan(block, steps, pair, warps)
        with guarded(launchers.scan):
            found = scan_results(x, grad_y, height, width, plan)
        with guarded(launchers.scan):
            again = scan_results(x, grad_y, height, width, plan)
        same_bits(again, found, f"the same call again under {plan}", x)
        worst, tried = max(worst, same_numbers(found, expected, f"{plan}", inputs=x)), tried + 1
    return {"worst": worst, "plans": tried}


def repeats(op: Op, setting: Setting) -> dict[str, Any]:
    """The same bits each time, and beside another stream that runs the same kernels."""
    inputs = moved(op.make(), setting.device)
    function = partial(op.function, backend=op.backend)
    first = results(function, inputs)
    for i in range(REPEATS if not setting.rehearsal else 2):
        same_bits(results(function, inputs), first, f"repetition {i + 1}", inputs)
    if setting.device != "cuda":
        raise Skip("equal bits; there are no streams on a CPU")
    others = {k: None if x is None else x.clone() for k, x in inputs.items()}
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for i in range(REPEATS):
        found = []
        for stream, x in zip(streams, (inputs, others), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(results(function, x))
        torch.cuda.synchronize()
        for one in found:
            same_bits(one, first, f"two streams, repetition {i + 1}", inputs)
    return {"repetitions": REPEATS}


def graph(op: Op, setting: Setting) -> dict[str, Any]:
    """A captured forward and backward pass, replayed on other inputs."""
    if setting.device != "cuda":
        raise Skip("there are no CUDA graphs on a CPU")
    function = partial(op.function, backend=op.backend)
    inputs = moved(op.make(), setting.device)
    fresh = {k: None if x is None else 0.5 * x for k, x in inputs.items()}
    expected = results(function, fresh)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    wanted = [x for x in leaves.values() if x is not None]
    weights = (torch.randint(-8, 9, expected["output"].shape, generator=torch.Generator().manual_seed(0)) / 8).cuda()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = function(**leaves)
        grads = torch.autograd.grad(out, wanted, weights.to(out.dtype))
    with torch.no_grad():
        for name, x in leaves.items():
            if x is not None:
                x.copy_(fresh[name])  # type: ignore[arg-type]
    captured.replay()
    torch.cuda.synchronize()
    named = zip([k for k, x in leaves.items() if x is not None], grads, strict=True)
    found = {"output": out, **{f"grad {k}": g for k, g in named}}
    return {"worst": same_numbers(found, expected, "a replayed graph", inputs=fresh)}


def compiled(op: Op, setting: Setting, dynamic: bool | None = True) -> dict[str, Any]:
    """`torch.compile` of the op as a whole, forward and backward."""
    function = partial(op.function, backend=op.backend)
    inputs = moved(op.make(), setting.device)
    expected = results(function, inputs)
    found = results(torch.compile(function, fullgraph=True, dynamic=dynamic), inputs)
    return {"worst": same_numbers(found, expected, "under torch.compile", inputs=inputs)}


def rounds_to_nearest(dtype: torch.dtype, setting: Setting) -> dict[str, Any]:
    """y in half precision is y of float32, computed from the same values and rounded to nearest."""
    size = (1, 13, 11, 40, 16, 2) if not setting.rehearsal else (1, 2, 2, 5, 2, 1)
    half = scan_inputs(*size, setting.device, dtype)
    whole = {**half, "u": half["u"].float()}
    y, *_ = scan_forward(half, *size[1:3])
    expected = scan_forward(whole, *size[1:3])[0].to(dtype)
    different = int((y != expected).sum())
    if different and setting.rehearsal:
        raise Skip(f"the interpreter cuts off: {different} of {y.numel()} values differ")
    if different:
        raise Wrong(f"{different} of {y.numel()} values are not rounded to nearest", half)
    return {"values": y.numel()}


def kan_large_offsets(setting: Setting) -> dict[str, Any]:
    """More than 2^31 values of x and y: the last rows give what they give alone, bit for bit."""
    rows = (1 << 25) + 4096 if not setting.rehearsal else 32
    tail = 1024 if not setting.rehearsal else 16
    x = kan_inputs(tail, 64, 64, 5, 3, setting.device, torch.bfloat16)
    long = torch.zeros(rows, 64, dtype=torch.bfloat16, device=setting.device)
    grad = torch.zeros_like(long)
    long[-tail:], grad[-tail:] = x["x"], x["grad_y"]
    tiles = launchers.kan.Tiles(16 if setting.rehearsal else 128, 16, 64, 4, 2)

    def run(rows: Tensor, grad_y: Tensor) -> Results:
        inputs = {**x, "x": rows, "grad_y": grad_y}
        y, grads = kan_forward(inputs, tiles=tiles), kan_backward(inputs, (True, True), tiles=(tiles, None))
        return {"y": y[-tail:], "grad x": grads[0][-tail:], "grad base": grads[2], "grad spline": grads[3]}

    found, alone = run(long, grad), run(x["x"], x["grad_y"])
    same_bits({k: found[k] for k in ("y", "grad x")}, alone, f"the last {tail} of {rows} rows", x)
    sums = {name: found[name] for name in ("grad base", "grad spline")}  # bfloat16, from parts that are cut elsewhere
    same_numbers(sums, alone, f"{rows} rows", 2.0**-8, x)
    return {"values": rows * 64}


def scan_batch_offsets(back: bool, setting: Setting) -> dict[str, Any]:
    """A batch whose offsets pass 2^31, in u forward and in the steps backward: its last image, and that image alone."""
    b, side, d = (20, 512, 512) if not back else (9, 512, 256)  # 2.7e9 values of u; 2.4e9 of the steps
    if setting.rehearsal:
        b, side, d = 2, 1, 5
    one = scan_inputs(1, side, side, d, 1, 1, setting.device, torch.bfloat16)
    shape = (b, side * side, d)
    many = {**one, "u": torch.zeros(shape, dtype=torch.bfloat16, device=setting.device)}
    many["coeffs"] = torch.zeros(b, *one["coeffs"].shape[1:], device=setting.device)
    many["u"][-1], many["coeffs"][-1] = one["u"][0], one["coeffs"][0]
    plan = launchers.scan.Plan(32, 4096 if not setting.rehearsal else 16, not back)
    if not back:
        found = {"y": scan_forward(many, side, side, plan, save=False)[0][-1:]}
        same_bits(found, {"y": scan_forward(one, side, side, plan, save=False)[0]}, f"image {b} of {b}", one)
        return {"values": b * side * side * d}
    grad_y = torch.zeros_like(many["u"])
    grad_y[-1] = torch.randn(side * side, d, generator=torch.Generator().manual_seed(1)).to(grad_y)
    runs: list[Results] = []
    for x, grad in ((many, grad_y), (one, grad_y[-1:])):
        saved = scan_forward(x, side, side, plan)[2]
        grads = scan_backward(x, grad, saved, side, side, plan)
        runs.append({"grad u": grads["u"][-1:], "grad coeffs": grads["coeffs"][-1:], "grad A": grads["A"]})
        del saved, grads
    same_bits({"grad u": runs[0]["grad u"]}, runs[1], f"image {b} of {b}", one)
    same_numbers(runs[0], runs[1], f"a batch of {b}", inputs=one)
    return {"values": b * side * side * 4 * d}


def scan_image_offsets(setting: Setting) -> dict[str, Any]:
    """One image just below 2^31 addresses: its last channels give what they give alone, forward and backward."""
    height, width, d = (1024, 1023, 512) if not setting.rehearsal else (1, 2, 64)
    plan = launchers.scan.Plan(32, 4096 if not setting.rehearsal else 16)
    whole = scan_inputs(1, height, width, d, 1, 1, setting.device, torch.bfloat16)
    part = {name: x if name == "coeffs" else x[..., -32:].contiguous() for name, x in whole.items()}
    part |= {name: whole[name][:, -32:].contiguous() for name in ("dt_proj_weight", "A")}
    grad_y = torch.randn(whole["u"].shape, generator=torch.Generator().manual_seed(1)).to(whole["u"])
    runs: list[Results] = []
    for x, grad in ((whole, grad_y), (part, grad_y[..., -32:].contiguous())):
        y, _, saved = scan_forward(x, height, width, plan)
        grads = scan_backward(x, grad, saved, height, width, plan)
        runs.append({"y": y[..., -32:], "grad u": grads["u"][..., -32:], "grad A": grads["A"][:, -32:]})
        del y, saved, grads
    same_bits({k: runs[0][k] for k in ("y", "grad u")}, runs[1], f"the last 32 of {d} channels", {})
    same_numbers(runs[0], runs[1], f"the last 32 of {d} channels")
    return {"addresses": height * width * 4 * d}


def rounded_products(setting: Setting) -> dict[str, Any]:
    """With TF32 switched on the factors of products are rounded to 10 bits, and no more is lost."""
    if setting.device != "cuda":
        raise Skip("there is no TF32 on a CPU")
    op = OPS["kan/1024x160"]
    inputs = op.make()
    with tf32(True):
        found = results(partial(op.function, backend=op.backend), moved(inputs, setting.device))
    exact = results(partial(op.function, backend="reference"), moved(inputs, torch.float64))
    return judge(found, exact, exact, inputs, bands=TF32_BANDS)


# What the kernels refuse: float64, many states, a high degree.
REFUSED = {
    "float64": (OPS["scan2d/9x7 d12 n16 r2"], torch.float64),
    "1025 states": (image(1, 3, 2, 2, 1, 1025), torch.float32),
    "1025 states of a sequence": (line(1, 3, 4, 1025, whole=False), torch.float32),
    "order 6": (splines(9, 5, 4, s=6), torch.float32),
}


def refused(name: str, setting: Setting) -> dict[str, Any]:
    """Under `auto` it runs all the same, and the answer is right."""
    if setting.device != "cuda":
        raise Skip("on a CPU auto never takes triton")
    op, dtype = REFUSED[name]
    inputs = moved(op.make(), dtype)
    with tf32(False):
        found = results(partial(op.function, backend="auto"), moved(inputs, setting.device))
    exact = results(partial(op.function, backend="reference"), moved(inputs, torch.float64))
    plain = results(partial(op.function, backend="reference"), inputs)
    return judge(found, exact, plain, inputs, bands=2.0)


def resources(setting: Setting) -> dict[str, Any]:
    """Registers and spills of every kernel of a call of each, as this version of Triton compiles them."""
    if setting.device != "cuda":
        raise Skip("the interpreter compiles nothing")
    for call in CALLS.values():
        for heavy in (False, True):
            call(setting.device, heavy)
    found = compiled_kernels()
    if spilling := sorted({row["kernel"] for row in found if row["spills"]}):
        raise Wrong(f"registers spill in {', '.join(spilling)}; ahead of time none did for sm_90", kernels=found)
    return {"kernels": found}


def alone_in_memory(check: Callable[[Setting], dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """A check that needs tens of gigabytes, one of them at a time."""
    with only_one(setting.out):
        try:
            return check(setting)
        finally:
            torch.cuda.empty_cache()  # or this worker would keep it from the next one


def on_module(check: Callable[[Op, Setting], dict[str, Any]], module: Module, setting: Setting) -> dict[str, Any]:
    """A check of an op, of a module as a function of its input."""
    return check(as_op(module, setting.device), setting)


def _behaviours() -> Iterator[Task]:
    static = partial(compiled, dynamic=None)  # Inductor cannot decide some sizes of a whole model
    for kind, of_op, of_module in (
        ("again", repeats, repeats),
        ("graph", graph, graph),
        ("compiled", compiled, static),
    ):
        for name in CHOSEN:
            yield Task(f"{kind}/{name}", partial(of_op, OPS[name]))
        for name in CHOSEN_MODULES:
            yield Task(f"{kind}/{name}", partial(on_module, of_module, MODULES[name]), limit=400)


def tasks(setting: Setting) -> Iterator[Task]:
    """Those that need most of the memory lie apart, so that they seldom wait for each other."""
    large = iter(
        Task(f"offsets/{name}", partial(alone_in_memory, check), limit=500)
        for name, check in (
            ("image", scan_image_offsets),
            ("batch", partial(scan_batch_offsets, False)),
            ("batch back", partial(scan_batch_offsets, True)),
            ("kan rows", kan_large_offsets),
        )
    )
    yield next(large)
    for size in SIZES if not setting.rehearsal else [(1, 1, 2, 2, 1, 1)]:
        yield Task("plans/b{} {}x{} d{} n{} r{}".format(*size), partial(plans_agree, size), limit=240)
    yield next(large)
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        yield Task(f"rounding/{name}", partial(rounds_to_nearest, dtype))
    if setting.rehearsal:  # a compiler would take the interpreter to pieces
        yield Task("again/scan2d/pixel", partial(repeats, OPS["scan2d/pixel"]))
        yield Task("graph/scan2d/pixel", partial(graph, OPS["scan2d/pixel"]))
    else:
        yield from _behaviours()
    yield next(large)
    yield Task("tf32", rounded_products)
    for name in REFUSED:
        yield Task(f"refused/{name}", partial(refused, name))
    yield Task("resources", resources, limit=240)
    yield from large
