"""Text sources: local files and datasets on the Hugging Face hub, as partitions.

A source is a list of `Partition`s; a partition is what one process reads at a time. Partitions are streamed, never
loaded into memory whole. To add a file format: a generator of texts, a line in `READERS` and its suffix in
`file_format`. To add a source: a function that returns partitions.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blockgpt.errors import DataError, UserError, did_you_mean, error_text, first_line, require_package

PARTITION_BYTES = 32 * 2**20  # of files: what a process reads at a time, and the most that is lost when it is killed
MAX_DOCUMENT = 16 * 2**20  # bytes; a longer text file is split at line ends into several documents
ATTEMPTS = 5  # network failures in a row before an error
RETRY_SECONDS = 2.0  # the wait before the first retry; it doubles before each further one
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")  # Tiny Shakespeare, its sha256


class Partition(Protocol):
    """What one process reads: a deterministic stream of documents. It is pickled to worker processes."""

    def identity(self) -> Any:
        """A JSON-able description of what is read. Equal identities are taken to be equal documents.

        A `FilePartition` is described by path, size and modification time, not by the content of the files.
        """

    def documents(self, skipped: Counter[str]) -> Iterator[tuple[str | None, str]]:
        """Yield (split or None, text), in the same order each time; count what is left out in `skipped`, by reason."""


@dataclass(frozen=True)
class FileSpan:
    """A file, or a range of it.

    Attributes:
        format: a key of `READERS`.
        size: of the whole file, in bytes.
        start, stop: the range, in bytes (of a parquet file: in row groups); stop None: to the end of the file.
    """

    path: str
    format: str
    size: int
    mtime_ns: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FilePartition:
    """Several small files, or a range of a large one.

    Attributes:
        text_key: the field or column that contains the text.
    """

    spans: tuple[FileSpan, ...]
    text_key: str = "text"

    def identity(self) -> list[list[Any]]:
        return [[s.path, s.format, s.size, s.mtime_ns, s.start, s.stop, self.text_key] for s in self.spans]

    def documents(self, skipped: Counter[str]) -> Iterator[tuple[None, str]]:
        for span in self.spans:
            try:
                for text in READERS[span.format](span, self.text_key, skipped):
                    if text:
                        yield None, text
                    else:
                        skipped["empty"] += 1
            except (OSError, EOFError, zlib.error, csv.Error) as error:  # pyarrow's errors are OSErrors and ValueErrors
                raise DataError(f"{span.path}: cannot be read: {error_text(error)}") from None


def file_partitions(patterns: Iterable[str], text_key: str = "text") -> list[FilePartition]:
    """Partition files.

    Args:
        patterns: files, folders or glob patterns such as "docs/**/*.txt". A folder means every file below it. Hidden
            files are left out unless they are named. `file_format` finds the format by the suffix.
        text_key: the field or column that contains the text, in formats that have fields.

    Returns:
        The partitions, in the order of the paths, each about PARTITION_BYTES in size.

    Raises:
        DataError: a pattern that no file matches, or a file that cannot be opened.
    """
    groups: list[list[FileSpan]] = [[]]
    group_size = 0
    for path in matching_files(patterns):
        for span in file_spans(path):
            size = span.size if span.stop is None else PARTITION_BYTES
            if group_size + size > PARTITION_BYTES and groups[-1]:
                groups.append([])
                group_size = 0
            groups[-1].append(span)
            group_size += size
    return [FilePartition(tuple(group), text_key) for group in groups]


def matching_files(patterns: Iterable[str]) -> list[str]:
    """The files that match any of the patterns of `file_partitions`, sorted; `DataError` for a pattern without one."""
    paths: set[str] = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        wildcard = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(wildcard, recursive=True)
        matches = [p for p in matches if os.path.isfile(p)]
        if not matches:
            raise DataError(f"{pattern}: no such file (write a pattern in quotes: 'docs/**/*.txt')")
        paths.update(matches)
    return sorted(paths)


def file_format(path: str | Path) -> tuple[str, str | None]:
    """The format of a file (a key of `READERS`) and its compression (gzip, zstd or None), by its suffixes."""
    name, compression = Path(path).name.lower(), None
    for suffix, codec in ((".gz", "gzip"), (".zst", "zstd")):
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), codec
    formats = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    format = formats.get(Path(name).suffix, "text")
    if format == "parquet" and compression:
        raise DataError(f"{path}: is a compressed parquet file (decompress it: parquet compresses its columns)")
    return format, compression


def file_spans(path: str | Path) -> Iterator[FileSpan]:
    """A file as one span, or, if it is large and can be read from the middle, as several."""
    format, compression = file_format(path)
    starts: list[int]
    stops: list[int | None]
    try:
        status = os.stat(path)
        if format == "parquet":
            starts, n_groups = row_group_ranges(path)
            stops = [*starts[1:], n_groups]
        elif compression or format == "csv" or status.st_size <= PARTITION_BYTES:
            starts, stops = [0], [None]
        else:
            starts = list(range(0, status.st_size, PARTITION_BYTES))
            stops = [*starts[1:], status.st_size]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from None
    return (FileSpan(str(path), format, status.st_size, status.st_mtime_ns, start, stop)
            for start, stop in zip(starts, stops, strict=True))


def row_group_ranges(path: str | Path) -> tuple[list[int], int]:
    """The first row group of each span of a parquet file, of about PARTITION_BYTES each, and the number of groups."""
    with parquet_file(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    starts, span_size = [0], 0
    for i, size in enumerate(sizes):
        if span_size and span_size + size > PARTITION_BYTES:
            starts.append(i)
            span_size = 0
        span_size += size
    return starts, len(sizes)


def open_span(span: FileSpan) -> BinaryIO:
    """The content of the file, decompressed, as a binary stream. Reading to the end of a truncated file fails."""
    compression = file_format(span.path)[1]
    if compression == "gzip":
        return gzip.open(span.path)  # type: ignore[return-value]  # typeshed: a GzipFile is no BinaryIO
    if compression == "zstd":
        return io.BufferedReader(require_package("pyarrow").input_stream(span.path, compression="zstd"), 2**20)
    return open(span.path, "rb")


def read_lines(file: BinaryIO, span: FileSpan, skipped: Counter[str] | None = None) -> Iterator[bytes]:
    """Yield the lines that start in the span, with their line ends.

    Args:
        skipped: where to count the lines longer than MAX_DOCUMENT, which are left out; None: yield them in slices.
    """
    position, stop = 0, None
    if span.stop is not None:  # a compressed file cannot be read from the middle and is one span
        position, stop = next_line_start(file, span.start), next_line_start(file, span.stop)
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


def next_line_start(file: BinaryIO, position: int) -> int:
    """The position of the first line that starts at `position` or after it; the end of the file if there is none."""
    if position == 0:
        return 0
    file.seek(position - 1)
    while block := file.read(2**16):
        if (at := block.find(b"\n")) >= 0:
            return position + at
        position += len(block)
    return position - 1


def text_documents(span: FileSpan, text_key: str, skipped: Counter[str]) -> Iterator[str]:
    """A text file is one document; one longer than MAX_DOCUMENT, or a span of it, is split at line ends."""
    with open_span(span) as file:
        buffer: list[bytes] = []
        size = 0
        lines: Iterable[bytes]
        if span.stop is None:
            buffer.append(file.read(MAX_DOCUMENT))
            size = len(buffer[0])
            lines = iter(lambda: file.readline(MAX_DOCUMENT), b"")
        else:
            lines = read_lines(file, span)
        for line in lines:
            if size + len(line) > MAX_DOCUMENT and (not buffer or buffer[-1].endswith(b"\n")):
                yield from decode_utf8(buffer, skipped)
                buffer, size = [], 0
            elif size > 2 * MAX_DOCUMENT:  # no line end so far: split between two characters
                joined = b"".join(buffer)
                cut = next((i for i in range(len(joined) - 1, 0, -1) if joined[i] & 0xC0 != 0x80), len(joined))
                yield from decode_utf8([joined[:cut]], skipped)
                buffer, size = [joined[cut:]], len(joined) - cut
            buffer.append(line)
            size += len(line)
        if buffer:
            yield from decode_utf8(buffer, skipped)


def decode_utf8(buffer: Sequence[bytes], skipped: Counter[str]) -> Iterator[str]:
    """Yield the joined bytes as one text; if they are not UTF-8, count them instead."""
    try:
        yield b"".join(buffer).decode("utf-8")
    except UnicodeDecodeError:
        skipped["not_utf8"] += 1


def jsonl_documents(span: FileSpan, text_key: str, skipped: Counter[str]) -> Iterator[str]:
    """A line is a JSON object, and its field `text_key` is the document."""
    with open_span(span) as file:
        for line in read_lines(file, span, skipped):
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


def csv_documents(span: FileSpan, text_key: str, skipped: Counter[str]) -> Iterator[str]:
    """A row is a document. The first row names the columns; the text is in the column `text_key`."""
    csv.field_size_limit(MAX_DOCUMENT)
    separator = "\t" if ".tsv" in Path(span.path).suffixes else ","
    with open_span(span) as file:
        try:
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter=separator)
            if text_key not in (rows.fieldnames or ()):
                raise no_column(span.path, text_key, rows.fieldnames or ())
            for row in rows:
                yield row[text_key] or ""
        except UnicodeDecodeError as error:
            raise DataError(f"{span.path}: is not UTF-8 text ({error.reason})") from None


def parquet_documents(span: FileSpan, text_key: str, skipped: Counter[str]) -> Iterator[str]:
    """A row is a document. The text is in the column `text_key`."""
    arrow_error = require_package("pyarrow").ArrowException
    with parquet_file(span.path) as file:
        if text_key not in file.schema_arrow.names:
            raise no_column(span.path, text_key, file.schema_arrow.names)
        stop = file.num_row_groups if span.stop is None else span.stop
        try:
            for batch in file.iter_batches(256, row_groups=list(range(span.start, stop)), columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if type(text) is str:
                        yield text
                    else:
                        skipped[f"no_{text_key}"] += 1
        except arrow_error as error:
            raise DataError(f"{span.path}: cannot be read: {first_line(error)}") from None


def parquet_file(path: str | Path) -> Any:
    """An open pyarrow.parquet.ParquetFile; `DataError` if the file is not parquet."""
    parquet, arrow = require_package("pyarrow.parquet"), require_package("pyarrow")
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowException as error:
        raise DataError(f"{path}: is not a parquet file: {first_line(error)}") from None


def no_column(path: str, text_key: str, columns: Iterable[str]) -> DataError:
    return DataError(f"{path}: has no column {text_key!r}{did_you_mean(text_key, columns)}: name it with --text_key")


READERS: dict[str, Callable[[FileSpan, str, Counter[str]], Iterator[str]]] = {
    "text": text_documents, "jsonl": jsonl_documents, "csv": csv_documents, "parquet": parquet_documents}


@dataclass(frozen=True)
class HubPartition:
    """One shard of a dataset that the package `datasets` streams.

    Attributes:
        arguments: of datasets.load_dataset, as (key, value) pairs.
        text_key: the column that contains the text.
        index, count: this shard and the number of shards.
        into: the split for which the documents are, or None.
    """

    arguments: tuple[tuple[str, Any], ...]
    text_key: str
    index: int
    count: int
    into: str | None = None

    def identity(self) -> list[Any]:
        return [[list(pair) for pair in self.arguments], self.text_key, self.index, self.count, self.into]

    def documents(self, skipped: Counter[str]) -> Iterator[tuple[str | None, str]]:
        """Yield the documents; after a network failure, continue where it stopped.

        Raises:
            DataError: after ATTEMPTS failures in a row.
        """
        for row in self.rows():
            text = row.get(self.text_key)
            if text and type(text) is str:
                yield self.into, text
            elif self.text_key not in row:
                raise no_column(hub_name(self.arguments), self.text_key, row)
            else:
                skipped["empty"] += 1

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the shard, with retries."""
        state: dict[str, Any] | None = None
        rows: Iterator[dict[str, Any]] | None = None
        failures = 0
        while True:
            try:
                if rows is None:
                    shard = hub_dataset(self.arguments).shard(self.count, self.index)
                    if state is not None:
                        shard.load_state_dict(state)
                    rows = iter(shard)
                row = next(rows, None)
                state = shard.state_dict()
            except Exception as error:  # the libraries below raise many types for a broken connection
                failures, rows = failures + 1, None
                if failures == ATTEMPTS:
                    raise DataError(f"{hub_name(self.arguments)}: cannot be read any further: {type(error).__name__}: "
                                    f"{first_line(error)}") from None
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
                continue
            failures = 0
            if row is None:
                return
            yield row


def hub_partitions(path: str, name: str | None = None, split: str = "train", text_key: str = "text",
                   into: str | None = None, **more: Any) -> list[HubPartition]:
    """The partitions of a dataset on the Hugging Face hub, one per file.

    Args:
        path, name, split, more: arguments of datasets.load_dataset. Local files: path="json", data_files=...
        text_key: the column that contains the text.
        into: the split for which the documents are; None: decided for each document by its hash.

    Raises:
        DataError: the dataset cannot be opened.
    """
    arguments = tuple(sorted({"path": path, "name": name, "split": split, **more}.items()))
    try:
        count = hub_dataset(arguments).num_shards
    except UserError:
        raise
    except Exception as error:  # no network, no such dataset, another file layout: the library raises many types
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{hub_name(arguments)}: cannot be opened: {problem} (--source accepts a local copy too)") \
            from None
    return [HubPartition(arguments, text_key, i, count, into) for i in range(count)]


def hub_dataset(arguments: Iterable[tuple[str, Any]]) -> Any:
    """The streamed datasets.IterableDataset. Raises what the library raises."""
    keywords = {k: list(v) if type(v) is tuple else v for k, v in arguments}
    return require_package("datasets").load_dataset(**keywords, streaming=True)


def hub_name(arguments: Iterable[tuple[str, Any]]) -> str:
    """The dataset's path, name and split, for an error message."""
    keywords = dict(arguments)
    return " ".join(str(keywords[k]) for k in ("path", "name", "split") if keywords.get(k))


def download(url: str, sha256: str, timeout: float = 30) -> bytes:
    """Download a file and check its digest (a proxy can answer with a login page, for example).

    Args:
        timeout: seconds without an answer.

    Raises:
        DataError: the download fails, or its sha256 is another.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be downloaded: {error} (get the file another way and give --source FILE)") \
            from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{url}: is not the expected file: its sha256 differs (get it another way and give "
                        "--source FILE)")
    return data


def read_or_download(source: Path | None, url: str, sha256: str) -> str:
    """The text of the local file `source`, or of the download if source is None."""
    try:
        return (download(url, sha256) if source is None else source.read_bytes()).decode("utf-8")
    except OSError as error:
        raise DataError(f"--source {source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--source {source}: is not UTF-8 text (byte {error.start})") from None
