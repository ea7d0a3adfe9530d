"""Files of token ids: mapping them into memory, and what can be told of a file that no meta.json describes.

A mapped file has no open descriptor: a dataset may have more files than a process may open.
"""

import codecs
import ctypes
import functools
import hashlib
import mmap
import os
import re
import shlex
import stat
import weakref
from pathlib import Path

import numpy as np

from blockgpt.console import script_path
from blockgpt.data.formats import COMPRESSIONS, MARKS, file_type_error, is_text, signature
from blockgpt.errors import DataError, error_text
from blockgpt.files import exists

PRINTABLE = frozenset(b"\t\n\r") | frozenset(range(32, 127))  # characters of ASCII
# Of formats.SIGNATURES, those that are too long to be token ids by chance are looked for.
MIN_SIGNATURE = 4
PICKLE = re.compile(rb"\x80[\x04\x05]\x95.{4}\0{4}|\x80[\x02\x03]([]}]q|c[a-z_]{2}|\x8a\nl\xfc\x9cF\xf9)", re.DOTALL)
ARRAY_FUNCTIONS = "np.fromfile(FILE, '{}').astype('{}').tofile(FILE)"


@functools.cache
def libc() -> ctypes.CDLL:
    """The C library, with the types of the functions that are called here."""
    library = ctypes.CDLL(None, use_errno=True)
    size, address, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.mmap.argtypes, library.mmap.restype = [address, size, integer, integer, integer, ctypes.c_long], address
    library.munmap.argtypes = [address, size]
    library.madvise.argtypes = [address, size, integer]
    return library


def memory_map(path: str | Path, dtype: np.dtype | str) -> np.ndarray:
    """A file as a 1-d read-only array; only the pages that are accessed are read. The file may be empty.

    Python's mmap keeps a descriptor open for as long as the array exists (until 3.13), hence the call of the system's.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if not size:  # mmap refuses an empty file
            return np.frombuffer(b"", dtype)
        address = libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    buffer = (ctypes.c_char * size).from_address(address)
    weakref.finalize(buffer, libc().munmap, address, size).atexit = False
    array: np.ndarray = np.frombuffer(buffer, dtype)  # type: ignore[call-overload]  # numpy's stubs know no ctypes
    array.setflags(write=False)
    return array


def madvise(tokens: np.ndarray, advice: str) -> None:
    """Advise the kernel how an array of `memory_map` will be accessed, if the platform has that advice.

    Without MADV_RANDOM the system reads ahead, which makes a read at a random position of a large file some hundred
    times as expensive.
    """
    buffer = getattr(tokens.base, "obj", tokens.base)  # numpy may keep a memoryview of it
    if isinstance(buffer, ctypes.Array) and hasattr(mmap, advice):
        libc().madvise(ctypes.addressof(buffer), ctypes.sizeof(buffer), getattr(mmap, advice))


def check_token_ids(ids: np.ndarray, vocab_size: int, where: str | Path, hint: str = "") -> None:
    """`DataError` if a token id is beyond the vocabulary: the embedding would fail far from the cause."""
    if ids.size and ids.max() >= vocab_size:
        raise DataError(f"{where}: has the token id {ids.max()}, beyond vocab_size={vocab_size} {hint}".rstrip())


def sha256_of_ends(path: Path, n: int = 2**20) -> str:
    """Hex digest of a large file's size and of its first and last n bytes, which is quick whatever the size."""
    with open(path, "rb") as file:
        head, size = file.read(n), file.seek(0, 2)
        file.seek(-n, 2)
        return hashlib.sha256(str(size).encode() + head + file.read(n)).hexdigest()


# ---- files without a meta.json


def check_bare_file(path: Path, dtype: np.dtype) -> None:
    """`DataError` if a file is at a glance no file of token ids of this dtype.

    A signature, text, an index file next to it, ids of a wider dtype: every second uint16 of an int32 file is zero.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise file_type_error(str(path), mode)
        with open(path, "rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from None
    wanted = f"not {dtype.name} token ids"
    if what := foreign_format(head):
        raise DataError(f"{path}: is {what}, {wanted}")
    index = path.with_suffix(".idx")
    if exists(index):
        raise DataError(f"{path}: belongs to {index.name}, as Megatron and fairseq write it, {wanted}")
    if is_text_file(head):
        command = shlex.join(["python", script_path("data/files/prepare.py"), "--name=NAME", f"--input={path}"])
        raise DataError(f"{path}: is text, {wanted} ({command})")
    if wide := wide_dtype(head, dtype):
        raise DataError(f"{path}: has {'big-endian ' * (wide.str[0] == '>')}{wide.name} ids, {wanted} "
                        f"(numpy: {ARRAY_FUNCTIONS.format(wide.str, dtype.str)})")


def foreign_format(head: bytes) -> str | None:
    """The name of the format whose signature begins a file, or None."""
    for name, (_, begin) in COMPRESSIONS.items():
        if (name != "gzip" and begin.match(head)) or (name == "gzip" and head.startswith(b"\x1f\x8b\x08")):
            return name
    if PICKLE.match(head):
        return "a pickle"
    known = signature(head, MIN_SIGNATURE)
    return known[0] if known and known[1] else None


def is_text_file(head: bytes) -> bool:
    """Whether a head of a file, of 16 bytes or more, is text: nearly impossible for token ids.

    UTF-8, UTF-16 with its mark, or, in a longer file, another encoding of mostly ASCII characters.
    """
    if len(head) < 16:
        return False
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return can_decode(head, encoding)
    if not is_text(head):
        return False
    n_printable = len(head.translate(None, bytes(set(range(256)) - PRINTABLE)))
    return can_decode(head, "utf-8") or (len(head) >= 512 and n_printable >= 0.8 * len(head))


def can_decode(head: bytes, encoding: str) -> bool:
    """Whether bytes are the beginning of a text in an encoding."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
        return True
    except UnicodeError:
        return False


def wide_dtype(head: bytes, dtype: np.dtype) -> np.dtype | None:
    """The wider dtype that the first ids of a file have, if only their low words are used."""
    for wide in map(np.dtype, ("<i8", "<i4", ">i8", ">i4")):
        n = wide.itemsize // dtype.itemsize
        words = np.frombuffer(head[:len(head) // wide.itemsize * wide.itemsize], dtype).reshape(-1, n)
        if wide.str[0] == ">":
            words = words[:, ::-1].byteswap()
        if n == 1 or len(words) < 8 or np.mean(words[:, 0] != 0) < 0.5:
            continue
        rest = words[:, 1:]
        if not rest.any() or (n == 2 and rest.max() < 16 and words[:, 0].max() >= 1024 and np.mean(rest == 0) > 0.5):
            return wide
    return None


def check_bare_ids(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    """`check_token_ids` of a whole file, with a guess at what the file is instead."""
    if vocab_size > 1024 and len(ids) >= 16 and np.isin(ids[:2**15], list(PRINTABLE)).all():  # a BPE's ids are others
        raise DataError(f"{path}: is text in UTF-{8 * ids.itemsize}, not token ids (iconv -f UTF-{8 * ids.itemsize}LE "
                        "-t UTF-8, then data/files/prepare.py)")
    beyond = ids >= vocab_size
    if not beyond.any():
        return
    guess = "another --tokenizer or --vocab_size?"
    n_header = int(np.flatnonzero(beyond)[-1]) + 1
    narrow = ids.view("<u2" if ids.itemsize == 4 else "u1")
    if n_header * ids.itemsize <= 4096 and n_header < len(ids) / 2:
        guess = f"only among the first {n_header * ids.itemsize:,} bytes: a header?"
    elif (ids.byteswap() < vocab_size).all():
        guess = "the file is big-endian: byteswap it"
    elif ids.itemsize == 4 or (narrow < vocab_size).all():
        guess = f"are the ids {narrow.dtype.name}? another --tokenizer or --vocab_size?"
    check_token_ids(ids, vocab_size, path, f"({guess})")
