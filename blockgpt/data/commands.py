"""What the prepare.py scripts share: their flags, and what they do with them."""

import collections
import os
import shlex
import sys
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.data.filters import parse_filters
from blockgpt.data.prepare import prepare, write_dataset
from blockgpt.data.sources import SHAKESPEARE, hub_partitions, text_of
from blockgpt.data.tokenizer import CharTokenizer, load_tokenizer
from blockgpt.data.writer import (
    SHARD_TOKENS,
    Recipe,
)
from blockgpt.errors import UserError


def command_parser(description, out_dir, tokenizer="gpt2", val_fraction=0.01):
    """An `ArgumentParser` with the options of every dataset that `prepare_with` reads."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--out_dir", type=Path, default=out_dir, help="where the files go")
    parser.add_argument("--tokenizer", default=tokenizer,
                        help="byte, char, gpt2, cl100k_base, o200k_base, or a file: *.model, *.tiktoken, *.json")
    parser.add_argument("--val_fraction", type=float, default=val_fraction,
                        help="share of the documents that is for validation")
    parser.add_argument("--workers", type=int, help="processes; None: one a core")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens of a file, about")
    parser.add_argument("--filter", action="append", metavar="NAME=VALUE",
                        help="keep what passes, e.g. min_chars=200, language=en, callable=module:function; repeatable")
    parser.add_argument("--keep_duplicates", action="store_true", help="do not drop documents that were there before")
    return parser


def parse(parser):
    """The parsed command line; `UserError` for a value out of range, before anything is read."""
    args = parser.parse_args()
    sys.path.append(os.getcwd())  # where a user's --filter callable=module:function stands
    args.filters = parse_filters(args.filter)
    for name, ok, range_ in (("val_fraction", 0 < args.val_fraction < 1, "above 0 and below 1"),
                             ("workers", args.workers is None or args.workers >= 1, "at least 1"),
                             ("shard_tokens", args.shard_tokens >= 1, "at least 1")):
        if not ok:
            raise UserError(f"--{name}: {getattr(args, name)} is out of range, must be {range_}")
    return args


def prepare_with(args, parts, source, by_position=False, separate=True, **extras):
    """`prepare` as the parsed options of `command_parser` ask."""
    recipe = Recipe(args.val_fraction, by_position, separate, not args.keep_duplicates, args.filters)
    tokenizer = characters_of(parts) if args.tokenizer == "char" else load_tokenizer(args.tokenizer)
    return prepare(args.out_dir, tokenizer, parts, source=source, recipe=recipe, workers=args.workers,
                   shard_tokens=args.shard_tokens, command=shlex.join(["python", *sys.argv]), **extras)


def prepare_from_hub(description, script, source, *, val_fraction, splits=(("train", None),), samples=None):
    """What a prepare.py does whose text stands on the Hugging Face hub, there as `source`.

    script: its __file__. splits: (the hub's, the one of ours that it fills) each; None: a document's hash decides.
    samples: {value of --sample: the hub's name of it}, the default first.
    """
    how = ("Streamed through `datasets`, a file of it at a time by each process. Killed, or cut off from the network, "
           "the same command goes on. --source: another name on the hub, or a local copy of the repository.")
    parser = command_parser(f"{description} {how}", Path(script).resolve().parent, val_fraction=val_fraction)
    parser.add_argument("--source", default=source, help="on the hub, or a local folder")
    if samples:
        parser.add_argument("--sample", choices=samples, default=next(iter(samples)), help="how much of it")
    args = parse(parser)
    name = samples[args.sample] if samples else None
    parts = [part for split, into in splits for part in hub_partitions(args.source, name, split, into=into)]
    prepare_with(args, parts, f"{args.source} {name}" if name else args.source)


def prepare_shakespeare(description, script, tokenizer):
    """What a prepare.py of Tiny Shakespeare does: the first 90 % of the text train, the rest val, as nanoGPT has it.

    script: its __file__. tokenizer: what --tokenizer is by default.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, help="a local input.txt; None: download")
    parser.add_argument("--out_dir", type=Path, default=Path(script).resolve().parent, help="where the files go")
    parser.add_argument("--tokenizer", default=tokenizer, help="byte, char, gpt2, … or a file, as data/files has it")
    args = parser.parse_args()
    tokenizer = None if args.tokenizer == "char" else load_tokenizer(args.tokenizer)  # a slip is told before a download
    text = text_of(args.source, *SHAKESPEARE)
    cut = int(len(text) * 0.9)
    write_dataset(args.out_dir, tokenizer or CharTokenizer(text), [("train", text[:cut]), ("val", text[cut:])],
                  source=str(args.source or SHAKESPEARE[0]), separate=False)


def characters_of(parts):
    """A `CharTokenizer` of every character in the parts, which are read once for it."""
    characters = set()
    for part in parts:
        for _, text in part.documents(collections.Counter()):
            characters.update(text)
    return CharTokenizer("".join(characters))
