"""What is in a dataset: counts, digests, the most frequent tokens, duplicates, a few sequences with token boundaries.

    python -m tools.inspect_data pycode [--sequences 3] [--block_size 64] [--verify]

Reads up to --tokens of each split. In a printed sequence, | separates tokens and ⏹ is the end of a document.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import numpy as np

from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.data.dataset import SPLITS, Dataset, open_dataset
from blockgpt.data.loader import SequenceReader
from blockgpt.data.token_files import check_token_ids
from blockgpt.data.tokenizer import Tokenizer, describe_tokenizer, from_meta
from blockgpt.data.writer import digest_of
from blockgpt.errors import DataError, exit_on_user_error
from blockgpt.files import sha256_of


def documents(shards: Sequence[np.ndarray], eot: int, limit: int) -> Iterator[np.ndarray]:
    """The documents in the first `limit` tokens of the shards, without their eot."""
    for tokens in shards:
        tokens, limit = tokens[:limit], limit - min(limit, len(tokens))
        yield from (d[d != eot] for d in np.split(tokens, np.flatnonzero(tokens == eot) + 1) if len(d))


def histogram(values: Sequence[int], base: int) -> list[str]:
    """The lines of a histogram of positive integers, with a row for each power of `base`."""
    edges = [base**i for i in range(int(np.log(max(values)) / np.log(base)) + 2)]
    counts = np.histogram(values, edges)[0]
    return [f"    {low:>9,} … {high - 1:>9,} {n:>9,}  {'█' * round(40 * n / counts.max())}"
            for low, high, n in zip(edges, edges[1:], counts.tolist(), strict=False) if n]


def print_split(dataset: Dataset, split: str, tokenizer: Tokenizer, limit: int, top: int) -> None:
    """Print what a split contains: the counts of meta.json, then what its first `limit` tokens are."""
    entry, bytes_per_token = dataset.meta["splits"][split], dataset.bytes_per_token(split)
    totals = ", ".join(f"{entry[k]:,} {k}" for k in ("documents", "tokens", "bytes") if entry[k] is not None)
    print(f"\n{split}: {totals} in {len(entry['files'])} file{'s' * (len(entry['files']) > 1)}"
          + (f"; {bytes_per_token:.3f} bytes per token" if bytes_per_token else ""))
    print_token_counts(dataset, split, tokenizer, limit, top)
    print_documents(dataset, split, limit)


def print_token_counts(dataset: Dataset, split: str, tokenizer: Tokenizer, limit: int, top: int) -> None:
    """Print the `top` most frequent of the first `limit` tokens of a split."""
    eot, counts, total = dataset.meta["eot"], np.zeros(dataset.vocab_size, np.int64), 0
    for tokens in dataset.shards[split]:
        ids = tokens[:limit - total]
        check_token_ids(ids, dataset.vocab_size, f"{dataset.directory}: {split}", dataset.hint)
        counts += np.bincount(ids, minlength=dataset.vocab_size)
        total += len(ids)
    print(f"  of the first {total:,} tokens: {np.count_nonzero(counts):,} of {dataset.vocab_size:,} ids in use; the "
          "most frequent:")
    for token in np.argsort(-counts, kind="stable")[:top].tolist():
        if counts[token]:
            text = "⏹" if token == eot else repr(tokenizer.decode([token]))
            print(f"    {token:>7} {text:<16} {counts[token]:>11,}  {counts[token] / total:.2%}")


def print_documents(dataset: Dataset, split: str, limit: int) -> None:
    """Print how many documents the first `limit` tokens of a split have, their lengths, and how many are duplicates."""
    eot = dataset.meta["eot"]
    if eot is None:
        print("  documents: not separated")
        return
    lengths, digests = [], set()
    for document in documents(dataset.shards[split], eot, limit):
        lengths.append(len(document))
        digests.add(digest_of(document.tobytes()))
    print(f"  documents: median {int(np.median(lengths)):,} tokens, longest {max(lengths):,}, "
          f"{len(lengths) - len(digests):,} duplicate, {lengths.count(0):,} empty; by length in tokens:")
    print("\n".join(histogram([n for n in lengths if n] or [1], 4)))


def print_sequences(dataset: Dataset, tokenizer: Tokenizer, block_size: int, n: int) -> None:
    """Print the inputs of n sequences of the train split, evenly spaced, token by token."""
    reader, eot = SequenceReader(dataset, "train", block_size), dataset.meta["eot"]
    for index in np.linspace(0, reader.count - 1, min(n, reader.count)).astype(np.int64):
        tokens = reader.read(np.array([index]))["tokens"][0].tolist()
        texts = ("⏹" if token == eot else tokenizer.decode([token]) for token in tokens)
        print(f"\nsequence {index:,} of {reader.count:,}:\n" + "|".join(texts))


def verify_files(dataset: Dataset) -> None:
    """`DataError` if a file of the dataset has another digest than meta.json says."""
    for name, entry in itertools.chain(*(dataset.meta["splits"][split]["files"].items() for split in SPLITS)):
        if sha256_of(dataset.directory / name) != entry["sha256"]:
            raise DataError(f"{dataset.directory / name}: is damaged: its sha256 is not the one in meta.json "
                            f"{dataset.hint}")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="a folder in --data_dir")
    parser.add_argument("--data_dir", help="the folder of the datasets; None: data/ in the project's folder")
    parser.add_argument("--tokenizer", help="of a dataset without meta.json: gpt2, … or a file")
    parser.add_argument("--sequences", type=int, default=3, help="sequences to print")
    parser.add_argument("--block_size", type=int, default=64, help="tokens of a printed sequence")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of each split to read")
    parser.add_argument("--top", type=int, default=10, help="how many of the most frequent tokens to print")
    parser.add_argument("--verify", action="store_true", help="check the digest of every file, however large")
    args = parser.parse_args(argv)
    minimums = {"sequences": 0, "block_size": 1, "tokens": 1, "top": 0}
    check_ranges(args, {name: (getattr(args, name) >= n, f"at least {n}") for name, n in minimums.items()})
    dataset = open_dataset(args.dataset, args.data_dir, args.tokenizer)
    meta = dataset.meta
    tokenizer = from_meta(meta["tokenizer"])
    print(f"{dataset.directory}: {describe_tokenizer(meta['tokenizer'])}, vocabulary {meta['vocab_size']:,}, "
          f"{meta['dtype']}, from {meta['source']}\nfingerprint {dataset.fingerprint}")
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in meta["skipped"].items() if n)
    print(f"documents skipped when it was prepared: {skipped or 'none'}")
    if args.verify:
        verify_files(dataset)
        print("every file has the digest that meta.json says")
    for split in SPLITS:
        print_split(dataset, split, tokenizer, args.tokens, args.top)
    print_sequences(dataset, tokenizer, args.block_size, args.sequences)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
