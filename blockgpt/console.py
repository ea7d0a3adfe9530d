"""What people see on a terminal: lines that appear at once, sizes and times in words, the parser of the commands."""

import argparse
import os
import shutil
import sys
import textwrap

from blockgpt.errors import UserError, did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """argparse for the commands beside train.py, telling mistakes as train.py does."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        if unrecognized:
            names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            message += did_you_mean(words.split()[0].partition("=")[0], names)
        raise UserError(message.removeprefix("argument "))


def echo(text, stream=None, end="\n"):
    """Print at once. A console that cannot be written, such as a full disk's file, is given up: the run goes on."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:  # `| head` has had enough
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is not sys.stderr:
            echo(f"warning: the console cannot be written ({error.strerror}): the run goes on in silence", sys.stderr)


def is_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


def in_columns(name, text):
    """A row of the header; on a terminal, the text is wrapped in a column of its own."""
    if not is_terminal():
        return name + text
    width = max(20, shutil.get_terminal_size().columns - 1 - len(name))
    return name + ("\n" + " " * len(name)).join(textwrap.wrap(text, width) or [""])


def human_bytes(n):
    return "? memory" if n is None else f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def human_time(seconds):
    if seconds is None:
        return "…"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s"
