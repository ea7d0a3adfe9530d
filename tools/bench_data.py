"""How fast the data wing is: preparing, opening, reading, and whether a training step would wait.

    python -m tools.bench_data [--input 'docs/**/*.txt'] [--tokenizers byte gpt2]

Preparing runs in one process on --input (by default Python's standard library), reading on what was prepared. Seconds
are of the processor, which other work on the machine does not change, and of the clock where the name says so.
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
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import Prefetch, TrainBatches
from blockgpt.data.mixture import MixedBatches, Mixture
from blockgpt.data.packing import PackedBatches
from blockgpt.data.prepare import prepare
from blockgpt.data.sources import file_partitions
from blockgpt.data.tokenizer import load_tokenizer
from blockgpt.errors import exit_on_user_error

BLOCK, BATCH, SEED = 1024, 16, 1
ASKED = 2_000_000  # tokens/s that a training step may ask for


def spent(action):
    """(what the action returns, its seconds of processor time)."""
    started = time.process_time()
    result = action()
    return result, time.process_time() - started


def prepared(folder, name, parts):
    """Prepare the parts by the tokenizer `name` in this process, print the speed, return the dataset."""
    tokenizer = load_tokenizer(name)
    tokenizer.encode("warm")
    with contextlib.redirect_stdout(io.StringIO()):
        meta, seconds = spent(lambda: prepare(folder / Path(name).name, tokenizer, parts, source="bench", workers=1))
    size, tokens = (sum(split[key] for split in meta["splits"].values()) for key in ("bytes", "tokens"))
    print(f"prepare, {name}: {size / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f} M tokens/s on one core "
          f"({size / 1e6:.1f} MB)")
    return open_dataset(Path(name).name, folder)


def read_speed(label, batches, steps=200):
    """Print what a micro-batch costs at the start and at step 10⁹."""
    for first in (0, 10**9):
        _, seconds = spent(lambda first=first: [batches.micro_batch(step) for step in range(first, first + steps)])
        print(f"read, {label}, from step {first:.0e}: {seconds / steps * 1e6:.0f} µs for {BATCH} × {BLOCK}, "
              f"{steps * BATCH * BLOCK / seconds / 1e6:.0f} M tokens/s on one core")


def waiting(batches, steps=100):
    """Print how long a consumer of ASKED tokens/s waits for its batches, by the clock."""
    ahead, waited = Prefetch(lambda step: batches.micro_batch(step), lambda step: step + 1), 0.0
    ahead.get(0)
    for step in range(1, steps):
        time.sleep(BATCH * BLOCK / ASKED)  # a GPU at work leaves the processor free
        started = time.perf_counter()
        ahead.get(step)
        waited += time.perf_counter() - started
    print(f"wait at {ASKED / 1e6:g} M tokens/s: {waited / (steps - 1) * 1e6:.0f} µs of a step of "
          f"{BATCH * BLOCK / ASKED * 1e3:.1f} ms, by the clock")


def two_terabytes(folder, dataset):
    """Print what it costs to open and read a sparse file of two terabytes."""
    size, directory = 2 * 10**12, folder / "sparse"
    directory.mkdir()
    meta = json.loads((dataset.directory / "meta.json").read_text())
    for split in meta["splits"].values():
        split["files"] = {name: {"sha256": "", "size": size} for name in split["files"]}
        split["tokens"] = size // 2 * len(split["files"])
        for name in split["files"]:
            os.close(os.open(directory / name, os.O_CREAT | os.O_WRONLY))
            os.truncate(directory / name, size)
    (directory / "meta.json").write_text(json.dumps(meta))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    batches = TrainBatches(open_dataset("sparse", folder), SEED, BLOCK, BATCH)
    opened = time.perf_counter()
    batches.micro_batch(10**9)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"2 TB, sparse: opened in {(opened - started) * 1e3:.1f} ms, a batch in "
          f"{(time.perf_counter() - opened) * 1e3:.1f} ms by the clock, {grown:.1f} MiB more")


def main(argv):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", default=[f"{sysconfig.get_path('stdlib')}/**/*.py"], help="text")
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "gpt2"], help="as data/files takes them")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder, parts = Path(folder), file_partitions(args.input)
        datasets = [prepared(folder, name, parts) for name in args.tokenizers]
        _, seconds = spent(lambda: open_dataset(datasets[0].name, folder))
        print(f"open, {datasets[0].tokens('train') / 1e6:.0f} M tokens, digests and ids checked: "
              f"{seconds * 1e3:.0f} ms")
        stream = TrainBatches(datasets[-1], SEED, BLOCK, BATCH)
        packed, seconds = spent(lambda: PackedBatches(datasets[-1], SEED, BLOCK, BATCH))
        print(f"plan of packing='documents': {seconds * 1e3:.0f} ms; windows are "
              f"{packed.used.sum() / packed.n_sequences / (BLOCK + 1):.2%} full")
        mixture = Mixture([(0, {"a": 0.7, "b": 0.3})], BATCH)
        read_speed("stream", stream)
        read_speed("documents", packed)
        read_speed("two sources", MixedBatches({"a": stream, "b": packed}, mixture, BATCH))
        waiting(stream)
        two_terabytes(folder, datasets[0])


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
