"""How long compare_architectures.py takes, from its start to the table, and how much memory.

    python -m tools.bench_compare --runs 10000 --out_dir /tmp/synthetic     writes the runs that do not exist
    python -m tools.bench_compare --runs 10 --repeats 5

The runs are synthetic: run.json and metrics.jsonl as train.py writes them, of architectures with as many seeds each as
--seeds says, every hundredth with an incomplete metrics.jsonl.
"""

import argparse
import dataclasses
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.errors import exit_on_user_error
from blockgpt.files import exists, user_path
from configurator import KEYS
from model_config import get_preset

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS, STEPS, TOKENS_PER_STEP = 5, 5, 2048  # records of a metrics.jsonl
NORMS, PRESETS = ("layernorm_nobias", "rmsnorm"), ("gpt2", "llama")


def write_runs(folder: Path, count: int, seeds: int) -> None:
    """Run directories 00000, 00001, …; those that exist stay."""
    for i in range(count):
        run = folder / f"{i:05}"
        if not exists(run / "run.json"):
            run.mkdir(parents=True, exist_ok=True)
            arm, seed = divmod(i, seeds)
            write_run(run, arm, seed)


def write_run(run: Path, arm: int, seed: int) -> None:
    """One run of an arm: every arm has a learning rate of its own, and one of four architectures."""
    model = get_preset(PRESETS[arm % 2], n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320,
                       normalization=NORMS[arm // 2 % 2]).resolve()
    config: dict[str, Any] = {name: key.default for name, key in KEYS.items()}
    config |= {**dataclasses.asdict(model), "seed": seed, "max_iters": STEPS * 10,
               "learning_rate": 1e-3 + 1e-6 * (arm // 4)}
    rng = random.Random(f"{arm} {seed}")
    document = {
        "schema_version": 1, "run_name": run.name, "status": "finished", "status_reason": None,
        "created_at": "2026-11-26T08:00:00Z", "arch_name": model.arch_name(),
        "config": {key: value for key, value in config.items() if isinstance(value, (str, int, float, type(None)))},
        "model": dataclasses.asdict(model), "criterion": {"metric": "val_loss", "more_is_better": False},
        "parameters": {"total": 900_000, "trainable": 900_000, "non_embedding": 800_000},
        "flops_per_token": {"train": 6e6}, "val_data": {"tokens": 65536, "digest": "5eed"},
        "data": {"dataset": "pycode", "fingerprint": "abc", "vocab_size": 320, "train_tokens": 1_000_000,
                 "tokens_per_step": TOKENS_PER_STEP, "sequences_per_step": 8},
        "hardware": {"device": "cpu", "name": "cpu", "world_size": 1, "dtype": "float32"}}
    records = []
    for i in range(1, STEPS + 1):
        records.append({"kind": "step", "step": 10 * i, "tokens": 10 * i * TOKENS_PER_STEP, "loss": 3.0, "lr": 1e-3,
                        "grad_norm": 0.5, "step_time": 0.1, "tokens_per_sec": 20000 + rng.random(), "tflops": 0.1,
                        "mfu": 0.4, "memory": {"allocated": 2**29, "peak": 2**30, "reserved": None},
                        "tokens_per_source": {"pycode": 10 * i * TOKENS_PER_STEP}})
        if i % (STEPS // EVALUATIONS) == 0:
            loss = 2 + 1 / i + 0.01 * (arm % 4) + rng.gauss(0, 0.003)
            records.append({"kind": "eval", "step": 10 * i, "tokens": 10 * i * TOKENS_PER_STEP, "val_loss": loss,
                            "val_bpb": loss, "val_data": document["val_data"]})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(text[:-40] if (arm + seed) % 100 == 99 else text)
    (run / "run.json").write_text(json.dumps(document, indent=1))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m tools.bench_compare", description="Time compare_architectures.py.")
    parser.add_argument("--runs", type=int, default=10, help="runs to compare")
    parser.add_argument("--seeds", type=int, default=5, help="runs that differ in the seed alone")
    parser.add_argument("--repeats", type=int, default=3, help="comparisons; the fastest is printed")
    parser.add_argument("--out_dir", type=user_path, default=None,
                        help="directory of the synthetic runs (default: a temporary one)")
    args = parser.parse_args(argv)
    check_ranges(args, {name: (getattr(args, name) >= 1, "at least 1") for name in ("runs", "seeds", "repeats")})
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out_dir or temporary)
        write_runs(folder, args.runs, args.seeds)
        for flags in ([], ["--baseline", "00000"], ["--baseline", "00000", "--format", "json"]):
            command = [sys.executable, str(ROOT / "compare_architectures.py"), "--out_dir", str(folder), *flags]
            seconds = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - started)
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"{args.runs:,} runs {' '.join(flags) or '(table)'}: {min(seconds):.2f} s, at most {memory:,.0f} MiB "
                  "so far", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
