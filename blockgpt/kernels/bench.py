"""Times of the kernels and of their rivals, for `tools/bench_kernels.py`.

A row is one operation at one shape and dtype, forward or forward and backward; a column one candidate. All candidates
of a row run in turn, in rotating order, each time on another of several sets of inputs, so that none finds its inputs
in the cache of the one before. On CUDA, work is queued before the first event: the time of a short kernel is then not
that of its launch. Bandwidth and matrix products of the same device are measured beside them.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from blockgpt.kernels.linear_cross_entropy import linear_cross_entropy

Function = Callable[..., torch.Tensor]
INPUT_SETS = 3
BACKLOG = 1 << 22  # cycles that the GPU waits while the launches of a measurement are queued


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        operation, dtype, size: as printed.
        inputs: a set of inputs; those that require gradients get them.
        functions: {candidate: function of the inputs}; the first is plain PyTorch in eager mode.
        bytes: that must be read and written, (forward, forward and backward).
        flops: of matrix products, the same; 0 where bandwidth is the limit.
    """

    operation: str
    dtype: torch.dtype
    size: str
    inputs: Callable[[], list[torch.Tensor]]
    functions: dict[str, Function]
    bytes: tuple[int, int]
    flops: tuple[int, int]


@dataclass(frozen=True)
class KernelTimes:
    """A candidate's median seconds in one row."""

    case: Case
    backward: bool
    seconds: dict[str, float]


def missing(device: torch.device) -> str | None:
    """What this computer lacks for the Triton kernels; None if nothing."""
    lacks = [] if device.type == "cuda" else ["a CUDA device"]
    lacks += [] if importlib.util.find_spec("triton") else ["Triton (Linux; pip install -r requirements.txt)"]
    return " and ".join(lacks) or None


def with_compiled(functions: dict[str, Function], compiled: bool) -> dict[str, Function]:
    """The candidates, and eager's compiled by torch."""
    return {**functions, **({"compiled": torch.compile(functions["eager"])} if compiled else {})}


def random_inputs(device: torch.device, dtype: torch.dtype,
                  *shapes: tuple[int, ...]) -> Callable[[], list[torch.Tensor]]:
    return lambda: [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def rms_norm_case(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Case:
    own: Any = importlib.import_module("blockgpt.kernels.rms_norm")
    functions: dict[str, Function] = {"eager": lambda x, w: own.rms_norm_torch(x, w, 1e-5),
                                      "triton": lambda x, w: own.rms_norm(x, w, 1e-5)}
    if importlib.util.find_spec("liger_kernel"):
        liger: Any = importlib.import_module("liger_kernel.ops.rms_norm")
        functions["liger"] = lambda x, w: liger.LigerRMSNormFunction.apply(x, w, 1e-5)
    if importlib.util.find_spec("quack"):
        quack: Any = importlib.import_module("quack")
        functions["quack"] = lambda x, w: quack.rmsnorm(x, w, eps=1e-5)
    size = tokens * width * dtype.itemsize
    return Case("rms_norm", dtype, f"{width}", random_inputs(device, dtype, (tokens, width), (width,)),
                with_compiled(functions, True), (2 * size, 5 * size), (0, 0))


def swiglu_case(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Case:
    own: Any = importlib.import_module("blockgpt.kernels.swiglu")
    functions: dict[str, Function] = {"eager": lambda gate, up: own.gated_torch(gate, up, "silu"),
                                      "triton": lambda gate, up: own.gated(gate, up, "silu")}
    if importlib.util.find_spec("liger_kernel"):
        liger: Any = importlib.import_module("liger_kernel.ops.swiglu")
        functions["liger"] = liger.LigerSiLUMulFunction.apply
    size = tokens * width * dtype.itemsize
    return Case("swiglu", dtype, f"{width}", random_inputs(device, dtype, (tokens, width), (tokens, width)),
                with_compiled(functions, True), (3 * size, 8 * size), (0, 0))


def loss_case(device: torch.device, dtype: torch.dtype, tokens: int, width: int, vocabulary: int, chunk: int) -> Case:
    targets = torch.randint(0, vocabulary, (tokens,), device=device)

    def eager(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ weight.T).float(), targets)

    functions: dict[str, Function] = {"eager": eager,
                                      f"chunks of {chunk}": lambda h, w: linear_cross_entropy(h, w, targets, chunk)}
    if device.type == "cuda" and hasattr(F, "linear_cross_entropy"):
        torchs: Any = F.linear_cross_entropy
        functions["torch"] = lambda h, w: torchs(h, w, targets)
    if importlib.util.find_spec("liger_kernel"):
        liger: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        functions["liger"] = lambda h, w: liger.LigerFusedLinearCrossEntropyFunction.apply(h, w, targets)[0]
    product = 2 * tokens * width * vocabulary
    return Case("linear_cross_entropy", dtype, f"{width} × {vocabulary:,}",
                random_inputs(device, dtype, (tokens, width), (vocabulary, width)),
                with_compiled(functions, device.type == "cuda"), (0, 0), (product, 3 * product))


def time_case(case: Case, device: torch.device, rounds: int) -> Iterator[KernelTimes]:
    """Forward, then forward and backward."""
    sets = [case.inputs() for _ in range(INPUT_SETS)]
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in case.functions}
        names, warm_up = list(times), 2
        for i in range(rounds + warm_up):
            for j, name in enumerate(names[i % len(names):] + names[:i % len(names)]):
                seconds = time_pass(case.functions[name], sets[(i + j) % len(sets)], backward, device)
                if i >= warm_up:
                    times[name].append(seconds)
        yield KernelTimes(case, backward, {name: statistics.median(values) for name, values in times.items()})


def time_pass(function: Function, inputs: list[torch.Tensor], backward: bool, device: torch.device) -> float:
    """Seconds of a forward pass, with or without the backward pass."""
    def run() -> None:
        out = function(*inputs)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BACKLOG)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def copy_bandwidth(device: torch.device, rounds: int = 10) -> float:
    """Bytes per second, read and written, of a copy of 256 MiB."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(time_pass(lambda a: target.copy_(a), [source], False, device) for _ in range(rounds))
    return 2 * source.numel() / seconds


def product_speed(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """FLOP/s of a product of two square matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / statistics.median(time_pass(torch.mm, [a, a], False, device) for _ in range(rounds))


def timing_table(measurements: list[KernelTimes], bandwidth: float, speed: dict[torch.dtype, float]) -> list[list[str]]:
    """Rows of text: one a candidate."""
    rows = [["operation", "dtype", "size", "pass", "candidate", "ms", "GB/s or TFLOP/s", "share", "of eager"]]
    for m in measurements:
        for name, seconds in m.seconds.items():
            flops, bytes_ = m.case.flops[m.backward], m.case.bytes[m.backward]
            rate, limit, unit = ((flops / seconds, speed[m.case.dtype], 1e12) if flops
                                 else (bytes_ / seconds, bandwidth, 1e9))
            rows.append([m.case.operation, str(m.case.dtype).removeprefix("torch."), m.case.size,
                         "both" if m.backward else "forward", name, f"{1000 * seconds:,.3f}", f"{rate / unit:,.1f}",
                         f"{rate / limit:.0%}", f"{seconds / m.seconds['eager']:.2f}"])
    return rows
