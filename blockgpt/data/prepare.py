"""Text to a dataset: `data/<name>/` with train*.bin, val*.bin and, last, meta.json.

The .bin files are raw little-endian token ids. A dataset exists if and only if its meta.json does: everything is
written to temporaries and renamed, so that a crash leaves the old dataset or none, never an incomplete one.
To add a dataset: a `data/<name>/prepare.py` that passes the name of a dataset on the hub to `prepare_from_hub`
(blockgpt/data/commands.py), or its own partitions (blockgpt/data/sources.py) to `prepare`, or, if the text is small,
its documents to `write_dataset` (as data/pycode does).
"""

import collections
import concurrent.futures.process
import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]  # it has no type hints

from blockgpt.data.dataset import DTYPES, SCHEMA_VERSION, SPLITS, dtype_for
from blockgpt.data.sources import Partition
from blockgpt.data.tokenizer import Tokenizer, from_meta
from blockgpt.data.writer import (
    SHARD_TOKENS,
    Recipe,
    SplitWriter,
    commit,
    encode_partition,
    find_duplicates,
    finish_partition,
    is_done,
    partition_path,
    remove_stale,
    sum_partition_stats,
    write_splits,
)
from blockgpt.errors import DataError, error_text
from blockgpt.files import FolderLock

CONTINUES = "(the finished partitions are saved: the same command continues)"
SMALL_SECONDS = 60.0  # that a small dataset waits for its lock: two runs that start at once both prepare theirs
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0  # between two displays of the progress; the first one comes after as long


def write_dataset(out_dir: str | Path, tokenizer: Tokenizer, documents: Iterable[tuple[str, str]], *, source: str,
                  skipped: Mapping[str, int] | None = None, separate: bool = True, **extras: Any) -> dict[str, Any]:
    """Encode a stream of documents into `out_dir`, in this process, all or nothing.

    Args:
        documents: (split, text) each, split "train" or "val". Streamed: one text is in memory at a time.
        source: a description of where the text is from.
        skipped: counts of what was left out, by reason; `documents` may update it while it is read.
        separate: append the tokenizer's eot to each document.
        extras: JSON-able additions to meta.json.

    Returns:
        The content of meta.json. Token counts include the eot of each document; bytes are those of the text, as UTF-8.

    Raises:
        DataError: a split without tokens, a full disk, a folder that cannot be written.
    """
    recipe = Recipe(separate=separate, deduplicate=False)
    refusals: collections.Counter[str] = collections.Counter()
    started, out_dir = time.perf_counter(), Path(out_dir)
    work = out_dir / f".parts.{secrets.token_hex(4)}.tmp"
    with writing_to(out_dir, wait=SMALL_SECONDS):
        try:
            work.mkdir()
            first_refusal = encode_partition(work / "all", documents, tokenizer, recipe, refusals)
            meta = assemble(out_dir, work, [work / "all"], tokenizer, recipe, source=source, extras=extras,
                            skipped={**(skipped or {}), **refusals}, first_refusal=first_refusal)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(summary(meta, time.perf_counter() - started, out_dir))
    return meta


def prepare(out_dir: str | Path, tokenizer: Tokenizer, partitions: Sequence[Partition], *, source: str,
            recipe: Recipe | None = None, workers: int | None = None, shard_tokens: int = SHARD_TOKENS,
            **extras: Any) -> dict[str, Any]:
    """Encode `partitions` into `out_dir`, in several processes.

    After any interruption the finished partitions are saved, and the same call continues with the others. The result
    does not depend on `workers`.

    Args:
        workers: processes; None: one per core.
        shard_tokens: approximate tokens per file.

    Other arguments, result and errors as `write_dataset`.
    """
    recipe, out_dir, started = recipe or Recipe(), Path(out_dir), time.perf_counter()
    key = hashlib.sha256(json.dumps([tokenizer.to_meta(), asdict(recipe)], default=repr).encode()).hexdigest()[:16]
    work = out_dir / f".parts.{key}.tmp"
    with writing_to(out_dir, work):
        work.mkdir(exist_ok=True)
        paths = [partition_path(work, partition) for partition in partitions]
        todo = {path: partition for path, partition in zip(paths, partitions, strict=True) if not is_done(path)}
        done = sum(map(is_done, paths))
        if done:
            print(f"continuing: {done} of {len(paths)} partitions are finished", flush=True)
        progress = ProgressDisplay(len(paths), done)
        encode_partitions(todo, tokenizer, recipe, min(workers or n_cores(), len(todo)), progress)
        skipped, first_refusal = sum_partition_stats(paths)
        extras = {"recipe": {**asdict(recipe), "filters": {k: str(v) for k, v in recipe.filters.items()}}, **extras}
        try:
            meta = assemble(out_dir, work, paths, tokenizer, recipe, source=source, extras=extras, skipped=skipped,
                            first_refusal=first_refusal, shard_tokens=shard_tokens)
        except DataError:  # an empty split: the same partitions would fail again
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    print(summary(meta, time.perf_counter() - started, out_dir))
    return meta


def n_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def writing_to(out_dir: Path, work: Path | None = None, wait: float = 1.0) -> Iterator[None]:
    """Create and lock `out_dir`, and turn a failure to write below it into a `DataError`.

    Args:
        work: a work directory to keep, however old it is: the command can continue from it.
        wait: seconds to wait for another process that prepares the dataset.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with FolderLock(out_dir, "prepares this dataset", wait):
            remove_stale(out_dir, keep=work)
            yield
    except OSError as error:
        saved = "; the finished partitions are saved: the same command continues" if work else ""
        raise DataError(f"{out_dir}: cannot be written: {error_text(error)} (free disk space, or choose another "
                        f"folder: --out_dir, or train.py's --data_dir{saved})") from None


def assemble(out_dir: Path, work: Path, paths: Sequence[Path], tokenizer: Tokenizer, recipe: Recipe, *, source: str,
             extras: Mapping[str, Any], skipped: Mapping[str, int], first_refusal: str | None,
             shard_tokens: int = SHARD_TOKENS) -> dict[str, Any]:
    """Write the encoded partitions as shards and commit them with their meta.json, which is returned.

    Args:
        paths: of the partitions, without suffix, in the order of the corpus.
        first_refusal: why a document could not be encoded, for the error message of an empty split.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {name: SplitWriter(work, name, DTYPES[dtype], shard_tokens) for name in SPLITS}
    try:
        duplicate = find_duplicates(work, paths) if recipe.deduplicate else None
        if duplicate is not None:
            skipped = {**skipped, "duplicate": int(duplicate.sum())}
        write_splits(paths, splits, duplicate)
        for name, split in splits.items():
            split.finish()
            if not split.tokens:
                counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items() if n)
                raise DataError(f"{out_dir}: the {name} split would be empty ({source} has too little text"
                                + (f"; left out: {counts}" if counts else "")
                                + (f"; {first_refusal}" if first_refusal else "") + ")")
        meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta(),
                "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot if recipe.separate else None, "dtype": dtype,
                "source": source, "splits": {name: split.to_meta() for name, split in splits.items()},
                "skipped": dict(sorted(skipped.items())), **extras}
        commit(out_dir, splits, meta)
        return meta
    finally:
        for split in splits.values():
            split.discard()


# ---- several processes ----

SPAWN = multiprocessing.get_context("spawn")  # the same on every system; no state is inherited
worker_state: dict[str, Any] = {}  # of a worker process: tokenizer, recipe, counters


def init_worker(tokenizer_meta: dict[str, Any], recipe: Recipe, counters: Any) -> None:
    """Runs first in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    worker_state.update(tokenizer=from_meta(tokenizer_meta), recipe=recipe, counters=counters)


def exit_with_parent() -> None:
    """Exit when the main process ends: a worker would wait forever, or write to the files of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_in_worker(path: Path, partition: Partition) -> None:
    """Encode one partition in a worker process."""
    def advance(tokens: int, size: int) -> None:
        counters = worker_state["counters"]
        with counters.get_lock():
            counters[0] += tokens
            counters[1] += size

    encode_and_finish(path, partition, worker_state["tokenizer"], worker_state["recipe"], advance)


def encode_and_finish(path: Path, partition: Partition, tokenizer: Tokenizer, recipe: Recipe,
                      advance: Callable[[int, int], None]) -> None:
    skipped: collections.Counter[str] = collections.Counter()
    first_refusal = encode_partition(path, partition.documents(skipped), tokenizer, recipe, skipped, advance)
    finish_partition(path, skipped, first_refusal)


def encode_partitions(todo: Mapping[Path, Partition], tokenizer: Tokenizer, recipe: Recipe, workers: int,
                      progress: "ProgressDisplay") -> None:
    """Encode partitions; the first failure ends it, after the partitions that are in progress."""
    try:
        if workers > 1:
            encode_in_pool(todo, tokenizer, recipe, workers, progress)
            return
        for path, partition in todo.items():
            encode_and_finish(path, partition, tokenizer, recipe, progress.advance)
            progress.update(1)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps because memory ran out: use fewer --workers "
                        f"{CONTINUES}") from None
    except DataError as error:
        raise DataError(f"{error} {CONTINUES}") from None
    finally:
        progress.close()


def encode_in_pool(todo: Mapping[Path, Partition], tokenizer: Tokenizer, recipe: Recipe, workers: int,
                   progress: "ProgressDisplay") -> None:
    pool = concurrent.futures.ProcessPoolExecutor(workers, SPAWN, init_worker,
                                                  (tokenizer.to_meta(), recipe, progress.counters))
    with pool:
        pending = {pool.submit(encode_in_worker, path, partition) for path, partition in todo.items()}
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.update(len(done))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class ProgressDisplay:
    """A tqdm bar over partitions if stderr is a terminal, else a line on stdout every LOG_SECONDS. Silent at first.

    Attributes:
        counters: tokens and bytes so far, of all processes.
    """

    def __init__(self, total: int, done: int) -> None:
        self.counters = SPAWN.Array("Q", 2)
        self.total, self.initial, self.done = total, done, done
        self.started = self.logged = time.perf_counter()
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="partition", disable=not self.is_terminal, leave=False,
                        dynamic_ncols=True, delay=TERMINAL_SECONDS, mininterval=TERMINAL_SECONDS, miniters=0)

    def advance(self, tokens: int, size: int) -> None:
        """Count tokens and bytes that this process encoded."""
        self.counters[0] += tokens
        self.counters[1] += size
        self.update(0)

    def update(self, partitions: int) -> None:
        """Count finished partitions, and display the progress if it is time to."""
        self.done += partitions
        if self.is_terminal:
            self.bar.set_postfix_str(self.speed(), refresh=False)
            self.bar.update(partitions)
        elif time.perf_counter() - self.logged >= LOG_SECONDS:
            self.logged = time.perf_counter()
            print(tqdm.format_meter(self.done, self.total, self.logged - self.started, initial=self.initial,
                                    unit="partition", postfix=self.speed(), ncols=0), flush=True)

    def speed(self) -> str:
        tokens, size = self.counters[0], self.counters[1]
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {size / seconds / 1e6:.1f} MB/s"

    def close(self) -> None:
        self.bar.close()


def summary(meta: Mapping[str, Any], seconds: float, out_dir: Path) -> str:
    """The lines that a finished command prints."""
    lines = [f"{name:5} {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes"
             + (f" in {len(s['files'])} files" if len(s["files"]) > 1 else "") for name, s in meta["splits"].items()]
    skipped = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items() if count)
    tokens, size = (sum(s[k] for s in meta["splits"].values()) for k in ("tokens", "bytes"))
    speed = f"{tokens / seconds:,.0f} tokens/s, {size / seconds / 1e6:.1f} MB/s"
    return "\n".join([*lines, f"skipped: {skipped or 'nothing'}", f"{seconds:.1f} s, {speed} -> {out_dir}"])
