"""What is in a dataset: counts, digests, the commonest tokens, duplicates, a few windows with their boundaries.

    python -m tools.inspect_data pycode [--windows 3] [--block_size 64] [--verify]

Reads up to --tokens of each split. In the windows, | stands between tokens and ⏹ for the end of a document.
"""

import collections
import itertools
import sys

import numpy as np

from blockgpt.console import ArgumentParser
from blockgpt.data.dataset import SPLITS, open_dataset
from blockgpt.data.loader import SequenceReader
from blockgpt.data.tokenizer import describe_tokenizer, from_meta
from blockgpt.data.writer import digest_of
from blockgpt.errors import DataError, UserError, exit_on_user_error
from blockgpt.files import sha256_of


def documents(shards, eot, limit):
    """Yield the documents, as arrays without their eot, of the first `limit` tokens of the shards."""
    for tokens in shards:
        tokens, limit = tokens[:limit], limit - min(limit, len(tokens))
        yield from (d[d != eot] for d in np.split(tokens, np.flatnonzero(tokens == eot) + 1) if len(d))


def histogram(values, bins):
    """Lines of a histogram of positive whole numbers, by powers of `bins`."""
    edges = [bins**i for i in range(int(np.log(max(values)) / np.log(bins)) + 2)]
    counts = np.histogram(values, edges)[0]
    return [f"    {low:>9,} … {high - 1:>9,} {n:>9,}  {'█' * round(40 * n / counts.max())}"
            for low, high, n in zip(edges, edges[1:], counts.tolist(), strict=False) if n]


def describe_split(dataset, split, tokenizer, limit, top):
    """Print what the split holds; all but the counts of meta.json is of its first `limit` tokens."""
    entry, eot = dataset.meta["splits"][split], dataset.meta["eot"]
    per_token = dataset.bytes_per_token(split)
    counted = ", ".join(f"{entry[k]:,} {k}" for k in ("documents", "tokens", "bytes") if entry[k] is not None)
    print(f"\n{split}: {counted} in {len(entry['files'])} file{'s' * (len(entry['files']) > 1)}"
          + (f"; {per_token:.3f} bytes per token" if per_token else ""))
    counts, seen = np.zeros(dataset.vocab_size, np.int64), 0
    for tokens in dataset.shards[split]:
        part = tokens[:limit - seen]
        if len(part) and part.max() >= dataset.vocab_size:
            raise DataError(f"{dataset.directory}: {split}: has the token id {part.max()}, beyond "
                            f"vocab_size={dataset.vocab_size} {dataset.remedy}")
        counts += np.bincount(part, minlength=dataset.vocab_size)
        seen += len(part)
    print(f"  of {seen:,} tokens looked at: {np.count_nonzero(counts):,} of {dataset.vocab_size:,} ids in use; the "
          "commonest:")
    for rank in np.argsort(-counts, kind="stable")[:top]:
        if counts[rank]:
            text = "⏹" if rank == eot else repr(tokenizer.decode([int(rank)])) if tokenizer else ""
            print(f"    {int(rank):>7} {text:<16} {counts[rank]:>11,}  {counts[rank] / seen:.2%}")
    if eot is None:
        return print("  documents: not separated")
    lengths, digests = [], collections.Counter()
    for document in documents(dataset.shards[split], eot, limit):
        lengths.append(len(document))
        digests[digest_of(document.tobytes())] += 1
    extra = sum(digests.values()) - len(digests)
    print(f"  documents: median {int(np.median(lengths)):,} tokens, longest {max(lengths):,}, {extra:,} duplicate, "
          f"{lengths.count(0):,} empty; by length in tokens:")
    print("\n".join(histogram([n for n in lengths if n] or [1], 4)))


def show_windows(dataset, tokenizer, block_size, n):
    """Print n windows of the train split, evenly apart, token by token."""
    windows, eot = SequenceReader(dataset, "train", block_size), dataset.meta["eot"]
    for number in np.linspace(0, windows.count - 1, min(n, windows.count)).astype(np.int64):
        x, _ = windows.read(np.array([number]))
        tokens = ("⏹" if i == eot else tokenizer.decode([i]) if tokenizer else str(i) for i in x[0].tolist())
        print(f"\nwindow {number:,} of {windows.count:,}:\n" + "|".join(tokens))


def main(argv):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="a folder under --data_dir")
    parser.add_argument("--data_dir", help="where datasets stand; None: data/ beside train.py")
    parser.add_argument("--tokenizer", help="of a folder of bare token files")
    parser.add_argument("--windows", type=int, default=3, help="windows to show")
    parser.add_argument("--block_size", type=int, default=64, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of each split to look at")
    parser.add_argument("--top", type=int, default=10, help="tokens to list, the commonest first")
    parser.add_argument("--verify", action="store_true", help="digest every file, however large")
    args = parser.parse_args(argv)
    for name, least in (("windows", 0), ("block_size", 1), ("tokens", 1), ("top", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: {getattr(args, name)} is out of range, must be at least {least}")
    sys.stdout.reconfigure(errors="replace")  # a corpus holds what it likes, not every terminal shows it
    dataset = open_dataset(args.dataset, args.data_dir, args.tokenizer)
    meta = dataset.meta
    tokenizer = from_meta(meta["tokenizer"])
    print(f"{dataset.directory}: {describe_tokenizer(meta['tokenizer'])}, vocabulary {meta['vocab_size']:,}, {meta['dtype']}, "
          f"from {meta['source']}\nfingerprint {dataset.fingerprint}")
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in meta["skipped"].items() if n)
    print(f"left out when it was made: {skipped or 'nothing'}")
    if args.verify:
        for name, entry in itertools.chain(*(meta["splits"][s]["files"].items() for s in SPLITS)):
            if sha256_of(dataset.directory / name) != entry["sha256"]:
                raise DataError(f"{dataset.directory / name}: is damaged: its sha256 is not the one in meta.json "
                                f"{dataset.remedy}")
        print("every file has the digest that meta.json says")
    for split in SPLITS:
        describe_split(dataset, split, tokenizer, args.tokens, args.top)
    show_windows(dataset, tokenizer, args.block_size, args.windows)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
