"""Token files to batches, each a pure function of (seed, step): nothing to save, nothing to replay on a resume.

A dataset is opened against its meta.json and memory-mapped. Training walks it in windows of block_size + 1
tokens, each of an epoch once, in an order that a keyed permutation computes on the spot. What a token means
is not known here.
"""

import collections
import concurrent.futures
import hashlib
import json
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blockgpt.data.prepare import SCHEMA_VERSION, dataset_dir, is_bare, not_prepared, prepare_command
from blockgpt.data.tokenizer import UNNAMED, describe, load_tokenizer
from blockgpt.data.writer import DTYPES, SPLITS, dtype_for
from blockgpt.errors import DataError
from blockgpt.files import sha256_of

VERIFY_BYTES = 2**30  # larger datasets are opened by size alone: their digests would take seconds at every start
COUNTED_TOKENS = 2**22  # of bare files, to learn the bytes of a token

META = {"schema_version": (int,), "tokenizer": (dict,), "vocab_size": (int,), "eot": (int, type(None)),
        "dtype": (str,), "source": (str,), "splits": (dict,), "skipped": (dict,)}
SPLIT = {"tokens": (int,), "bytes": (int,), "documents": (int,), "files": (dict,)}
FILE = {"sha256": (str,), "size": (int,)}


@dataclass(frozen=True)
class Dataset:
    """A dataset whose files are what its meta.json says.

    shards: {split: [1-d arrays of token ids, read-only]}. remedy: what to do if they turn out damaged after all.
    """

    name: str
    directory: Path
    meta: dict
    shards: dict
    remedy: str = ""

    @property
    def vocab_size(self):
        return self.meta["vocab_size"]

    @property
    def fingerprint(self):
        """Hex digest of what the batches depend on: every shard, the dtype, the vocabulary's size."""
        shards = {s: [f["sha256"] for _, f in sorted(self.meta["splits"][s]["files"].items())] for s in SPLITS}
        return hashlib.sha256(json.dumps([self.meta["dtype"], self.vocab_size, shards]).encode()).hexdigest()

    def tokens(self, split):
        """Tokens in a split, end-of-text tokens included."""
        return self.meta["splits"][split]["tokens"]

    def bytes_per_token(self, split):
        """UTF-8 bytes of text per token of the split, on average; bits per byte = bits per token / this.

        None where nobody counted them, as for bare token files.
        """
        held = self.meta["splits"][split]["bytes"]
        return None if held is None else held / self.tokens(split)


def open_dataset(dataset, data_dir=None, tokenizer=None, vocab_size=None):
    """Open `<data_dir>/<dataset>`, checked: a `Dataset`. data_dir None: data/ beside this file.

    tokenizer (as `load_tokenizer` takes it), vocab_size: what a folder of bare token files needs, of which the one or
    the other is enough; of other datasets the tokenizer must be the one that is named.
    `DataError` names the file at fault: absent, of another size or digest than meta.json says (the digests of a
    dataset up to VERIFY_BYTES), or with token ids beyond the vocabulary.
    """
    directory, remedy = dataset_dir(dataset, data_dir), f"(run {prepare_command(dataset, data_dir)} again)"
    if is_bare(directory):
        return open_bare(dataset, directory, load_tokenizer(tokenizer) if tokenizer else None, vocab_size)
    if not (directory / "meta.json").exists():
        raise not_prepared(dataset, data_dir)
    try:
        meta = read_meta(directory / "meta.json")
        if type(meta.get("command")) is str:  # of a dataset without a script of its own
            remedy = f"(run {meta['command']} again)"
        files = [(split, name, entry) for split in SPLITS for name, entry in meta["splits"][split]["files"].items()]
        verify = sum(entry["size"] for _, _, entry in files) <= VERIFY_BYTES
        shards = {split: [] for split in SPLITS}
        for split, name, entry in sorted(files, key=lambda file: file[1]):
            shards[split].append(open_shard(directory / name, entry, DTYPES[meta["dtype"]], meta["vocab_size"], verify))
    except DataError as error:
        raise DataError(f"{error} {remedy}") from None
    if tokenizer and load_tokenizer(tokenizer).to_meta() != meta["tokenizer"]:
        raise DataError(f"dataset {dataset!r} was made with the tokenizer {describe(meta['tokenizer'])}, not with "
                        f"{tokenizer} (drop --tokenizer, or prepare it again)")
    return Dataset(dataset, directory, meta, shards, remedy)


def open_bare(dataset, directory, tokenizer=None, vocab_size=None):
    """The `Dataset` of a train.bin and val.bin without a meta.json, as nanoGPT's prepare.py leaves them.

    Where the tokenizer is known its bytes are counted by decoding, or, beyond COUNTED_TOKENS, estimated from those.
    """
    if tokenizer is None and vocab_size is None:
        raise DataError(f"{directory}: has train.bin and val.bin and no meta.json: say what they hold, "
                        "--tokenizer=gpt2 or --vocab_size=N (python -m tools.convert_nanogpt_meta writes it down)")
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    dtype = DTYPES[dtype_for(vocab_size)]
    shards, splits = {}, {}
    for split in SPLITS:
        path = directory / f"{split}.bin"
        size = path.stat().st_size
        if not size or size % dtype.itemsize:
            raise DataError(f"{path}: has {size} bytes, which is no whole number of {dtype.name} tokens, at least one")
        entry = {"size": size, "sha256": sha256_of(path) if size <= VERIFY_BYTES else sha256_of_ends(path)}
        shards[split] = [open_shard(path, entry, dtype, vocab_size, verify=False)]
        if size <= VERIFY_BYTES:
            check_ids(shards[split][0], vocab_size, path, "(another --tokenizer or --vocab_size?)")
        splits[split] = {"tokens": size // dtype.itemsize, "bytes": None, "documents": 1,
                         "files": {path.name: entry}}
        if tokenizer:
            sample = shards[split][0][:COUNTED_TOKENS]
            held = len(tokenizer.decode(sample.tolist()).encode())
            splits[split]["bytes"] = round(held * splits[split]["tokens"] / len(sample))
    meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta() if tokenizer else {"name": UNNAMED},
            "vocab_size": vocab_size, "eot": tokenizer.eot if tokenizer else None, "dtype": dtype_for(vocab_size),
            "source": "token files without a meta.json", "splits": splits, "skipped": {}}
    return Dataset(dataset, directory, meta, shards, "(another --tokenizer or --vocab_size?)")


def sha256_of_ends(path, n=2**20):
    """Hex digest of a large file's size and first and last n bytes: what can be told of it at once."""
    with open(path, "rb") as file:
        size, head = file.seek(0, 2), file.seek(0) or file.read(n)
        file.seek(-n, 2)
        return hashlib.sha256(str(size).encode() + head + file.read(n)).hexdigest()


def read_meta(path):
    """The content of a meta.json; `DataError` if a field is absent or cannot be, alone or beside another."""
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON") from None
    version = meta.get("schema_version") if type(meta) is dict else SCHEMA_VERSION
    if type(version) is int and version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}")
    check_fields(path, "", meta, META)
    if meta["dtype"] not in DTYPES:
        raise DataError(f"{path}: dtype is {meta['dtype']!r}, not one of {', '.join(DTYPES)}")
    itemsize = DTYPES[meta["dtype"]].itemsize
    if meta["vocab_size"] < 1:
        raise DataError(f"{path}: vocab_size is {meta['vocab_size']}, must be at least 1")
    for split in SPLITS:
        where, entries = f"splits.{split}.", meta["splits"].get(split)
        check_fields(path, where, entries, SPLIT)
        for field in ("tokens", "bytes"):
            if entries[field] < 1:
                raise DataError(f"{path}: {where}{field} is {entries[field]}: the split is empty")
        for name, entry in entries["files"].items():
            if not re.fullmatch(rf"{split}[\w.-]*\.bin", name):
                raise DataError(f"{path}: {where}files: {name!r} is not the name of a {split}*.bin beside it")
            check_fields(path, f"{where}files.{name}.", entry, FILE)
            if entry["size"] % itemsize:
                raise DataError(f"{path}: {where}files.{name}.size is {entry['size']}, which is no whole number of "
                                f"{meta['dtype']} tokens")
        held = sum(entry["size"] for entry in entries["files"].values()) // itemsize
        if held != entries["tokens"]:
            raise DataError(f"{path}: {where}tokens is {entries['tokens']}, but its files hold {held} {meta['dtype']} "
                            "tokens")
    return meta


def check_fields(path, where, value, fields):
    """`DataError` unless `value` is an object that has every field of `fields` with one of its types."""
    if type(value) is not dict:
        raise DataError(f"{path}: {where.rstrip('.') or 'the whole'} is not an object")
    for name, types in fields.items():
        if name not in value:
            raise DataError(f"{path}: {where}{name} is missing")
        if type(value[name]) not in types:
            raise DataError(f"{path}: {where}{name} is {value[name]!r:.80}, not of type {types[0].__name__}")


def open_shard(path, entry, dtype, vocab_size, verify):
    """Memory-map one file of tokens after checking it against its entry in meta.json: 1-d array, read-only.

    verify: its digest and its ids too, which reads it.
    """
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise DataError(f"{path}: has {size} bytes, meta.json says {entry['size']}")
        if verify and sha256_of(path) != entry["sha256"]:
            raise DataError(f"{path}: is damaged: its sha256 is not the one in meta.json")
        tokens = mapped(path, dtype) if size else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if verify:
        check_ids(tokens, vocab_size, path)
    else:
        advise(tokens, "MADV_RANDOM")
    return tokens


def mapped(path, dtype):
    """A file as a 1-d array, read-only, of which only what is looked at is read."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def advise(tokens, pattern):
    """Tell the system, if it can be told, how a mapped file will be read.

    It reads ahead of what is looked at, which a window at a random place in a large file pays for a hundredfold.
    """
    mapping = getattr(tokens.base, "obj", None)  # numpy keeps a memoryview of it
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, pattern):
        mapping.madvise(getattr(mmap, pattern))


def check_ids(ids, vocab_size, where, remedy=""):
    """`DataError` if a token id lies beyond the vocabulary: an embedding would fail on it far from the cause."""
    if ids.size and ids.max() >= vocab_size:
        raise DataError(f"{where}: has the token id {ids.max()}, beyond vocab_size={vocab_size} {remedy}".rstrip())


class Windows:
    """The windows of block_size + 1 tokens of one split, numbered from 0 to `count` - 1 through its shards.

    They start at multiples of block_size, plus an offset: inputs do not overlap, and the last token of one window
    is the first of the next. None crosses from shard to shard. Each shard keeps `spare` tokens free for the offset
    (or has one window, and gives the offset the room there is); a shard too short has none.
    """

    def __init__(self, dataset, split, block_size, spare=0):
        shards = [tokens for tokens in dataset.shards[split] if len(tokens) > block_size]
        ends = np.cumsum([len(tokens) for tokens in dataset.shards[split]])
        self.before = [end - len(t) for end, t in zip(ends, dataset.shards[split], strict=True) if len(t) > block_size]
        if not shards:
            longest = max(map(len, dataset.shards[split])) - 1
            smaller = f"--block_size={longest} or smaller, or " if longest > 0 else ""
            raise DataError(f"block_size={block_size} is too long for the {split} split of dataset {dataset.name!r}, "
                            f"{dataset.tokens(split)} tokens ({smaller}more data)")
        self.dataset, self.split = dataset, split
        self.block_size = block_size
        self.views = [np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1) for tokens in shards]
        lengths = np.array([len(tokens) for tokens in shards])
        counts = np.maximum(1, (lengths - 1 - spare) // block_size)
        self.room = lengths - counts * block_size  # offsets that keep a shard's last window inside it: 0 … room - 1
        self.ends = np.cumsum(counts)
        self.firsts = self.ends - counts
        self.count = int(self.ends[-1])

    def locate(self, numbers, offset=0):
        """(shard, first token in it) of each of the windows, (B,) int64 each; the arguments are `read`'s."""
        shard = np.searchsorted(self.ends, numbers, side="right")
        return shard, (numbers - self.firsts[shard]) * self.block_size + offset % self.room[shard]

    def read(self, numbers, offset=0):
        """Inputs and targets of the windows `numbers` ((B,) int64): x, y, int64 tensors (B, block_size).

        offset: one for all, or one for each ((B,) int64), taken modulo the room in the window's shard.
        """
        shard, start = self.locate(numbers, offset)
        if len(self.views) == 1:
            ids = self.views[0][start]  # (B, block_size + 1)
        else:
            ids = np.empty((len(numbers), self.block_size + 1), self.views[0].dtype)
            for s in np.unique(shard):
                ids[shard == s] = self.views[s][start[shard == s]]
        check_ids(ids, self.dataset.vocab_size, f"{self.dataset.directory}: {self.split}", self.dataset.remedy)
        return torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))


class GlobalBatches:
    """The steps of a run out of its sequences, the same however many processes share them.

    A subclass has `sequences(k)`: the k-th sequences of the run, k (B,) int64, as x, y, int64 tensors (B, block_size);
    `n_targets(k)`: how many targets they hold; and `offsets(k)`: [(dataset, token of its train split)] where each
    begins. batch_size: sequences of a micro-batch;
    gradient_accumulation_steps: micro-batches of a step, over all processes.
    """

    def __init__(self, batch_size, gradient_accumulation_steps=1):
        self.batch_size, self.gradient_accumulation_steps = batch_size, gradient_accumulation_steps

    def micro_batch(self, step, micro_step=0, rank=0, world_size=1):
        """Process `rank`'s `micro_step`-th share of a step: x, y, int64 tensors (batch_size, block_size).

        The processes' shares make up the same global batch, micro-batch for micro-batch, however many they are.
        """
        return self.sequences(self.numbers(step, micro_step, rank, world_size))

    def numbers(self, step, micro_step=0, rank=0, world_size=1):
        """The numbers of the sequences of `micro_batch`, which takes the same arguments: (batch_size,) int64."""
        assert self.gradient_accumulation_steps % world_size == 0 and 0 <= rank < world_size and step >= 0
        assert 0 <= micro_step < self.gradient_accumulation_steps // world_size
        micro = step * self.gradient_accumulation_steps + micro_step * world_size + rank
        return np.arange(micro * self.batch_size, (micro + 1) * self.batch_size)

    def step_targets(self, step):
        """The targets of a step, over all processes."""
        sequences = self.batch_size * self.gradient_accumulation_steps
        return self.n_targets(np.arange(step * sequences, (step + 1) * sequences))


class TrainBatches(GlobalBatches):
    """The training sequences of a run: the k-th is a function of (seed, k) alone.

    Epoch e is k // n_windows. A permutation keyed by (seed, e) orders its windows; from the second epoch on they
    lie at an offset, also keyed, so that a token is not always predicted from the same place.
    `DataError` if no window of block_size + 1 tokens fits.
    """

    def __init__(self, dataset, seed, block_size, batch_size, gradient_accumulation_steps=1):
        super().__init__(batch_size, gradient_accumulation_steps)
        # Every epoch has as many windows as the first: the spare tokens are the room for any later offset.
        self.windows = Windows(dataset, "train", block_size, spare=block_size - 1)
        self.n_windows = self.windows.count
        self.seed_key = scramble(np.array([seed], np.uint64))

    def sequences(self, k):
        return self.windows.read(*self._windows(k))

    def _windows(self, k):
        """(window, offset) of each sequence, (B,) int64 each."""
        epoch, place = np.divmod(k, self.n_windows)
        key = scramble(self.seed_key + epoch.astype(np.uint64))
        offset = np.where(epoch == 0, 0, (scramble(~key) % self.windows.block_size).astype(np.int64))
        return permute(place, self.n_windows, key), offset

    def offsets(self, k):
        shard, start = self.windows.locate(*self._windows(k))
        name = self.windows.dataset.name
        return [(name, int(self.windows.before[s] + first)) for s, first in zip(shard, start, strict=True)]

    def n_targets(self, k):
        return len(k) * self.windows.block_size


def val_windows(dataset, block_size, eval_tokens=0):
    """The windows an evaluation reads: (`Windows` of the val split, their numbers as int64 array).

    They lie side by side or evenly apart over the whole split, and depend on nothing else: eval_tokens are rounded
    down to whole windows, at least one; 0, or more than there are, means all. The whole split is all but the
    fewer than block_size tokens left over at the end of a shard. `DataError` if no window fits.
    """
    windows = Windows(dataset, "val", block_size)
    n = max(1, eval_tokens // block_size) if eval_tokens else windows.count
    n = min(n, windows.count)
    return windows, (2 * np.arange(n) + 1) * windows.count // (2 * n)  # the middle of each n-th part


def val_batches(dataset, block_size, eval_tokens, batch_size, rank=0, world_size=1):
    """Iterate over process `rank`'s share of `val_windows`: x, y, int64 tensors (up to batch_size, block_size).

    Each window is read by exactly one process; shares differ by one window at most. All have as many batches, since a
    model that is parted computes on all processes at once: where a share is a window short of one, it is a window
    without targets (-1).
    """
    windows, numbers = val_windows(dataset, block_size, eval_tokens)
    mine = numbers[rank::world_size]

    def batch(first):
        if first < len(mine):
            return windows.read(mine[first:first + batch_size])
        x, y = windows.read(numbers[:1])
        return x, torch.full_like(y, -1)

    return map(batch, range(0, -(-len(numbers) // world_size), batch_size))


class Prefetch:
    """Batches read ahead by a thread, in the order in which `successor` says they will be asked for.

    read(key): a batch, by whatever names it. What is asked for out of turn is read then, and the order goes on from
    there, so that reading ahead changes nothing but when. Errors of `read` appear where its batch is asked for.
    """

    def __init__(self, read, successor, depth=4):
        self.read, self.successor, self.depth = read, successor, depth
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self.pending = collections.deque()  # (key, future), the next first

    def get(self, key):
        if not self.pending or self.pending[0][0] != key:
            while self.pending:
                self.pending.popleft()[1].cancel()
            self._submit(key)
        batch = self.pending.popleft()[1]
        while len(self.pending) < self.depth:
            self._submit(self.successor(self.pending[-1][0] if self.pending else key))
        return batch.result()

    def _submit(self, key):
        self.pending.append((key, self.thread.submit(self.read, key)))


def pinned(batch):
    """The batch in memory from which a GPU copies by itself."""
    return tuple(t.pin_memory() for t in batch)


def to_device(batch, device):
    """The tensors of a batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
    if torch.device(device).type == "cuda":
        return tuple(t.to(device, non_blocking=True) for t in pinned(batch))
    return tuple(t.to(device) for t in batch)


def scramble(x):
    """uint64 array -> uint64 array, a bijection that looks random: SplitMix64 (Steele et al. 2014). Wraps by design."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def permute(index, n, key):
    """Where a permutation of 0 … n - 1 sends each index. index (B,) int64, key (B,) uint64 -> (B,) int64.

    A Feistel network on the rectangle a × b, a = ⌈√n⌉, b = ⌈n / a⌉ (Black & Rogaway 2002): each round adds to one
    coordinate, modulo its side, a hash of the other, so it can be undone. A result that falls on one of the fewer
    than a cells beyond n walks on until it does not, which happens in no memory and nearly no time.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def network(x):
        left, right = x // b, x % b
        for r in range(0, 6, 2):  # `>> 32` keeps the sum from wrapping, which would not be a bijection modulo a
            left = (left + (scramble(key + right + (r << 48)) >> 32)) % a
            right = (right + (scramble(key + left + (r + 1 << 48)) >> 32)) % b
        return left * b + right

    x = network(index.astype(np.uint64))
    while (beyond := x >= n).any():
        x = np.where(beyond, network(x), x)
    return x.astype(np.int64)
