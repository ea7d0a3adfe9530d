"""How text becomes a dataset: `data/<name>/` with train*.bin, val*.bin and, last, meta.json.

The .bin files are raw little-endian token ids. A dataset exists if and only if its meta.json does: everything
is written beside its place and renamed into it, so that a crash leaves the old dataset or none, never a half.
To add a dataset: a `data/<name>/prepare.py` that names a dataset of the hub to `prepare_from_hub`, hands its own parts
(data/sources.py) to `prepare`, or, where there is little of it, its documents to `write_dataset` (see data/pycode).
"""

import collections
import concurrent.futures.process
import contextlib
import fcntl
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
from dataclasses import asdict
from pathlib import Path

from blockgpt.data.dataset import DTYPES, SCHEMA_VERSION, SPLITS, dtype_for
from blockgpt.data.tokenizer import from_meta
from blockgpt.data.writer import (
    SHARD_TOKENS,
    Recipe,
    Split,
    assemble,
    commit,
    encode_partition,
    find_duplicates,
    finish_partition,
    is_done,
    os_error_text,
    partition_path,
    remove_stale,
    sum_partition_stats,
)
from blockgpt.errors import DataError

MEND = "(make room there, or choose another folder: --out_dir, or train.py's --data_dir)"


def write_dataset(out_dir, tokenizer, documents, *, source, skipped=None, separate=True, **extras):
    """Encode a stream of documents into `out_dir`, in this process, all or nothing; returns what meta.json holds.

    documents: iterable of (split, text), split "train" or "val", streamed: one text in memory at a time.
    separate: put the tokenizer's eot behind each. source: where the text is from, in words. skipped: {reason: count}
    of what was left out, which `documents` may go on filling while it is read. extras: JSON-able additions to
    meta.json.
    Token counts include the eot behind each document; bytes are those of the text alone, as UTF-8.
    `DataError` for a split without tokens, a full disk, a folder that cannot be written.
    """
    recipe = Recipe(separate=separate, deduplicate=False)
    refusals = collections.Counter()
    started, work = time.perf_counter(), Path(out_dir) / f".parts.{secrets.token_hex(4)}.tmp"
    with writing_to(out_dir):
        try:
            work.mkdir()
            refused = encode_partition(work / "all", documents, tokenizer, recipe, refusals)
            left_out = {**(skipped or {}), **refusals}
            meta = build(Path(out_dir), work, [work / "all"], tokenizer, recipe, source, left_out, refused, extras)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(summary(meta, time.perf_counter() - started, out_dir))
    return meta


def prepare(out_dir, tokenizer, parts, *, source, recipe=None, workers=None, shard_tokens=SHARD_TOKENS, **extras):
    """Encode `parts` (data/sources.py) into `out_dir`, over several processes; returns what meta.json holds.

    workers: processes; None: a core each. Whatever stops it, the parts that were done are kept, and the same call
    goes on with the others. What comes out does not depend on workers. Other arguments and errors as `write_dataset`.
    """
    recipe, out_dir, started = recipe or Recipe(), Path(out_dir), time.perf_counter()
    key = hashlib.sha256(json.dumps([tokenizer.to_meta(), asdict(recipe)], default=repr).encode()).hexdigest()[:16]
    work = out_dir / f".parts.{key}.tmp"
    with writing_to(out_dir, work), exclusive_lock(work):
        paths = [partition_path(work, part) for part in parts]
        todo = {path: part for path, part in zip(paths, parts, strict=True) if not is_done(path)}
        done = sum(map(is_done, paths))
        if done:
            print(f"going on: {done} of {len(parts)} parts were done", flush=True)
        encode_partitions(todo, tokenizer, recipe, min(workers or cores(), len(todo)), Progress(len(parts), done))
        left_out, refused = sum_partition_stats(paths)
        extras = {"recipe": {**asdict(recipe), "filters": {k: str(v) for k, v in recipe.filters.items()}}, **extras}
        try:
            meta = build(out_dir, work, paths, tokenizer, recipe, source, left_out, refused, extras, shard_tokens)
        except DataError:  # no split can be empty: to do it again would end the same
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    print(summary(meta, time.perf_counter() - started, out_dir))
    return meta


def cores():
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def writing_to(out_dir, kept=None):
    """Around whatever writes below `out_dir`: the folder is there, and what fails there is told in one line.

    kept: a work directory that stays, however long ago its process was killed.
    """
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        remove_stale(Path(out_dir), kept)
        yield
    except OSError as error:
        goes_on = "; what was done is kept, the same command goes on" if kept else ""
        raise DataError(f"{out_dir}: cannot be written: {os_error_text(error)} {MEND[:-1]}{goes_on})") from None


@contextlib.contextmanager
def exclusive_lock(work):
    """The work directory, made if need be, for this process alone."""
    work.mkdir(exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"{work.parent}: another process is preparing the same at this moment (wait for it)") from None
    finally:
        os.close(descriptor)


def build(out_dir, work, paths, tokenizer, recipe, source, left_out, refused, extras, shard_tokens=SHARD_TOKENS):
    """Assemble the parts into shards and publish them with their meta.json, which is returned."""
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {name: Split(work, name, DTYPES[dtype], shard_tokens) for name in SPLITS}
    try:
        drop = find_duplicates(work, paths) if recipe.deduplicate else ()
        if recipe.deduplicate:
            left_out = {**left_out, "duplicate": int(drop.sum())}
        assemble(paths, splits, drop)
        for name, split in splits.items():
            split.finish()
            if not split.tokens:
                gone = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)
                raise DataError(f"{out_dir}: the {name} split would be empty ({source} has too little text"
                                + (f"; left out: {gone}" if gone else "") + (f"; {refused}" if refused else "") + ")")
        meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta(),
                "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot if recipe.separate else None, "dtype": dtype,
                "source": source, "splits": {name: split.account() for name, split in splits.items()},
                "skipped": dict(sorted(left_out.items())), **extras}
        commit(out_dir, splits, meta)
        return meta
    finally:
        for split in splits.values():
            split.discard()


# ---- the parts, over several processes ----

SPAWN = multiprocessing.get_context("spawn")  # the same on every system, and nothing inherited by accident
worker = {}  # what a worker process keeps from its start: tokenizer, recipe, counters


def start_worker(tokenizer, recipe, counters):
    """Runs first in each worker process. tokenizer: its entry in meta.json."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=end_with_parent, daemon=True).start()
    worker.update(tokenizer=from_meta(tokenizer), recipe=recipe, counters=counters)


def end_with_parent():
    """Where the main process was killed: go too, or this one would wait for ever, or write where its successor does."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_one(path, part):
    """Encode one part in a worker process."""
    def advance(tokens, size):
        with worker["counters"].get_lock():
            worker["counters"][0] += tokens
            worker["counters"][1] += size

    finish_partition(path, *encoded(path, part, worker["tokenizer"], worker["recipe"], advance))


def encoded(path, part, tokenizer, recipe, advance):
    skipped = collections.Counter()
    refused = encode_partition(path, part.documents(skipped), tokenizer, recipe, skipped, advance)
    return skipped, refused


def encode_partitions(todo, tokenizer, recipe, workers, progress):
    """Encode the parts of `todo` {path: part}. The first that fails ends it, after those under way."""
    try:
        if workers <= 1:
            for path, part in todo.items():
                finish_partition(path, *encoded(path, part, tokenizer, recipe, progress.advance))
                progress.part_done()
            return
        pool = concurrent.futures.ProcessPoolExecutor(workers, SPAWN, start_worker,
                                                      (tokenizer.to_meta(), recipe, progress.counters))
        with pool:
            pending = {pool.submit(encode_one, path, part) for path, part in todo.items()}
            try:
                while pending:
                    done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        progress.part_done()
                    progress.show()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process was killed, out of memory perhaps (the parts done are kept: the same command "
                        "goes on, with fewer --workers)") from None
    except DataError as error:
        raise DataError(f"{error} (the parts done are kept: the same command goes on)") from None
    finally:
        progress.close()


class Progress:
    """One line on a terminal, rewritten; in a file, a line now and then. Silent for what takes a moment.

    total, done: parts. counters: tokens and bytes since the start, of all processes.
    """

    def __init__(self, total, done):
        self.total, self.done, self.counters = total, done, SPAWN.Array("Q", 2)
        self.started = self.shown = time.perf_counter()
        self.live = sys.stderr is not None and sys.stderr.isatty()

    def advance(self, tokens, size):
        """Count what this process did, and show it."""
        self.counters[0] += tokens
        self.counters[1] += size
        self.show()

    def part_done(self):
        self.done += 1
        self.show()

    def show(self):
        now = time.perf_counter()
        if now - self.shown < (0.5 if self.live else 30):
            return
        tokens, size = self.counters
        seconds, self.shown = now - self.started, now
        share = self.done / self.total
        filled = int(share * 20)
        line = (f"[{'#' * filled}{'.' * (20 - filled)}] part {self.done}/{self.total}   {tokens:,} tokens   "
                f"{tokens / seconds:,.0f} tokens/s   {size / seconds / 1e6:.1f} MB/s")
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + line[:width], end="", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def close(self):
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def summary(meta, seconds, out_dir):
    """What was made, for a reader at a terminal."""
    lines = [f"{name:5} {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes"
             + (f" in {len(s['files'])} files" if len(s["files"]) > 1 else "") for name, s in meta["splits"].items()]
    skipped = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items() if count)
    tokens, size = (sum(s[k] for s in meta["splits"].values()) for k in ("tokens", "bytes"))
    speed = f"{tokens / seconds:,.0f} tokens/s, {size / seconds / 1e6:.1f} MB/s"
    return "\n".join([*lines, f"skipped: {skipped or 'nothing'}", f"{seconds:.1f} s, {speed} -> {out_dir}"])


# ---- what the prepare.py scripts have in common ----


