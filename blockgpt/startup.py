"""What every command does before anything else: the version of Python, the standard streams, missing packages.

A command imports this module before any other and before any package; a Python that is too old ends here. Python 3.8
can parse it and every command. `errors.exit_on_user_error` calls `open_streams`. It imports nothing of the project.
"""

import codecs
import io
import os
import re
import sys

MINIMUM_PYTHON = (3, 10)  # pyproject.toml and the README name it too
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if sys.version_info < MINIMUM_PYTHON:
    if sys.stderr is not None:
        sys.stderr.write(f"error: this needs Python {MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]} or newer, {sys.executable} "
                         f"is {sys.version_info[0]}.{sys.version_info[1]} (with make: make demo PYTHON=python3.12)\n")
    sys.exit(2)

# One character for one, so that columns stay aligned.
LOOKALIKES = {"·": "-", "×": "x", "…": "~", "→": ">", "←": "<", "−": "-", "–": "-", "—": "-", "━": "=", "─": "-",
              "█": "#", "⏹": "@", "≤": "<", "≥": ">", "’": "'", "‘": "'", "“": '"', "”": '"'}
ENCODE_ERRORS = "blockgpt.lookalike"  # the name of `replace_with_lookalikes` as an error handler of codecs


def replace_with_lookalikes(error: UnicodeError) -> "tuple[str, int]":
    """An error handler of codecs: what the console cannot encode, as ASCII that looks like it, else as '?'."""
    import unicodedata

    if not isinstance(error, UnicodeEncodeError):
        raise error
    unencodable = error.object[error.start:error.end]
    letters = (LOOKALIKES.get(c) or unicodedata.normalize("NFKD", c)[0] for c in unencodable)
    return "".join(c if c.isascii() else "?" for c in letters), error.end


codecs.register_error(ENCODE_ERRORS, replace_with_lookalikes)


def n_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_streams() -> None:
    """Make the standard streams usable: a closed one becomes os.devnull, and a character of any kind can be printed.

    A closed descriptor would otherwise be that of the next file that is opened, and a library that prints would write
    into it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_devnull(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (open to the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ENCODE_ERRORS)


def redirect_to_devnull(descriptor: int) -> None:
    """Open os.devnull as `descriptor`, in child processes too."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(opened, descriptor)
        os.close(opened)


def give_up_broken_streams(probe: bool = False) -> "OSError | None":
    """Redirect standard output and error to os.devnull where they cannot be written; the first error, if any.

    Args:
        probe: write an empty line: a stream that has failed may have dropped what it held, and flushes without error.
    """
    first = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            if probe and first is None:
                print(file=stream, flush=True)
        except OSError as error:
            first = first or error
            redirect_to_devnull(stream.fileno())
    return first


def explain_missing_package(error: BaseException) -> "str | None":
    """The line for the import of a package of requirements.txt that is not installed; None for any other error."""
    import shlex

    package = (getattr(error, "name", None) or "").partition(".")[0]
    requirements = os.path.join(ROOT, "requirements.txt")
    with open(requirements, encoding="utf-8") as file:
        required = re.findall(r"^[\w-]+", file.read(), re.MULTILINE)
    if not isinstance(error, ModuleNotFoundError) or package not in required:
        return None
    environment = os.path.join(ROOT, ".venv")
    if os.path.isfile(os.path.join(environment, "run.stamp")) and sys.prefix != environment:
        fix = "source " + shlex.quote(os.path.join(environment, "bin", "activate"))
    else:
        fix = "python -m pip install -r " + shlex.quote(requirements)
    return f"the package {package} is not installed for {sys.executable} ({fix})"


def except_hook(error_type: "type[BaseException]", error: BaseException, trace: "object") -> None:
    """In place of `sys.excepthook`: a missing package is one line and exit code 2."""
    line = explain_missing_package(error) if isinstance(error, ModuleNotFoundError) else None
    if line is None:
        return previous_hook(error_type, error, trace)  # type: ignore[arg-type]
    open_streams()
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


previous_hook = sys.excepthook
sys.excepthook = except_hook
