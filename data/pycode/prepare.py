"""The embedded corpus: the source code of Python's standard library, from the Python that runs this. No download.

python data/pycode/prepare.py [--tokenizer gpt2] [--out_dir DIR]

Each file is one document, by default as UTF-8 bytes, followed by an end-of-text token. A file's path decides whether it
is train or val, so that the split is the same on every computer with the same Python.
"""

import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.data.commands import add_out_dir, add_separator
from blockgpt.data.losses import Skipped
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import load_tokenizer
from blockgpt.errors import DataError, error_text, exit_on_user_error
from blockgpt.files import unreadable

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


def collect(root: str | Path, skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of each .py file below `root`, in the order of their paths; count others in `skipped`.

    Raises:
        DataError: there is no .py file.
        UserError: a folder cannot be read: nobody knows what it holds.
    """
    files: dict[str, Path] = {}

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise unreadable(error.filename, error)

    for directory, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if f not in NOT_STDLIB]
        paths = [Path(directory, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    if not files:
        raise DataError(f"{root}: has no .py files: this Python's standard library is not installed as source code "
                        "(run prepare.py with another Python)")
    for name, path in sorted(files.items()):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped.update(not_utf8=1)  # some test files are so on purpose
        except OSError as error:
            skipped.position = (str(path), "", 0)
            skipped.lose("unreadable", error_text(error))
        else:
            if text:
                yield split_of(name), text
            else:
                skipped.update(empty=1)


def split_of(name: str) -> str:
    """The split of a file, by the hash of its path relative to the library: one file in ten is val."""
    return "val" if int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % 10 == 0 else "train"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_out_dir(parser, Path(__file__).resolve().parent)
    parser.add_argument("--tokenizer", default="byte", help="byte, gpt2, … or a file, as in data/files")
    add_separator(parser)
    args = parser.parse_args()
    skipped = Skipped({"not_utf8": 0, "unreadable": 0, "empty": 0})
    tokenizer, documents = load_tokenizer(args.tokenizer, args.eot), collect(sysconfig.get_path("stdlib"), skipped)
    write_dataset(args.out_dir, tokenizer, documents, skipped=skipped, source="Python's standard library",
                  separate=not args.no_separator, python=platform.python_version())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
