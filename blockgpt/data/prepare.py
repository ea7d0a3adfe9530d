"""Text to a dataset: `data/<name>/` with train*.bin, val*.bin and, last, meta.json.

The .bin files are raw little-endian token ids. A dataset exists if and only if its meta.json does: everything is
written to temporaries and renamed, so that a crash leaves the old dataset or none, never an incomplete one.
To add a dataset: a `data/<name>/prepare.py` that passes the name of a dataset on the hub to `prepare_from_hub`
(blockgpt/data/commands.py), or its own partitions (blockgpt/data/sources.py) to `prepare`, or, if the text is small,
its documents to `write_dataset` (as data/pycode does).
"""

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

from blockgpt.console import echo
from blockgpt.data.dataset import DTYPES, SCHEMA_VERSION, SPLITS, dtype_for
from blockgpt.data.filters import source_digests
from blockgpt.data.losses import MAX_LOSS, Skipped
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
from blockgpt.errors import DataError, UserError, error_text
from blockgpt.files import FolderLock, list_dir
from blockgpt.startup import n_cores

CONTINUES = "(the finished partitions are saved: the same command continues)"
SMALL_SECONDS = 60.0  # that a small dataset waits for its lock: two runs that start at once both prepare theirs
BY_POSITION = "--by_position makes the end of each document val; --val_fraction sets how many are"
PARTS_VERSION = 2  # of the files in a work directory: one with others is not continued
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
    check_separable(tokenizer, recipe)
    refusals = Skipped(max_loss=1)
    started, out_dir = time.perf_counter(), Path(out_dir)
    work = out_dir / f".parts.{secrets.token_hex(4)}.tmp"
    with writing_to(out_dir, wait=SMALL_SECONDS):
        try:
            work.mkdir()
            encode_partition(work / "all", documents, tokenizer, recipe, refusals)
            refusals.update(skipped or {})
            meta = assemble(out_dir, work, [work / "all"], tokenizer, recipe, refusals, source=source, extras=extras)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print_summary(meta, refusals, time.perf_counter() - started, out_dir)
    return meta


def prepare(out_dir: str | Path, tokenizer: Tokenizer, partitions: Sequence[Partition], *, source: str,
            recipe: Recipe | None = None, workers: int | None = None, shard_tokens: int = SHARD_TOKENS,
            max_loss: float = MAX_LOSS, **extras: Any) -> dict[str, Any]:
    """Encode `partitions` into `out_dir`, in several processes.

    After any interruption the finished partitions are saved, and the same call continues with the others. The result
    does not depend on `workers`.

    Args:
        workers: processes; None: one per core.
        shard_tokens: approximate tokens per file.
        max_loss: the fraction of the records of a file that may be lost.

    Other arguments, result and errors as `write_dataset`.
    """
    recipe, out_dir, started = recipe or Recipe(), Path(out_dir), time.perf_counter()
    check_separable(tokenizer, recipe)
    described = {**asdict(recipe), "filters": {k: str(v) for k, v in recipe.filters.items()},
                 "sources": source_digests(recipe.filters)}
    key = hashlib.sha256(json.dumps([PARTS_VERSION, tokenizer.to_meta(), described]).encode()).hexdigest()[:16]
    work = out_dir / f".parts.{key}.tmp"
    with writing_to(out_dir, work):
        work.mkdir(exist_ok=True)
        paths = [partition_path(work, partition) for partition in partitions]
        todo = {path: partition for path, partition in zip(paths, partitions, strict=True) if not is_done(path)}
        done = sum(map(is_done, paths))
        if done:
            echo(f"continuing: {done} of {len(paths)} partitions are finished")
        progress = ProgressDisplay(len(paths), done)
        try:
            encode_partitions(todo, tokenizer, recipe, max_loss, min(workers or n_cores(), len(todo)), progress)
        except DataError as error:
            if any(map(is_done, paths)):
                raise DataError(f"{error} {CONTINUES}") from None
            shutil.rmtree(work, ignore_errors=True)
            raise
        skipped = sum_partition_stats(paths)
        try:
            meta = assemble(out_dir, work, paths, tokenizer, recipe, skipped, source=source,
                            extras={"recipe": described, **extras}, shard_tokens=shard_tokens,
                            hint="" if recipe.by_position else BY_POSITION)
        except DataError:  # an empty split: the same partitions would fail again
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    print_summary(meta, skipped, time.perf_counter() - started, out_dir)
    return meta


def check_separable(tokenizer: Tokenizer, recipe: Recipe) -> None:
    """`DataError` if documents are to be separated and the tokenizer has no token for that."""
    if recipe.separate and tokenizer.eot is None:
        candidates = f"--eot names one, such as {', '.join(tokenizer.special[:4])}; " if tokenizer.special else ""
        raise DataError(f"the tokenizer {tokenizer.name} has no end-of-text token that is known, so documents would "
                        f"run into each other ({candidates}--no_separator if that is wanted)")


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
        saved = ""
        with contextlib.suppress(UserError):
            if work and list_dir(work, "*.json"):
                saved = "; the finished partitions are saved: the same command continues"
        path = error.filename if isinstance(error.filename, str) else str(out_dir)
        if not Path(path).absolute().is_relative_to(out_dir.absolute()):  # such as a cache, or a temporary folder
            raise DataError(f"{path}: {error_text(error)} (free disk space, or make it accessible{saved})") from None
        raise DataError(f"{out_dir}: cannot be written: {error_text(error)} (free disk space, or choose another "
                        f"folder: --out_dir, or train.py's --data_dir{saved})") from None


def assemble(out_dir: Path, work: Path, paths: Sequence[Path], tokenizer: Tokenizer, recipe: Recipe, skipped: Skipped,
             *, source: str, extras: Mapping[str, Any], shard_tokens: int = SHARD_TOKENS,
             hint: str = "") -> dict[str, Any]:
    """Write the encoded partitions as shards and commit them with their meta.json, which is returned.

    Args:
        paths: of the partitions, without suffix, in the order of the corpus.
        skipped: what was left out; duplicates are added.
        hint: how to fix an empty split.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {name: SplitWriter(work, name, DTYPES[dtype], shard_tokens) for name in SPLITS}
    try:
        duplicate = find_duplicates(work, paths) if recipe.deduplicate else None
        if duplicate is not None:
            skipped["duplicate"] = int(duplicate.sum())
        write_splits(paths, splits, duplicate)
        for split in splits.values():
            split.finish()
        check_splits(out_dir, splits, skipped, source, hint)
        meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta(),
                "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot if recipe.separate else None, "dtype": dtype,
                "source": source, "splits": {name: split.to_meta() for name, split in splits.items()},
                "skipped": dict(sorted(skipped.items())), **extras}
        commit(out_dir, splits, meta)
        return meta
    finally:
        for split in splits.values():
            split.discard()


def check_splits(out_dir: Path, splits: Mapping[str, SplitWriter], skipped: Skipped, source: str, hint: str) -> None:
    """`DataError` if a split has no tokens, with what was left out and how to get some."""
    empty = next((name for name, split in splits.items() if not split.tokens), None)
    if empty is None:
        return
    n_documents = sum(split.documents for split in splits.values())
    counts = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
    reasons = [f"{source} has too little text: {n_documents:,} document{'s' * (n_documents != 1)}",
               f"left out: {counts}" if counts else "", *skipped.warnings(),
               hint if n_documents else ""]
    raise DataError(f"{out_dir}: the {empty} split would be empty ({'; '.join(filter(None, reasons))})")


# ---- several processes ----

SPAWN = multiprocessing.get_context("spawn")  # the same on every system; no state is inherited
worker_state: dict[str, Any] = {}  # of a worker process: tokenizer, recipe, counters


def init_worker(tokenizer_meta: dict[str, Any], recipe: Recipe, max_loss: float, counters: Any) -> None:
    """Runs first in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    worker_state.update(tokenizer=from_meta(tokenizer_meta), recipe=recipe, max_loss=max_loss, counters=counters)


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

    state = worker_state
    encode_and_finish(path, partition, state["tokenizer"], state["recipe"], state["max_loss"], advance)


def encode_and_finish(path: Path, partition: Partition, tokenizer: Tokenizer, recipe: Recipe, max_loss: float,
                      advance: Callable[[int, int], None]) -> None:
    skipped = Skipped(max_loss=max_loss)
    encode_partition(path, partition.documents(skipped), tokenizer, recipe, skipped, advance)
    finish_partition(path, skipped)


def encode_partitions(todo: Mapping[Path, Partition], tokenizer: Tokenizer, recipe: Recipe, max_loss: float,
                      workers: int, progress: "ProgressDisplay") -> None:
    """Encode partitions; the first failure ends it, after the partitions that are in progress."""
    try:
        if workers > 1:
            encode_in_pool(todo, tokenizer, recipe, max_loss, workers, progress)
            return
        for path, partition in todo.items():
            encode_and_finish(path, partition, tokenizer, recipe, max_loss, progress.advance)
            progress.update(1)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps because memory ran out: use fewer --workers") from None
    finally:
        progress.close()


def encode_in_pool(todo: Mapping[Path, Partition], tokenizer: Tokenizer, recipe: Recipe, max_loss: float,
                   workers: int, progress: "ProgressDisplay") -> None:
    pool = concurrent.futures.ProcessPoolExecutor(workers, SPAWN, init_worker,
                                                  (tokenizer.to_meta(), recipe, max_loss, progress.counters))
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
            echo(tqdm.format_meter(self.done, self.total, self.logged - self.started, initial=self.initial,
                                   unit="partition", postfix=self.speed(), ncols=0))

    def speed(self) -> str:
        tokens, size = self.counters[0], self.counters[1]
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {size / seconds / 1e6:.1f} MB/s"

    def close(self) -> None:
        self.bar.close()


def print_summary(meta: Mapping[str, Any], skipped: Skipped, seconds: float, out_dir: Path) -> None:
    """Print the lines of a finished command, and a warning for each kind of loss on stderr."""
    lines = [f"{name:5} {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes"
             + (f" in {len(s['files'])} files" if len(s["files"]) > 1 else "") for name, s in meta["splits"].items()]
    counts = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items() if count)
    tokens, size = (sum(s[k] for s in meta["splits"].values()) for k in ("tokens", "bytes"))
    speed = f"{tokens / seconds:,.0f} tokens/s, {size / seconds / 1e6:.1f} MB/s"
    echo("\n".join([*lines, f"skipped: {counts or 'nothing'}", f"{seconds:.1f} s, {speed} -> {out_dir}"]))
    for line in skipped.warnings():
        echo(f"warning: {line}", sys.stderr)
