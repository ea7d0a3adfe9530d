"""How a user's mistake leaves the program: one line on stderr and an exit code, never a traceback.

Raise a subclass of `UserError` for what the user can mend; use `assert` for what only we can.
This module imports nothing of ours, so every room may use it.
"""

import contextlib
import difflib
import functools
import importlib
import os
import sys


class UserError(ValueError):
    """Something the user can mend. The message says what, where and how; it is printed on one line.

    alike: whether every process of a run raises it, so that one of them tells it.
    """

    exit_code = 2
    on_all_ranks = True


class ConfigError(UserError):
    """A key, a value or a combination of them that cannot be built.

    key: the configuration key at fault, so that the configurator can say where it was set.
    """

    def __init__(self, key, message):
        super().__init__(f"{key}: {message}")
        self.key = key


class DataError(UserError):
    """A dataset that is missing, damaged, or does not fit the model."""


class CheckpointError(UserError):
    """No usable checkpoint where one was asked for."""

    exit_code = 3


class SaveError(UserError):
    """The final save failed."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss or a gradient stopped being a number; nothing was updated with it."""

    exit_code = 5


class PeerLostError(UserError):
    """Another process of the run died or stands still."""

    exit_code = 6
    on_all_ranks = False


def did_you_mean(word, names):
    """' (did you mean X?)' for a near miss, else ' (one of …)'; the nearest of a long list."""
    names = {str(n).lower(): str(n) for n in names}
    near = difflib.get_close_matches(str(word).lower()[:100], names, n=1, cutoff=0.6 if len(names) < 20 else 0.0)
    return f" (did you mean {names[near[0]]}?)" if near else f" (one of {', '.join(names.values())})" if names else ""


def short_repr(value):
    """repr(value) for a message: never long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an integer of 5000 digits, a class with a broken __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}…{text[-10:]}"


def first_line(error):
    """The first line of what an exception of a library says, for a message of ours; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def exit_on_user_error(leave=sys.exit):
    """Turn a `UserError` (or Ctrl-C) inside the block into one line on stderr and its exit code."""
    try:
        yield
    except UserError as error:
        # A slip is the same in every process of a machine, what came of training in every process of the run.
        rank = os.environ.get("LOCAL_RANK" if error.exit_code == 2 else "RANK", "0")
        if not error.on_all_ranks or rank == "0" or "WORLD_SIZE" not in os.environ:
            line = " ".join(str(error).split())
            print("error: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
        leave(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` closed our stdout: nobody is left to tell
        sys.stderr.close()
        sys.exit(141)


@functools.cache
def require_package(module):
    """An optional package, or the `UserError` that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"this needs the package {package}, which cannot be imported: {first_line(error)} "
                        f"(pip install {package})") from None
