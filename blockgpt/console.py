"""The terminal: the parser of the commands, printing, columns, sizes and times as text."""

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from blockgpt.errors import UserError, did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """The argparse parser of every command: no abbreviated flags, and a mistake is a `UserError` with a hint.

    Flags may be typed with dashes in place of their underscores.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; a flag with one value that is given twice is a `UserError`: the first would be lost silently."""
        args = self._with_underscores(list(sys.argv[1:] if args is None else args))
        given = [arg.partition("=")[0] for arg in args[:args.index("--") if "--" in args else None]]
        for action in self._actions:
            if type(action) is argparse._StoreAction and sum(given.count(name) for name in action.option_strings) > 1:
                raise UserError(f"{action.option_strings[-1]}: is given twice (give it once)")
        return super().parse_known_args(args, namespace)

    def _with_underscores(self, args: list[str]) -> list[str]:
        """args with the names of known flags as they were declared."""
        names = {name.replace("_", "-"): name for action in self._actions for name in action.option_strings}
        end = args.index("--") if "--" in args else len(args)

        def declared(arg: str) -> str:
            name, equals, value = arg.partition("=")
            return names.get(name.replace("_", "-"), name) + equals + value if arg.startswith("--") else arg

        return [*map(declared, args[:end]), *args[end:]]

    def print_help(self, file: Any = None) -> None:
        """Print the help at once, so that `| head` ends the command quietly."""
        echo(self.format_help(), file, end="")

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`, with the nearest flag for one that does not exist."""
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        if unrecognized:
            names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            message += did_you_mean(words.split()[0].partition("=")[0], names)
        raise UserError(message.removeprefix("argument "))


def check_ranges(args: argparse.Namespace, ranges: Mapping[str, tuple[bool, str]]) -> None:
    """Check the values of parsed flags.

    Args:
        args: the parsed flags.
        ranges: {flag: (whether its value is in range, the range in words)}.

    Raises:
        UserError: the first flag that is out of range.
    """
    for name, (in_range, words) in ranges.items():
        if not in_range:
            raise UserError(f"--{name}: {getattr(args, name)} is out of range, must be {words}")


def echo(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print at once, to stdout by default.

    A stream that cannot be written, such as a file on a full disk, is replaced by os.devnull: the run continues.

    Raises:
        BrokenPipeError: the reader has closed the pipe, as `| head` does.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is not sys.stderr:
            echo(f"warning: the console cannot be written ({error.strerror}): the run continues without output",
                 sys.stderr)


def resume_flags(run_dir: str | os.PathLike[str], resume: str = "must") -> str:
    """The flags that continue a run, to paste behind `python train.py` or torchrun's train.py."""
    folder, name = os.path.split(os.fspath(run_dir))
    out_dir = [] if folder == "runs" else [f"--out_dir={folder or '.'}"]
    return shlex.join([f"--resume={resume}", f"--run_name={name}", *out_dir])


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def in_columns(name: str, text: str) -> str:
    """A row of the header: a name and its text. On a terminal the text is wrapped in its column."""
    if not is_terminal():
        return name + text
    width = max(20, shutil.get_terminal_size().columns - 1 - len(name))
    return name + ("\n" + " " * len(name)).join(textwrap.wrap(text, width) or [""])


def align_columns(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Rows of cells as lines of text, two spaces between columns.

    Args:
        rows: of equal length.
        left: the indices of the columns that are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def percentages(amounts: Mapping[str, float], unit: str = "", scale: float = 1, digits: int = 0) -> str:
    """'embeddings 1,024 (20%) · attention 4,096 (80%)' of the amounts by name."""
    whole = sum(amounts.values()) or 1
    return " · ".join(f"{name} {n / scale:,.{digits}f}{unit} ({n / whole:.0%})" for name, n in amounts.items())


def human_bytes(size: float | None) -> str:
    """A number of bytes in MiB or GiB; None is unknown."""
    if size is None:
        return "? memory"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def human_time(seconds: float | None) -> str:
    """A duration as 1h02m or 2m03s; None is unknown."""
    if seconds is None:
        return "…"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s"
