"""Errors of the user: one line on stderr and an exit code, never a traceback.

Raise a subclass of `UserError` for what the user can fix. Use `assert` for internal invariants. A new exit code
is a new subclass. This module imports of the project only startup.py, so that every module can use it.
"""

import contextlib
import difflib
import errno
import functools
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from blockgpt.startup import give_up_broken_streams, open_streams

# Of what the user can fix, wherever a library raises them.
DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Something that the user can fix. The message says what, where and how; it is printed on one line.

    Attributes:
        exit_code: the exit code of the program.
        on_all_ranks: whether every process of a run raises this error, so that one of them prints it. Set it to
            False on an error of one process, which then prints it itself.
    """

    exit_code = 2
    on_all_ranks = True


class ConfigError(UserError):
    """A configuration key with a value, or in a combination, that cannot be used.

    Attributes:
        key: the configuration key at fault, so that the configurator can say where it was set.
        message: what is wrong, without the key.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"

    def at(self, location: str | os.PathLike[str]) -> UserError:
        """The error with the file or flag that set the key in front. A flag is its own key and is named once."""
        return UserError(f"{location}: {self.message if location == f'--{self.key}' else self}")


class DataError(UserError):
    """A dataset that is missing, damaged, or does not fit the model."""


class CheckpointError(UserError):
    """No usable checkpoint where one is required."""

    exit_code = 3


class SaveError(UserError):
    """The final save failed."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss or a gradient is not finite; no update was made with it."""

    exit_code = 5


class PeerLostError(UserError):
    """Another process of the run died or makes no progress."""

    exit_code = 6
    on_all_ranks = False


class OutOfMemoryError(UserError):
    """A device or the host has no memory left."""

    exit_code = 7
    on_all_ranks = False


def nearest(word: object, names: Iterable[object], cutoff: float | None = None) -> str | None:
    """The name that is most like a word; None if no similarity (0 to 1) reaches the cutoff.

    Args:
        cutoff: None: 0.6 for fewer than 20 names, else 0.
    """
    by_lowercase = {str(name).lower(): str(name) for name in names}
    if cutoff is None:
        cutoff = 0.6 if len(by_lowercase) < 20 else 0.0
    near = difflib.get_close_matches(str(word).lower()[:100], by_lowercase, n=1, cutoff=cutoff)
    return by_lowercase[near[0]] if near else None


def did_you_mean(word: object, names: Iterable[object]) -> str:
    """The hint after an unknown word: ' (did you mean X?)' for a near miss, else ' (one of …)'.

    Of 20 names or more it is always the nearest one. Without names it is empty.
    """
    words = list(map(str, names))
    if near := nearest(word, words):
        return f" (did you mean {near}?)"
    return f" (one of {', '.join(words)})" if words else ""


def short_repr(value: object) -> str:
    """repr(value) for a message, cut to about 70 characters. It raises no error, whatever the value."""
    try:
        text = repr(value)
    except Exception:  # an integer of 5000 digits, a class with a broken __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}…{text[-10:]}"


def message_of(error: BaseException) -> str:
    """str(error); empty if that fails, as it can for an exception that a user has defined."""
    try:
        return str(error)
    except Exception:
        return ""


def first_line(error: BaseException) -> str:
    """The first line of the message of a library's exception, or its type if it has no message."""
    return (message_of(error).strip().splitlines() or [type(error).__name__])[0][:200]


def error_text(error: BaseException) -> str:
    """The system's message of an OSError, else the error's own message or type; on one line."""
    text = str(getattr(error, "strerror", None) or message_of(error) or type(error).__name__)
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def exit_on_user_error(exit_process: Callable[[int], Any] = sys.exit) -> Iterator[None]:
    """Turn a `UserError`, Ctrl-C, or a stdout that is closed or full, inside the block into one line and an exit code.

    The standard streams can be used inside the block, whatever they are (`open_streams`).

    Args:
        exit_process: called with the exit code of a `UserError`. A run of several processes needs more than sys.exit.
    """
    open_streams()
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()  # here, where an error is caught; at the interpreter's exit it would be a traceback
            raise
        sys.stdout.flush()
    except UserError as error:
        report_error(error)
        give_up_broken_streams()
        exit_process(error.exit_code)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr)
        give_up_broken_streams()
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout closed the pipe, as `| head` does
        give_up_broken_streams()
        sys.exit(141)
    except OSError as error:
        if give_up_broken_streams(probe=True) is None:
            if error.errno in DISK_ERRORS and isinstance(error.filename, str):  # such as a library's cache
                report_error(UserError(f"{error.filename}: {error_text(error)} (free disk space, or make it "
                                       "accessible; TMPDIR and TORCHINDUCTOR_CACHE_DIR name scratch folders)"))
                exit_process(UserError.exit_code)
                return
            record_for_torchrun(traceback.format_exc())
            raise
        report_error(UserError(f"the output cannot be written: {error_text(error)}"))
        give_up_broken_streams()
        sys.exit(2)
    except Exception:
        record_for_torchrun(traceback.format_exc())
        raise


def report_error(error: UserError) -> None:
    """Print the line of an error, unless another process does, and record it for torchrun."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    record_for_torchrun(f"error: {line}")
    if is_reported_here(error):
        with contextlib.suppress(OSError):  # the terminal is gone
            print(f"error: {line}", file=sys.stderr, flush=True)


def record_for_torchrun(message: str) -> None:
    """Write the file that torchrun's agent reads from a process that has failed, for the summary that it prints.

    The format is that of torch.distributed.elastic.multiprocessing.errors. Only the first error counts.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    entry = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "x") as file:
        json.dump({"message": entry}, file)


def is_reported_here(error: UserError) -> bool:
    """Whether this process prints the error: of those that raise it too, one does.

    A mistake in config or data (exit code 2) is printed once on each machine, a failure of the run once in the run.
    """
    if not error.on_all_ranks or "WORLD_SIZE" not in os.environ:
        return True
    return os.environ.get("LOCAL_RANK" if error.exit_code == 2 else "RANK", "0") == "0"


@functools.cache
def require_package(module: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it cannot be imported; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"this needs the package {package}, which cannot be imported: {first_line(error)} "
                        f"(pip install {package})") from None
