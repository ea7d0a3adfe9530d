"""Text sources as partitions: local files. hub.py has those on the Hugging Face hub.

A source is a list of `Partition`s; a partition is what one process reads at a time. Partitions are streamed, never
loaded into memory whole. paths.py finds the files, formats.py recognizes their formats, readers.py reads them.
To add a source: a function that returns partitions.
"""

import hashlib
import http.client
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blockgpt.console import echo
from blockgpt.data.formats import UnknownFormat, read_file, recognize
from blockgpt.data.losses import Skipped, library_errors
from blockgpt.data.paths import InputFile, matching_files
from blockgpt.data.readers import READERS, FileSpan, ReadOptions, parquet_file
from blockgpt.errors import DataError
from blockgpt.files import user_path

PARTITION_BYTES = 32 * 2**20  # of files: what a process reads at a time, and the most that is lost when it is killed
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")  # Tiny Shakespeare, its sha256


class Partition(Protocol):
    """What one process reads: a deterministic stream of documents. It is pickled to worker processes."""

    def identity(self) -> Any:
        """A JSON-able description of what is read. Equal identities are taken to be equal documents.

        A `FilePartition` is described by path, size and modification time, not by the content of the files.
        """

    def documents(self, skipped: Skipped) -> Iterator[tuple[str | None, str]]:
        """Yield (split or None, text), in the same order each time; count what is left out in `skipped`, by reason."""


@dataclass(frozen=True)
class FilePartition:
    """Several small files, or a range of a large one."""

    spans: tuple[FileSpan, ...]
    options: ReadOptions

    def identity(self) -> list[list[Any]]:
        return [[s.path, *s.format, s.size, s.mtime_ns, s.start, s.stop, self.options.text_key, self.options.quotes]
                for s in self.spans]

    def documents(self, skipped: Skipped) -> Iterator[tuple[None, str]]:
        """Yield the texts. `DataError` if most of a file, or most of the partition's text files, is lost."""
        n_text_files = n_lost_text_files = 0
        first_lost = ("", "")  # of the text files
        for span in self.spans:
            n, n_empty, before = 0, 0, skipped.begin()
            with library_errors(f"{span.path}: cannot be read"):  # a compression library, a decoder
                for text in READERS[span.format.name](span, self.options, skipped):
                    n += 1
                    if text:
                        yield None, text
                    else:
                        skipped["empty"] += 1
                        n_empty += 1
            if span.format.name == "text":
                n_text_files, n_lost_text_files = n_text_files + n, n_lost_text_files + skipped.n_lost - before
                first_lost = first_lost if first_lost[0] else skipped.file_first
            else:
                skipped.check(before, n, span.path)
                skipped.note_empty(n_empty, n)
        skipped.file_first = first_lost
        skipped.check(skipped.n_lost - n_lost_text_files, n_text_files, "text files")


def file_partitions(patterns: Iterable[str], text_key: str = "text", format: str | None = None,
                    quotes: bool = True) -> list[FilePartition]:
    """Partition files.

    Args:
        patterns: files, folders or patterns, as `matching_files` takes them.
        format: a format of text in which every file is read; None: the one that `recognize` finds.

    Other arguments as in `ReadOptions`.

    Returns:
        The partitions, in the order of the paths, each about PARTITION_BYTES in size.

    Raises:
        DataError: a pattern that no file matches, a file that cannot be opened or whose format is not known.
    """
    groups: list[list[FileSpan]] = [[]]
    group_size = 0
    for span in all_spans(matching_files(patterns), format):
        size = span.size if span.stop is None else PARTITION_BYTES
        if group_size + size > PARTITION_BYTES and groups[-1]:
            groups.append([])
            group_size = 0
        groups[-1].append(span)
        group_size += size
    options = ReadOptions(text_key, quotes)
    return [FilePartition(tuple(group), options) for group in groups]


def all_spans(files: Iterable[InputFile], format: str | None) -> Iterator[FileSpan]:
    """The spans of the files. Images, programs and the like are left out with a warning, unless they are named."""
    left_out: dict[str, list[str]] = {}
    n_read = 0
    for file in files:
        try:
            yield from file_spans(file, format)
            n_read += 1
        except UnknownFormat as error:
            if error.has_documents or file.named:
                raise
            left_out.setdefault(error.what, []).append(file.path)
    for what, paths in left_out.items():
        others = f" and {len(paths) - 1:,} more files" if len(paths) > 1 else ""
        echo(f"warning: left out: {paths[0]}{others}: {what}", sys.stderr)
    if not n_read:
        raise DataError(f"{next(iter(left_out.values()))[0]}: there is no text among the files")


def file_spans(file: InputFile, format: str | None = None) -> Iterator[FileSpan]:
    """A file as one span, or, if it is large and can be read from the middle, as several."""
    path, status, _ = file
    file_format = recognize(path, format)
    starts: list[int]
    stops: list[int | None]
    if file_format.name == "parquet":
        starts, n_groups = row_group_ranges(path)
        stops = [*starts[1:], n_groups]
    elif (file_format.name not in ("text", "jsonl") or file_format.compression or file_format.encoding != "utf-8"
          or status.st_size <= PARTITION_BYTES):
        starts, stops = [0], [None]
    else:
        starts = list(range(0, status.st_size, PARTITION_BYTES))
        stops = [*starts[1:], status.st_size]
    for start, stop in zip(starts, stops, strict=True):
        yield FileSpan(path, file_format, status.st_size, status.st_mtime_ns, start, stop)


def row_group_ranges(path: str) -> tuple[list[int], int]:
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


def read_source(source: Path) -> bytes:
    try:
        return read_file(user_path(source))
    except DataError as error:
        raise DataError(f"--source {error}") from None


def read_or_download(source: Path | None, url: str, sha256: str) -> str:
    """The text of the local file `source`, or of the download if source is None."""
    try:
        return (download(url, sha256) if source is None else read_source(source)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--source {source}: is not UTF-8 text (byte {error.start})") from None
