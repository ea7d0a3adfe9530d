"""Files that are complete or absent: preallocation, atomic writes, durable renames, digests.

A new file format goes through `write_json` or `write_bytes`, or through `PreallocatedFile` where it is large.
"""

import errno
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

CHUNK_BYTES = 1 << 20  # bytes read or written at a time
File = TypeVar("File", bound="PreallocatedFile")


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


class PreallocatedFile:
    """A new file whose size is known. Its blocks are allocated first; its sha256 is computed during the write.

    A context manager.

    Raises:
        OSError: the file cannot be written. A lack of space is detected here, before the first byte is written.
    """

    def __init__(self, path: str | Path, size: int) -> None:
        self.size, self.position, self.digest = size, 0, hashlib.sha256()
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115 (lives as long as self)
        try:
            preallocate(self.file.fileno(), size)
        except OSError as error:
            self.file.close()
            raise OSError(error.errno, f"{os.strerror(error.errno or 0)} for {size:,} bytes", str(path)) from None

    def write(self, data: bytes | memoryview) -> None:
        """Append the bytes of `data`."""
        data = memoryview(data).cast("B")
        for start in range(0, len(data), CHUNK_BYTES):  # each chunk is written and digested while it is in the cache
            chunk = data[start:start + CHUNK_BYTES]
            self.digest.update(chunk)
            self.position += len(chunk)
            while chunk:
                chunk = chunk[self.file.write(chunk):]

    def finish(self) -> dict[str, Any]:
        """Force the file to the disk; returns its manifest entry {"size", "sha256"}."""
        assert self.position == self.size, f"{self.file.name}: {self.position} bytes of {self.size}"
        os.fsync(self.file.fileno())
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def __enter__(self: File) -> File:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.file.close()


def preallocate(descriptor: int, size: int) -> None:
    """Allocate `size` bytes of the disk, where system and file system can; OSError if too few are free."""
    if not size or not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # some file systems, by the manual
            raise


def drop_page_cache(path: str | Path) -> None:
    """Ask the kernel to drop its cached pages of a file, so that the next read is from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fsync_path(path: str | Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Replace `path` by `value` as JSON, as `write_bytes` does."""
    write_bytes(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content`. A reader, also after a crash, finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
