"""Which format a file has: binary formats are known by their content, formats of text by the file's suffix.

A file that is neither text nor a format of `SUFFIXES` is refused by name, or, if it has no documents (an image, a
program), left out. To add a format that is read: its suffix in `SUFFIXES` and a reader in readers.py. To name one that
is not: a line in `SIGNATURES`.
"""

import codecs
import gzip
import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from blockgpt.data.losses import library_errors
from blockgpt.errors import DataError, error_text, require_package

HEAD_BYTES = 2**16  # of a file, which decide its format
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".jl": "jsonl", ".json": "json",
            ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"}
COMPRESSIONS = {  # {name: (suffix, how the content begins)}
    "gzip": (".gz", re.compile(rb"\x1f\x8b")), "xz": (".xz", re.compile(rb"\xfd7zXZ\0")),
    "zstd": (".zst", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    "bzip2": (".bz2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"))}
KNOWN = "text, json lines, json, csv, tsv and parquet, each also in gzip, zstd, bzip2 or xz"
# (first bytes, their offset, name, whether such a file can hold documents). One that is all letters does not count in a
# file of text, except those of `OF_TEXT`.
SIGNATURES: tuple[tuple[bytes, int, str, bool], ...] = (
    (b"ustar", 257, "a tar archive", True), (b"PK\x03\x04", 0, "a zip archive or an office document", True),
    (b"PK\x05\x06", 0, "an empty zip archive", True), (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", True),
    (b"Rar!\x1a\x07", 0, "a rar archive", True), (b"\x04\x22\x4d\x18", 0, "lz4", True),
    (b"\x1f\x9d", 0, "a file of compress (.Z)", True), (b"ARROW1", 0, "an Arrow file", True),
    (b"\xff\xff\xff\xff", 0, "an Arrow stream", True), (b"FEA1", 0, "a Feather file", True),
    (b"ORC", 0, "an ORC file", True), (b"Obj\x01", 0, "an Avro file", True), (b"PAR1", 0, "parquet", True),
    (b"SQLite format 3\0", 0, "an SQLite database", True), (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", True),
    (b"\x93NUMPY", 0, "a NumPy array", True), (b"GGUF", 0, "a GGUF model", True),
    (b"MMIDIDX\0\0", 0, "an index of Megatron", True), (b"TNTIDX\0\0", 0, "an index of fairseq", True),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "an old office document", True),
    ((20240520).to_bytes(4, "little"), 0, "a token file of llm.c", True),
    ((20240801).to_bytes(4, "little"), 0, "a token file of llm.c", True),
    (b"\x80\x02", 0, "a pickle", True), (b"\x80\x03", 0, "a pickle", True), (b"\x80\x04", 0, "a pickle", True),
    (b"\x80\x05", 0, "a pickle", True), (b"LZIP", 0, "lzip", True), (b"\x1f\x8b", 0, "gzip", True),
    (b"\x28\xb5\x2f\xfd", 0, "zstd", True), (b"\xfd7zXZ\0", 0, "xz", True), (b"BZh", 0, "bzip2", True),
    (b"\x89PNG\r\n\x1a\n", 0, "an image", False), (b"\xff\xd8\xff", 0, "an image", False),
    (b"GIF8", 0, "an image", False), (b"BM", 0, "an image", False),
    (b"II*\0", 0, "an image", False), (b"MM\0*", 0, "an image", False),
    (b"\0\0\x01\0", 0, "an icon", False), (b"8BPS", 0, "an image", False),
    (b"RIFF", 0, "an image, sound or video", False),
    (b"OggS", 0, "a sound or video", False), (b"ID3", 0, "a sound", False), (b"fLaC", 0, "a sound", False),
    (b"\xff\xfb", 0, "a sound", False), (b"ftyp", 4, "a video or an image", False),
    (b"\x1aE\xdf\xa3", 0, "a video", False), (b"wOFF", 0, "a font", False), (b"wOF2", 0, "a font", False),
    (b"\0\x01\0\0\0", 0, "a font", False), (b"OTTO", 0, "a font", False), (b"\x7fELF", 0, "a program", False),
    (b"MZ", 0, "a program", False), (b"\xcf\xfa\xed\xfe", 0, "a program", False),
    (b"\xca\xfe\xba\xbe", 0, "a program", False), (b"\0asm", 0, "a program", False),
    (b"!<arch>\n", 0, "a library", False), (b"\r\r\n", 1, "compiled Python", False),
    (b"\r\n", 2, "compiled Python", False),
    (b"DIRC", 0, "an index of git", False),
    # of text:
    (b"%PDF-", 0, "a PDF document", True), (b"%!PS", 0, "a PostScript document", True),
    (b"{\\rtf", 0, "an RTF document", True),
    (b"version https://git-lfs.github.com/spec/", 0, "a pointer of Git LFS to the file (run git lfs pull)", True))
OF_TEXT = (b"%PDF-", b"%!PS", b"{\\rtf", b"version https://git-lfs.github.com/spec/")
CONTROL = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b")
# The longer marks first: UTF-32's little-endian one begins with UTF-16's.
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))


class FileFormat(NamedTuple):
    """How a file is read.

    Attributes:
        name: a key of readers.READERS.
        compression: a key of `COMPRESSIONS`, or None.
        encoding: "utf-8", or another one that the file's mark says.
    """

    name: str
    compression: str | None = None
    encoding: str = "utf-8"


class UnknownFormat(DataError):
    """A file that cannot be read as documents. `has_documents`: whether it could hold some."""

    def __init__(self, path: str | Path, what: str, has_documents: bool = True) -> None:
        super().__init__(f"{path}: is {what} (what can be read: {KNOWN})")
        self.what, self.has_documents = what, has_documents


def recognize(path: str | Path, format: str | None = None) -> FileFormat:
    """The format of a file, by its content and its suffix.

    Args:
        format: a format of text in which the file is read whatever its suffix.

    Raises:
        UnknownFormat: the format is known and cannot be read, or is unknown.
        DataError: the file cannot be read, or contradicts its suffix.
    """
    head, tail = read_ends(path)
    name = Path(path).name.lower()
    compressed_suffix = next((c for c, (suffix, _) in COMPRESSIONS.items() if name.endswith(suffix)), None)
    stem = name.rpartition(".")[0] if compressed_suffix else name
    by_suffix = SUFFIXES.get(Path(stem).suffix)
    compression = next((c for c, (_, begin) in COMPRESSIONS.items() if begin.match(head)), None)
    if by_suffix == "parquet" and (compression or compressed_suffix):
        raise DataError(f"{path}: is a compressed parquet file (decompress it: parquet compresses its columns)")
    if head.startswith(b"PAR1") and (tail == b"PAR1" or by_suffix == "parquet"):
        return FileFormat("parquet")
    if by_suffix == "parquet":
        raise DataError(f"{path}: is not a parquet file: its content is {describe(head)[0]}")
    if compression:
        with library_errors(f"{path}: cannot be read"), open_compressed(path, compression) as file:
            head = file.read(HEAD_BYTES)
    elif compressed_suffix and head:
        raise DataError(f"{path}: is not {compressed_suffix}: its content is {describe(head)[0]} (rename it)")
    encoding = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and (signature(head) or not is_text(head)):
        raise UnknownFormat(path, *describe(head))
    return FileFormat(format or text_format(head, by_suffix, Path(stem).suffix), compression, encoding)


def read_file(path: Path) -> bytes:
    """The content of a file; `DataError` if it cannot be read, or is a pipe, which would be waited for."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise file_type_error(str(path), mode)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from None


def read_ends(path: str | Path) -> tuple[bytes, bytes]:
    """The first HEAD_BYTES of a file and its last four bytes."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEAD_BYTES), file.seek(0, 2)
            file.seek(max(0, size - 4))
            return head, file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from None


def open_compressed(path: str | Path, compression: str | None) -> BinaryIO:
    """The content of a file, decompressed, as a binary stream. Reading to the end of a truncated file fails."""
    opened: Any
    if compression == "zstd":
        opened = io.BufferedReader(require_package("pyarrow").input_stream(str(path), compression="zstd"), 2**20)
    elif compression == "bzip2":
        opened = require_package("bz2").open(path)
    elif compression == "xz":
        opened = require_package("lzma").open(path)
    else:
        opened = gzip.open(path) if compression else open(path, "rb")  # noqa: SIM115 (the caller closes it)
    return opened


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text, of whatever encoding with one byte per ASCII character."""
    return all(len(block) - len(block.translate(None, CONTROL)) <= len(block) / 50 for block in (head, head[:512]))


def signature(head: bytes, min_length: int = 0) -> tuple[str, bool] | None:
    """Name and has_documents of the first of `SIGNATURES` with which a file begins, or None.

    Args:
        min_length: of the signatures that are considered, in bytes.
    """
    for first, offset, name, has_documents in SIGNATURES:
        if len(first) >= min_length and head[offset:offset + len(first)] == first and (
                first in OF_TEXT or not (first.isascii() and is_text(first)) or not is_text(head)):
            return name, has_documents
    return None


def describe(head: bytes) -> tuple[str, bool]:
    """What a file with these first bytes is, in words, and whether such a file can hold documents."""
    if known := signature(head):
        return known
    if not head:
        return "empty", True
    if is_text(head):
        return "text", True
    even, odd = head[::2], head[1::2]
    for order, zeros, others in (("LE", odd, even), ("BE", even, odd)):
        if len(head) > 8 and zeros.count(0) > len(zeros) / 3 and others.count(0) < len(others) / 20:
            return f"UTF-16 text without a mark, or 16-bit numbers: for text, iconv -f UTF-16{order} -t UTF-8", True
    for order, zeros in (("LE", head[3::4]), ("BE", head[::4])):
        if len(head) > 16 and zeros.count(0) == len(zeros) and head.count(0) > len(head) / 3:
            return f"UTF-32 text without a mark, or 32-bit numbers: for text, iconv -f UTF-32{order} -t UTF-8", True
    return "in no known format: neither text nor a known kind of binary file", True


def text_format(head: bytes, by_suffix: str | None, suffix: str) -> str:
    """The format of a text file by its suffix, and by its content where the suffix does not say: JSON in a .txt."""
    if by_suffix and by_suffix != "json":
        return by_suffix
    lines = [line for line in head.split(b"\n", 64)[:64] if line.strip()]
    n_objects = sum(line.startswith(b"{") and is_json_object(line) for line in lines)
    if by_suffix == "json" or not suffix or any(c.isdigit() for c in suffix):  # such as part-00000, or a hub's blob
        if n_objects > (0 if by_suffix else 1) or (by_suffix and len(lines) == 1 and head.startswith(b"{")):
            return "jsonl"
        if by_suffix or (head.lstrip()[:1] == b"[" and head.lstrip()[1:].lstrip()[:1] in (b"{", b'"')):
            return "json"
    elif n_objects > 1 and n_objects >= len(lines) - 1:  # the last line may be cut off
        return "jsonl"
    elif re.match(rb'\s*\[\s*\{\s*"[^"\\]*"\s*:', head):
        return "json"
    return "text"


def is_json_object(line: bytes) -> bool:
    try:
        return type(json.loads(line)) is dict
    except (ValueError, RecursionError):
        return False


class Transcoder(io.RawIOBase):
    """A stream of text in another encoding, as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.file, self.decoder, self.pending = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = None
        while not self.pending and block != b"":
            block = self.file.read(HEAD_BYTES)
            self.pending = self.decoder.decode(block, final=not block).encode()
        n = min(len(buffer), len(self.pending))
        buffer[:n], self.pending = self.pending[:n], self.pending[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def file_type_error(path: str, mode: int) -> DataError:
    """The error for what is no regular file."""
    what = {stat.S_IFIFO: "a pipe, which cannot be read twice: write it to a file first",
            stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
            stat.S_IFDIR: "a folder"}.get(stat.S_IFMT(mode), "no regular file")
    return DataError(f"{os.fspath(path)}: is {what}")
