"""Write the meta.json that nanoGPT's folders lack: train.bin and val.bin stay as they are.

    python -m tools.convert_nanogpt_meta DIR                     # a meta.pkl there says which characters the ids are
    python -m tools.convert_nanogpt_meta DIR --tokenizer gpt2    # no meta.pkl: nanoGPT's openwebtext, shakespeare

A pickle can run any program when it is loaded, so meta.pkl is never loaded: the few instructions that a plain dict
of numbers and strings is made of are carried out here, and any other is refused.
"""

import pickletools
import sys
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.data.dataset import SPLITS, is_bare, open_bare
from blockgpt.data.tokenizer import CharTokenizer, load_tokenizer
from blockgpt.errors import DataError, exit_on_user_error, first_line
from blockgpt.files import write_json

LARGEST = 2**24  # bytes of a meta.pkl: that of all of Unicode is smaller
MARK = object()  # on the stack, where the items of a collection begin
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXT = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "UNICODE", "BINUNICODE",
                    "BINUNICODE8", "SHORT_BINUNICODE"}


def read_plain_pickle(data):
    """The dict, list, str, int, bool or None that the bytes of a pickle describe; `DataError` for anything else."""
    stack, memo = [], {}

    def since_mark():
        at = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is MARK)
        items = stack[at + 1:]
        del stack[at:]
        return items

    def pairs(items):
        return zip(items[::2], items[1::2], strict=True)

    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in NUMBERS_AND_TEXT:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name == "MARK":
                stack.append(MARK)
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name == "DICT":
                stack.append(dict(pairs(since_mark())))
            elif name == "LIST":
                stack.append(since_mark())
            elif name in ("SETITEM", "SETITEMS"):
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                typed(stack[-1], dict).update(pairs(items))
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                typed(stack[-1], list).extend(items)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "STOP":
                (value,) = stack
                return value
            elif name not in ("PROTO", "FRAME"):
                raise DataError(f"has the instruction {name}, which no plain dict needs: not nanoGPT's, perhaps "
                                "hostile")
    except (ValueError, IndexError, KeyError, TypeError, StopIteration, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"is not a whole pickle: {type(error).__name__}: {first_line(error)}") from None
    raise DataError("is not a whole pickle: it does not end")


def typed(value, kind):
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} is no {kind.__name__}")
    return value


def characters_of(meta):
    """The `CharTokenizer` of nanoGPT's {"vocab_size": …, "itos": {id: character}, "stoi": {character: id}}."""
    itos = meta.get("itos") if type(meta) is dict else None
    if type(itos) is not dict or not itos or set(itos) != set(range(len(itos))):
        raise DataError("has no itos that numbers characters from 0 on")
    characters = [itos[i] for i in range(len(itos))]
    if not all(type(c) is str and len(c) == 1 for c in characters):
        raise DataError("numbers something else than characters")
    if characters != sorted(set(characters)):
        raise DataError("does not number the characters in the order of their code points, as nanoGPT does")
    return CharTokenizer("".join(characters))


def main(argv):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="with train.bin and val.bin, as nanoGPT's prepare.py leaves them")
    parser.add_argument("--tokenizer", help="where there is no meta.pkl: gpt2, … or a file")
    args = parser.parse_args(argv)
    if not is_bare(args.directory):
        raise DataError(f"{args.directory}: is no folder with train.bin and val.bin and without meta.json")
    path = args.directory / "meta.pkl"
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        try:
            if path.stat().st_size > LARGEST:
                raise DataError(f"{path}: is too large for a vocabulary of characters")
            tokenizer = characters_of(read_plain_pickle(path.read_bytes()))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror} (give --tokenizer)") from None
        except DataError as error:
            raise DataError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    meta = open_bare(args.directory.name, args.directory, tokenizer).meta
    meta["source"] = "nanoGPT"
    try:
        write_json(args.directory / "meta.json", meta)
    except OSError as error:
        raise DataError(f"{args.directory}: cannot be written: {error.strerror}") from None
    counts = ", ".join(f"{meta['splits'][s]['tokens']:,} {s}" for s in SPLITS)
    print(f"{args.directory / 'meta.json'}: {tokenizer.name}, vocabulary {tokenizer.vocab_size:,}, tokens {counts}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
