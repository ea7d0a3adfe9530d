"""The documents of a file, one generator for each format of text files and for parquet.

A reader streams: it has one record in memory at a time. It counts what it cannot use (`Skipped.lose`), with the number
of the line, row or record. To add a format: a generator of texts, a line in `READERS`, its suffix in formats.SUFFIXES.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blockgpt.data.formats import FileFormat, Transcoder, open_compressed
from blockgpt.data.losses import Skipped, library_errors
from blockgpt.errors import DataError, did_you_mean, first_line, require_package, short_repr

MAX_DOCUMENT = 16 * 2**20  # bytes; a longer text file is split at line ends into several documents
MAX_CELL = 8 * MAX_DOCUMENT  # characters; a longer cell of a table is taken for a quote that never ends


@dataclass(frozen=True)
class FileSpan:
    """A file, or a range of it.

    Attributes:
        size: of the whole file, in bytes.
        start, stop: the range, in bytes (of a parquet file: in row groups); stop None: to the end of the file.
    """

    path: str
    format: FileFormat
    size: int
    mtime_ns: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How the records of a file are read.

    Attributes:
        text_key: the field or column that contains the text.
        quotes: whether a quote at the start of a csv or tsv cell encloses it.
    """

    text_key: str = "text"
    quotes: bool = True


def open_span(span: FileSpan) -> BinaryIO:
    """The content of the file, decompressed and as UTF-8 without a mark, as a binary stream."""
    file = open_compressed(span.path, span.format.compression)
    if span.format.encoding != "utf-8":
        return io.BufferedReader(Transcoder(file, span.format.encoding), 2**20)
    return file


def read_lines(file: BinaryIO, span: FileSpan, skipped: Skipped | None = None) -> Iterator[bytes]:
    """Yield the lines that start in the span, with their line ends.

    Args:
        skipped: where to count the lines longer than MAX_DOCUMENT, which are left out; None: yield them in slices.
    """
    position, stop, n_lines = 0, None, 0
    if span.stop is not None:  # a compressed file cannot be read from the middle and is one span
        position, stop = next_line_start(file, span.start), next_line_start(file, span.stop)
        file.seek(position)
    unit = "line" if not span.start else f"(from byte {position:,} on) line"
    while stop is None or position < stop:
        line = file.readline(MAX_DOCUMENT)
        if not line:
            return
        position += len(line)
        n_lines += 1
        if skipped is not None:
            skipped.position = (span.path, unit, n_lines)
            if len(line) == MAX_DOCUMENT and not line.endswith(b"\n"):
                skipped.lose("too_long", f"more than {MAX_DOCUMENT:,} bytes, {seen(line)}")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_DOCUMENT)
                    position += len(line)
                continue
        yield line.removeprefix(codecs.BOM_UTF8) if n_lines == 1 and not span.start else line


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


def seen(value: object) -> str:
    """The beginning of what was found, for a message."""
    if isinstance(value, bytes):
        value = value[:80].decode("utf-8", errors="replace").rstrip("\n")
    return short_repr(value)


# ---- text


def text_documents(span: FileSpan, options: ReadOptions, skipped: Skipped) -> Iterator[str]:
    """A text file is one document; one longer than MAX_DOCUMENT, or a span of it, is split at line ends."""
    skipped.position = (span.path, "", 0)
    with open_span(span) as file:
        buffer: list[bytes] = []
        size = 0
        lines: Iterable[bytes]
        if span.stop is None:
            buffer.append(file.read(MAX_DOCUMENT).removeprefix(codecs.BOM_UTF8))
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


def decode_utf8(buffer: Sequence[bytes], skipped: Skipped) -> Iterator[str]:
    """Yield the joined bytes as one text; if they are not UTF-8, count them instead."""
    content = b"".join(buffer)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        skipped.lose("not_utf8", f"byte {error.start:,} (line {line:,}) is {content[error.start]:#04x}")
        return
    yield text


# ---- json


def jsonl_documents(span: FileSpan, options: ReadOptions, skipped: Skipped) -> Iterator[str]:
    """A line is a JSON object, whose field `text_key` is the document, or a string, which is one itself."""
    key = json.dumps(options.text_key).encode()
    with open_span(span) as file:
        for line in read_lines(file, span, skipped):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
                if line.count(key) > 1:
                    value = json.loads(line, object_pairs_hook=lambda pairs: unique(pairs, options.text_key))
            except (ValueError, RecursionError) as error:
                skipped.lose("not_json", f"{error}: {seen(line)}" if type(error) is ValueError else seen(line))
                continue
            yield from yield_text(value, options.text_key, skipped)


def json_documents(span: FileSpan, options: ReadOptions, skipped: Skipped) -> Iterator[str]:
    """A record is an element of an array, or one of several objects that follow each other, or the only object."""
    with open_span(span) as file:
        for i, value in enumerate(json_values(file, span.path, options.text_key), 1):
            skipped.position = (span.path, "record", i)
            yield from yield_text(value, options.text_key, skipped)


def yield_text(value: Any, text_key: str, skipped: Skipped) -> Iterator[str]:
    """Yield the text of a JSON value; if it has none, count it and say what it has."""
    text = value.get(text_key) if type(value) is dict else value
    if type(text) is str:
        yield text
    elif type(value) is not dict:
        skipped.lose(f"no_{text_key}", f"no object but {seen(value)}")
    elif text_key in value:
        skipped.lose(f"no_{text_key}", f"{text_key} is of type {type(text).__name__}, not text")
    else:
        skipped.lose(f"no_{text_key}", no_field(text_key, value))


def no_field(text_key: str, keys: Iterable[str]) -> str:
    """What a record has in place of the field `text_key`, with the flag that names another."""
    return f"no field {text_key!r} but {short_repr(', '.join(keys))}: --text_key names the field"


def unique(pairs: list[tuple[str, Any]], text_key: str) -> dict[str, Any]:
    """The pairs as a dict; ValueError if two have the key of the text: one would be lost."""
    if sum(key == text_key for key, _ in pairs) > 1:
        raise ValueError(f"two fields {text_key!r}")
    return dict(pairs)


def json_values(file: BinaryIO, path: str, text_key: str) -> Iterator[Any]:
    """Yield the elements of a JSON array, or JSON values that follow each other, one in memory at a time."""
    decode = json.JSONDecoder(object_pairs_hook=lambda pairs: unique(pairs, text_key)).raw_decode
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
    buffer, at, ended, count, in_array, after_value = "", 0, False, 0, False, False
    while True:
        while at < len(buffer) and buffer[at].isspace():
            at += 1
        c = buffer[at:at + 1]
        try:
            if c == "[" and not count and not in_array:
                in_array, at = True, at + 1
            elif c == "]" and in_array:
                rest = (buffer[at + 1:] + text.read(100)).strip()
                if rest:
                    raise DataError(f"{path}: after its array of {count:,} elements comes {seen(rest)}")
                return
            elif c == "," and in_array and after_value:
                at, after_value = at + 1, False
            elif c and not (in_array and after_value):
                value, end = decode(buffer, at)
                if end == len(buffer) and not ended:
                    raise json.JSONDecodeError("may go on", buffer, end)
                at, count, after_value = end, count + 1, True
                yield value
            elif c or ended:
                raise json.JSONDecodeError("ends" if ended else "no comma", buffer, at)
            else:
                raise json.JSONDecodeError("may go on", buffer, at)
        except json.JSONDecodeError:
            if ended or len(buffer) - at > 2 * MAX_DOCUMENT:
                if not buffer[at:] and not in_array:
                    return
                found = seen(buffer[at:at + 80]) if buffer[at:] else "it ends"
                raise DataError(f"{path}: is not json after {count:,} records: {found} (damaged or cut off?)") from None
            block = text.read(max(2**16, len(buffer) - at))
            buffer, at, ended = buffer[at:] + block, 0, not block
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: record {count + 1:,} is not json: {first_line(error)}") from None


# ---- tables


def table_documents(span: FileSpan, options: ReadOptions, skipped: Skipped) -> Iterator[str]:
    """A row of csv or tsv is a document. The first row names the columns; the text is in the column `text_key`."""
    csv.field_size_limit(MAX_CELL)
    with open_span(span) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        n_above, header = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
        separator, columns = read_header(span, header, options)
        column = columns.index(options.text_key)
        reader = csv.reader(lines, delimiter=separator, strict=options.quotes,
                            quoting=csv.QUOTE_MINIMAL if options.quotes else csv.QUOTE_NONE)
        for row in table_rows(reader, span, skipped, n_above):
            if len(row) > len(columns) and any(row[len(columns):]):
                skipped.lose("cut_by_separator", f"{len(row)} cells, {len(columns)} columns, {seen(row[column])}")
            elif len(row) <= column:
                skipped.lose(f"no_{options.text_key}", f"{len(row)} cells, {len(columns)} columns")
            elif swallows_rows(row, column, columns, separator):
                quoted = next(cell for cell in row if "\n" in cell)
                raise DataError(f"{skipped.where()}: a quote takes in the rows after it: {seen(quoted)} (if "
                                "quotes are part of the text: --no_quotes)")
            elif len(row[column]) > MAX_DOCUMENT:
                skipped.lose("too_long", f"more than {MAX_DOCUMENT:,} characters")
            elif not row[column].isascii() and has_surrogates(row[column]):
                skipped.lose("not_utf8", seen(row[column]))
            else:
                yield row[column]


def read_header(span: FileSpan, header: str, options: ReadOptions) -> tuple[str, list[str]]:
    """(separator, names of the columns) of a table. `DataError` unless exactly one has the text."""
    separators = "\t" if span.format.name == "tsv" else ",;\t|"
    rows = {separator: next(csv.reader([header], delimiter=separator), []) for separator in separators}
    for separator, columns in rows.items():
        names = [name.strip() for name in columns]
        if names.count(options.text_key) > 1:
            raise DataError(f"{span.path}: has {names.count(options.text_key)} columns {options.text_key!r} (rename "
                            "them)")
        if options.text_key in names:
            return separator, names
    raise no_column(span.path, options.text_key, max(rows.values(), key=lambda row: len(list(row))))


def table_rows(reader: Any, span: FileSpan, skipped: Skipped, n_above: int) -> Iterator[list[str]]:
    """Yield the rows of a csv.reader that are not blank; count those that are not csv and go on behind them.

    Args:
        n_above: the lines above those that the reader has.
    """
    while True:
        skipped.position = (span.path, "line", n_above + reader.line_num + 1)
        try:
            row = next(reader, None)
        except csv.Error as error:
            words = first_line(error)
            if "end of data" in words or "field limit" in words:
                raise DataError(f"{skipped.where()}: a quote opens a cell that does not end (if quotes are part of the "
                                "text: --no_quotes)") from None
            skipped.lose("bad_quotes", words)
            continue
        if row is None:
            return
        if row:
            yield row


def swallows_rows(row: list[str], column: int, columns: list[str], separator: str) -> bool:
    """Whether the lines of a row look like rows of the table: an opening quote that is text takes them in."""
    if len(columns) < 2 or not any("\n" in cell for cell in row):
        return False
    others = [(i, cell) for i, cell in enumerate(row[:len(columns)]) if i != column and "\n" not in cell]
    if separator != "\t" and not any(cell.isdigit() for _, cell in others):
        return False  # a comma is common in text
    first, *lines = (line.split(separator) for line in separator.join(row[:len(columns)]).split("\n"))
    return len(first) >= len(columns) and all(
        len(cells) == len(columns) and all(cells[i].isdigit() if cell.isdigit() else cells[i] for i, cell in others)
        for cells in lines)


def has_surrogates(text: str) -> bool:
    try:
        text.encode()
        return False
    except UnicodeEncodeError:
        return True


def no_column(path: str, text_key: str, columns: Iterable[str]) -> DataError:
    return DataError(f"{path}: has no column {text_key!r}{did_you_mean(text_key, columns)}: name it with --text_key")


# ---- parquet


def parquet_documents(span: FileSpan, options: ReadOptions, skipped: Skipped) -> Iterator[str]:
    """A row is a document. The text is in the column `text_key`."""
    text_key = options.text_key
    with parquet_file(span.path) as file:
        check_column(span.path, file.schema_arrow, text_key)
        stop = file.num_row_groups if span.stop is None else span.stop
        for group in range(span.start, stop):
            n_rows = 0
            batches = file.iter_batches(256, row_groups=[group], columns=[text_key])
            while True:
                with library_errors(f"{span.path}: row group {group}, after row {n_rows}: cannot be read"):
                    batch = next(batches, None)
                    texts = [] if batch is None else batch.column(0).to_pylist()
                if batch is None:
                    break
                for text in texts:
                    n_rows += 1
                    skipped.position = (span.path, f"row group {group} row", n_rows)
                    if type(text) is str:
                        yield text
                    else:
                        skipped.lose(f"no_{text_key}", "null")


def check_column(path: str, schema: Any, text_key: str) -> None:
    """`DataError` unless exactly one column of a pyarrow schema is `text_key`, and it has strings."""
    fields = [field for field in schema if field.name == text_key]
    if not fields:
        raise no_column(path, text_key, schema.names)
    if len(fields) > 1:
        raise DataError(f"{path}: has {len(fields)} columns {text_key!r} (rename them)")
    type_ = fields[0].type
    value_type = getattr(type_, "value_type", type_) if str(type_).startswith("dictionary") else type_
    if str(value_type) not in ("string", "large_string", "string_view", "null"):
        columns = ", ".join(f.name for f in schema if str(f.type) in ("string", "large_string", "string_view"))
        raise DataError(f"{path}: column {text_key!r} is of type {type_}, not string (columns of strings: "
                        f"{columns or 'none'}; --text_key)")


def parquet_file(path: str | Path) -> Any:
    """An open pyarrow.parquet.ParquetFile; `DataError` if the file is not parquet."""
    parquet = require_package("pyarrow.parquet")
    with library_errors(f"{path}: is not a parquet file that can be read"):
        return parquet.ParquetFile(path)


READERS: dict[str, Callable[[FileSpan, ReadOptions, Skipped], Iterator[str]]] = {
    "text": text_documents, "jsonl": jsonl_documents, "json": json_documents, "csv": table_documents,
    "tsv": table_documents, "parquet": parquet_documents}
