"""The kernels against plain PyTorch, the compiler, and other libraries where they are installed.

    python -m tools.bench_kernels                          # on a CUDA device
    python -m tools.bench_kernels --tokens=2048 --vocabularies=50304 --rounds=5      # on a CPU: the head's loss alone

For each operation, dtype, width and vocabulary: the median time forward, and forward and backward; bytes or FLOPs per
second, and their share of what this machine's own copy or matrix product reaches; the time relative to eager PyTorch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import torch

from blockgpt.console import ArgumentParser, align_columns, echo
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.kernels import bench
from blockgpt.training.device import choose_device

OPERATIONS = ("rms_norm", "swiglu", "linear_cross_entropy")
NEED_TRITON = ("rms_norm", "swiglu")


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, cpu, …")
    parser.add_argument("--operations", help=f"of {', '.join(OPERATIONS)}; default: all that this machine can run")
    parser.add_argument("--dtypes", help="default: float32,bfloat16,float16; on a CPU float32")
    parser.add_argument("--widths", type=integers, default=[768, 1024, 2048, 4096, 8192], help="768,1024,…")
    parser.add_argument("--vocabularies", type=integers, default=[32_000, 50_304, 128_256, 256_000], help="32000,…")
    parser.add_argument("--head_width", type=int, default=768, help="n_embd of the head")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a micro-batch")
    parser.add_argument("--chunk", type=int, default=4096, help="loss_chunk of the head")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each candidate")
    args = parser.parse_args(argv)
    device = choose_device(args.device, local_rank=0)
    lacks = bench.missing(device)
    operations = args.operations.split(",") if args.operations else OPERATIONS
    for name in operations:
        if name not in OPERATIONS:
            raise UserError(f"--operations: {name!r} is unknown (of {', '.join(OPERATIONS)})")
        if args.operations and lacks and name in NEED_TRITON:
            raise UserError(f"--operations: {name} needs {lacks}")
    dtypes: list[Any] = [getattr(torch, name, None) for name in (args.dtypes or (
        "float32" if device.type == "cpu" else "float32,bfloat16,float16")).split(",")]
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise UserError(f"--dtypes: {args.dtypes!r} is not a list of torch's dtypes (float32,bfloat16)")
    if lacks:
        echo(f"{' and '.join(NEED_TRITON)}: not measured, they need {lacks}")
        operations = [name for name in operations if name not in NEED_TRITON]
    cases = []
    for dtype in dtypes:
        for name, make in (("rms_norm", bench.rms_norm_case), ("swiglu", bench.swiglu_case)):
            cases += [make(device, dtype, args.tokens, width) for width in args.widths if name in operations]
        if "linear_cross_entropy" in operations:
            cases += [bench.loss_case(device, dtype, args.tokens, args.head_width, vocabulary, args.chunk)
                      for vocabulary in args.vocabularies]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    bandwidth, speed = bench.copy_bandwidth(device), {dtype: bench.product_speed(device, dtype) for dtype in dtypes}
    echo(f"{name}, torch {torch.__version__}, {args.tokens:,} tokens; copy {bandwidth / 1e9:,.1f} GB/s, products "
         + ", ".join(f"{rate / 1e12:,.2f} TFLOP/s ({dtype})" for dtype, rate in speed.items()))
    measurements = [m for case in cases for m in bench.time_case(case, device, args.rounds)]
    echo("\n".join(align_columns(bench.timing_table(measurements, bandwidth, speed), left=(0, 1, 2, 3, 4))))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
