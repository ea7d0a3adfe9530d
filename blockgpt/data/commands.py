"""The flags that the prepare.py scripts share, and the functions that prepare a dataset from them."""

import argparse
import collections
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.data.filters import parse_filters
from blockgpt.data.prepare import prepare, write_dataset
from blockgpt.data.sources import SHAKESPEARE, Partition, hub_partitions, read_or_download
from blockgpt.data.tokenizer import CharTokenizer, load_tokenizer
from blockgpt.data.writer import SHARD_TOKENS, Recipe


def command_parser(description: str | None, out_dir: Path | None, tokenizer: str = "gpt2",
                   val_fraction: float = 0.01) -> ArgumentParser:
    """An `ArgumentParser` with the flags of every dataset that `prepare_with` prepares.

    Args:
        out_dir, tokenizer, val_fraction: the defaults of these flags.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--out_dir", type=Path, default=out_dir, help="the dataset's folder")
    parser.add_argument("--tokenizer", default=tokenizer,
                        help="byte, char, gpt2, cl100k_base, o200k_base, or a file: *.model, *.tiktoken, *.json")
    parser.add_argument("--val_fraction", type=float, default=val_fraction,
                        help="fraction of the documents for validation")
    parser.add_argument("--workers", type=int, help="processes; None: one per core")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="approximate tokens per file")
    parser.add_argument("--filter", action="append", metavar="NAME=VALUE",
                        help="keep only documents that pass, e.g. min_chars=200, language=en, "
                             "callable=module:function; repeatable")
    parser.add_argument("--keep_duplicates", action="store_true", help="keep documents that occurred before")
    return parser


def parse_and_check(parser: ArgumentParser) -> argparse.Namespace:
    """Parse sys.argv; `UserError` for a value out of range, before anything is read.

    Returns:
        The flags, and `filters`, the parsed values of --filter.
    """
    args = parser.parse_args()
    sys.path.append(os.getcwd())  # --filter callable=module:function may name a module there
    args.filters = parse_filters(args.filter)
    check_ranges(args, {"val_fraction": (0 < args.val_fraction < 1, "above 0 and below 1"),
                        "workers": (args.workers is None or args.workers >= 1, "at least 1"),
                        "shard_tokens": (args.shard_tokens >= 1, "at least 1")})
    return args


def prepare_with(args: argparse.Namespace, partitions: Sequence[Partition], source: str, by_position: bool = False,
                 separate: bool = True, **extras: Any) -> dict[str, Any]:
    """Call `prepare` with the parsed flags of `command_parser`."""
    recipe = Recipe(args.val_fraction, by_position, separate, not args.keep_duplicates, args.filters)
    tokenizer = char_tokenizer(partitions) if args.tokenizer == "char" else load_tokenizer(args.tokenizer)
    return prepare(args.out_dir, tokenizer, partitions, source=source, recipe=recipe, workers=args.workers,
                   shard_tokens=args.shard_tokens, command=shlex.join(["python", *sys.argv]), **extras)


def prepare_from_hub(description: str | None, script: str, source: str, *, val_fraction: float,
                     splits: Iterable[tuple[str, str | None]] = (("train", None),),
                     samples: Mapping[str, str] | None = None) -> None:
    """The command of a dataset whose text is on the Hugging Face hub.

    Args:
        script: the prepare.py's __file__; the dataset goes into its folder.
        source: the name on the hub.
        splits: (split on the hub, split here) pairs; None: decided for each document by its hash.
        samples: {value of --sample: its name on the hub}, the default first.
    """
    usage = ("Streamed through `datasets`; each process reads one of its files at a time. After an interruption, also "
             "of the network, the same command continues. --source: another name on the hub, or a local copy of the "
             "repository.")
    parser = command_parser(f"{description} {usage}", Path(script).resolve().parent, val_fraction=val_fraction)
    parser.add_argument("--source", default=source, help="name on the hub, or a local folder")
    if samples:
        parser.add_argument("--sample", choices=samples, default=next(iter(samples)), help="size of the sample")
    args = parse_and_check(parser)
    name = samples[args.sample] if samples else None
    partitions = [p for split, into in splits for p in hub_partitions(args.source, name, split, into=into)]
    prepare_with(args, partitions, f"{args.source} {name}" if name else args.source)


def prepare_shakespeare(description: str | None, script: str, tokenizer: str) -> None:
    """The command of Tiny Shakespeare: the first 90 % of the text is train and the rest val, as in nanoGPT.

    Args:
        script: the prepare.py's __file__; the dataset goes into its folder.
        tokenizer: the default of --tokenizer.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, help="a local input.txt; None: download")
    parser.add_argument("--out_dir", type=Path, default=Path(script).resolve().parent, help="the dataset's folder")
    parser.add_argument("--tokenizer", default=tokenizer, help="byte, char, gpt2, … or a file, as in data/files")
    args = parser.parse_args()
    loaded = None if args.tokenizer == "char" else load_tokenizer(args.tokenizer)  # an error precedes the download
    text = read_or_download(args.source, *SHAKESPEARE)
    cut = int(len(text) * 0.9)
    write_dataset(args.out_dir, loaded or CharTokenizer(text), [("train", text[:cut]), ("val", text[cut:])],
                  source=str(args.source or SHAKESPEARE[0]), separate=False)


def char_tokenizer(partitions: Iterable[Partition]) -> CharTokenizer:
    """A `CharTokenizer` of all characters in the partitions, which are read once for it."""
    characters: set[str] = set()
    for partition in partitions:
        for _, text in partition.documents(collections.Counter()):
            characters.update(text)
    return CharTokenizer("".join(characters))
