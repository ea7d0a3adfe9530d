"""Documents to token files: encode parts, drop duplicates, assemble shards, publish. `blockgpt.data.prepare` runs it.

Each part becomes three files in a work directory beside the dataset: `.ids` (the tokens of its documents, one behind
the other), `.index` (one `ROW` a document) and, last, `.json`: a part without it is not done. When all are done,
the documents that stay are copied in order into shards. So what comes out does not depend on how many processes
worked, or on how often they were killed; memory holds a document and a part of an index, whatever the corpus.
"""

import collections
import contextlib
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field

import numpy as np

from blockgpt.data.dataset import DTYPES, SPLITS, dtype_for
from blockgpt.data.filters import compile_filters, first_failing_filter
from blockgpt.data.tokenizer import encode_utf8
from blockgpt.errors import DataError, first_line
from blockgpt.files import fsync_path, write_json

ROW = np.dtype([("digest", "<u8", 2), ("tokens", "<u8"), ("bytes", "<u8"), ("split", "u1")])
SHARD_TOKENS = 2**28  # of one file: half a gigabyte of uint16
COPY_TOKENS = 2**22  # copied at a time
DEDUP_ROWS = 2**24  # compared at a time
STALE = 24 * 3600  # seconds after which an untouched temporary belongs to a process that was killed


@dataclass(frozen=True)
class Recipe:
    """What decides, beside the documents, which tokens come out.

    val_fraction: of the documents, by their hash, or with by_position of each document's characters, its end.
    separate: put the tokenizer's eot behind each document. filters: {name: value} of `blockgpt.data.filters`.
    """

    val_fraction: float = 0.01
    by_position: bool = False
    separate: bool = True
    deduplicate: bool = True
    filters: dict = field(default_factory=dict)

    def pieces(self, split, text, digest):
        """[(split, text, digest)] that a document makes: itself, or where it is split by position, two."""
        if split is not None:
            return [(split, text, digest)]
        if self.by_position:
            cut = int(len(text) * (1 - self.val_fraction))
            return [(s, t, digest_of(encode_utf8(s + t))) for s, t in (("train", text[:cut]), ("val", text[cut:])) if t]
        drawn = int.from_bytes(digest[:8], "little") / 2**64
        return [("val" if drawn < self.val_fraction else "train", text, digest)]


def digest_of(data):
    """16 bytes that tell documents apart: enough for any corpus, half the room of a full digest."""
    return hashlib.blake2b(data, digest_size=16).digest()


def encode_partition(path, documents, tokenizer, recipe, skipped, advance=None):
    """Write `<path>.ids` and `<path>.index` of the documents, an iterable of (split or None, text).

    skipped: a Counter that gets what filters and tokenizer refuse. advance(tokens, bytes): called now and then.
    Returns why the first document that could not be encoded was refused, or None.
    """
    dtype, filters, refused = DTYPES[dtype_for(tokenizer.vocab_size)], compile_filters(recipe.filters), None
    eot = np.array([tokenizer.eot] if recipe.separate and tokenizer.eot is not None else [], dtype)
    with open(f"{path}.ids", "wb", buffering=2**20) as ids_file, open(f"{path}.index", "wb") as index_file:
        index, tokens, size = [], 0, 0
        for split, text in documents:
            if reason := first_failing_filter(filters, text):
                skipped[f"filter_{reason}"] += 1
                continue
            try:
                data = encode_utf8(text)
                # Both halves are encoded before either is written: a document is in the dataset whole or not at all.
                pieces = [(s, tokenizer.encode_array(t).astype(dtype), len(data) if t is text else len(encode_utf8(t)), d)
                          for s, t, d in recipe.pieces(split, text, digest_of(data))]
            except DataError as error:
                skipped["not_encodable"] += 1
                refused = refused or str(error)
                continue
            for into, ids, n_bytes, digest in pieces:
                ids_file.write(ids.data)
                ids_file.write(eot.data)
                index.append((np.frombuffer(digest, "<u8"), len(ids) + len(eot), n_bytes, SPLITS.index(into)))
                tokens, size = tokens + len(ids) + len(eot), size + n_bytes
            if len(index) >= 4096 or size >= 2**22:
                index_file.write(np.array(index, ROW).data)
                if advance:
                    advance(tokens, size)
                index, tokens, size = [], 0, 0
        index_file.write(np.array(index, ROW).data)
        if advance:
            advance(tokens, size)
    return refused


def finish_partition(path, skipped, refused):
    """Mark a part as done, once its files are on the disk."""
    fsync_path(f"{path}.ids")
    fsync_path(f"{path}.index")
    write_json(f"{path}.json", {"skipped": dict(skipped), "refused": refused})


def partition_path(work, part):
    """Where a part's files stand: by its content, so that a file that changed is read again, and no other."""
    return work / hashlib.sha256(json.dumps(part.identity()).encode()).hexdigest()[:32]


def is_done(path):
    return os.path.exists(f"{path}.json")


def memory_map(path, dtype):
    """The file as a read-only array; np.memmap knows no empty ones."""
    return np.memmap(path, dtype, "r").view(np.ndarray) if os.path.getsize(path) else np.empty(0, dtype)


def find_duplicates(work, paths):
    """Which of the parts' documents stood there before: a bool array on the disk, one for each row of the indices."""
    rows = [os.path.getsize(f"{path}.index") // ROW.itemsize for path in paths]
    total = sum(rows)
    if not total:
        return np.zeros(0, bool)
    drop = np.memmap(work / "duplicates", bool, "w+", shape=(total,))
    buckets = -(-total // DEDUP_ROWS)
    for bucket in range(buckets):
        found, numbers, first = [], [], 0
        for path, n in zip(paths, rows, strict=True):
            digests = memory_map(f"{path}.index", ROW)["digest"]
            mine = np.flatnonzero(digests[:, 0] // 2**32 % buckets == bucket) if buckets > 1 else slice(None)
            found.append(digests[mine])
            numbers.append(np.arange(first, first + n)[mine])
            first += n
        found, numbers = np.concatenate(found), np.concatenate(numbers)
        order = np.lexsort((numbers, found[:, 1], found[:, 0]))  # of equal ones, the first of the corpus stays
        ordered = found[order]
        drop[numbers[order[1:]]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return drop


def assemble(paths, splits, drop):
    """Copy the documents of the parts that stay into `splits` {name: Split}, in the order of the corpus."""
    first = 0
    for path in paths:
        ids, index = memory_map(f"{path}.ids", splits["train"].dtype), memory_map(f"{path}.index", ROW)
        at = row = 0
        while row < len(index):
            rows = index[row:row + 2**16]
            ends = np.cumsum(rows["tokens"].astype(np.int64))
            n = max(1, int(np.searchsorted(ends, COPY_TOKENS, "right")))
            rows, tokens = rows[:n], ids[at:at + int(ends[n - 1])]
            stays = ~drop[first + row:first + row + n] if len(drop) else np.ones(n, bool)
            for number, name in enumerate(SPLITS):
                mine = stays & (rows["split"] == number)
                if mine.any():
                    chosen = tokens if mine.all() else tokens[np.repeat(mine, rows["tokens"].astype(np.int64))]
                    splits[name].add(chosen, int(rows["bytes"][mine].sum()), int(mine.sum()))
            at, row = at + len(tokens), row + n
        first += len(index)


class Split:
    """One split on its way to the disk: shards in the work directory, counted and digested as they grow."""

    def __init__(self, work, name, dtype, shard_tokens=SHARD_TOKENS):
        self.work, self.name, self.dtype, self.shard_tokens = work, name, dtype, shard_tokens
        self.tokens = self.bytes = self.documents = 0
        self.shards, self.file = [], None  # a shard: [temporary, digest, size]

    def add(self, ids, n_bytes, documents):
        """Append the tokens of some documents; a shard that is full ends here, between documents."""
        if self.file is None or self.shards[-1][2] >= self.shard_tokens * self.dtype.itemsize:
            self._next_shard()
        data = ids.data
        self.file.write(data)
        self.shards[-1][1].update(data)
        self.shards[-1][2] += ids.nbytes
        self.tokens, self.bytes, self.documents = self.tokens + len(ids), self.bytes + n_bytes, \
            self.documents + documents

    def _next_shard(self):
        self.finish()
        temporary = self.work / f"{self.name}.{len(self.shards)}.bin"  # over what a killed process left there
        self.file = open(temporary, "wb", buffering=2**20)  # noqa: SIM115 (lives until `finish`)
        self.shards.append([temporary, hashlib.sha256(), 0])

    def finish(self):
        if self.file:
            self.file.close()
            fsync_path(self.shards[-1][0])
            self.file = None

    def files(self):
        """{final name: shard}: train.bin, or train_00000.bin and so on where there are several."""
        if len(self.shards) == 1:
            return {f"{self.name}.bin": self.shards[0]}
        return {f"{self.name}_{i:05}.bin": shard for i, shard in enumerate(self.shards)}

    def account(self):
        """This split's entry in meta.json."""
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
                "files": {name: {"sha256": digest.hexdigest(), "size": size}
                          for name, (_, digest, size) in self.files().items()}}

    def discard(self):
        """Leave no temporary behind, whatever happened; nothing to do once they are renamed."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        for temporary, *_ in self.shards:
            with contextlib.suppress(OSError):
                temporary.unlink()


def commit(out_dir, splits, meta):
    """Rename the finished files into place; from the first rename to the last there is no meta.json.

    Unless it already says the same: then it stays true throughout, and processes that prepare one dataset side
    by side never take it from each other. (If theirs differ, a mix of files fails the digests when it is opened.)
    Shards of an older, longer dataset go.
    """
    path = out_dir / "meta.json"
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        before = None
    if before != meta:
        path.unlink(missing_ok=True)
        fsync_path(out_dir)
    for split in splits.values():
        for name, (temporary, *_) in split.files().items():
            os.replace(temporary, out_dir / name)
    fsync_path(out_dir)
    write_json(path, meta)
    fsync_path(out_dir)
    kept = {name for split in splits.values() for name in split.files()}
    for old in shards_of(before):
        if old not in kept:
            (out_dir / old).unlink(missing_ok=True)


def shards_of(meta):
    """The names of the files beside it that a meta.json, of which nothing is known, claims as its own."""
    try:
        names = [name for split in SPLITS for name in meta["splits"][split]["files"]]
        return [name for name in names if name.endswith(".bin") and "/" not in name]
    except (KeyError, TypeError, AttributeError):
        return []


def remove_stale(out_dir, kept=None):
    """Remove the temporaries, but for `kept`, of processes killed long ago: they can be as large as the dataset."""
    for pattern in (".meta.json.*.tmp", ".parts.*.tmp"):
        for path in out_dir.glob(pattern):
            if path == kept:
                continue
            with contextlib.suppress(FileNotFoundError):
                newest = max(p.stat().st_mtime for p in (path, *(path.iterdir() if path.is_dir() else ())))
                if time.time() - newest <= STALE:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def sum_partition_stats(paths):
    """(Counter of what the parts left out, why the first document was refused or None), from their .json."""
    skipped, refused = collections.Counter(), None
    for path in paths:
        with open(f"{path}.json", "rb") as file:
            done = json.load(file)
        skipped.update(done["skipped"])
        refused = refused or done["refused"]
    return skipped, refused


def os_error_text(error):
    """An OSError in words."""
    return error.strerror or first_line(error)
