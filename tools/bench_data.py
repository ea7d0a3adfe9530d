"""How fast the data pipeline is: preparing, opening, reading, and whether a training step would wait for its batch.

    python -m tools.bench_data [--input 'docs/**/*.txt'] [--tokenizers byte gpt2]

Prepares --input (by default Python's standard library) in one process, then reads what was prepared. Seconds are
processor time, which other work on the machine does not change, or wall time where the line says so.
"""

import contextlib
import io
import json
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.data.dataset import Dataset, open_dataset
from blockgpt.data.loader import GlobalBatches, Prefetch, TrainBatches
from blockgpt.data.mixture import MixedBatches, Mixture
from blockgpt.data.packing import PackedBatches
from blockgpt.data.prepare import prepare
from blockgpt.data.sources import file_partitions
from blockgpt.data.tokenizer import load_tokenizer
from blockgpt.data.writer import Recipe
from blockgpt.errors import exit_on_user_error

BLOCK_SIZE, BATCH_SIZE, SEED = 1024, 16, 1
CONSUMER_SPEED = 2_000_000  # tokens/s that a training step consumes

Result = TypeVar("Result")


def timed(action: Callable[[], Result]) -> tuple[Result, float]:
    """(what the action returns, its seconds of processor time)."""
    start = time.process_time()
    result = action()
    return result, time.process_time() - start


def bench_prepare(folder: Path, tokenizer_name: str, partitions: Any) -> Dataset:
    """Prepare the partitions in this process, print the speed, return the dataset."""
    tokenizer, name = load_tokenizer(tokenizer_name), Path(tokenizer_name).name
    tokenizer.encode("warm up")
    with contextlib.redirect_stdout(io.StringIO()):
        meta, seconds = timed(lambda: prepare(folder / name, tokenizer, partitions, source="bench", workers=1,
                                              recipe=Recipe(val_fraction=0.1)))  # a small corpus has both splits too
    size, tokens = (sum(split[key] for split in meta["splits"].values()) for key in ("bytes", "tokens"))
    print(f"prepare, {tokenizer_name}: {size / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f} M tokens/s on one "
          f"core ({size / 1e6:.1f} MB)")
    return open_dataset(name, folder)


def bench_read(label: str, batches: GlobalBatches, steps: int = 200) -> None:
    """Print the time of a micro-batch at step 0 and at step 10⁹."""
    for first in (0, 10**9):
        start = time.process_time()
        for step in range(first, first + steps):
            batches.micro_batch(step)
        seconds = time.process_time() - start
        print(f"read, {label}, from step {first:.0e}: {seconds / steps * 1e6:.0f} µs for {BATCH_SIZE} × {BLOCK_SIZE}, "
              f"{steps * BATCH_SIZE * BLOCK_SIZE / seconds / 1e6:.0f} M tokens/s on one core")


def bench_wait(batches: GlobalBatches, steps: int = 100) -> None:
    """Print how long a consumer of CONSUMER_SPEED tokens/s waits for its batches, in wall time."""
    prefetch, waited = Prefetch(batches.micro_batch, lambda step: step + 1), 0.0
    step_seconds = BATCH_SIZE * BLOCK_SIZE / CONSUMER_SPEED
    prefetch.get(0)
    for step in range(1, steps):
        time.sleep(step_seconds)  # in place of a GPU's work, which leaves the processor free
        start = time.perf_counter()
        prefetch.get(step)
        waited += time.perf_counter() - start
    print(f"wait at {CONSUMER_SPEED / 1e6:g} M tokens/s: {waited / (steps - 1) * 1e6:.0f} µs of a step of "
          f"{step_seconds * 1e3:.1f} ms, wall time")


def bench_two_terabytes(folder: Path, dataset: Dataset) -> None:
    """Print what it costs to open and read a sparse file of two terabytes."""
    size, directory = 2 * 10**12, folder / "sparse"
    directory.mkdir()
    meta = json.loads((dataset.directory / "meta.json").read_text())
    for split in meta["splits"].values():
        split["files"] = {name: {"sha256": "", "size": size} for name in split["files"]}
        split["tokens"] = size // 2 * len(split["files"])
        for name in split["files"]:
            (directory / name).touch()
            os.truncate(directory / name, size)
    (directory / "meta.json").write_text(json.dumps(meta))
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    batches = TrainBatches(open_dataset("sparse", folder), SEED, BLOCK_SIZE, BATCH_SIZE)
    opened = time.perf_counter()
    batches.micro_batch(10**9)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"2 TB, sparse: opened in {(opened - start) * 1e3:.1f} ms, a batch in "
          f"{(time.perf_counter() - opened) * 1e3:.1f} ms, wall time; {growth:.1f} MiB of memory")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", default=[f"{sysconfig.get_path('stdlib')}/**/*.py"],
                        help="text files, as data/files/prepare.py takes them")
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "gpt2"],
                        help="each as data/files/prepare.py takes it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder, partitions = Path(temporary), file_partitions(args.input)
        datasets = [bench_prepare(folder, name, partitions) for name in args.tokenizers]
        _, seconds = timed(lambda: open_dataset(datasets[0].name, folder))
        print(f"open, {datasets[0].tokens('train') / 1e6:.0f} M tokens, digests and ids checked: "
              f"{seconds * 1e3:.0f} ms")
        stream = TrainBatches(datasets[-1], SEED, BLOCK_SIZE, BATCH_SIZE)
        packed, seconds = timed(lambda: PackedBatches(datasets[-1], SEED, BLOCK_SIZE, BATCH_SIZE))
        print(f"packing='documents': planned in {seconds * 1e3:.0f} ms; sequences are "
              f"{packed.used.sum() / packed.n_sequences / (BLOCK_SIZE + 1):.2%} full")
        mixture = Mixture([(0, {"a": 0.7, "b": 0.3})], BATCH_SIZE)
        bench_read("stream", stream)
        bench_read("documents", packed)
        bench_read("two sources", MixedBatches({"a": stream, "b": packed}, mixture, BATCH_SIZE))
        bench_wait(stream)
        bench_two_terabytes(folder, datasets[0])


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
