"""The flags that the prepare.py scripts share, and the functions that prepare a dataset from them."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.data.filters import parse_filters
from blockgpt.data.hub import hub_partitions
from blockgpt.data.losses import MAX_LOSS, Skipped
from blockgpt.data.prepare import check_separable, prepare, write_dataset
from blockgpt.data.readers import READERS
from blockgpt.data.sources import SHAKESPEARE, FilePartition, Partition, file_partitions, read_or_download
from blockgpt.data.tokenizer import CharTokenizer, load_tokenizer
from blockgpt.data.writer import SHARD_TOKENS, Recipe
from blockgpt.files import user_path


def command_parser(description: str | None, out_dir: Path | None, tokenizer: str = "gpt2",
                   val_fraction: float = 0.01) -> ArgumentParser:
    """An `ArgumentParser` with the flags of every dataset that `prepare_with` prepares.

    Args:
        out_dir, tokenizer, val_fraction: the defaults of these flags.
    """
    parser = ArgumentParser(description=description)
    add_out_dir(parser, out_dir)
    parser.add_argument("--tokenizer", default=tokenizer,
                        help="byte, char, gpt2, cl100k_base, o200k_base, a file (*.model, *.tiktoken, *.json), or a "
                             "folder with one")
    add_separator(parser)
    parser.add_argument("--by_position", action="store_true", help="the end of each document is val")
    parser.add_argument("--val_fraction", type=float, default=val_fraction,
                        help="fraction of the documents for validation")
    parser.add_argument("--workers", type=int, help="processes; None: one per core")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="approximate tokens per file")
    parser.add_argument("--filter", action="append", metavar="NAME=VALUE",
                        help="keep only documents that pass, e.g. min_chars=200, language=en, "
                             "callable=module:function; repeatable")
    parser.add_argument("--keep_duplicates", action="store_true", help="keep documents that occurred before")
    add_max_loss(parser)
    return parser


def add_out_dir(parser: ArgumentParser, out_dir: Path | None) -> None:
    parser.add_argument("--out_dir", type=user_path, default=out_dir, help="the dataset's folder")


def add_separator(parser: ArgumentParser) -> None:
    parser.add_argument("--eot", metavar="TOKEN", help="the tokenizer's token that ends a document; None: its own")
    parser.add_argument("--no_separator", action="store_true", help="no end-of-text token after a document")


def add_max_loss(parser: ArgumentParser) -> None:
    parser.add_argument("--max_loss", type=float, default=MAX_LOSS,
                        help="fraction of the records of a file that may be lost, because they are damaged or have no "
                             "text; more is an error")


def add_text_key(parser: ArgumentParser) -> None:
    parser.add_argument("--text_key", default="text", help="the field or column that contains the text")


def add_input(parser: ArgumentParser) -> None:
    """Add the flags of `input_partitions`."""
    parser.add_argument("--input", nargs="+", action="extend", required=True,
                        help="files, folders or patterns in quotes")
    add_text_key(parser)
    parser.add_argument("--format", choices=READERS, help="of every file; None: by its content and suffix")
    parser.add_argument("--no_quotes", action="store_true", help="quotes in csv and tsv are part of the text")


def input_partitions(args: argparse.Namespace) -> list[FilePartition]:
    """The partitions of the files that the flags of `add_input` name."""
    return file_partitions(args.input, args.text_key, args.format, not args.no_quotes)


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
                        "max_loss": (0 <= args.max_loss <= 1, "from 0 to 1"),
                        "shard_tokens": (args.shard_tokens >= 1, "at least 1")})
    return args


def prepare_with(args: argparse.Namespace, partitions: Sequence[Partition], source: str,
                 **extras: Any) -> dict[str, Any]:
    """Call `prepare` with the parsed flags of `command_parser`."""
    recipe = Recipe(args.val_fraction, args.by_position, not args.no_separator, not args.keep_duplicates, args.filters)
    if args.tokenizer == "char":
        check_separable(CharTokenizer(""), recipe)  # before the text is read for its characters
    tokenizer = (load_tokenizer(args.tokenizer, args.eot) if args.tokenizer != "char" or args.eot
                 else char_tokenizer(partitions, args.max_loss))
    return prepare(args.out_dir, tokenizer, partitions, source=source, recipe=recipe, workers=args.workers,
                   shard_tokens=args.shard_tokens, max_loss=args.max_loss, command=shlex.join(["python", *sys.argv]),
                   **extras)


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
    parser.add_argument("--source", type=os.path.expanduser, default=source, help="name on the hub, or a local folder")
    add_text_key(parser)
    if samples:
        parser.add_argument("--sample", choices=samples, default=next(iter(samples)), help="size of the sample")
    args = parse_and_check(parser)
    name = samples[args.sample] if samples else None
    partitions = [p for split, into in splits for p in hub_partitions(args.source, name, split, args.text_key, into)]
    prepare_with(args, partitions, f"{args.source} {name}" if name else args.source)


def prepare_shakespeare(description: str | None, script: str, tokenizer: str) -> None:
    """The command of Tiny Shakespeare: the first 90 % of the text is train and the rest val, as in nanoGPT.

    Args:
        script: the prepare.py's __file__; the dataset goes into its folder.
        tokenizer: the default of --tokenizer.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, help="a local input.txt; None: download")
    add_out_dir(parser, Path(script).resolve().parent)
    parser.add_argument("--tokenizer", default=tokenizer, help="byte, char, gpt2, … or a file, as in data/files")
    args = parser.parse_args()
    loaded = None if args.tokenizer == "char" else load_tokenizer(args.tokenizer)  # an error precedes the download
    text = read_or_download(args.source, *SHAKESPEARE)
    cut = int(len(text) * 0.9)
    write_dataset(args.out_dir, loaded or CharTokenizer(text), [("train", text[:cut]), ("val", text[cut:])],
                  source=str(args.source or SHAKESPEARE[0]), separate=False)


def char_tokenizer(partitions: Iterable[Partition], max_loss: float = MAX_LOSS) -> CharTokenizer:
    """A `CharTokenizer` of all characters in the partitions, which are read once for it."""
    characters: set[str] = set()
    for partition in partitions:
        for _, text in partition.documents(Skipped(max_loss=max_loss)):
            characters.update(text)
    return CharTokenizer("".join(characters))
