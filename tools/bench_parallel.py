"""Parallel modes on this host's CPU, with gloo: whether all compute the same, and what each process holds.

    python -m tools.bench_parallel agreement            every mode × preset: the largest relative difference of a step's
                                                        loss from that of a single process, over 50 steps in float32
    python -m tools.bench_parallel bytes                bytes of parameters, gradients and optimizer state on each rank,
                                                        counted from their storages, next to the formula

The runs are train.py's own, on the embedded corpus. --presets and --modes select some. A new mode is a line in `MODES`.
"""

import argparse
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.experiments.records import read_log
from configurator import load_config
from model_config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
MODES: dict[str, tuple[int, list[str]]] = {  # name: (processes, flags)
    "single": (1, []),
    "DDP": (2, []),
    "ZeRO-1": (2, ["--use_zero1=True"]),
    "FSDP": (2, ["--use_fsdp=True"]),
    "TP": (2, ["--tensor_parallel=2"]),
    "DDP 4": (4, []),
    "ZeRO-1 4": (4, ["--use_zero1=True"]),
    "FSDP 4": (4, ["--use_fsdp=True"]),
    "FSDP, 2 replicas": (4, ["--use_fsdp=True", "--dp_replicate=2"]),
    "FSDP × TP": (4, ["--use_fsdp=True", "--tensor_parallel=2"]),
}
SIZE = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=32", "--batch_size=2", "--eval_tokens=512",
        "--device=cpu", "--dtype=float32", "--compile=False", "--mfu_peak=1", "--log_interval=1",
        "--learning_rate=1e-3", "--warmup_iters=10", "--checkpoint_interval=0"]
Curve = list[tuple[float, float]]  # (loss, gradient norm) of each step


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this tool with `arguments` in several processes."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={processes}", "-m", "tools.bench_parallel", *arguments],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------- agreement


def agreement_runs(presets: Iterable[str], steps: int, out_dir: Path, mode: str) -> dict[str, list[str]]:
    """{run name: arguments of train.py}: each preset, with 4 and 8 micro-batches, with tied and untied weights."""
    return {f"{preset}-{micro_batches}-{tied}":
            [f"config/arch_{preset}.py", *SIZE, *MODES[mode][1], f"--gradient_accumulation_steps={micro_batches}",
             f"--weight_tying={tied}", f"--max_iters={steps}", f"--eval_interval={steps}", f"--out_dir={out_dir}",
             f"--run_name={preset}-{micro_batches}-{tied}"]
            for preset in presets for micro_batches in (4, 8) for tied in (True, False)}


def train_all(mode: str, runs: Iterable[list[str]], folder: Path) -> None:
    """Train `runs`, each the arguments of train.py, one after the other in the processes of `mode`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(list(runs)))
    done = torchrun(MODES[mode][0], "--train", str(folder / "runs.json"))
    if done.returncode:
        raise UserError(f"{mode}: the runs failed:\n{done.stderr[-3000:]}")


def train_in_process(path: str | Path) -> None:
    """In one of the processes: pass each run of a file by `train_all` to train.py's `train`, in one process group."""
    from blockgpt.training import launch
    from blockgpt.training.faults import Watchdog

    train = runpy.run_path(str(ROOT / "train.py"))["train"]
    runtime = None
    for argv in json.loads(Path(path).read_text()):
        config = load_config(argv)
        runtime = runtime or launch.init(config)
        with Watchdog(runtime, config) as watchdog:
            train(config, runtime, watchdog)
        gc.collect()  # a model can contain reference cycles
    launch.shutdown()


def read_curve(run_dir: Path) -> Curve:
    records, _ = read_log(run_dir / "metrics.jsonl")
    return [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "step"]


def loss_difference(curves: Iterable[tuple[Curve, Curve]]) -> float:
    """The largest relative difference between the losses of the first and of the second curve of each pair."""
    return max(abs(a - b) / abs(b) for curve, reference in curves
               for (a, _), (b, _) in zip(curve, reference, strict=True))


def compare_modes(modes: Iterable[str], presets: list[str], steps: int) -> float:
    """Print a row for each mode and preset; returns the largest relative loss difference."""
    print(f"| mode | processes | preset | largest relative loss difference in {steps} steps | bitwise equal to DDP |")
    print("|---|---|---|---|---|")
    curves: dict[tuple[str, str], Curve] = {}
    largest = 0.0
    with tempfile.TemporaryDirectory() as parent:
        for mode in dict.fromkeys(("single", *modes)):
            folder = Path(parent, mode.replace(" ", "-"))
            runs = agreement_runs(presets, steps, folder, mode)
            train_all(mode, runs.values(), folder)
            curves |= {(mode, name): read_curve(folder / name) for name in runs}
            shutil.rmtree(folder)
            if mode == "single":
                continue
            processes = MODES[mode][0]
            ddp = "DDP 4" if processes == 4 else "DDP"
            for preset in presets:
                names = [name for name in runs if name.startswith(f"{preset}-")]
                difference = loss_difference((curves[mode, name], curves["single", name]) for name in names)
                equal = ""
                if mode != ddp and (ddp, names[0]) in curves:
                    equal = "yes" if all(curves[mode, name] == curves[ddp, name] for name in names) else "no"
                largest = max(largest, difference)
                print(f"| {mode.removesuffix(' 4')} | {processes} | {preset} | {difference:.1e} | {equal} |",
                      flush=True)
    print(f"\nlargest of all: {largest:.2e}")
    return largest


# ---------------------------------------------------------------- bytes

# Bytes per parameter of (parameters, gradients, optimizer state) on one of n processes.
FORMULAS: dict[str, Callable[[int], tuple[float, float, float]]] = {
    "DDP": lambda n: (4, 4, 8),
    "ZeRO-1": lambda n: (4, 4, 8 / n),
    "FSDP": lambda n: (4 / n, 4 / n, 8 / n),
}
MEASUREMENT = "measurement: "  # the start of the line with the JSON of `measure_bytes`


def measure_bytes(argv: list[str]) -> None:
    """In one of the processes: train one step; print bytes of parameters, gradients, optimizer state by rank."""
    import torch

    from blockgpt.training import launch, parallel
    from blockgpt.training.optimizers import build_optimizer
    from model_builder import build_model

    config = load_config(argv)
    runtime = launch.init(config)
    model = build_model(config.for_vocabulary(256).model, config.seed, runtime.device,
                        lambda model: parallel.parallelize(model, config, runtime))
    optimizer: Any = build_optimizer(model, config, runtime.device)
    wrapped = parallel.wrap(model, config, runtime)
    x = torch.zeros(1, config.model.block_size, dtype=torch.int64)
    wrapped(x, x).backward()
    optimizer.step()

    def storage_bytes(tensors: Iterable[Any]) -> int:
        storages = [(t.to_local() if hasattr(t, "to_local") else t).untyped_storage() for t in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    state = getattr(optimizer, "optim", optimizer).state  # ZeroRedundancyOptimizer has its own in `optim`
    by_rank = runtime.all_gather_object([
        storage_bytes(model.parameters()), storage_bytes(p.grad for p in model.parameters()),
        storage_bytes(t for values in state.values() for t in values.values() if t.dim())])
    if runtime.is_rank_zero:
        count = sum(p.numel() for p in model.parameters())
        print(MEASUREMENT + json.dumps({"parameters": count, "by_rank": by_rank}), flush=True)
    del wrapped, optimizer, model, state
    launch.shutdown()


def print_bytes(presets: Iterable[str]) -> None:
    """Print a row for each mode, number of processes and preset."""
    print("| mode | processes | preset | parameters, gradients, optimizer: bytes per parameter, by rank | formula |")
    print("|---|---|---|---|---|")
    for mode, formula in FORMULAS.items():
        for n in (2, 3, 4):
            expected = " ".join(f"{b:.2f}" for b in formula(n))
            for preset in presets:
                argv = [f"config/arch_{preset}.py", *SIZE, "--n_layer=4", "--n_embd=128", *MODES[mode][1],
                        f"--gradient_accumulation_steps={n}"]
                done = torchrun(n, "--measure", json.dumps(argv))
                line = next((x for x in done.stdout.splitlines() if x.startswith(MEASUREMENT)), None)
                if done.returncode or line is None:
                    raise UserError(f"{mode} with {n} processes failed: {done.stderr[-2000:]}")
                measured = json.loads(line.removeprefix(MEASUREMENT))
                by_rank = "; ".join(" ".join(f"{b / measured['parameters']:.2f}" for b in row)
                                    for row in measured["by_rank"])
                print(f"| {mode} | {n} | {preset} | {by_rank} | {expected} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", nargs="?", choices=("agreement", "bytes"), default="agreement")
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=sorted(set(PRESETS) - {"custom"}))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--train", help=argparse.SUPPRESS)  # for this tool's own processes
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.train:
        train_in_process(options.train)
    elif options.measure:
        measure_bytes(json.loads(options.measure))
    elif options.table == "bytes":
        print_bytes(options.presets)
    elif compare_modes(options.modes, options.presets, options.steps) > 1e-6:
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
