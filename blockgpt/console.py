"""The terminal: the parser of the commands, printing, columns, sizes and times as text."""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from blockgpt.errors import UserError, did_you_mean
from blockgpt.startup import ROOT, redirect_to_devnull

COLOURS = {"bold": 1, "dim": 2, "green": 32, "yellow": 33, "cyan": 36}


class ArgumentParser(argparse.ArgumentParser):
    """The argparse parser of every command: no abbreviated flags, and a mistake is a `UserError` with a hint.

    Flags may be typed with dashes in place of their underscores.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def complete(self) -> None:
        """Where a shell asks for the completions of a word, answer with argcomplete and exit."""
        if "_ARGCOMPLETE" in os.environ:
            with contextlib.suppress(ImportError):
                import argcomplete

                argcomplete.autocomplete(self, always_complete_options="long", print_suppressed=True)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, and the completions of a shell."""
        self.complete()
        return super().parse_args(args, namespace)

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
        print(self.format_help(), file=file, end="", flush=True)

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
    clear_line()
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up(stream, error)


def give_up(stream: TextIO, error: OSError) -> None:
    """Redirect a stream that cannot be written to os.devnull, with a warning on stderr."""
    redirect_to_devnull(stream.fileno())
    if stream is not sys.stderr:
        with contextlib.suppress(BrokenPipeError):
            echo(f"warning: the console cannot be written ({error.strerror}): the run continues without output",
                 sys.stderr)


class LiveLine:
    """The line of the terminal that is rewritten in place, if there is one."""

    open = False


def rewrite_line(text: str) -> None:
    """Print a line in place of the last one that was printed so. It must fit into the terminal."""
    prefix, LiveLine.open = "\r\x1b[K" * LiveLine.open, False
    echo(prefix + text, end="")
    LiveLine.open = True


def clear_line() -> None:
    """Remove the line of `rewrite_line`."""
    if LiveLine.open:
        LiveLine.open = False
        echo("\r\x1b[K", end="")


def can_rewrite() -> bool:
    """Whether stdout is a terminal on which a line can be rewritten."""
    return is_terminal() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in a colour of COLOURS, where the stream (stdout by default) has colours.

    That is a terminal, unless TERM is dumb. NO_COLOR, which is not empty, means no colours anywhere; else FORCE_COLOR,
    which is not 0, means colours everywhere.
    """
    stream = stream or sys.stdout
    forced = os.environ.get("FORCE_COLOR", "")
    has_colours = (bool(forced) and forced != "0") or (forced != "0" and stream is not None and stream.isatty()
                                                     and os.environ.get("TERM") != "dumb")
    if os.environ.get("NO_COLOR") or not has_colours:
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def resume_flags(run_dir: str | os.PathLike[str], resume: str = "must") -> str:
    """The flags that continue a run, to paste behind `python train.py` or torchrun's train.py."""
    folder, name = os.path.split(os.fspath(run_dir))
    out_dir = [] if folder == "runs" else [f"--out_dir={folder or '.'}"]
    return shlex.join([f"--resume={resume}", f"--run_name={name}", *out_dir])


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def terminal_width() -> int:
    """The columns of the terminal; COLUMNS where it is set, 120 where stdout is no terminal."""
    return shutil.get_terminal_size((120, 24)).columns


def in_columns(name: str, text: str) -> str:
    """A row of the header: a name and its text. On a terminal the text is wrapped in its column."""
    if not is_terminal():
        return name + text
    width = max(20, shutil.get_terminal_size().columns - 1 - len(name))
    return name + ("\n" + " " * len(name)).join(textwrap.wrap(text, width) or [""])


def python_command() -> str:
    """What a user types for the Python that runs this: `python`, or its path where that is another one."""
    found = shutil.which("python")
    if found and os.path.abspath(found) == sys.executable:
        return "python"
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith("..") else here


def script_path(script: str) -> str:
    """How a script of the project, such as train.py, is named in the current folder; elsewhere its absolute path."""
    path = os.path.join(ROOT, script)
    return script if os.path.abspath(script) == path else path


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
