"""Write the meta.json that nanoGPT's folders lack; train.bin and val.bin are not changed.

    python -m tools.convert_nanogpt_meta DIR                     # DIR/meta.pkl contains the characters of the ids
    python -m tools.convert_nanogpt_meta DIR --tokenizer gpt2    # without meta.pkl: nanoGPT's openwebtext, shakespeare

A pickle can run any program when it is loaded. `read_plain_pickle` therefore refuses a pickle that names anything.
"""

import argparse
import io
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.data.dataset import SPLITS, is_bare, open_bare
from blockgpt.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from blockgpt.errors import DataError, exit_on_user_error, first_line, short_repr
from blockgpt.files import FolderLock, user_path, write_json

MAX_BYTES = 2**24  # of a meta.pkl: a vocabulary of all Unicode characters is smaller


class PlainUnpickler(pickle._Unpickler):
    """Loads values of builtin types only: no class, function or persistent object can be named, so none can be called.

    It is pickle's Python implementation, because the C one allocates memory for the largest memo index in the stream:
    ten bytes can ask for gigabytes. BYTEARRAY8 does the same and is left out.
    """

    dispatch = {opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if opcode != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"refers to {short_repr(f'{module}.{name}')}, which a vocabulary does not need: it is not "
                        "nanoGPT's, and may be malicious")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError(f"refers to the persistent object {short_repr(pid)}: it is not nanoGPT's")


def read_plain_pickle(data: bytes) -> Any:
    """The value that a pickle contains: dicts, lists, strings, numbers and so on.

    Raises:
        DataError: the pickle is damaged, or refers to a class, a function or a persistent object.
    """
    try:
        return PlainUnpickler(io.BytesIO(data)).load()
    except DataError:
        raise
    except Exception as error:  # the documentation of pickle names no complete list
        raise DataError(f"is not a complete pickle: {type(error).__name__}: {first_line(error)}") from None


def nanogpt_tokenizer(meta: Any) -> CharTokenizer:
    """The tokenizer of nanoGPT's meta.pkl.

    Args:
        meta: {"vocab_size": …, "itos": {id: character}, "stoi": {character: id}}, not validated.

    Raises:
        DataError: meta has another form.
    """
    itos = meta.get("itos") if type(meta) is dict else None
    if (type(itos) is not dict or not itos or not all(type(i) is int for i in itos)
            or set(itos) != set(range(len(itos)))):
        raise DataError("has no itos that numbers characters from 0 on")
    characters = [itos[i] for i in range(len(itos))]
    if not all(type(c) is str and len(c) == 1 for c in characters):
        raise DataError("has an itos with values that are not single characters")
    if characters != sorted(set(characters)):
        raise DataError("does not number the characters in the order of their code points, as nanoGPT does")
    return CharTokenizer("".join(characters))


def read_tokenizer(path: Path) -> CharTokenizer:
    """The tokenizer that the meta.pkl at `path` describes; `DataError` names the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError("is too large for a vocabulary of characters")
        return nanogpt_tokenizer(read_plain_pickle(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror} (give --tokenizer)") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=user_path,
                        help="with train.bin and val.bin, as nanoGPT's prepare.py writes them")
    parser.add_argument("--tokenizer", help="if there is no meta.pkl: gpt2, … or a file")
    args = parser.parse_args(argv)
    if not is_bare(args.directory):
        raise DataError(f"{args.directory}: is no folder with train.bin and val.bin and without meta.json")
    try:
        with FolderLock(args.directory, "prepares this dataset"):
            convert(args)
    except OSError as error:
        raise DataError(f"{args.directory}: cannot be written: {error.strerror}") from None


def convert(args: argparse.Namespace) -> None:
    """Write meta.json, the description of bare token files."""
    tokenizer: Tokenizer = (load_tokenizer(args.tokenizer) if args.tokenizer
                            else read_tokenizer(args.directory / "meta.pkl"))
    meta = open_bare(args.directory.name, args.directory, tokenizer).meta
    meta["source"] = "nanoGPT"
    write_json(args.directory / "meta.json", meta)
    counts = ", ".join(f"{meta['splits'][s]['tokens']:,} {s}" for s in SPLITS)
    print(f"{args.directory / 'meta.json'}: {tokenizer.name}, vocabulary {tokenizer.vocab_size:,}, tokens {counts}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
