"""Documents to token files: encode partitions, find duplicates, write shards, commit. `blockgpt.data.prepare` calls it.

Each partition becomes three files in a work directory inside the dataset's folder: `.ids` (the tokens of its documents,
one after the other), `.index` (one `ROW` per document) and, last, `.json`; a partition without its .json is not done.
When all are done, the documents that stay are copied in order into shards. The result therefore does not depend on the
number of processes or on interruptions. Memory holds one document and a block of an index, whatever the corpus size.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blockgpt.data.dataset import DTYPES, SPLITS, dtype_for
from blockgpt.data.filters import compile_filters, first_failing_filter
from blockgpt.data.losses import Skipped, library_errors
from blockgpt.data.sources import Partition
from blockgpt.data.token_files import memory_map
from blockgpt.data.tokenizer import END_OF_TEXT, Tokenizer, encode_utf8
from blockgpt.errors import DataError
from blockgpt.files import exists, fsync_path, is_dir, list_dir, write_json

ROW = np.dtype([("digest", "<u8", 2), ("tokens", "<u8"), ("bytes", "<u8"), ("split", "u1")])
SHARD_TOKENS = 2**28  # per file: half a gigabyte of uint16
COPY_TOKENS = 2**22  # copied at a time
DEDUP_ROWS = 2**24  # compared at a time
STALE_SECONDS = 24 * 3600  # an untouched temporary of this age belongs to a process that was killed


@dataclass(frozen=True)
class Recipe:
    """The settings that decide which tokens a set of documents gives. Saved in meta.json.

    Attributes:
        val_fraction: the fraction of the documents that is validation, by their hash; with by_position, the fraction at
            the end of each document.
        separate: append the tokenizer's eot to each document.
        deduplicate: keep only the first of identical documents.
        filters: {name: value} of `blockgpt.data.filters`.
    """

    val_fraction: float = 0.01
    by_position: bool = False
    separate: bool = True
    deduplicate: bool = True
    filters: dict[str, Any] = field(default_factory=dict)

    def split_document(self, split: str | None, text: str, digest: bytes) -> list[tuple[str, str, bytes]]:
        """Assign a document to a split; by_position divides it into two.

        Args:
            split: the split that the source assigns, or None.

        Returns:
            [(split, text, digest)], one or two entries.
        """
        if split is not None:
            return [(split, text, digest)]
        if self.by_position:
            cut = int(len(text) * (1 - self.val_fraction))
            halves = (("train", text[:cut]), ("val", text[cut:]))
            return [(name, half, digest_of(encode_utf8(name + half))) for name, half in halves if half]
        uniform = int.from_bytes(digest[:8], "little") / 2**64  # in [0, 1)
        return [("val" if uniform < self.val_fraction else "train", text, digest)]


def digest_of(data: bytes) -> bytes:
    """A 16-byte hash of a document: collisions are improbable in any corpus, at half the size of a full digest."""
    return hashlib.blake2b(data, digest_size=16).digest()


# ---- one partition ----


def encode_partition(path: str | Path, documents: Iterable[tuple[str | None, str]], tokenizer: Tokenizer,
                     recipe: Recipe, skipped: Skipped, advance: Callable[[int, int], None] | None = None) -> None:
    """Write `<path>.ids` and `<path>.index` of the documents.

    Args:
        documents: (split or None, text) each.
        skipped: counts what filters and tokenizer refuse, by reason. The documents' reader says there where it is.
        advance: called with (tokens, bytes) for every block of documents.

    Raises:
        DataError: most documents are lost because the tokenizer or a filter's function fails on them.
    """
    dtype, filters = DTYPES[dtype_for(tokenizer.vocab_size)], compile_filters(recipe.filters)
    eot = np.array([tokenizer.eot] if recipe.separate and tokenizer.eot is not None else [], dtype)
    with open(f"{path}.ids", "wb", buffering=2**20) as ids_file, open(f"{path}.index", "wb") as index_file:
        rows: list[tuple[np.ndarray, int, int, int]] = []
        tokens = size = n_documents = n_lost = 0

        def flush() -> None:
            index_file.write(np.array(rows, ROW).data)
            if advance:
                advance(tokens, size)

        for document_split, text in documents:
            n_documents += 1
            try:
                reason = "filter_failed"
                if failing := first_failing_filter(filters, text):
                    skipped[f"filter_{failing}"] += 1
                    continue
                reason = "not_encodable"
                encoded = encode_document(document_split, text, tokenizer, dtype, recipe)
            except DataError as error:
                skipped.lose(reason, str(error))
                n_lost += 1
                continue
            skipped.markers += contains_marker(text, tokenizer)
            for split, ids, n_bytes, digest in encoded:
                ids_file.write(ids.data)
                ids_file.write(eot.data)
                rows.append((np.frombuffer(digest, "<u8"), len(ids) + len(eot), n_bytes, SPLITS.index(split)))
                tokens, size = tokens + len(ids) + len(eot), size + n_bytes
            if len(rows) >= 4096 or size >= 2**22:
                flush()
                rows, tokens, size = [], 0, 0
        flush()
    skipped.check_encoded(n_lost, n_documents)


def contains_marker(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text contains an end-of-text token as letters."""
    return END_OF_TEXT[0] in text or (tokenizer.eot_text is not None and tokenizer.eot_text in text)


def encode_document(split: str | None, text: str, tokenizer: Tokenizer, dtype: np.dtype,
                    recipe: Recipe) -> list[tuple[str, np.ndarray, int, bytes]]:
    """Encode a document: one or two (split, 1-d ids, bytes of text, digest).

    `DataError` if any of it cannot be encoded: a document is in the dataset complete or not at all.
    """
    data = encode_utf8(text)
    with library_errors("the tokenizer fails on it"):
        return [(name, tokenizer.encode_array(half).astype(dtype), len(data if half is text else encode_utf8(half)),
                 digest) for name, half, digest in recipe.split_document(split, text, digest_of(data))]


def finish_partition(path: str | Path, skipped: Skipped) -> None:
    """Mark a partition as done, after its files are on the disk."""
    fsync_path(f"{path}.ids")
    fsync_path(f"{path}.index")
    write_json(f"{path}.json", skipped.to_json())


def partition_path(work: Path, partition: Partition) -> Path:
    """The path, without suffix, of a partition's files.

    It is named by the hash of the partition's identity (for files: path, size and modification time), so that only a
    partition whose files changed is encoded again.
    """
    return work / hashlib.sha256(json.dumps(partition.identity()).encode()).hexdigest()[:32]


def is_done(path: str | Path) -> bool:
    return exists(f"{path}.json")


def sum_partition_stats(paths: Iterable[Path]) -> Skipped:
    """What the partitions left out, from their .json."""
    skipped = Skipped()
    for path in paths:
        with open(f"{path}.json", "rb") as file:
            skipped.merge(json.load(file))
    return skipped


# ---- all partitions ----


def find_duplicates(work: Path, paths: Sequence[Path]) -> np.ndarray:
    """Mark the documents that occur earlier in the corpus.

    Documents are compared in buckets of about DEDUP_ROWS, by their digest.

    Returns:
        (rows of all indices,) bool, memory-mapped in the work directory.
    """
    lengths = [os.path.getsize(f"{path}.index") // ROW.itemsize for path in paths]
    total = sum(lengths)
    if not total:
        return np.zeros(0, bool)
    duplicate = np.memmap(work / "duplicates", bool, "w+", shape=(total,))
    n_buckets = -(-total // DEDUP_ROWS)
    for bucket in range(n_buckets):
        digest_blocks, id_blocks, offset = [], [], 0
        for path, length in zip(paths, lengths, strict=True):
            digests = memory_map(f"{path}.index", ROW)["digest"]
            in_bucket = np.flatnonzero(digests[:, 0] // 2**32 % n_buckets == bucket) if n_buckets > 1 else slice(None)
            digest_blocks.append(digests[in_bucket])
            id_blocks.append(np.arange(offset, offset + length)[in_bucket])
            offset += length
        bucket_digests, document_ids = np.concatenate(digest_blocks), np.concatenate(id_blocks)
        # Sorted by digest, then by place in the corpus: of identical documents, the first stays.
        order = np.lexsort((document_ids, bucket_digests[:, 1], bucket_digests[:, 0]))
        ordered = bucket_digests[order]
        duplicate[document_ids[order[1:]]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return duplicate


def write_splits(paths: Iterable[Path], splits: dict[str, "SplitWriter"], duplicate: np.ndarray | None) -> None:
    """Copy the documents of all partitions into their splits, in the order of the corpus.

    Args:
        duplicate: what `find_duplicates` returns: the documents to leave out; None: copy all.
    """
    offset = 0  # of the partition's first document in `duplicate`
    for path in paths:
        ids, index = memory_map(f"{path}.ids", splits["train"].dtype), memory_map(f"{path}.index", ROW)
        token = row = 0
        while row < len(index):
            rows = index[row:row + 2**16]
            ends = np.cumsum(rows["tokens"].astype(np.int64))
            n = max(1, int(np.searchsorted(ends, COPY_TOKENS, "right")))  # documents that fit into COPY_TOKENS
            rows, block = rows[:n], ids[token:token + int(ends[n - 1])]
            keep = np.ones(n, bool) if duplicate is None else ~duplicate[offset + row:offset + row + n]
            for split_index, name in enumerate(SPLITS):
                selected = keep & (rows["split"] == split_index)
                if selected.any():
                    tokens = block if selected.all() else block[np.repeat(selected, rows["tokens"].astype(np.int64))]
                    splits[name].write(tokens, int(rows["bytes"][selected].sum()), int(selected.sum()))
            token, row = token + len(block), row + n
        offset += len(index)


@dataclass
class Shard:
    """A file of tokens in the work directory, with its size in bytes and its digest so far."""

    path: Path
    size: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)


class SplitWriter:
    """Writes the shards of one split into the work directory, and counts what they contain."""

    def __init__(self, work: Path, name: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.work, self.name, self.dtype, self.shard_tokens = work, name, dtype, shard_tokens
        self.tokens = self.bytes = self.documents = 0
        self.shards: list[Shard] = []
        self.file: BinaryIO | None = None  # of the last shard

    def write(self, ids: np.ndarray, n_bytes: int, documents: int) -> None:
        """Append the tokens of whole documents. A full shard is closed first: it ends between two documents."""
        if self.file is None or self.shards[-1].size >= self.shard_tokens * self.dtype.itemsize:
            self.finish()
            self.file = self._open_shard()
        shard = self.shards[-1]
        self.file.write(ids.data)
        shard.sha256.update(ids.data)
        shard.size += ids.nbytes
        self.tokens += len(ids)
        self.bytes += n_bytes
        self.documents += documents

    def _open_shard(self) -> BinaryIO:
        path = self.work / f"{self.name}.{len(self.shards)}.bin"  # replaces what a killed process wrote
        file = open(path, "wb", buffering=2**20)  # noqa: SIM115 (open until `finish`)
        self.shards.append(Shard(path))
        return file

    def finish(self) -> None:
        """Close the last shard, once it is on the disk."""
        if self.file:
            self.file.close()
            fsync_path(self.shards[-1].path)
            self.file = None

    def files(self) -> dict[str, Shard]:
        """{final file name: shard}: train.bin, or train_00000.bin and so on if there are several."""
        if len(self.shards) == 1:
            return {f"{self.name}.bin": self.shards[0]}
        return {f"{self.name}_{i:05}.bin": shard for i, shard in enumerate(self.shards)}

    def to_meta(self) -> dict[str, Any]:
        """The entry of this split in meta.json."""
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
                "files": {name: {"sha256": shard.sha256.hexdigest(), "size": shard.size}
                          for name, shard in self.files().items()}}

    def discard(self) -> None:
        """Remove the shards that `commit` did not rename."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        for shard in self.shards:
            with contextlib.suppress(OSError):
                shard.path.unlink()


# ---- the dataset's folder ----


def commit(out_dir: Path, splits: dict[str, SplitWriter], meta: dict[str, Any]) -> None:
    """Rename the finished shards to their final names, then write meta.json; remove the shards of an older dataset.

    There is no meta.json between the first rename and the last. If the existing one has the same content, it stays: it
    is true throughout, and processes that prepare the same dataset at once never remove it from each other. If their
    results differ, a mixture of files fails the digest check when it is opened.
    """
    path = out_dir / "meta.json"
    try:
        existing = json.loads(path.read_bytes())
    except (OSError, ValueError):
        existing = None
    if existing != meta:
        path.unlink(missing_ok=True)
        fsync_path(out_dir)
    for split in splits.values():
        for name, shard in split.files().items():
            os.replace(shard.path, out_dir / name)
    fsync_path(out_dir)
    write_json(path, meta)
    fsync_path(out_dir)
    current = {name for split in splits.values() for name in split.files()}
    for name in shard_names(existing):
        if name not in current:
            (out_dir / name).unlink(missing_ok=True)


def shard_names(meta: Any) -> list[str]:
    """The names of the shards that a meta.json lists. Its content is not trusted: names must be *.bin in its folder."""
    try:
        names = [name for split in SPLITS for name in meta["splits"][split]["files"]]
        return [name for name in names if name.endswith(".bin") and "/" not in name]
    except (KeyError, TypeError, AttributeError):
        return []


def remove_stale(out_dir: Path, keep: Path | None = None) -> None:
    """Remove temporaries of processes that were killed long ago: they can be as large as the dataset.

    Args:
        keep: a work directory to keep, whatever its age.
    """
    for pattern in (".meta.json.*.tmp", ".parts.*.tmp"):
        for path in list_dir(out_dir, pattern):
            if path == keep:
                continue
            with contextlib.suppress(FileNotFoundError):
                newest = max(p.stat().st_mtime for p in (path, *list_dir(path)))
                if time.time() - newest <= STALE_SECONDS:
                    continue
                if is_dir(path):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
