"""Files that are whole or not there: reserved room, atomic writes, durable renames, digests."""

import errno
import hashlib
import json
import os
from pathlib import Path

CHUNK_BYTES = 1 << 20  # bytes read or written at a time


def sha256_of(path):
    """Hex digest of a file, read in pieces."""
    digest, room = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(room):
            digest.update(room[:n])
    return digest.hexdigest()


class PreallocatedFile:
    """A new file of a size known before: its room is taken at once, its sha256 computed as it is written.

    A context manager. OSError where the disk refuses: the room is the first thing it is asked for.
    """

    def __init__(self, path, size):
        self.size, self.written, self.digest = size, 0, hashlib.sha256()
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115 (lives as long as self)
        try:
            preallocate(self.file.fileno(), size)
        except OSError as error:
            self.file.close()
            raise OSError(error.errno, f"{os.strerror(error.errno)} for {size:,} bytes", str(path)) from None

    def write(self, data):
        """Append `data`, anything with bytes in it."""
        data = memoryview(data).cast("B")
        for start in range(0, len(data), CHUNK_BYTES):  # written and digested while it is in the cache
            piece = data[start:start + CHUNK_BYTES]
            self.digest.update(piece)
            self.written += len(piece)
            while piece:
                piece = piece[self.file.write(piece):]

    def finish(self):
        """Force it to the disk; {"size", "sha256"}."""
        assert self.written == self.size, f"{self.file.name}: {self.written} bytes of {self.size}"
        os.fsync(self.file.fileno())
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def preallocate(descriptor, size):
    """Take the room of `size` bytes from the disk, where system and file system can; OSError if there is not enough."""
    if not size or not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # some file systems, by the manual
            raise


def drop_page_cache(path):
    """Let the system drop its copy of a file in memory, so that the next reader meets the disk's."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fsync_path(path):
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value, indent=1):
    """Replace `path` by `value` as JSON, as `write_bytes` does."""
    write_bytes(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def write_bytes(path, content):
    """Replace `path` by `content`: a reader, or a crash, meets the old file or the new, never a part of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
