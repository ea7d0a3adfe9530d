"""Files that are complete or absent: preallocation, atomic writes, durable renames, digests; looking up; locks.

A new file format goes through `write_json` or `write_bytes`, or through `PreallocatedFile` where it is large. Whatever
looks for a file or folder does so with `find` and the functions below it, and whatever writes to a folder that another
process may write to holds its `FolderLock`.
"""

import contextlib
import errno
import fcntl
import fnmatch
import glob
import hashlib
import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from blockgpt.console import echo
from blockgpt.errors import UserError, error_text

CHUNK_BYTES = 1 << 20  # bytes read or written at a time
File = TypeVar("File", bound="PreallocatedFile")


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user wrote, its ~ expanded: a shell leaves it as it is in --flag=~/x."""
    return Path(os.path.expanduser(path))


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
        """Append the bytes of `data`, which a thread digests meanwhile."""
        data = memoryview(data).cast("B")
        self.position += len(data)
        if len(data) < CHUNK_BYTES:
            self.digest.update(data)
            self._write(data)
            return
        with ThreadPoolExecutor(1, "sha256") as executor:
            digested = executor.submit(self.digest.update, data)
            self._write(data)
            digested.result()

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start:start + CHUNK_BYTES]
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


# ---- looking up: there, not there, cannot tell


ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # errors that say that nothing is there


def find(path: str | Path) -> os.stat_result | None:
    """The status of a file or folder, links followed; None if nothing is there.

    `os.path.exists`, `Path.is_dir` and `glob` have two answers: what may not be read is not there for them. Then a run
    starts all over again, or half of the data is left out. Look files up with this function and those below it.

    Raises:
        UserError: it cannot be told: no permission, a link to nowhere (a disk that is not mounted), an error of the
            disk or the network.
    """
    path = Path(path)
    try:
        return os.stat(path)
    except ValueError:  # a null character, which no name has
        return None
    except OSError as error:
        if error.errno not in ABSENT:
            raise unreadable(path, error) from None
    for ancestor in (path, *path.parents):
        try:
            status = os.lstat(ancestor)
        except OSError as error:
            if error.errno in ABSENT:
                continue
            raise unreadable(ancestor, error) from None
        if stat.S_ISLNK(status.st_mode) and not os.path.exists(ancestor):
            raise UserError(f"{ancestor}: is a link to {os.readlink(ancestor)}, which does not exist (mount that "
                            "disk, or remove the link)")
        break
    return None


def unreadable(path: str | Path, error: Exception) -> UserError:
    """The `UserError` for a file or folder of which an error of the system hides whether it exists."""
    denied = isinstance(error, PermissionError)
    fix = "change its permissions, or those of the folders above it" if denied else "check the disk that it is on"
    return UserError(f"{path}: cannot be read: {error_text(error)} ({fix})")


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder; `UserError` if that cannot be told."""
    return find(path) is not None


def is_dir(path: str | Path) -> bool:
    """Whether there is a folder; `UserError` if that cannot be told."""
    status = find(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file; `UserError` if that cannot be told."""
    status = find(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def list_dir(folder: str | Path, pattern: str = "*") -> list[Path]:
    """The entries of a folder whose names match `pattern`, sorted; none if there is no such folder.

    Hidden entries match only a pattern that begins with a dot, as in `glob`. They need not be readable themselves.

    Raises:
        UserError: the folder cannot be read.
    """
    if not is_dir(folder):
        return []
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # removed meanwhile
        return []
    except OSError as error:
        raise unreadable(folder, error) from None
    return [Path(folder, name) for name in sorted(names)
            if fnmatch.fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))]


def matching(pattern: str | Path) -> list[Path]:
    """`glob.glob(pattern, recursive=True)`, sorted; `UserError` if a folder that it searches cannot be read."""
    pattern = Path(pattern)
    found = [Path(pattern.anchor)]
    for name in pattern.relative_to(pattern.anchor).parts:
        if name == "**":
            found = [path for folder in found for path in (folder, *below(folder))]
        elif glob.has_magic(name):
            found = [path for folder in found for path in list_dir(folder, name)]
        else:
            found = [folder / name for folder in found if exists(folder / name)]
    return sorted(set(found))


def below(folder: Path, ancestors: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All that is below a folder and not hidden. Links are followed, but not to a folder that they are in.

    Raises:
        UserError: a folder or an entry cannot be read.
    """
    status = find(folder)
    if status is None or not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in ancestors:
        return
    for path in list_dir(folder):
        yield path
        yield from below(path, (*ancestors, (status.st_dev, status.st_ino)))


# ---- locks


class FolderLock:
    """The lock of a folder that one process at a time may write to: a run, a dataset, a sweep. A context manager.

    `<folder>/.lock` is locked with flock, and has the holder's pid and host. The kernel frees the lock when the
    process ends, however it ends; then the file stays. A forked process does not hold it. Where the file system has no
    locks, a warning says so. A process that holds the lock already shares it.

    Args:
        folder: exists.
        activity: what the holder does, for the error: "trains in it".
        wait: seconds to wait for another process that holds it, and may be about to end.

    Raises:
        UserError: another process holds it. Nothing was changed.
        OSError: the file cannot be written.
    """

    held: ClassVar[dict[tuple[int, int], int]] = {}  # {(device, inode) of the file: its descriptor}

    def __init__(self, folder: str | Path, activity: str, wait: float = 1.0) -> None:
        self.path, deadline = Path(folder, ".lock"), time.monotonic() + wait
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            status = os.fstat(descriptor)
            self.key = (status.st_dev, status.st_ino)
            self.owned = self.key not in self.held
            try:
                if self.owned:
                    self._acquire(descriptor, activity, deadline)
                    current = find(self.path)
                    if current is not None and (current.st_dev, current.st_ino) == self.key:
                        self.held[self.key] = descriptor
                        return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if not self.owned:
                return  # else the holder before has removed the file

    def _acquire(self, descriptor: int, activity: str, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(f"{self.path.parent}: {holder(descriptor)} {activity} (wait until it ends, or end "
                                    "it)") from None
                time.sleep(0.05)
            except OSError as error:
                echo(f"warning: {self.path.parent}: this file system has no locks ({error_text(error)}): nothing "
                     "stops a second process from writing there", sys.stderr)
                return
        with contextlib.suppress(OSError):  # a full disk: the lock itself is held
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Free the lock before the process ends, and remove its file."""
        if self.owned and self.key in self.held:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self.held.pop(self.key))

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.release()


def holder(descriptor: int) -> str:
    """Who wrote itself into a lock file: 'process 12 on host'."""
    match = re.fullmatch(r"(\d+) (\S+)\n", os.pread(descriptor, 300, 0).decode(errors="replace"))
    return f"process {match[1]} on {match[2]}" if match else "another process"


def _forget_locks() -> None:
    """In a forked process: it would hold its parent's locks beyond the parent's end."""
    while FolderLock.held:
        os.close(FolderLock.held.popitem()[1])


os.register_at_fork(after_in_child=_forget_locks)
