"""How text becomes a dataset: `data/<name>/` with train.bin, val.bin and, last, meta.json.

The .bin files are raw little-endian token ids. A dataset exists if and only if its meta.json does: everything
is written beside its place and renamed into it, so that a crash leaves the old dataset or none, never a half.
To add a dataset: a `data/<name>/prepare.py` that hands its documents to `write_dataset` (see data/pycode).
"""

import contextlib
import hashlib
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from errors import DataError, did_you_mean
from files import sync, write_json

ROOT = Path(__file__).resolve().parent
EMBEDDED = "pycode"  # the corpus that needs no download: every Python brings it
SCHEMA_VERSION = 1
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
STALE = 24 * 3600  # seconds after which an untouched temporary belongs to a process that was killed


def dataset_dir(dataset, data_dir=None):
    """Where a dataset stands; data_dir None: data/ beside this file."""
    return Path(data_dir or ROOT / "data") / dataset


def prepare_command(dataset, data_dir=None):
    """The command, as typed in the project's folder, that makes a dataset."""
    elsewhere = f" --out_dir {shlex.quote(str(dataset_dir(dataset, data_dir)))}" if data_dir else ""
    return f"python data/{dataset}/prepare.py{elsewhere}"


def not_prepared(dataset, data_dir=None):
    """The `DataError` for a dataset that has no meta.json."""
    scripts = {p.parent.name for p in ROOT.glob("data/*/prepare.py")}
    if dataset in scripts:
        return DataError(f"dataset {dataset!r} is not prepared: run {prepare_command(dataset, data_dir)}")
    prepared = {p.parent.name for p in Path(data_dir or ROOT / "data").glob("*/meta.json")}
    return DataError(f"dataset {dataset!r} does not exist: no {dataset_dir(dataset, data_dir)}/meta.json"
                     + did_you_mean(dataset, sorted(scripts | prepared)))


def ensure(dataset, data_dir=None):
    """Make the embedded corpus if it is asked for and not there yet; `DataError` for any other dataset not there.

    Of the processes of one run, let one call this and the others wait.
    """
    directory = dataset_dir(dataset, data_dir)
    if (directory / "meta.json").exists():
        return
    if dataset != EMBEDDED:
        raise not_prepared(dataset, data_dir)
    print(f"preparing {dataset} in {directory}: once, a few seconds", flush=True)
    command = [sys.executable, ROOT / "data" / dataset / "prepare.py", "--out_dir", directory]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise DataError(f"dataset {dataset!r} could not be prepared: {last.removeprefix('error: ')}")


def write_dataset(out_dir, tokenizer, documents, *, source, skipped=None, **extras):
    """Encode `documents` into `out_dir`, all or nothing; prints a summary and returns what meta.json holds.

    documents: iterable of (split, text), split "train" or "val", streamed: one text in memory at a time.
    source: where the text is from, in words. skipped: {reason: count} of what was left out, which `documents`
    may go on filling while it is read. extras: JSON-able additions to meta.json.
    Token counts include the eot behind each document; bytes are those of the text alone, as UTF-8.
    `DataError` for a split without tokens, a full disk, a folder that cannot be written.
    """
    started, out_dir = time.perf_counter(), Path(out_dir)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    splits = {}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_stale(out_dir)
        for name in SPLITS:
            splits[name] = SplitFile(out_dir / f"{name}.bin", DTYPES[dtype])
        for name, text in documents:
            splits[name].add(tokenizer, text)
        for name, split in splits.items():
            split.finish()
            if not split.tokens:
                raise DataError(f"{out_dir}: the {name} split would be empty ({source} has too little text)")
        meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta(),
                "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "dtype": dtype, "source": source,
                "splits": {name: split.account() for name, split in splits.items()},
                "skipped": dict(sorted((skipped or {}).items())), **extras}
        publish(out_dir, splits.values(), meta)
    except OSError as error:
        raise DataError(f"{out_dir}: cannot be written: {error.strerror or error} "
                        "(make room there, or choose another folder: --out_dir, "
                        "or train.py's --data_dir)") from None
    finally:
        for split in splits.values():
            split.discard()
    print(summary(meta, time.perf_counter() - started, out_dir))
    return meta


class SplitFile:
    """One split on its way to the disk: a temporary beside its place, counted and digested as it grows."""

    def __init__(self, path, dtype):
        self.path, self.dtype = path, dtype
        # Not the process id: two containers on one shared folder may have the same.
        self.temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self.file = open(self.temporary, "xb", buffering=1 << 20)  # noqa: SIM115 (lives as long as self)
        self.digest = hashlib.sha256()
        self.tokens = self.bytes = self.documents = self.size = 0

    def add(self, tokenizer, text):
        ids = tokenizer.encode(text)
        if tokenizer.eot is not None:
            ids = [*ids, tokenizer.eot]
        data = np.array(ids, self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.bytes += len(text.encode("utf-8"))
        self.documents += 1
        self.size += len(data)

    def finish(self):
        self.file.close()
        sync(self.temporary)

    def account(self):
        """This split's entry in meta.json."""
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
                "files": {self.path.name: {"sha256": self.digest.hexdigest(), "size": self.size}}}

    def discard(self):
        """Leave no temporary behind, whatever happened; nothing to do once it is renamed."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()


def publish(out_dir, split_files, meta):
    """Rename the finished files into place; from the first rename to the last there is no meta.json.

    Unless it already says the same: then it stays true throughout, and processes that prepare one dataset side
    by side never take it from each other. (If theirs differ, a mix of files fails the digests when it is opened.)
    """
    path = out_dir / "meta.json"
    try:
        same = json.loads(path.read_bytes()) == meta
    except (OSError, ValueError):
        same = False
    if not same:
        path.unlink(missing_ok=True)
        sync(out_dir)
    for split in split_files:
        os.replace(split.temporary, split.path)
    sync(out_dir)
    write_json(path, meta)
    sync(out_dir)


def remove_stale(out_dir):
    """Remove the temporaries of processes that were killed long ago: they can be as large as the dataset."""
    for name in ("train.bin", "val.bin", "meta.json"):
        for path in out_dir.glob(f".{name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


def summary(meta, seconds, out_dir):
    """What was made, for a reader at a terminal."""
    lines = [f"{name:5} {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes"
             for name, s in meta["splits"].items()]
    skipped = ", ".join(f"{count} {reason}" for reason, count in meta["skipped"].items() if count)
    return "\n".join([*lines, f"skipped: {skipped or 'nothing'}", f"{seconds:.1f} s -> {out_dir}"])
