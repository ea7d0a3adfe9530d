"""Where documents come from: a user's files, the Hugging Face hub.

A source is a list of parts. A part is what one process reads on its own: `identity()` is JSON-able and changes when
its content does; `documents(skipped)` yields (split or None, text), the same each time, and counts in `skipped` what
it leaves out. No part is held in memory whole. To add a kind of file: a generator of texts and a line in `READERS`.
"""

import csv
import glob
import gzip
import hashlib
import http.client
import io
import json
import os
import time
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from blockgpt.errors import DataError, UserError, did_you_mean, first_line, require_package

PARTITION_BYTES = 32 * 2**20  # of files: what a process reads at a time, and at most loses when it is killed
MAX_DOCUMENT = 16 * 2**20  # bytes; a longer text file is cut at line ends into several documents
ATTEMPTS = 5  # to go on after a failure of the network
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")  # Tiny Shakespeare, its sha256
RETRY_SECONDS = 2.0  # seconds before the first of them, twice as long before each further one


@dataclass(frozen=True)
class FileSpan:
    """A file, or the part of one that starts (bytes; row groups of parquet) in start … stop - 1; stop None: all."""

    path: str
    kind: str
    size: int
    mtime_ns: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FilePartition:
    """Several small files, or a piece of a large one. text_key: the field or column that holds the text."""

    pieces: tuple
    text_key: str = "text"

    def identity(self):
        return [[p.path, p.kind, p.size, p.mtime_ns, p.start, p.stop, self.text_key] for p in self.pieces]

    def documents(self, skipped):
        for piece in self.pieces:
            try:
                for text in READERS[piece.kind](piece, self.text_key, skipped):
                    if text:
                        yield None, text
                    else:
                        skipped["empty"] += 1
            except (OSError, EOFError, zlib.error, csv.Error) as error:  # pyarrow's errors are OSErrors and ValueErrors
                reason = getattr(error, "strerror", None) or first_line(error)
                raise DataError(f"{piece.path}: cannot be read: {reason}") from None


def file_partitions(patterns, text_key="text"):
    """The parts of the files that glob `patterns` name ("docs/**/*.txt"), in the order of their paths.

    A pattern that is a folder stands for every file below it. Hidden files are left out unless named. The kind goes
    by the suffix (`kind_of`). `DataError` for a pattern that no file matches.
    """
    paths = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        wanted = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        found = [pattern] if os.path.isfile(pattern) else glob.glob(wanted, recursive=True)
        found = [p for p in found if os.path.isfile(p)]
        if not found:
            raise DataError(f"{pattern}: no such file (a pattern in quotes: 'docs/**/*.txt')")
        paths.update(found)
    groups, held = [[]], 0  # of pieces, each a part
    for path in sorted(paths):
        for piece in file_spans(path):
            size = piece.size if piece.stop is None else PARTITION_BYTES
            if held + size > PARTITION_BYTES and groups[-1]:
                groups.append([])
                held = 0
            groups[-1].append(piece)
            held += size
    return [FilePartition(tuple(group), text_key) for group in groups]


def kind_of(path):
    """(kind, compression or None) of a file by its suffixes: jsonl, csv, parquet, else text; gz or zst of these."""
    name, compression = Path(path).name.lower(), None
    for suffix, packer in ((".gz", "gzip"), (".zst", "zstd")):
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), packer
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(name).suffix, "text")
    if kind == "parquet" and compression:
        raise DataError(f"{path}: is parquet, compressed once more (unpack it: parquet is compressed inside)")
    return kind, compression


def file_spans(path):
    """The pieces of a file: itself, or, where it is large and can be entered in the middle, several."""
    kind, compression = kind_of(path)
    try:
        status = os.stat(path)
        base = (str(path), kind, status.st_size, status.st_mtime_ns)
        if kind == "parquet":
            with parquet_file(path) as file:
                groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            starts, held = [0], 0
            for i, size in enumerate(groups):
                if held and held + size > PARTITION_BYTES:
                    starts.append(i)
                    held = 0
                held += size
            stops = [*starts[1:], len(groups)]
        elif compression or kind == "csv" or status.st_size <= PARTITION_BYTES:
            starts, stops = [0], [None]
        else:
            starts = list(range(0, status.st_size, PARTITION_BYTES))
            stops = [*starts[1:], status.st_size]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from None
    return (FileSpan(*base, start, stop) for start, stop in zip(starts, stops, strict=True))


def stream(piece):
    """The content of a file, unpacked, as a binary stream; a truncated one fails when its end is met."""
    compression = kind_of(piece.path)[1]
    if compression == "gzip":
        return gzip.open(piece.path)
    if compression == "zstd":
        return io.BufferedReader(require_package("pyarrow").input_stream(piece.path, compression="zstd"), 2**20)
    return open(piece.path, "rb")


def lines(file, piece, skipped=None):
    """The lines that start in the piece, with their ends; those beyond MAX_DOCUMENT in slices, or left out.

    skipped: where to count the long lines that are left out; None: slice them.
    """
    position, stop = 0, None
    if piece.stop is not None:  # a packed file, which cannot be entered in the middle, is one piece
        position, stop = first_line_start(file, piece.start), first_line_start(file, piece.stop)
        file.seek(position)
    while stop is None or position < stop:
        line = file.readline(MAX_DOCUMENT)
        if not line:
            return
        position += len(line)
        if skipped is not None and len(line) == MAX_DOCUMENT and not line.endswith(b"\n"):
            skipped["too_long"] += 1
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_DOCUMENT)
                position += len(line)
            continue
        yield line


def first_line_start(file, position):
    """Where the first line starts that starts at `position` or behind it: the end of the file if none does."""
    if position == 0:
        return 0
    file.seek(position - 1)
    while block := file.read(2**16):
        if (at := block.find(b"\n")) >= 0:
            return position + at
        position += len(block)
    return position - 1


def text_documents(piece, text_key, skipped):
    """A text file is a document; one beyond MAX_DOCUMENT, or a piece of it, is cut at line ends."""
    with stream(piece) as file:
        held, size = [], 0
        if piece.stop is None:
            held.append(file.read(MAX_DOCUMENT))
            size = len(held[0])
            rest = iter(lambda: file.readline(MAX_DOCUMENT), b"")
        else:
            rest = lines(file, piece)
        for line in rest:
            if size + len(line) > MAX_DOCUMENT and (not held or held[-1].endswith(b"\n")):
                yield from decoded(held, skipped)
                held, size = [], 0
            elif size > 2 * MAX_DOCUMENT:  # no line end far and wide
                whole = b"".join(held)
                cut = next((i for i in range(len(whole) - 1, 0, -1) if whole[i] & 0xC0 != 0x80), len(whole))
                yield from decoded([whole[:cut]], skipped)
                held, size = [whole[cut:]], len(whole) - cut
            held.append(line)
            size += len(line)
        if held:
            yield from decoded(held, skipped)


def decoded(pieces, skipped):
    """The bytes as one text, or, where they are no UTF-8, none and a count."""
    try:
        yield b"".join(pieces).decode("utf-8")
    except UnicodeDecodeError:
        skipped["not_utf8"] += 1


def jsonl_documents(piece, text_key, skipped):
    """A line is an object whose field `text_key` is the document."""
    with stream(piece) as file:
        for line in lines(file, piece, skipped):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                skipped["not_json"] += 1
                continue
            text = value.get(text_key) if type(value) is dict else None
            if type(text) is str:
                yield text
            else:
                skipped[f"no_{text_key}"] += 1


def csv_documents(piece, text_key, skipped):
    """A row is a document, its text in the column `text_key` that the first row names."""
    csv.field_size_limit(MAX_DOCUMENT)
    separator = "\t" if ".tsv" in Path(piece.path).suffixes else ","
    with stream(piece) as file:
        try:
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter=separator)
            if text_key not in (rows.fieldnames or ()):
                raise no_column(piece.path, text_key, rows.fieldnames or ())
            for row in rows:
                yield row[text_key] or ""
        except UnicodeDecodeError as error:
            raise DataError(f"{piece.path}: is not UTF-8 text ({error.reason})") from None


def parquet_documents(piece, text_key, skipped):
    """A row is a document, its text in the column `text_key`."""
    arrow_error = require_package("pyarrow").ArrowException
    with parquet_file(piece.path) as file:
        if text_key not in file.schema_arrow.names:
            raise no_column(piece.path, text_key, file.schema_arrow.names)
        stop = file.num_row_groups if piece.stop is None else piece.stop
        try:
            for batch in file.iter_batches(256, row_groups=list(range(piece.start, stop)), columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if type(text) is str:
                        yield text
                    else:
                        skipped[f"no_{text_key}"] += 1
        except arrow_error as error:
            raise DataError(f"{piece.path}: cannot be read: {first_line(error)}") from None


def parquet_file(path):
    """An open ParquetFile; `DataError` if it is none."""
    parquet, arrow = require_package("pyarrow.parquet"), require_package("pyarrow")
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowException as error:
        raise DataError(f"{path}: is not a parquet file: {first_line(error)}") from None


def no_column(path, text_key, names):
    return DataError(f"{path}: has no column {text_key!r}{did_you_mean(text_key, names)}: --text_key names it")


READERS = {"text": text_documents, "jsonl": jsonl_documents, "csv": csv_documents, "parquet": parquet_documents}


@dataclass(frozen=True)
class HubPartition:
    """One shard of a dataset that `datasets` streams.

    arguments: of datasets.load_dataset, as a tuple of (key, value). into: the split of ours that it fills, or None.
    """

    arguments: tuple
    text_key: str
    index: int
    count: int
    into: str | None = None

    def identity(self):
        return [[list(pair) for pair in self.arguments], self.text_key, self.index, self.count, self.into]

    def documents(self, skipped):
        """Goes on where it stopped when the network fails; `DataError` after ATTEMPTS failures in a row."""
        state, failures, rows = None, 0, None
        while True:
            try:
                if rows is None:
                    shard = hub_dataset(self.arguments).shard(self.count, self.index)
                    if state is not None:
                        shard.load_state_dict(state)
                    rows = iter(shard)
                row = next(rows, None)
                state = shard.state_dict()
            except Exception as error:  # whatever the libraries below make of a broken connection
                failures, rows = failures + 1, None
                if failures == ATTEMPTS:
                    raise DataError(f"{name_of(self.arguments)}: cannot be read any further: {type(error).__name__}: "
                                    f"{first_line(error)}") from None
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
                continue
            failures = 0
            if row is None:
                return
            text = row.get(self.text_key)
            if text and type(text) is str:
                yield self.into, text
            elif self.text_key not in row:
                raise no_column(name_of(self.arguments), self.text_key, row)
            else:
                skipped["empty"] += 1


def hub_partitions(path, name=None, split="train", text_key="text", into=None, **more):
    """The parts of a dataset on the Hugging Face hub (or of local files: path "json", data_files=…), one a file."""
    arguments = tuple(sorted({"path": path, "name": name, "split": split, **more}.items()))
    try:
        count = hub_dataset(arguments).num_shards
    except UserError:
        raise
    except Exception as error:  # no network, no such dataset, another layout of its files: the library's many kinds
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{name_of(arguments)}: cannot be opened: {problem} (--source takes a local copy too)") \
            from None
    return [HubPartition(arguments, text_key, i, count, into) for i in range(count)]


def download(url, sha256, timeout=30):
    """The bytes at `url`; `DataError` if they cannot be had or are others (a proxy's login page, say).

    timeout: seconds without an answer.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be downloaded: {error} (get the file another way and give --source FILE)") \
            from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{url}: gave something else than the file expected (get it another way and give "
                        "--source FILE)")
    return data


def text_of(source, url, sha256):
    """The text of the file that --source names, or, where it is None, of the download."""
    try:
        return (download(url, sha256) if source is None else source.read_bytes()).decode("utf-8")
    except OSError as error:
        raise DataError(f"--source {source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--source {source}: is not UTF-8 text (byte {error.start})") from None


def hub_dataset(arguments):
    """The dataset, streamed. Raises what the library raises."""
    arguments = {k: list(v) if type(v) is tuple else v for k, v in arguments}
    return require_package("datasets").load_dataset(**arguments, streaming=True)


def name_of(arguments):
    found = dict(arguments)
    return " ".join(str(found[k]) for k in ("path", "name", "split") if found.get(k))
